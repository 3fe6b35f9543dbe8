"""A ``torch.export`` graph -> one that the passes may rewrite: a copy with separate fake values.

Exported graphs are pre-dispatch ATen already.  What is decided on the copy, a guard or a size that
depends on data, never reaches the program it came from.

Before, with a region without gradients as a call of a subgraph::

    wrap_with_set_grad_enabled: (...) = wrap_with_set_grad_enabled(False, submod_3, x)
    to: f32[1, S, 8] = getitem(wrap_with_set_grad_enabled, 0)
    cos: f32[1, S, 8] = getitem(wrap_with_set_grad_enabled, 1)
    mul: f32[1, S, 8] = aten.mul.Tensor(to, cos)

After, with its operators between the switches and without the conversion that converted nothing::

    _set_grad_enabled = _set_grad_enabled(False)
    cos_1: f32[1, S, 8] = aten.cos(x)
    _set_grad_enabled_1 = _set_grad_enabled(True)
    mul: f32[1, S, 8] = aten.mul.Tensor(x, cos_1)
"""

from __future__ import annotations

import copy
import operator
import time
from collections.abc import Callable, Collection
from typing import Any

import sympy
import torch
from torch.export import ExportGraphSignature
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dartfx import compat
from dartfx.passes.casting import note_autocast
from dartfx.passes.frontend.canonicalise import canonicalise
from dartfx.passes.frontend.normalise import drop_aliases
from dartfx.passes.graph import argument, aten, packet, set_argument, sizes
from dartfx.passes.refusal import Refusal

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def import_exported(module: GraphModule, state: Collection[str]) -> GraphModule:
    """A copy of an exported graph that shares parameters and submodules with it, but no fake value.

    state: names of the placeholders that are parameters, buffers or constants.  Regions without
    gradients or under autocast, which export keeps as calls of subgraphs, stand in the copy
    itself.  Raises Refusal when the graph holds no fake values, or some that cannot be copied.
    """
    start = time.perf_counter()
    graph = Graph()
    returned = graph.graph_copy(module.graph, {})
    output = graph.output(returned)
    output.meta.update(next(reversed(module.graph.nodes)).meta)
    own = GraphModule(module, graph)
    own.meta.update(copy.deepcopy(module.meta))
    _inline_regions(own)
    _renew_values(graph)
    note_autocast(graph)
    for node in graph.find_nodes(op="placeholder"):
        if node.name in state:
            node.meta["tensor_dict"] = {compat.STATIC_INPUT: "exported"}
    drop_aliases(graph)
    _return_without_copies(graph)
    _assert_no_sizes(graph)
    canonicalise(graph)
    own.recompile()
    own.meta["seconds"] = time.perf_counter() - start
    return own


# --- separate fake values ---------------------------------------------------------------------


def _renew_values(graph: Graph) -> None:
    env = _twin(shape_env(graph))
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True, shape_env=env, static_shapes=False)
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = compat.pytree.tree_map(lambda v: _renewed(v, mode), node.meta["val"])


def shape_env(graph: Graph) -> ShapeEnv:
    """What is known of an exported graph's symbolic sizes.  Raises Refusal without fake values."""
    for node in graph.nodes:
        for value in compat.pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, compat.FakeTensor):
                return value.fake_mode.shape_env or ShapeEnv()
    raise Refusal("the exported graph holds no fake values")


def free_symbols(graph: Graph) -> set[sympy.Symbol]:
    """Every symbol in a shape or a number of the graph."""
    found: set[sympy.Symbol] = set()
    for node in graph.nodes:
        for value in compat.pytree.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            for size in sizes:
                if isinstance(size, _SYMBOLIC):
                    found |= size.node.expr.free_symbols
    return found


def guards_of(graph: Graph) -> int:
    """How many guards the graph's shapes rest on so far."""
    return len(shape_env(graph).guards)


def refuse_new_guards(graph: Graph, before: int) -> None:
    """Raise Refusal if the rewriting decided by sizes that differ from call to call.

    ``torch.compile`` would guard on them and compile again; an exported program cannot.  What holds
    for all sizes is forgotten.
    """
    guards = shape_env(graph).guards
    for guard in guards[before:]:
        if not _always_holds(guard.expr):
            raise Refusal(
                "what is to be dropped depends on the program's dynamic sizes: it would be right "
                f"only where {guard.expr}",
                advice="exporting with a fixed number of vision tokens, or with bounds (min and "
                "max of torch.export.Dim) that decide it",
            )
    del guards[before:]


def _always_holds(guard: sympy.Basic) -> bool:
    """Whether a guard says only that a polynomial divides a multiple of itself.

    Sizes behind the cut are sums (``S - N + R``), whose common factors torch does not look for.
    """

    def remainder(mod: sympy.Basic) -> sympy.Basic:
        whole, part = mod.args
        return sympy.Integer(0) if sympy.cancel(whole / part).is_Integer else mod

    return bool(
        guard.replace(lambda e: isinstance(e, compat.Mod | compat.PythonMod), remainder)
        == sympy.true
    )


