"""torch or transformers without one of the private names: each is removed in turn."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._inductor.utils import fresh_cache

import dartfx
from dartfx import compat
from dartfx.backend.warm_start import compiled_kernels
from dartfx.cli import doctor
from dartfx.cli.tiny_model import Tiny, prompt
from dartfx.observe.compilation import Compilation
from dartfx.ops.registration import require_rows
from dartfx.runtime import call_budget, rank_agreement
from dartfx.tools.zoo.registry import missing_classes
from tests.layout.test_layout import sources

OPTIONS: dict[str, Any] = {"layer": 1, "retain_tokens": 4, "on_unsupported": "ignore"}
EAGER = {**OPTIONS, "lowering": "eager"}

# Imports every module with all private names out of reach, then compiles a graph.
PROGRAM = """
import importlib, pkgutil, sys
real = importlib.import_module
def without_torch(name, package=None):
    if sys._getframe(1).f_globals["__name__"] == "dartfx.compat":
        raise ImportError(f"no {name}")
    return real(name, package)
importlib.import_module = without_torch
import dartfx
OPTIONAL = "tools", "__main__", "integrations.lmms", "integrations.vllm."
for module in pkgutil.walk_packages(dartfx.__path__, "dartfx."):
    if not module.name.removeprefix("dartfx.").startswith(OPTIONAL):
        real(module.name)
assert dartfx.compat.missing() == list(dartfx.compat.NAMES.values())
import torch
options = {"lowering": "eager"}
assert torch.compile(lambda x: x * 2, backend="dart", options=options)(torch.ones(3)).sum() == 6
"""


def pruned(lowering: str = "eager", **options: object) -> str:
    """What is reported of a tiny model; its output is right, pruned or not."""
    dartfx.reset()
    torch.manual_seed(0)
    model, inputs = Tiny(), prompt("cpu")
    options = {**OPTIONS, "lowering": lowering, **options}
    with torch.no_grad():
        output = torch.compile(model, backend="dart", options=options)(*inputs)
        (report,) = dartfx.reports()
        if not report.pruned:
            torch.testing.assert_close(output, model(*inputs))
    return str(report)


def exported(tmp_path: Path) -> str:
    program = torch.export.export(Tiny(), prompt("cpu"))
    return str(dartfx.exported_pruning(dartfx.prune_exported(program, layer=1, retain_tokens=4)))


def dumped(tmp_path: Path) -> str:
    report = pruned(dump=tmp_path)
    if "pruned before" in report:
        assert (tmp_path / "graph_000" / "report.html").exists()
    return report


def explained(tmp_path: Path) -> str:
    return str(dartfx.explain(Tiny(), *prompt("cpu"), options=OPTIONS))


def replayed(tmp_path: Path) -> str:
    from dartfx.replay.rebuild import Replay

    replay = Replay()
    replay.scalar(2)
    return str(replay.size(3))


def measured(tmp_path: Path) -> str:
    compilation = Compilation()
    with compilation.measure():
        pass
    assert compilation.seconds["other"] >= 0
    return str(compilation)


def exchanged(tmp_path: Path) -> str:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return str(rank_agreement._exchange("0", {}))
    finally:
        dist.destroy_process_group()


def checked_on_a_device(tmp_path: Path) -> str:
    value, ok = (torch.empty(1, dtype=t, device="meta") for t in (torch.int64, torch.bool))
    return str(require_rows._init_fn(value, ok, "row {row} is lost"))


def compiled_anew(_: Path) -> str:
    torch.compiler.reset()
    with fresh_cache():
        return str(torch.compile(lambda x: x.softmax(-1).sin(), backend="dart")(torch.ones(8, 8)))


def reset_on_cuda(tmp_path: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return str(torch.compiler.reset())


USES: dict[str, Callable[[Path], object]] = {
    "DataDependentOutputException DynamicOutputShapeException FailOnRecompileLimitHit "
    "TorchDynamoException is_in_any_mode_without_ignore_compile_internals": lambda _: (
        dartfx.compile(Tiny(), **EAGER)(*prompt("cpu"))
    ),
    "BackendCompilerFailed RestartAnalysis InstructionTranslatorBase LazySymNodeFormatString "
    "LazyVariableTracker StringFormatVariable FakeTensor FakeTensorMode enable_python_dispatcher "
    "set_grad_enabled enter_autocast exit_autocast autograd_function_apply TensorPropertySource "
    "FunctionalTensorMode HigherOrderOperator InstructionTranslator "
    "callback_handler TensorVariable TupleVariable ConstantVariable install_guard "
    "TorchInGraphFunctionVariable wrap_fx_proxy check check_tensor_all": lambda _: pruned(),
    "aot_eager": lambda _: pruned("aot_eager"),
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": lambda _: missing_classes(),
    "compilation_time_metrics counters inductor_metrics": measured,
    "compile_fx": lambda _: pruned("inductor"),
    "list_mode_options": lambda _: pruned("inductor", mode="max-autotune"),
    "list_options inductor_config": lambda _: dartfx.DartConfig(inductor={"max_autotune": True}),
    "get_qualified_name trace_structured PyCodeCache is_traceable_wrapper_subclass "
    "get_metrics_context CompileContext": dumped,
    "Mod PythonMod pytree replace_autocast_with_hop_pass replace_set_grad_with_hop_pass "
    "wrap_with_autocast wrap_with_set_grad_enabled": exported,
    "OptimizedModule dynamo_config": explained,
    "ConstantSource": replayed,
    "AsyncCompile get_compile_threads CppPythonBindingsCodeCache": compiled_anew,
    "get_cpp_compiler InvalidCxxCompiler": lambda _: next(
        str(f) for f in doctor.examine("inductor", quick=True) if "C++" in str(f)
    ),
    "get_compiler_version_info cache_dir": lambda _: compiled_kernels.give(
        {}, compiled_kernels.built_by()
    ),
    "assert_async": checked_on_a_device,
    "maybe_mark_dynamic": lambda _: call_budget.CallBudget("tokens", 3).as_input(()),
    "reset_cudagraph_trees": reset_on_cuda,
    "get_default_store resolve_process_group": exchanged,
    "maybe_install_capturing_hooks output_capturing": lambda _: dartfx.compile(Tiny(), **EAGER),
}
USE = {name: use for names, use in USES.items() for name in names.split()}


@pytest.mark.parametrize("name", compat.NAMES)
def test_what_needs_a_missing_name_says_so_or_does_without(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    renamed = replace(compat.NAMES[name], attribute="renamed_by_a_later_version")
    monkeypatch.setitem(compat.NAMES, name, renamed)
    assert compat.missing() == [renamed]
    assert "renamed_by_a_later_version" in str(doctor._private_names())
    try:
        outcome = str(USE[name](tmp_path))
    except Exception as error:  # ours, or dynamo's around ours
        outcome = f"NOT pruned: {error}"
    assert "NOT pruned" not in outcome or str(renamed) in outcome


def test_every_module_can_be_imported_without_any_of_them() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_is_used_and_every_use_is_listed() -> None:
    text = "\n".join(path.read_text() for path in sources("dartfx", "passes"))
    used = set(re.findall(r"\bcompat\.([A-Za-z_]+)", text))
    used |= {n for call in re.findall(r"compat\.(?:find|errors)\(([^)]*)\)", text)
             for n in re.findall(r'"(\w+)"', call)}  # fmt: skip
    used -= {*compat.__all__, "py"}
    assert used == set(compat.NAMES)
