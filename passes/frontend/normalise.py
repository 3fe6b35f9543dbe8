"""Dynamo's graph -> pre-dispatch ATen, the one IR that every later pass reads.

Before, as dynamo writes it; parameters are inputs, and only some nodes have values::

    l_x_: f32[1, S, 8] = input
    to: f32[1, S, 8] = Tensor.to(l_x_, f32)
    layer_norm: f32[1, S, 8] = layer_norm(to, (8), ...)
    relu: f32[1, S, 8] = Tensor.relu(layer_norm)
    add: f32[1, S, 8] = add(l_x_, relu)

After; the conversion that converted nothing is gone::

    arg1_1: f32[1, S, 8] = input
    layer_norm: f32[1, S, 8] = aten.layer_norm(arg1_1, [8], arg2_1, arg3_1)
    relu: f32[1, S, 8] = aten.relu(layer_norm)
    add: f32[1, S, 8] = aten.add.Tensor(arg1_1, relu)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
import torch.fx.traceback
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from dartfx import compat
from dartfx.passes.casting import interpreter, note_autocast
from dartfx.passes.frontend.canonicalise import canonicalise
from dartfx.passes.frontend.expand_vmap import expand_vmap
from dartfx.passes.frontend.inline_higher_order import CHECKPOINTS, inline_higher_order
from dartfx.passes.graph import argument, aten, expr, hint, packet, tensor
from dartfx.passes.internal_error import REPORT_IT, describe
from dartfx.passes.refusal import Refusal

# Under this key inputs carry where they come from, which only dynamo's own nodes have as attribute.
SOURCE = "dartfx_source"


def normalise(
    module: GraphModule, examples: Sequence[Any] | None = None, extra: Sequence[Any] = ()
) -> GraphModule:
    """Re-trace a dynamo graph into pre-dispatch ATen with fake values on every node.

    examples: fake inputs; by default dynamo's own, so sizes it holds symbolic stay symbolic.
    extra: values of placeholders to add in front, which later passes may use: fake ones of the
    graph's own mode, or tensors that stand for any of their shape.
    Parameters stay placeholders, SDPA stays one call, and each node keeps its module path and
    source line.  Raises Refusal when the graph cannot be re-traced (an operator without a fake
    implementation).
    """
    module = inline_higher_order(module)
    examples = example_values(module) if examples is None else examples
    mode = _fake_mode(examples)
    extra = [_fake(mode, value) for value in extra]
    _require_own_gradients(module.graph)

    def run(*args: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return interpreter(source).run(*args[len(extra) :])

    start = time.perf_counter()
    try:
        with mode, torch.no_grad(), _fresh_symbols_ignored(mode):
            source = expand_vmap(module, examples)
            traced = make_fx(run, pre_dispatch=True)(*extra, *examples)
        _copy_input_notes(module.graph, traced.graph, len(extra))
        note_autocast(traced.graph)
        drop_aliases(traced.graph)
        canonicalise(traced.graph)
    except Exception as error:  # any operator may fail here, each in its own way
        raise Refusal(
            f"the graph could not be re-traced to ATen: {describe(error)}", advice=REPORT_IT
        ) from error
    traced.recompile()
    noted = {CHECKPOINTS: module.meta.get(CHECKPOINTS, [])}
    traced.meta |= {"seconds": time.perf_counter() - start, **noted}
    return traced


def _fake(mode: compat.FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, compat.FakeTensor):
        return value
    return mode.from_tensor(value, static_shapes=True)


def _copy_input_notes(old: Graph, new: Graph, extra: int) -> None:
    """Dynamo's notes on each input: whether it is a parameter or buffer, and where it is from."""
    inputs, traced = ([n for n in g.nodes if n.op == "placeholder"] for g in (old, new))
    for one, other in zip(inputs, traced[extra:], strict=True):
        other.meta["tensor_dict"] = one.meta.get("tensor_dict", {})
        other.meta[SOURCE] = one.meta.get(SOURCE)