def _twin(env: ShapeEnv) -> ShapeEnv:
    """A shape environment that knows the same symbols, by the same names, and learns alone."""
    twin = copy.copy(env)
    for name, value in vars(env).items():
        if isinstance(value, dict):
            copied = copy.copy(value)
            copied.update({k: copy.copy(v) for k, v in value.items() if isinstance(v, list)})
            setattr(twin, name, copied)
        elif isinstance(value, list | set):
            setattr(twin, name, copy.copy(value))
    return twin


def _renewed(old: Any, mode: compat.FakeTensorMode) -> Any:
    if isinstance(old, _SYMBOLIC):
        node = copy.copy(old.node)
        node.shape_env = mode.shape_env
        return type(old)(node)
    if not isinstance(old, torch.Tensor):
        return old
    if old.layout is not torch.strided:
        raise Refusal(f"the exported graph holds a tensor of layout {old.layout}")
    shape, strides = ([_renewed(s, mode) for s in sizes] for sizes in (old.shape, old.stride()))
    with mode:
        return torch.empty_strided(
            shape, strides, dtype=old.dtype, device=old.device, requires_grad=old.requires_grad
        )


# --- regions ----------------------------------------------------------------------------------


def _inline_regions(module: GraphModule) -> None:
    """Put the bodies of grad-mode and autocast regions into the graph, between their switches."""
    graph, regions = module.graph, _regions()
    while found := [n for n in graph.nodes if n.target in regions]:
        for node in found:
            _inline_region(module, node, *regions[node.target](node))
    graph.eliminate_dead_code(lambda n: n.op != "get_attr")


Switches = tuple[Callable[[Graph], Node], Callable[[Graph, Node], Node], Any, tuple[Any, ...]]


def _grad_mode(node: Node) -> Switches:
    enabled, body, *operands = node.args
    switch = compat.set_grad_enabled
    return (
        lambda graph: graph.call_function(switch, (enabled,)),
        lambda graph, _: graph.call_function(switch, (not enabled,)),
        body,
        tuple(operands),
    )


def _autocast(node: Node) -> Switches:
    *settings, body = node.args[:5]
    return (
        lambda graph: graph.call_function(compat.enter_autocast, tuple(settings)),
        lambda graph, entered: graph.call_function(compat.exit_autocast, (entered,)),
        body,
        node.args[5:],
    )


def _regions() -> dict[Any, Callable[[Node], Switches]]:
    return {compat.wrap_with_set_grad_enabled: _grad_mode, compat.wrap_with_autocast: _autocast}


def _inline_region(
    module: GraphModule,
    call: Node,
    enter: Callable[[Graph], Node],
    leave: Callable[[Graph, Node], Node],
    body: Node,
    operands: tuple[Any, ...],
) -> None:
    graph, inner = module.graph, module.get_submodule(str(body.target)).graph
    assert isinstance(inner, Graph)
    values: dict[Node, Any] = {}
    given = iter(operands)
    with graph.inserting_before(call):
        entered = enter(graph)
        for node in inner.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "output":
                returned = torch.fx.node.map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = graph.node_copy(node, values.__getitem__)
                if node.op == "get_attr":
                    values[node].target = f"{body.target}.{node.target}"
        leave(graph, entered)
    for part in list(call.users):
        assert part.target is operator.getitem
        part.replace_all_uses_with(returned[part.args[1]])
        graph.erase_node(part)
    graph.erase_node(call)


def restore_regions(
    module: GraphModule, signature: ExportGraphSignature
) -> tuple[GraphModule, ExportGraphSignature]:
    """Grad-mode and autocast regions as calls of subgraphs again, as export leaves them.

    Returns the module and the signature with the outputs' new names.
    """
    for node in module.graph.find_nodes(op="call_function", target=compat.set_grad_enabled):
        with torch.set_grad_enabled(not node.args[0]):  # what held before the first region
            module, new = compat.replace_set_grad_with_hop_pass(module, signature)
        signature = new or signature
        break
    module, new = compat.replace_autocast_with_hop_pass(module, signature)
    return module, new or signature


# --- outputs ----------------------------------------------------------------------------------


def _return_without_copies(graph: Graph) -> None:
    """Return what a layer computed itself, where it is only joined to nothing on its way out.

    So a cache is flattened that is rebuilt from its keys and values, outside of every layer.
    """
    (output,) = graph.find_nodes(op="output")
    for node in output.all_input_nodes:
        source = node
        while packet(source) is aten.cat and len(source.users) == 1:
            parts = [p for p in argument(source, "tensors") if not _is_empty(p)]
            if len(parts) != 1:
                break
            source = parts[0]
        if source is not node:
            output.replace_input_with(node, source)
            graph.erase_node(node)


def _is_empty(node: Node) -> bool:
    return any(type(s) is int and s == 0 for s in sizes(node))


# --- assertions -------------------------------------------------------------------------------


def _assert_no_sizes(graph: Graph) -> None:
    """Let assertions about a tensor's metadata check dtype and device only: shapes will change."""
    for node in graph.nodes:
        if packet(node) is aten._assert_tensor_metadata:
            for name in ("size", "stride"):
                set_argument(node, name, None)
