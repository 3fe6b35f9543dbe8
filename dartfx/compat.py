"""Every private name of torch and transformers that dartfx reads, each once.

``compat.FakeTensor`` looks the name up when it is used, never while dartfx is imported.  Where a
later version lacks a name, what needs it is refused with :class:`Unavailable`, which says so, or
does without (:func:`find`, :func:`errors`).  ``python -m dartfx doctor`` lists :func:`missing`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dartfx.errors import DartfxError

if TYPE_CHECKING:  # for annotations
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

__all__ = [
    "COMPILE_ID",
    "INPUT_SOURCE",
    "NAMES",
    "PARAMETER_SOURCES",
    "STATIC_INPUT",
    "PrivateName",
    "Unavailable",
    "errors",
    "find",
    "missing",
    "offloaded_caches_race",
]

# Looked for in the sources of the first and the last of these.
TORCH, TRANSFORMERS = "torch 2.11 to 2.13", "transformers 5.17 to 5.23"

# Dynamo's note in ``meta["tensor_dict"]`` of inputs that are parameters or buffers.
STATIC_INPUT = "_dynamo_static_input_type"

# By what AOTAutograd knows a graph of dynamo's, in which alone it reads that note: a key of the
# module's ``meta``, an attribute of the module and one of its placeholders.
COMPILE_ID, PARAMETER_SOURCES = "dynamo_compile_id", "_param_name_to_source"
INPUT_SOURCE = "_dynamo_source"


class Unavailable(DartfxError, RuntimeError):
    """A private name is not where it was in the versions it was seen in."""


@dataclass(frozen=True)
class PrivateName:
    """One private name: its module, its attribute ("" for the module itself) and what needs it."""

    module: str
    attribute: str
    use: str
    seen: str = TORCH

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}".removesuffix(".")

    def load(self) -> Any:
        """The object of this name.  Raises Unavailable, with the name and what needs it."""
        try:
            found = importlib.import_module(self.module)
            return getattr(found, self.attribute) if self.attribute else found
        except (ImportError, AttributeError) as error:
            raise Unavailable(f"{self} (seen in {self.seen}) is missing; {self.use}") from error


def _names(module: str, attributes: str, use: str, seen: str = TORCH) -> dict[str, PrivateName]:
    """Entries for names of one module, each under its own name without leading underscores."""
    return {a.lstrip("_"): PrivateName(module, a, use, seen) for a in attributes.split()}


_SIZES = "error texts that show a size do not fix that size"
_PICKED_ROWS = "rows of hidden states that a mask picks (DeepStack) do not break the graph"
_BRANCHES = "branches on token ids do not break the graph"
_CHECKS = "checks between a vision tower and its decoder do not break the graph"
_EXPORT = "exported programs are pruned"
_TIMES = "reports say what compiling took"
_FILES = "C++ kernels of a graph share files, which compiles faster"
_CXX = "doctor finds the C++ compiler, and load_cache compares it"

NAMES: dict[str, PrivateName] = {
    # Dynamo
    **_names(
        "torch._dynamo.exc",
        "BackendCompilerFailed FailOnRecompileLimitHit RestartAnalysis TorchDynamoException",
        "calls that are not one graph are compiled as several, and errors come out unwrapped",
    ),
    **_names(
        "torch._dynamo.symbolic_convert",
        "InstructionTranslatorBase",
        _SIZES,
    ),
    **_names(
        "torch._dynamo.symbolic_convert",
        "InstructionTranslator",
        "scans along the tokens (gated delta rule, Mamba-2) are one operator of the graph",
    ),
    **_names(
        "torch._dynamo",
        "maybe_mark_dynamic",
        "numbers of dartfx.budget take one compilation, not two",
    ),
    **_names("torch._dynamo.variables.lazy", "LazySymNodeFormatString LazyVariableTracker", _SIZES),
    **_names("torch._dynamo.variables.misc", "StringFormatVariable", _SIZES),
    **_names("torch._dynamo.variables.lists", "TupleVariable", _PICKED_ROWS),
    **_names("torch._dynamo.variables.tensor", "TensorVariable", _PICKED_ROWS),
    **_names("torch._dynamo.variables.constant", "ConstantVariable", _BRANCHES),
    **_names("torch._dynamo.guards", "install_guard", _BRANCHES),
    **_names("torch._dynamo.variables.torch", "TorchInGraphFunctionVariable", _CHECKS),
    **_names("torch._dynamo.variables.builder", "wrap_fx_proxy", _CHECKS),
    **_names("torch", "_check _check_tensor_all", _CHECKS),
    **_names(
        "torch._dynamo.source", "ConstantSource", "graphs with sizes of their own are re-traced"
    ),
    **_names(
        "torch._dynamo.source",
        "TensorPropertySource",
        "sliding windows whose length dynamo holds symbolic are pruned",
    ),
    **_names(
        "torch._dynamo.eval_frame",
        "OptimizedModule",
        "explain says that a wrapper's generate runs the original model",
    ),
    **_names(
        "torch._dynamo.backends.debugging", "aot_eager", 'lowering="aot_eager" compiles graphs'
    ),
    **_names(
        "torch._dynamo",
        "callback_handler",
        "dynamo's errors in code behind a pruned graph say that the sequence is shorter; scans of "
        "models that are loaded after the backend was looked up are operators, too",
    ),
    "dynamo_config": PrivateName(
        "torch._dynamo.config",
        "",
        "explain and bench compile the same code many times; calls say that compiling is disabled",
    ),
    **_names(
        "torch._dynamo.utils",
        "get_metrics_context",
        "the index of a dump names the guard that made dynamo compile again",
    ),
    **_names(
        "torch._guards",
        "CompileContext",
        "the index of a dump names dynamo's frames; the last compilation allowed is reported",
    ),
    # Inductor
    **_names("torch._inductor.compile_fx", "compile_fx", 'lowering="inductor" compiles graphs'),
    **_names("torch._inductor", "list_mode_options", "the option mode is checked and applied"),
    **_names("torch._inductor", "list_options", "the option inductor is checked"),
    "inductor_config": PrivateName("torch._inductor.config", "", "the option inductor is checked"),
    **_names("torch._dynamo.utils", "compilation_time_metrics counters", _TIMES),
    "inductor_metrics": PrivateName("torch._inductor.metrics", "", _TIMES),
    **_names(
        "torch._inductor.codecache", "PyCodeCache", "dumps and reports name the file of the code"
    ),
    **_names("torch._inductor.async_compile", "AsyncCompile get_compile_threads", _FILES),
    **_names("torch._inductor.codecache", "CppPythonBindingsCodeCache cache_dir", _FILES),
    **_names(
        "torch._inductor.cudagraph_trees",
        "reset_cudagraph_trees",
        "torch.compiler.reset() frees CUDA graphs",
    ),
    **_names("torch._inductor.cpp_builder", "get_cpp_compiler get_compiler_version_info", _CXX),
    **_names("torch._inductor.exc", "InvalidCxxCompiler", _CXX),
    # Tracing
    **_names("torch._subclasses.fake_tensor", "FakeTensor FakeTensorMode", "graphs are re-traced"),
    **_names(
        "torch._subclasses.fake_tensor",
        "DataDependentOutputException DynamicOutputShapeException",
        "calls that are not one graph are compiled as several",
    ),
    **_names(
        "torch._subclasses.functional_tensor",
        "FunctionalTensorMode",
        "Inductor fuses the selection instead of calling it",
    ),
    **_names("torch._dispatch.python", "enable_python_dispatcher", "new nodes get fake values"),
    **_names(
        "torch.utils._python_dispatch",
        "is_traceable_wrapper_subclass",
        "a dump leaves the shards of tensor-parallel inputs out",
    ),
    **_names(
        "torch.utils._python_dispatch",
        "is_in_any_mode_without_ignore_compile_internals",
        "a call inside a dispatch mode is refused before it runs",
    ),
    **_names("torch", "_assert_async", "a GPU reports rows that lose text"),
    **_names("torch._C", "_set_grad_enabled", "regions without gradients are found"),
    **_names(
        "torch.amp.autocast_mode",
        "_enter_autocast _exit_autocast",
        "regions under autocast are found",
    ),
    **_names(
        "torch._functorch.autograd_function",
        "autograd_function_apply",
        "functions with a custom backward are found",
    ),
    **_names("torch._ops", "HigherOrderOperator", "regions that are calls are looked into"),
    **_names("torch.fx.node", "_get_qualified_name", "dumps hold a repro.py"),
    **_names("torch._logging._internal", "trace_structured", "TORCH_TRACE shows what was done"),
    # torch.export
    **_names(
        "torch._export.passes.replace_autocast_with_hop_pass",
        "replace_autocast_with_hop_pass",
        _EXPORT,
    ),
    **_names(
        "torch._export.passes.replace_set_grad_with_hop_pass",
        "replace_set_grad_with_hop_pass",
        _EXPORT,
    ),
    **_names(
        "torch._higher_order_ops.wrap", "wrap_with_autocast wrap_with_set_grad_enabled", _EXPORT
    ),
    **_names("torch.utils._sympy.functions", "Mod PythonMod", _EXPORT),
    "pytree": PrivateName("torch.utils._pytree", "", _EXPORT),
    # Tensor parallelism
    **_names(
        "torch.distributed.distributed_c10d",
        "_get_default_store _resolve_process_group",
        "the ranks of a tensor-parallel model agree on what is pruned",
    ),
    # transformers
    **_names(
        "transformers.models.auto.modeling_auto",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "families --new lists the classes that no family covers",
        TRANSFORMERS,
    ),
    "output_capturing": PrivateName(
        "transformers.utils.output_capturing",
        "",
        "vision towers run in threads while another thread compiles",
        TRANSFORMERS,
    ),
    **_names(
        "transformers.utils.output_capturing",
        "maybe_install_capturing_hooks",
        "dartfx.compile installs hooks that would break the graph of the first call",
        TRANSFORMERS,
    ),
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return NAMES[name].load()


def find(name: str) -> Any:
    """The object that ``compat.<name>`` is; None where this version lacks it."""
    try:
        return NAMES[name].load()
    except Unavailable:
        return None


def errors(*names: str) -> tuple[type[Exception], ...]:
    """Those of the exception classes that this version has, for an ``except`` clause."""
    return tuple(found for name in names if (found := find(name)) is not None)


def missing() -> list[PrivateName]:
    """Every name listed here that this version lacks; those of a package that is not installed
    do not count."""
    packages = {name.module.partition(".")[0] for name in NAMES.values()}
    installed = {package for package in packages if importlib.util.find_spec(package)}
    listed = [n for n in NAMES.values() if n.module.partition(".")[0] in installed]
    return [name for name in listed if not _is_present(name)]


def _is_present(name: PrivateName) -> bool:
    try:
        name.load()
    except Unavailable:
        return False
    return True


def offloaded_caches_race() -> bool:
    """Whether transformers copies an offloaded layer back to the device before it has left it.

    Up to 5.19 ``Cache.update`` lets the default stream wait for the stream that copies layers back,
    but not the other way round.
    """
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    return (int(major), int(minor)) < (5, 20)
