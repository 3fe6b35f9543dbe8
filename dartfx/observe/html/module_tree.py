"""The modules of a graph as a tree, in which equal neighbours (decoder layers) are folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dartfx.observe.html.changes import operator
from dartfx.observe.html.values import Value
from dartfx.passes.graph import split_index

__all__ = ["Module", "module_tree"]


@dataclass
class Module:
    """One module and all below it: FLOPs and bytes before and after, operators of its own.

    equal: how many neighbours do the same and are folded into this one, itself included; last: the
    path of the last of them.
    """

    path: str
    flops: list[int] = field(default_factory=lambda: [0, 0])
    held: list[int] = field(default_factory=lambda: [0, 0])
    nodes: list[int] = field(default_factory=lambda: [0, 0])
    operators: Counter[str] = field(default_factory=Counter)
    children: dict[str, Module] = field(default_factory=dict)
    equal: int = 1
    last: str = ""

    @cached_property
    def does(self) -> tuple[Any, ...]:
        """Its contents, without its name: equal for equal modules."""
        below = tuple((_name(c.path), c.does) for c in self.children.values())
        return (*self.flops, *self.held, *self.nodes, frozenset(self.operators.items()), below)

    @property
    def label(self) -> str:
        """Its own name, or the range of names that are folded."""
        name = self.path.removeprefix("L['self']").strip(".") or "model"
        short = name.rpartition(".")[2]
        return short if self.equal == 1 else f"{short} … {self.last.rpartition('.')[2]}"

    @property
    def folded(self) -> list[Module]:
        """Its children, equal neighbours of one container as one."""
        shown: list[Module] = []
        for child in self.children.values():
            before = shown[-1] if shown else None
            if before is not None and split_index(child.path) and before.does == child.does:
                before.equal, before.last = before.equal + 1, child.path
            else:
                shown.append(child)
                child.equal, child.last = 1, child.path
        return shown


def module_tree(before: Mapping[str, Value], after: Mapping[str, Value]) -> Module:
    """The tree of all modules of the graph; ``after`` is empty for a graph that is not pruned."""
    root = Module("")
    for moment, found in enumerate((before, after or before)):
        for value in found.values():
            if value.op != "call_function":
                continue
            at = root
            _add(at, moment, value)
            for path in value.modules:
                at = at.children.setdefault(path, Module(path))
                _add(at, moment, value)
            at.operators[operator(value.code)] += moment
    while len(root.children) == 1 and root.nodes == next(iter(root.children.values())).nodes:
        (root,) = root.children.values()
    return root


def _add(module: Module, moment: int, value: Value) -> None:
    module.flops[moment] += value.flops
    module.held[moment] += value.held
    module.nodes[moment] += 1


def _name(path: str) -> str:
    return path.rpartition(".")[2]
