"""Every rewriting pass on one tiny graph, against its text in this folder.

``UPDATE_GOLDEN=1 python -m pytest tests/passes/golden`` rewrites the files; read their diff.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

from dartfx import passes
from dartfx.passes.frontend.canonicalise import canonicalise
from dartfx.passes.frontend.causal_windows import fold_windows, unfold_windows
from dartfx.passes.frontend.expand_vmap import expand_vmap
from dartfx.passes.frontend.exported import import_exported
from dartfx.passes.frontend.fix_windows import fix_windows
from dartfx.passes.frontend.inline_higher_order import inline_higher_order
from dartfx.passes.frontend.normalise import example_values, normalise
from dartfx.passes.frontend.unwrap_subclasses import unwrap_subclasses
from dartfx.passes.graph import fake_mode
from dartfx.passes.transform.inline_ops import inline_ops
from dartfx.passes.transform.outline_layers import outline_layers
from dartfx.passes.transform.restore_checkpoints import restore_checkpoints
from dartfx.passes.transform.return_mask import return_vision_mask
from tests.passes.golden.decoder import Decoder, Layer, Layers
from tests.passes.golden.graph_text import dynamo_graph, marked, renamed, render
from tests.passes.golden.rank_graphs import local_tensors, synced_selection

FOLDER = Path(__file__).parent
GOLDEN: dict[str, Callable[[], str]] = {}


def golden(*names: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register what makes the text of these files, from the file's name where there are several."""

    def register(function: Callable[..., str]) -> Callable[..., str]:
        for name in names:
            GOLDEN[name] = (lambda n=name: function(n)) if len(names) > 1 else function
        return function

    return register


def traced(function: Callable[..., Any], *args: Any) -> GraphModule:
    return make_fx(function, tracing_mode="symbolic", pre_dispatch=True)(*args)


# --- frontend ---------------------------------------------------------------------------------


@golden("normalise")
def _normalise() -> str:
    norm = nn.LayerNorm(8).requires_grad_(False)

    def block(x: Tensor) -> Tensor:
        return x + norm(x.to(torch.float32)).relu()

    module = dynamo_graph(block, torch.rand(1, 6, 8), symbolic=[(0, 1)])
    text = f"dynamo:\n{render(module.graph)}\nATen:\n{render(normalise(module).graph)}"
    return renamed(text, "S")


