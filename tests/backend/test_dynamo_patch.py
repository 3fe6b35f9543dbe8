"""When dynamo traces differently for this backend, and torch versions that lack support for it."""

from __future__ import annotations

import dis
import importlib
import logging
import operator
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator

from dartfx import compat
from dartfx.backend import graph_compiler
from dartfx.backend.tracing import checks, dynamo_patch

OPCODES = {name: dis.opmap[name] for name in dynamo_patch.CHANGES}
JUMPS = [name for name in OPCODES if "JUMP" in name]
OPCODE = OPCODES["BUILD_STRING"]
CHANGED_BY = {
    "ConstantVariable": JUMPS,
    "LazySymNodeFormatString": ["BUILD_STRING"],
    "LazyVariableTracker": ["BUILD_STRING", "BINARY_SUBSCR"],
    "StringFormatVariable": ["BUILD_STRING"],
    "TensorVariable": ["BINARY_SUBSCR", *JUMPS],
    "TupleVariable": ["BINARY_SUBSCR"],
    "install_guard": JUMPS,
}

PROGRAM = """
import dis
from torch._dynamo.symbolic_convert import InstructionTranslator as translator
from torch._dynamo.backends.registry import lookup_backend
opcode = dis.opmap["BUILD_STRING"]
before = translator.dispatch_table[opcode]
import dartfx, dartfx.backend.graph_compiler
assert translator.dispatch_table[opcode] is before, "changed by an import"
lookup_backend("dart")
assert translator.dispatch_table[opcode] is not before, "not changed by the lookup"
"""


@pytest.fixture(autouse=True)
def not_installed() -> Iterator[None]:
    dynamo_patch.uninstall()
    checks.uninstall()
    yield
    dynamo_patch.uninstall()
    checks.uninstall()
    graph_compiler.prepare_dynamo()


def test_an_import_changes_nothing_and_the_lookup_does() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_is_installed_once_and_can_be_undone() -> None:
    before = InstructionTranslator.dispatch_table[OPCODE]
    assert dynamo_patch.install(lambda backend: False)
    changed = InstructionTranslator.dispatch_table[OPCODE]
    assert changed is not before
    assert dynamo_patch.install(lambda backend: False)
    assert InstructionTranslator.dispatch_table[OPCODE] is changed
    dynamo_patch.uninstall()
    assert InstructionTranslator.dispatch_table[OPCODE] is before


@pytest.mark.parametrize(
    "key",
    [
        "ConstantVariable",
        "InstructionTranslatorBase",
        "LazySymNodeFormatString",
        "LazyVariableTracker",
        "StringFormatVariable",
        "TensorVariable",
        "TupleVariable",
        "install_guard",
    ],
)
def test_without_a_private_name_the_backend_works_and_a_line_for_each_change_names_it(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dartfx.backend import dart

    name = compat.NAMES[key]

    dynamo_patch.uninstall()
    changed = CHANGED_BY.get(key, [*OPCODES])
    before = [InstructionTranslator.dispatch_table[OPCODES[name]] for name in changed]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "dartfx"):
        patch.delattr(importlib.import_module(name.module), name.attribute)
        assert compat.missing() == [name]
        graph_compiler.prepare_dynamo()
        graph_compiler.prepare_dynamo()
    lines = [r.message for r in caplog.records if r.name == dynamo_patch.__name__]
    assert len(lines) == len(changed)
    assert all(str(name) in line for line in lines)
    assert before == [InstructionTranslator.dispatch_table[OPCODES[name]] for name in changed]
    doubled = torch.compile(lambda x: x * 2, backend=dart, options={"lowering": "eager"})
    assert torch.equal(doubled(torch.ones(3)), torch.full((3,), 2.0))


