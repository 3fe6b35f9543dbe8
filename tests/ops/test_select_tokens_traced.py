"""The selection operator in graphs: traced, fake, decomposed, compiled, and without Triton."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from dartfx.errors import SelectionError
from dartfx.selection import opaque
from dartfx.tools.zoo import oracle
from tests.support.selection_cases import expected, losing_text, operator, plain, ragged


def trace_args() -> tuple[Any, list[Tensor]]:
    case = plain(B=2)

    def call(hidden: Tensor, keys: Tensor, vision: Tensor) -> Tensor:
        parts = {"hidden": hidden, "keys": keys, "vision_mask": vision}
        return operator({**parts, "retain": 9, "N": 24})

    return call, [case["hidden"], case["keys"], case["vision_mask"]]


@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_stays_one_node_under_make_fx(pre_dispatch: bool, mode: str) -> None:
    call, args = trace_args()
    traced = make_fx(call, tracing_mode=mode, pre_dispatch=pre_dispatch)(*args)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert called == [torch.ops.dartfx.select_tokens.default]
    assert torch.equal(traced(*args), call(*args))


def test_the_fake_result_has_symbolic_sizes_without_guards() -> None:
    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes) as mode:
        hidden = mode.from_tensor(torch.randn(2, 40, 16))
        keys, vision = torch.empty(2, 2, 40, 8), torch.empty(2, 40, dtype=torch.bool)
        N, retain = (shapes.create_unbacked_symint() for _ in range(2))
        out = torch.ops.dartfx.select_tokens(
            hidden, keys, vision, None, N, retain, 4, 4, "dart", "auto"
        )
    assert out.dtype == torch.int64
    assert out.shape[0] == 2
    assert str(N.node.expr) in str(out.shape[1])
    assert str(retain.node.expr) in str(out.shape[1])


def test_opcheck() -> None:
    case = plain(B=2)
    tensors = [case["hidden"].requires_grad_(), case["keys"], case["vision_mask"]]
    args = (*tensors, torch.ones(2, 40, dtype=torch.bool), 24, 9, 4, 4, "dart", "auto")
    torch.library.opcheck(torch.ops.dartfx.select_tokens, args)


def gathered(case: dict[str, Any]) -> Tensor:
    keep_idx = operator(case)
    index = keep_idx[:, :, None].expand(-1, -1, case["hidden"].shape[2])
    return (case["hidden"] * 2).gather(1, index)


def check_backward(function: Any, case: dict[str, Any]) -> None:
    case["hidden"].requires_grad_()
    case["keys"].requires_grad_()
    function(case).sum().backward()
    want = torch.zeros(case["vision_mask"].shape)
    for b, positions in enumerate(expected(case).keep_idx):
        want[b, positions] = 2.0
    assert torch.equal(case["hidden"].grad, want[:, :, None].expand_as(case["hidden"]))
    assert case["keys"].grad is None or not case["keys"].grad.any()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_backward_reaches_the_kept_positions(backend: str | None) -> None:
    function = torch.compile(gathered, backend=backend) if backend else gathered
    check_backward(function, {**plain(B=2), "N": 24})


def test_the_form_inlined_on_a_gpu_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU some steps are opaque operators; here they are traced like on other devices."""
    monkeypatch.setattr(opaque, "DEVICES", ())
    graphs: list[str] = []

    def lowering(graph: torch.fx.GraphModule, args: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    function = torch.compile(operator, backend=aot_autograd(fw_compiler=lowering), dynamic=True)
    for counts, retain in (([30, 20], 12), ([41, 45], 20)):
        case = {**ragged(counts, [0, 0], 9), "retain": retain, "N": sum(counts) // 2}
        assert function(case).tolist() == expected(case).keep_idx
    assert graphs
    for code in graphs:
        assert set(re.findall(r"ops\.dartfx\.(\w+)", code)) == {"require_rows"}
        assert not re.search(r"nonzero|_local_scalar_dense|masked_select", code)


def test_on_a_cpu_only_what_reads_hidden_states_and_keys_is_compiled() -> None:
    graphs: list[str] = []

    def lowering(graph: torch.fx.GraphModule, args: Any) -> Any:
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    case = {**ragged([30, 20], [0, 3], 9), "retain": 12, "N": 25}
    function = torch.compile(operator, backend=aot_autograd(fw_compiler=lowering), fullgraph=True)
    assert function(case).tolist() == expected(case).keep_idx
    [code] = graphs
    opaque_calls = {"row_plans", "turns_of", "take_least_alike", "positions_with_text"}
    assert set(re.findall(r"ops\.dartfx\.(\w+)", code)) == {*opaque_calls, "require_rows"}
    assert not re.search(r"aten\.(sort|cumsum|searchsorted|scatter|where)", code)


TEXT_LOST = "row 1 has more valid text than fits"


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_text_is_never_lost(backend: str | None) -> None:
    case = losing_text()
    with pytest.raises(oracle.TextLost) as lost:
        expected(case)
    assert lost.value.row == 1
    function = torch.compile(operator, backend=backend) if backend else operator
    with pytest.raises(SelectionError, match=TEXT_LOST):
        function(case)


@pytest.mark.slow
def test_inductor_equals_the_oracle_and_never_loses_text() -> None:
    """At a size where generated C++ uses threads, out of which no exception can be thrown."""
    function = torch.compile(operator, fullgraph=True, dynamic=False)
    losing = losing_text()
    fitting = {**losing, "vision_mask": torch.zeros(2, 300, dtype=torch.bool)}
    fitting["vision_mask"][0, 5:205] = True
    fitting["vision_mask"][1, 20:220] = True
    want = expected(fitting)
    assert want.gap > 1e-6
    assert function(fitting).tolist() == want.keep_idx
    with pytest.raises(SelectionError, match=TEXT_LOST):
        function(losing)


@pytest.mark.slow
def test_inductor_with_dynamic_shapes_and_backward() -> None:
    function = torch.compile(gathered, fullgraph=True, dynamic=True)
    for counts, pads, words, retain in (([30, 20], [0, 3], 9, 12), ([50, 50], [4, 9], 14, 20)):
        case = {**ragged(counts, pads, words), "retain": retain, "N": sum(counts) // 2}
        check_backward(function, case)


def test_imports_and_runs_without_triton() -> None:
    code = """
        import sys, torch
        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "triton":
                    raise ImportError("no triton here")
        for name in [n for n in sys.modules if n.partition(".")[0] == "triton"]:
            del sys.modules[name]
        sys.meta_path.insert(0, Block())
        from dartfx.ops import select_tokens
        vision = torch.tensor([[False, True, True, True, False]])
        out = select_tokens(torch.randn(1, 5, 4), torch.randn(1, 2, 5, 4), vision, 1)
        assert out.shape == (1, 3) and "triton" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