@golden("canonicalise_packed_rows")
def _packed_rows() -> str:
    def deepstack(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return x.index_put((mask,), x[mask] + rows)

    mask = torch.tensor([[False, True, True, False, True, False]])
    module = traced(deepstack, torch.rand(1, 6, 8), mask, torch.rand(3, 8))
    before = render(module.graph)
    canonicalise(module.graph)
    return renamed(marked(before, render(module.graph)), "S", "D", "N")


@golden("canonicalise_inverse_permutation")
def _inverse_permutation() -> str:
    def routing(experts: Tensor) -> Tensor:
        order = experts.argsort()
        return torch.empty_like(order).index_put((order,), torch.arange(len(order)))

    module = traced(routing, torch.tensor([2, 0, 1, 0, 2, 1]))
    before = render(module.graph)
    canonicalise(module.graph)
    return marked(before, render(module.graph))


@golden("fix_windows")
def _fix_windows() -> str:
    texts = []

    def backend(module: GraphModule, _: Any) -> Callable[..., Any]:
        for fix in (False, True):  # fixing installs a guard, so the graph without comes first
            if fix:
                fix_windows(module.graph)
            texts.append(render(normalise(module).graph))
        return module.forward

    def tail(keys: Tensor, window: int) -> Tensor:
        return keys[:, :, -window + 1 :]

    torch.compile(tail, backend=backend, dynamic=True, fullgraph=True)(torch.rand(1, 2, 9, 4), 6)
    return renamed(marked(*texts), "W", "H", "S", "D")


@golden("expand_vmap")
def _expand_vmap() -> str:
    def causal(positions: Tensor) -> Tensor:
        see = lambda q, k: q >= k  # noqa: E731  as a mask function of transformers is
        return torch.vmap(torch.vmap(see, (None, 0)), (0, None))(positions, positions)

    module = dynamo_graph(causal, torch.arange(6), symbolic=[(0, 0)])
    examples = example_values(module)
    with examples[-1].fake_mode:
        expanded = expand_vmap(module, examples)
    inside = render(expanded.get_submodule("vmap_0").graph)
    around = marked(render(module.graph), render(expanded.graph))
    return renamed(f"{around}\nvmap_0:\n{inside}", "S")


@golden("inline_higher_order", "restore_checkpoints")
def _checkpoints(name: str) -> str:
    def block(x: Tensor) -> Tensor:
        return checkpoint(lambda y: (y.sin() * 2).relu(), x, use_reentrant=False)

    module = dynamo_graph(block, torch.rand(6, 8, requires_grad=True), symbolic=[(0, 0)])
    if name == "inline_higher_order":
        inlined = inline_higher_order(module)
        return renamed(marked(render(module.graph), render(inlined.graph)), "S")
    inlined = normalise(module)
    before = render(inlined.graph)
    restore_checkpoints(inlined)
    return renamed(marked(before, render(inlined.graph)), "S")


@golden("unwrap_subclasses")
def _unwrap_subclasses() -> str:
    weight = TwoTensor(torch.rand(8, 8), torch.rand(8, 8))
    with torch.no_grad():
        module = dynamo_graph(lambda x: x @ weight, torch.rand(6, 8), symbolic=[(0, 0)])
        plain = unwrap_subclasses(module)
    assert plain is not None
    return renamed(marked(render(module.graph), render(plain.module.graph)), "S")


@golden("causal_windows")
def _causal_windows() -> str:
    conv = nn.Conv1d(4, 4, 3, groups=4, padding=2, bias=False).requires_grad_(False)
    x = torch.rand(1, 4, 6)
    module = normalise(dynamo_graph(lambda x: conv(x)[:, :, : x.shape[2]], x, symbolic=[(0, 2)]))
    texts = [render(module.graph)]
    for step in (fold_windows, unfold_windows):
        step(module.graph)
        texts.append(render(module.graph))
    assert texts[2].count("aten.conv1d") == 1
    return renamed(marked(*texts[:2]), "S")


@golden("exported")
def _exported() -> str:
    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                angle = x.to(torch.float32).cos()
            return x * angle

    x = torch.rand(1, 6, 8, requires_grad=True)
    shapes = ({1: torch.export.Dim("length", min=2, max=64)},)
    module = torch.export.export(Block(), (x,), dynamic_shapes=shapes).graph_module
    return renamed(marked(render(module.graph), render(import_exported(module, ()).graph)), "S")


# --- transform --------------------------------------------------------------------------------


STEPS = ("insert_selection", "gather_frontier", "shrink_sizes", "trim_kv_cache", "check_shapes")


@cache
def pruning(continued: bool = False, **options: bool) -> list[str]:
    """The decoder after each step of a cut before layer 1, from "locate" on; R = 4.

    continued: on a cache of three earlier tokens.  options: of the request.
    """
    args = (4, 4, "dart", "torch")
    select = passes.ByOperator(torch.ops.dartfx.select_tokens.default, args, reads="norms")
    stages = (passes.Stage(1, lambda n: 4, select),)
    request = passes.Request(stages, "uniform", gathers_decode_mask=True, **options)
    texts: list[str] = []

    def observe(name: str, module: GraphModule, site: object = None) -> None:
        texts.append(render(module.graph))

    ids = torch.tensor([[2, 3, 1, 1, 1, 1, 1, 1, 1, 4, 5]])
    with torch.no_grad():
        past = [torch.rand(1, 2, 3, 4)] if continued else []
        inputs = ids, torch.rand(7, 8), *past
        dynamo = dynamo_graph(Decoder().eval(), *inputs, symbolic=[(0, 1), (1, 0)])
        module = normalise(dynamo)
    outcome = passes.prune(module, request, observe=observe)
    assert isinstance(outcome, passes.Pruned), outcome
    return texts


def test_planning_changes_nothing() -> None:
    located, axes, *_ = pruning()
    assert located == axes


@golden(*STEPS, "merge_dropped")
def _step(name: str) -> str:
    merge = name not in STEPS
    before, after = pruning(merge=merge)[1:][2 if merge else STEPS.index(name) :][:2]
    return renamed(marked(before, after), "S", "N").replace("S - N + Min(4, N)", "S'")


@golden("calibrate")
def _calibrate() -> str:
    before, after = pruning(calibrate=True)[-2:]
    return renamed(marked(before, after), "S", "N").replace("S - N + Min(4, N)", "S'")


@golden("selection_inputs")
def _selection_inputs() -> str:
    before, after = pruning(continued=True)[1:3]
    return renamed(marked(before, after), "S", "N").replace("S - N + Min(4, N)", "S'")


@golden("return_mask")
def _return_mask() -> str:
    def merge(ids: Tensor, embeds: Tensor, features: Tensor) -> Tensor:
        return embeds.masked_scatter((ids == 1)[..., None], features)

    ids = torch.tensor([[2, 1, 1, 1, 3, 4]])
    inputs = ids, torch.rand(1, 6, 8), torch.rand(3, 8)
    module = normalise(dynamo_graph(merge, *inputs, symbolic=[(0, 1), (1, 1), (2, 0)]))
    before = render(module.graph)
    assert return_vision_mask(module) == 0
    return renamed(marked(before, render(module.graph)), "S", "N")


@golden("inline_ops")
def _inline_ops() -> str:
    module = traced(lambda x: torch.nn.functional.silu(x) + 1, torch.rand(1, 6, 8))
    before = render(module.graph)
    inline_ops(module, {torch.ops.aten.silu.default: lambda x: x * x.sigmoid()})
    assert fake_mode(module.graph)
    return renamed(marked(before, render(module.graph)), "S", "D")


@golden("outline_layers")
def _outline_layers() -> str:
    inputs = torch.rand(1, 6, 8), torch.rand(1, 6, 4)
    module = normalise(dynamo_graph(Layers([Layer(), Layer()]), *inputs, symbolic=[(0, 1), (1, 1)]))
    outlined: Any = outline_layers(module)
    around = marked(render(module.graph), render(outlined.module.graph))
    return renamed(f"{around}\nlayers_0:\n{render(outlined.module.layers_0.graph)}", "S")


# --- distributed ------------------------------------------------------------------------------


@golden("to_local_tensors")
def _to_local_tensors() -> str:
    return marked(*map(render, local_tensors(dynamo_graph)))


@golden("sync_selection")
def _sync_selection() -> str:
    return marked(*map(render, synced_selection()))


# --- the texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_the_graph_is_as_its_golden_text(name: str) -> None:
    file, found = FOLDER / f"{name}.txt", GOLDEN[name]()
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(found)
    wanted = file.read_text() if file.exists() else ""
    assert found == wanted, "if the pass should do this, run with UPDATE_GOLDEN=1 and read the diff"


def test_no_golden_text_is_left_over() -> None:
    assert {file.stem for file in FOLDER.glob("*.txt")} == set(GOLDEN)
