"""Cases for ranks_worker.py, run by any number of processes, and their expected results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family
from tests.support.processes.launching import torchrun
from tests.support.processes.ranks_worker import NEW_TOKENS, Result
from tests.support.tolerances import CLOSE, RETAIN

WORKER = Path(__file__).parent / "ranks_worker.py"
Case = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A model, and the cases it goes through one after the other."""

    built: Family
    cases: list[Case]
    plan: Any = "auto"


def run(folder: Path, processes: int, *parts: Part) -> list[dict[str, Result]]:
    """What every rank found in every case; one start, which costs each process ten seconds."""
    listed = []
    for number, part in enumerate(parts):
        saved = folder / f"model_{number}"
        part.built.model.save_pretrained(saved)
        for variant in {case["inputs"] for case in part.cases if "inputs" in case}:
            torch.save(prompt(part.built, variant), saved / f"{variant}.pt")
        cases = [in_folder(case, folder) for case in part.cases]
        listed.append({"model": str(saved), "plan": part.plan, "cases": cases})
    (folder / "cases.json").write_text(json.dumps(listed))
    torchrun(processes, str(WORKER), str(folder))
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(processes)]


def in_folder(case: Case, folder: Path) -> Case:
    """The case with its dump, if it writes one, in the folder of the run."""
    options = dict(case.get("options", {}))
    if "dump" in options:
        options["dump"] = str(folder / options["dump"])
    return {**case, "options": options}


def prompt(built: Family, variant: str) -> dict[str, Any]:
    inputs = built.make_inputs(variant)
    if variant == "one":
        inputs.pop("attention_mask")
    return inputs


def case(do: str, inputs: str = "one", name: str = "", **options: Any) -> Case:
    layout = {"one": "layered", "pad2": "uniform"}[inputs]
    given = {"kv_layout": layout, **options}
    return {"name": name or f"{do} {inputs}", "do": do, "inputs": inputs, "options": given}


def check_generated(
    built: Family, variant: str, results: list[Result], *, shared: int = 1, steps: int = NEW_TOKENS
) -> None:
    """Tokens, logits and cache lengths of every rank are those of one process.

    shared: ranks that hold each key head.  steps: tokens that were written.
    """
    layout: hooked.KvLayout = "layered" if variant == "one" else "uniform"
    inputs = prompt(built, variant)
    oracle = hooked.pruned_generate(
        built.model, inputs, retain=RETAIN, max_new_tokens=steps, kv_layout=layout
    )
    heads = built.model.config.get_text_config().num_key_value_heads
    for result in results:
        assert result["kinds"] == ["Pruned"], result["because"]
        assert result["tokens"].tolist() == oracle.token_ids.tolist()
        torch.testing.assert_close(result["logits"], oracle.logits, **CLOSE)
        assert [shape[2] for shape in result["caches"]] == oracle.kv_lengths
        assert {shape[1] for shape in result["caches"]} == {heads * shared // len(results)}


def check_forwarded(built: Family, variant: str, results: list[Result]) -> None:
    layout: hooked.KvLayout = "layered" if variant == "one" else "uniform"
    oracle = hooked.pruned_forward(
        built.model, prompt(built, variant), retain=RETAIN, kv_layout=layout
    )
    for result in results:
        # Some models' forwards dynamo breaks between the merge and the decoder.
        assert result["kinds"] in (["Pruned"], ["ReturnsMask", "Pruned"]), result["because"]
        torch.testing.assert_close(result["logits"], oracle.logits, **CLOSE)
        assert [shape[2] for shape in result["caches"]] == oracle.kv_lengths


def unpruned(built: Family, variant: str = "one") -> torch.Tensor:
    return hooked.unpruned_forward(built.model, prompt(built, variant)).logits
