"""The table "what kv_layout trades" of generate.md: ``python docs/kv_layouts.py`` prints it.

A small LLaVA of three layers, cut before the last one, four greedy tokens on the CPU.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor

import dartfx
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.registry import load

RETAIN, STEPS = 6, 4


def main() -> None:
    """Print a row for each layout."""
    torch.manual_seed(0)
    family = load("llava", layers=3)
    batch = family.make_inputs("pad2")
    alone = {name: value for name, value in family.make_inputs().items() if "mask" not in name}
    row = {name: value for name, value in family.row(batch, 0).items() if "mask" not in name}
    how: Any = {"retain": RETAIN, "max_new_tokens": STEPS, "kv_layout": "layered"}
    paper = hooked.pruned_generate(family.model, alone, **how).logits
    rows = [
        "| layout | bytes | from the paper's layout | a row alone and in a batch |",
        "|---|---|---|---|",
    ]
    for layout in ("uniform", "layered"):
        options: dict[str, Any] = {"retain_tokens": RETAIN, "lowering": "eager"}
        options |= {"on_unsupported": "error"}
        model = dartfx.compile(copy.deepcopy(family.model), kv_layout=layout, **options)
        logits, cache = _decoded(model, alone)
        off = (logits - paper).abs().max()
        try:
            together = _decoded(model, batch)[0][:1]
            apart = f"{(_decoded(model, row)[0] - together).abs().max():.1e}"
        except dartfx.UnsupportedGraphError:
            apart = "a batch is refused"
        rows.append(f"| {layout} | {_bytes(cache)} | {off:.1e} | {apart} |")
    sys.stdout.write("\n".join(rows) + "\n")


def _decoded(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    settings = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
    made = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return torch.stack(made.logits, 1), made.past_key_values


def _bytes(cache: Any) -> int:
    return sum(
        t.untyped_storage().nbytes() for each in cache.layers for t in (each.keys, each.values)
    )


if __name__ == "__main__":
    main()
