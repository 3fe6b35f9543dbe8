"""What every rank of a tensor-parallel test runs: python -m torch.distributed.run ... DIR.

DIR holds ``cases.json``: folders of models and of the prompts for them, each with its plan and a
list of cases.  Every rank writes what it found to ``rank_N.pt``, after each case: a test also sees
how far a rank came.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers.distributed import DistributedConfig

import dartfx
from dartfx.passes import pipeline
from dartfx.passes.distributed import to_local_tensors
from dartfx.passes.outcome import Pruned
from dartfx.passes.transform import return_mask
from dartfx.runtime import rank_agreement, vision_mask

NEW_TOKENS = 3
Result = dict[str, Any]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Result] = {}
    for part in json.loads((folder / "cases.json").read_text()):
        saved = Path(part["model"])
        config = DistributedConfig(tp_plan=part["plan"])
        model: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            saved, distributed_config=config
        ).eval()
        for case in part["cases"]:
            inputs = torch.load(saved / f"{case['inputs']}.pt") if "inputs" in case else {}
            found[case["name"]] = tried(model, inputs, case)
            torch.save(found, folder / f"rank_{dist.get_rank()}.pt")
    dist.destroy_process_group()


def tried(model: Any, inputs: Result, case: Result) -> Result:
    """One case, from a state without anything of the one before it."""
    torch.compiler.reset()
    dartfx.reset()
    vision_mask.clear()
    model._compiled_call_impl = None
    try:
        result = CASES[case["do"]](model, inputs, case.get("options", {}))
    except (dartfx.DartfxError, RuntimeError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    return {**result, **reported()}


def reported() -> Result:
    """What the reports say, as plain data."""
    kinds = [type(r.outcome).__name__ for r in dartfx.reports()]
    pruned = [r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned)]
    across = [cut.across for outcome in pruned for cut in outcome.cuts]
    return {
        "kinds": [k for k in kinds if k != "Unchanged"],
        "how": [a and a.how for a in across],
        "because": [str(r.outcome) for r in dartfx.reports()],
    }


def options(given: Result) -> Result:
    return {"retain_tokens": 6, "lowering": "eager", "on_unsupported": "ignore", **given}


def generate(model: Any, inputs: Result, given: Result) -> Result:
    steps = given.pop("steps", NEW_TOKENS)
    if given.pop("plain", False):
        model._compiled_call_impl = None
    else:
        dartfx.compile(model, **options(given))
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return {
        "tokens": out.sequences[:, -steps:],
        "logits": torch.stack(out.logits, 1),
        "caches": [tuple(layer.keys.shape) for layer in out.past_key_values.layers],
    }


def forward(model: Any, inputs: Result, given: Result) -> Result:
    dartfx.compile(model, **options(given))
    with torch.no_grad():
        out = model(**inputs, use_cache=True)
    return {
        "logits": out.logits,
        "caches": [tuple(layer.keys.shape) for layer in out.past_key_values.layers],
    }


def in_several_graphs(model: Any, inputs: Result, given: Result) -> Result:
    """A plain forward under bare torch.compile, broken between the merge and the decoder, twice."""
    decoder = model.get_decoder()
    own = decoder.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        torch._dynamo.graph_break()
        return own(*args, **kwargs)

    with mock.patch.object(decoder, "forward", broken), torch.no_grad():
        compiled = torch.compile(model, backend="dart", options=options(given))
        compiled(**inputs)
        return {"logits": compiled(**inputs).logits}


def with_gradients(model: Any, inputs: Result, given: Result) -> Result:
    compiled = torch.compile(model, backend="dart", options=options(given))
    return {"logits": compiled(**inputs).logits.detach()}


@contextlib.contextmanager
def failing(module: Any, name: str, rank: int) -> Iterator[None]:
    """A bug in a pass, on one rank only."""
    if dist.get_rank() != rank:
        yield
        return
    with mock.patch.object(module, name, side_effect=RuntimeError("injected")):
        yield


def one_rank_fails(model: Any, inputs: Result, given: Result) -> Result:
    with failing(pipeline, "gather_frontier", given.pop("rank")):
        return generate(model, inputs, given)


def one_rank_cannot_trace_local_tensors(model: Any, inputs: Result, given: Result) -> Result:
    with failing(to_local_tensors, "make_fx", given.pop("rank")):
        return generate(model, inputs, given)


def one_rank_fails_in_several_graphs(model: Any, inputs: Result, given: Result) -> Result:
    with failing(pipeline, "gather_frontier", given.pop("rank")):
        return in_several_graphs(model, inputs, given)


def one_rank_does_not_return_the_mask(model: Any, inputs: Result, given: Result) -> Result:
    with failing(return_mask, "vision_mask", given.pop("rank")):
        return in_several_graphs(model, inputs, given)


def other_prompt_on_rank_1(model: Any, inputs: Result, given: Result) -> Result:
    """Ranks that are not given the same: what tensor parallelism takes for granted."""
    if dist.get_rank() == 1:
        ids = inputs["input_ids"]
        inputs["input_ids"] = torch.where(ids < 100, ids + 1, ids)
        inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    return generate(model, inputs, given)


def own_seed(model: Any, inputs: Result, given: Result) -> Result:
    torch.manual_seed(dist.get_rank() if given.pop("differ") else 0)
    return generate(model, inputs, given)


def no_answer(model: Any, inputs: Result, given: Result) -> Result:
    """Rank 1 compiles nothing while rank 0 waits to hear of it."""
    if dist.get_rank() == 1:
        time.sleep(4)
        return {}
    with mock.patch.dict(os.environ, {rank_agreement.TIMEOUT_VARIABLE: "2"}):
        rank_agreement._exchange(dist.group.WORLD.group_name, "here")
    return {}


def by_heads(
    hidden: Tensor,
    keys: Tensor,
    vision_mask: Tensor,
    text_mask: Tensor,
    budget: Tensor,
    **pivots: Any,
) -> Tensor:
    """Vision tokens with the largest product of head norms, weighted by the head's number."""
    weights = torch.arange(1, keys.shape[1] + 1, dtype=torch.float32)[None, :, None]
    scores = (keys.norm(dim=3) ** weights).prod(1)
    ranked = torch.where(vision_mask, scores, -1.0).argsort(1, descending=True)
    place = torch.arange(ranked.shape[1]).expand_as(ranked)
    return vision_mask & torch.zeros_like(vision_mask).scatter(1, ranked, place < budget[:, None])


dartfx.register_selector("by_heads")(by_heads)

CASES: dict[str, Callable[[Any, Result, Result], Result]] = {
    f.__name__: f
    for f in (
        generate,
        forward,
        in_several_graphs,
        with_gradients,
        one_rank_fails,
        one_rank_cannot_trace_local_tensors,
        one_rank_fails_in_several_graphs,
        one_rank_does_not_return_the_mask,
        other_prompt_on_rank_1,
        own_seed,
        no_answer,
    )
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