def added_by_mask(hidden: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    hidden = hidden.clone()
    hidden[mask, :] = hidden[mask, :] + rows
    return hidden * 2


def rows_of_ids(ids: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    return ids[mask] + rows


def traced(
    function: Callable[..., Tensor], ours: bool
) -> tuple[Callable[..., Any], list[torch.fx.GraphModule]]:
    """A compiled function, and the graphs that it is traced to in its calls."""
    made: list[torch.fx.GraphModule] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        made.append(module)
        return module.forward

    dynamo_patch.install(lambda called: ours)
    checks.install(lambda called: ours)
    torch.compiler.reset()
    return torch.compile(function, backend=backend), made


@pytest.mark.parametrize(
    ("function", "ours", "picked"),
    [(added_by_mask, True, True), (added_by_mask, False, False), (rows_of_ids, True, False)],
)
def test_rows_of_hidden_states_break_no_graph_of_ours(
    function: Callable[..., Tensor], ours: bool, picked: bool
) -> None:
    """Rows of anything else do, so that their number is known to the next graph."""
    compiled, made = traced(function, ours)
    hidden, mask = torch.randn(2, 5, 4), torch.tensor([[True, False, True, False, True]] * 2)
    given = hidden if function is added_by_mask else torch.arange(10).view(2, 5)
    rows = torch.ones(6, 4) if function is added_by_mask else torch.ones(6, dtype=torch.int64)
    result = compiled(given, mask, rows)
    assert torch.equal(result, function(given, mask, rows))
    in_graph = any(n.target is operator.getitem for m in made for n in m.graph.nodes)
    assert (in_graph and len(made) == 1) == picked


def doubled_at_seven(ids: Tensor, x: Tensor) -> Tensor:
    mask = (ids == 7).to("cpu")
    return x * 2 if mask.any() else x + 1


def doubled_when_all_are_set(types: Tensor, x: Tensor) -> Tensor:
    if not types.bool().all():
        x = x + 1
    return x * 2


def changed_before(ids: Tensor, x: Tensor) -> Tensor:
    ids.add_(1)
    return x * 2 if (ids == 7).any() else x + 1


def by_two_inputs(ids: Tensor, x: Tensor) -> Tensor:
    return x * 2 if (ids == x).any() else x + 1


BRANCHES: list[tuple[Callable[..., Tensor], bool, int]] = [
    (doubled_at_seven, True, 2),
    (doubled_at_seven, False, 3),
    (doubled_when_all_are_set, True, 2),
    (changed_before, True, 3),
    (by_two_inputs, True, 3),
]


@pytest.mark.parametrize(("function", "ours", "graphs"), BRANCHES)
def test_branches_that_one_input_decides_break_no_graph_of_ours(
    function: Callable[..., Tensor], ours: bool, graphs: int
) -> None:
    """Each answer has a graph of its own, and a guard picks it; other branches break theirs."""
    compiled, made = traced(function, ours)
    x = torch.ones(2)
    for ids in [[7, 1], [0, 2], [5, 7], [3, 0], [6, 6]]:
        given = torch.tensor([ids])
        assert torch.equal(compiled(given.clone(), x), function(given.clone(), x))
    assert len(made) == graphs


def checked(ids: Tensor, x: Tensor) -> Tensor:
    torch._check_tensor_all((ids == 7).any())
    return x * 2


def checked_then_read(ids: Tensor, x: Tensor) -> Tensor:
    y = checked(ids, x)
    return y[: int(ids[0])]


@pytest.mark.parametrize(
    ("function", "ours", "one"),
    [(checked, True, True), (checked, False, False), (checked_then_read, True, False)],
)
def test_checks_that_read_a_tensor_break_no_graph_of_ours(
    function: Callable[..., Tensor], ours: bool, one: bool
) -> None:
    """They still fail; what is read to decide a shape breaks the graph as ever."""
    compiled, made = traced(function, ours)
    x = torch.ones(9)
    for ids in ([7, 1], [2, 7]):
        assert torch.equal(compiled(torch.tensor(ids), x), function(torch.tensor(ids), x))
    assert (len(made) == 1) == one
    with pytest.raises(RuntimeError):
        compiled(torch.tensor([3, 3]), x)


@pytest.mark.parametrize("key", ["TorchInGraphFunctionVariable", "wrap_fx_proxy"])
def test_without_a_name_checks_are_left_to_dynamo(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    name = compat.NAMES[key]
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "dartfx"):
        patch.delattr(importlib.import_module(name.module), name.attribute)
        checks.install(lambda backend: True)
    assert [str(name) in r.message for r in caplog.records] == [True]
    checks.uninstall()
