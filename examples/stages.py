"""Prune in several stages: the deeper the layer, the fewer vision tokens.

A single early cut must be conservative, because no later layer sees what it drops.
Stages spread the same saving: half of the tokens are dropped early, half of the rest later, etc.
"""

from __future__ import annotations

import torch
from own_selection import model_and_inputs

import dartfx
from dartfx.passes import Pruned

STAGES = {"layer": [1, 2, 4], "retain_tokens": [72, 36, 18]}
ONE_CUT = {"layer": 2, "retain_tokens": 36}


def pruned_with(**options: object) -> Pruned:
    """Generate four tokens with these options; returns the prefill's outcome."""
    model, inputs = model_and_inputs()
    dartfx.reset()
    torch._dynamo.reset()
    dartfx.compile(model, **options)
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    (outcome,) = (r.outcome for r in dartfx.reports() if isinstance(r.outcome, Pruned))
    return outcome


def main(**options: object) -> list[Pruned]:
    """Compare one cut with three; returns the outcome of each."""
    found = []
    for budgets in (ONE_CUT, STAGES):
        pruned = pruned_with(**budgets, **options)
        found.append(pruned)
        for cut in pruned.cuts:
            before, after = cut.sequence
            print(f"before layer {cut.layer}: {before} -> {after} tokens")
        saved, cached = pruned.flops[0] / pruned.flops[1], pruned.kv_bytes[0] / pruned.kv_bytes[1]
        print(f"  decoder FLOPs {saved:.2f}x fewer, KV cache {cached:.2f}x smaller\n")
    return found


if __name__ == "__main__":
    main()
