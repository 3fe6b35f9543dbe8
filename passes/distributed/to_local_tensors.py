"""A dynamo graph over DTensors -> the same graph over this process's local tensors.

Under tensor parallelism dynamo's graph takes parameters as DTensors, most of which it unwraps at
once, and a few operators on them (a vocabulary-parallel embedding).  The re-trace to ATen knows
plain tensors only, so these operators are traced one level lower, where they are operators on local
tensors and functional collectives; everything else stays as dynamo wrote it.

Before, a table of 8 words split over two ranks and a split linear layer behind it::

    l_table_: f32[8, 6] = input
    embedding: f32[1, 3, 6] = embedding(ids, l_table_)
    redistribute: f32[1, 3, 6] = Tensor.redistribute(embedding, placements=[Replicate()])
    found: f32[1, 3, 6] = Tensor.to_local(redistribute)
    to_local_1: f32[4, 6] = Tensor.to_local(l_weight_)
    linear: f32[1, 3, 4] = linear(found, to_local_1)

After, where this rank masks the words that it does not hold::

    l_table_: f32[4, 6] = input
    embedding: f32[1, 3, 6] = aten.embedding(view, index_put_)
    index_put__1: f32[1, 3, 6] = aten.index_put_(embedding, [bitwise_or], lift_fresh_copy_1)
    all_reduce: f32[1, 3, 6] = _c10d_functional.all_reduce(index_put__1, 'sum', '0')
    wait_tensor: f32[1, 3, 6] = _c10d_functional.wait_tensor(all_reduce)
    linear: f32[1, 3, 4] = linear(wait_tensor, l_weight_)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from dartfx import compat
from dartfx.passes.distributed.shards import SHARDS_KEY, dtensors, example, is_dtensor, shards_of
from dartfx.passes.graph import aten
from dartfx.passes.refusal import Refusal


@dataclass(frozen=True)
class LocalGraph:
    """The graph over local tensors, and how to call it with dynamo's inputs.

    taken: which of dynamo's inputs the graph still has; device meshes are left out.
    """

    module: GraphModule
    taken: tuple[int, ...]

    def inputs(self, given: Sequence[Any]) -> list[Any]:
        """The local tensors of dynamo's inputs, real or fake."""
        return [getattr(given[index], "_local_tensor", given[index]) for index in self.taken]


def to_local_tensors(module: GraphModule) -> LocalGraph:
    """Rewrite a dynamo graph that has DTensors among its inputs; the graph itself is not changed.

    Raises Refusal where gradients are computed, a DTensor leaves the graph, or the operators on
    DTensors cannot be traced apart from the others.
    """
    graph = module.graph
    if torch.is_grad_enabled() and any(value.requires_grad for value in dtensors(graph)):
        raise Refusal(
            "a tensor-parallel graph that computes gradients",
            advice="torch.no_grad() or torch.inference_mode() around the call",
        )
    try:
        return _Rewriting(module).run()
    except Refusal:
        raise
    except Exception as error:  # whatever an operator on DTensors says to being traced
        raise Refusal(
            "the operators on distributed tensors could not be traced on local ones: "
            f"{type(error).__name__}: {error}",
            advice="please report it with the model and its tp_plan",
        ) from error


def _is_mesh(node: Node) -> bool:
    return node.op == "placeholder" and _mesh(example(node)) is not None


def _mesh(value: Any) -> Any:
    """The device mesh that an input is; None for any other."""
    value = getattr(value, "real_obj", value)
    return value if type(value).__name__ == "DeviceMesh" else None


@dataclass
class _Part:
    """Calls connected by DTensors, in graph order."""

    calls: list[Node] = field(default_factory=list)


