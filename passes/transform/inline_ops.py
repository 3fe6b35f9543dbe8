"""Calls of operators -> the plain operators that a function of tensors consists of.

Before::

    silu: f32[1, S, D] = aten.silu(x_1)
    add: f32[1, S, D] = aten.add.Tensor(silu, 1)

After, with ``lambda x: x * x.sigmoid()`` as the body of ``aten.silu``::

    sigmoid: f32[1, S, D] = aten.sigmoid(x_1)
    mul: f32[1, S, D] = aten.mul.Tensor(x_1, sigmoid)
    add: f32[1, S, D] = aten.add.Tensor(mul, 1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from dartfx import compat
from dartfx.passes.graph import fake_mode
from dartfx.passes.refusal import Refusal

Body = Callable[..., Any]


def inline_ops(module: GraphModule, bodies: Mapping[object, Body]) -> list[Node]:
    """Replace every call of an operator in ``bodies`` by what its function does; the new nodes.

    A function is traced on the call's fake values, so it must not depend on data; it may call
    operators that are in ``bodies`` themselves.  Raises Refusal for one that makes constant tensors
    while being traced: a graph cannot hold them.
    """
    created: list[Node] = []
    while found := [n for n in module.graph.nodes if n.target in bodies]:
        for call in found:
            created += _replace(call, bodies[call.target])
    remaining = set(module.graph.nodes)
    return [n for n in created if n in remaining]


def _replace(call: Node, body: Body) -> list[Node]:
    operands = call.all_input_nodes
    traced = _traced(call, body, operands)
    constants = traced.find_nodes(op="get_attr")
    if constants:
        raise Refusal(
            f"{call.target} makes a constant tensor ({constants[0].target}) while it is traced, "
            "which an exported graph cannot hold",
            call,
            advice="torch.full or torch.arange with the device of an operand",
        )
    values: dict[Node, Any] = dict(zip(traced.find_nodes(op="placeholder"), operands, strict=True))
    created = []
    with call.graph.inserting_before(call):
        for node in traced.nodes:
            if node.op == "call_function":
                values[node] = call.graph.node_copy(node, values.__getitem__)
                values[node].meta = {**_position(call), "val": node.meta.get("val")}
                created.append(values[node])
            elif node.op == "output":
                _use(map_arg(node.args[0], values.__getitem__), call)
    call.graph.erase_node(call)
    return created


def _use(results: Node | Sequence[Node], call: Node) -> None:
    """Redirect the users of ``call`` to its replacement."""
    if isinstance(results, Node):
        call.replace_all_uses_with(results)
        return
    for item in list(call.users):
        item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
        call.graph.erase_node(item)


def _traced(call: Node, body: Body, operands: list[Node]) -> Graph:
    def run(*values: Any) -> Any:
        given = dict(zip(operands, values, strict=True))
        args, kwargs = map_arg((call.args, call.kwargs), given.__getitem__)
        return body(*args, **kwargs)

    mode = fake_mode(call.graph)
    with mode, torch.no_grad(), compat.enable_python_dispatcher():
        return make_fx(run, pre_dispatch=True)(*(n.meta["val"] for n in operands)).graph


def _position(call: Node) -> dict[str, Any]:
    """A call's module path and source line, for the calls that replace it."""
    return {k: call.meta[k] for k in ("nn_module_stack", "stack_trace") if k in call.meta}