def _require_own_gradients(graph: Graph) -> None:
    """Raise Refusal for a function with a custom backward, which a re-trace would lose.

    Dynamo leaves it as a call only where gradients are computed.
    """
    for node in graph.nodes:
        if node.target is compat.autograd_function_apply:
            raise Refusal(
                "a torch.autograd.Function with its own backward is in a graph that computes "
                "gradients",
                node,
                advice="torch.no_grad() or torch.inference_mode() around the call",
            )


def drop_aliases(graph: Graph) -> None:
    """Remove conversions that convert nothing, and dropout where it drops nothing.

    They return their operand itself, so the tracer took each for the origin of every later use:
    a hidden state would seem to come from the norm that reads it.
    """
    for node in list(graph.nodes):
        kind = packet(node)
        may_be = kind in (aten.to, aten.type_as) or (
            kind is aten.dropout and not argument(node, "train")
        )
        source = argument(node, "self", argument(node, "input")) if may_be else None
        if not isinstance(source, Node) or argument(node, "copy"):
            continue
        old, new = tensor(source), tensor(node)
        if old is None or new is None or argument(node, "memory_format") is not None:
            continue
        if (old.dtype, old.device) == (new.dtype, new.device):
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def example_values(module: GraphModule) -> list[Any]:
    """Dynamo's fake value (or SymInt) of each placeholder."""
    return [n.meta.get("example_value") for n in module.graph.nodes if n.op == "placeholder"]


def with_own_symbols(examples: Sequence[Any]) -> list[Any]:
    """The same fake inputs in a separate fake mode, with separate symbols.

    What is decided on these installs no guard in the compilation they came from.
    """
    mode = compat.FakeTensorMode(shape_env=ShapeEnv())
    assert mode.shape_env is not None
    symbols: dict[sympy.Symbol, sympy.Expr] = {}

    def size(old: Any) -> Any:
        if type(old) is int or not isinstance(old, torch.SymInt):
            return old
        if expr(old).is_Integer:
            return int(expr(old))  # dynamo fixed the symbol by a guard meanwhile
        for symbol in sorted(expr(old).free_symbols, key=str):
            if symbol not in symbols:
                example = hint(old) if symbol == expr(old) else 2 + len(symbols)
                symbols[symbol] = expr(fresh_size(mode, example))
        return _sym_int(mode, expr(old).xreplace(symbols), hint(old))

    def value(old: Any) -> Any:
        if not isinstance(old, torch.Tensor):
            return size(old)
        with mode:
            return torch.empty_strided(
                [size(s) for s in old.shape],
                [size(s) for s in old.stride()],
                dtype=old.dtype,
                device=old.device,
            )

    # Bare symbols first: their example is what dynamo saw.
    bare = [e for e in examples if isinstance(e, torch.SymInt) and expr(e).is_Symbol]
    for symbol in bare:
        size(symbol)
    return [value(e) for e in examples]


def fresh_size(mode: compat.FakeTensorMode, example: int) -> torch.SymInt:
    """A new symbolic size with this example value."""
    shape_env = mode.shape_env
    assert shape_env is not None
    source = compat.ConstantSource(f"dartfx_size_{len(shape_env.var_to_range)}")
    symbol = shape_env.create_symbol(example, source, dynamic_dim=DimDynamic.DYNAMIC)
    return _sym_int(mode, symbol, example, source)


def _sym_int(
    mode: compat.FakeTensorMode, value: Any, example: int, source: Any = None
) -> torch.SymInt:
    assert mode.shape_env is not None
    result = mode.shape_env.create_symintnode(value, hint=example, source=source)
    assert isinstance(result, torch.SymInt)
    return result


def _fake_mode(examples: Sequence[object]) -> compat.FakeTensorMode:
    for value in examples:
        if isinstance(value, compat.FakeTensor):
            return value.fake_mode
    raise Refusal("the graph's inputs carry no fake tensors")


@contextlib.contextmanager
def _fresh_symbols_ignored(mode: compat.FakeTensorMode) -> Iterator[None]:
    # ``.item()`` in the graph makes new unbacked symbols at every trace; dynamo bound its own.
    if mode.shape_env is None:
        yield
    else:
        with mode.shape_env.ignore_fresh_unbacked_symbols():
            yield