class _Rewriting:
    """One rewriting of a graph: ``new`` is written in the order of the old one."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.new = Graph()
        self.copies: dict[Node, Node] = {}
        self.part_of = self._parts()

    def run(self) -> LocalGraph:
        taken = []
        for index, node in enumerate(self._placeholders()):
            if not _is_mesh(node):
                taken.append(index)
                self._placeholder(node)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                continue
            part = self.part_of.get(node)
            if part is None:
                self._copy(node)
            elif node is part.calls[-1]:
                self._write(part)
        self.new.lint()
        local = GraphModule(self.module, self.new)
        return LocalGraph(local, tuple(taken))

    def _placeholders(self) -> Iterator[Node]:
        return (n for n in self.module.graph.nodes if n.op == "placeholder")

    def _placeholder(self, node: Node) -> None:
        copied = self.copies[node] = self.new.node_copy(node)
        copied.meta = dict(node.meta)
        value = example(node)
        if is_dtensor(value):
            copied.meta["example_value"] = value._local_tensor
            known = {**node.meta.get("tensor_dict", {}), SHARDS_KEY: shards_of(value)}
            copied.meta["tensor_dict"] = known

    def _copy(self, node: Node) -> None:
        for operand in node.all_input_nodes:
            if operand not in self.copies or (node.op == "output" and is_dtensor(example(operand))):
                raise Refusal(
                    "a tensor that is distributed over the ranks, or their device mesh, is used "
                    "by something that is not a tensor operator",
                    node,
                )
        copied = self.copies[node] = self.new.node_copy(node, self.copies.__getitem__)
        copied.meta = dict(node.meta)

    def _parts(self) -> dict[Node, _Part]:
        """The part of every call that takes or makes a DTensor, but for plain unwrapping."""
        part_of: dict[Node, _Part] = {}
        for node in self.module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            from_dtensor = [i for i in node.all_input_nodes if is_dtensor(example(i))]
            if not from_dtensor and not is_dtensor(example(node)):
                continue
            part = _Part()
            joined = [part_of[i] for i in from_dtensor if i in part_of]
            for other in dict.fromkeys(map(id, joined)):
                part.calls += next(p for p in joined if id(p) == other).calls
            part.calls.append(node)
            part_of.update(dict.fromkeys(part.calls, part))
        return part_of

    def _write(self, part: _Part) -> None:
        """Trace one part on local tensors and write what comes of it."""
        if self._unwraps(part):
            self.copies[part.calls[0]] = self.copies[part.calls[0].args[0]]  # type: ignore[index]
            return
        inside = set(part.calls)
        operands = dict.fromkeys(i for n in part.calls for i in n.all_input_nodes)
        given = [i for i in operands if i not in inside and not _is_mesh(i)]
        results = [n for n in part.calls if any(u not in inside for u in n.users)]
        if any(i not in self.copies for i in given) or any(is_dtensor(example(n)) for n in results):
            raise Refusal(
                "operators on distributed tensors cannot be separated from the others",
                part.calls[-1],
            )
        examples = [getattr(example(i), "_local_tensor", example(i)) for i in given]
        with _fake_mode(examples), torch.no_grad():
            traced = make_fx(self._runner(part, given, results))(*examples)
        _constants_as_calls(traced)
        inputs = [n for n in traced.graph.nodes if n.op == "placeholder"]
        known = dict(zip(inputs, (self.copies[i] for i in given), strict=True))
        written = self.new.graph_copy(traced.graph, known)
        assert isinstance(written, tuple | list)
        self.copies.update(zip(results, written, strict=True))
        for old, copied in known.items():
            if old.op != "placeholder":
                origin = part.calls[-1].meta
                copied.meta = {k: origin[k] for k in _WHENCE if k in origin}
                copied.meta["example_value"] = old.meta.get("val")

    @staticmethod
    def _unwraps(part: _Part) -> bool:
        """Whether the part is ``parameter.to_local()``: the graph's input as it now is."""
        (first, *more) = part.calls
        source = first.args[0] if first.args else None
        return (
            not more
            and first.target == "to_local"
            and isinstance(source, Node)
            and source.op == "placeholder"
        )

    @staticmethod
    def _runner(
        part: _Part, given: Sequence[Node], results: Sequence[Node]
    ) -> Callable[..., tuple[Any, ...]]:
        def run(*local: Any) -> tuple[Any, ...]:
            values = {n: _wrapped(example(n), v) for n, v in zip(given, local, strict=True)}

            def value(node: Node) -> Any:
                return values[node] if node in values else _mesh(example(node))

            for node in part.calls:
                args, kwargs = map_arg((node.args, node.kwargs), value)
                values[node] = _call(node, args, kwargs)
            return tuple(values[n] for n in results)

        return run


def _constants_as_calls(traced: GraphModule) -> None:
    """Numbers that the trace holds as attributes, created where they are used instead."""
    for node in list(traced.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(traced, str(node.target))
        value = getattr(value, "constant", value)  # of a fake tensor
        if not isinstance(value, torch.Tensor) or value.ndim:
            raise Refusal("an operator on distributed tensors brings a constant tensor", node)
        with traced.graph.inserting_before(node):
            options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
            constant = traced.graph.call_function(aten.full.default, ([], value.item()), options)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
        traced.graph.erase_node(node)


_WHENCE = ("nn_module_stack", "stack_trace", "source_fn_stack")


def _call(node: Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function" and callable(node.target):
        return node.target(*args, **kwargs)
    raise Refusal("a module or attribute among operators on distributed tensors", node)


def _wrapped(example: Any, local: Any) -> Any:
    """``local`` as the DTensor that dynamo saw there; itself where that was none."""
    if not is_dtensor(example):
        return local
    return type(example).from_local(
        local,
        example.device_mesh,
        example.placements,
        run_check=False,
        shape=example.shape,
        stride=example.stride(),
    )


def _fake_mode(examples: Sequence[Any]) -> Any:
    for value in examples:
        if isinstance(value, compat.FakeTensor):
            return value.fake_mode
    raise Refusal("operators on distributed tensors carry no fake tensors")
