"""Several of Inductor's C++ kernels compiled as one file.

Inductor compiles every kernel of a CPU graph as a file of its own, and two thirds of what a file
costs are the same for any: reading the headers, and linking.  A pruned graph has about twice the
kernels of the plain one, since its layers have two lengths.  Here up to ``AT_ONCE`` kernels share a
file, each in a namespace of its own, with the text, the flags and the Python bindings that Inductor
gives it alone.  The code that calls them stays as it is, so caches hold the same code.  A file that
another process compiled and saved is loaded without asking Inductor for it.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from dartfx import compat
from dartfx.backend.warm_start import compiled_kernels

__all__ = ["AT_ONCE", "shared_files"]

log = logging.getLogger(__name__)

# Kernels in a file.  Files are compiled in parallel where Inductor has threads for that.
AT_ONCE = 12

# Of the compilation, where kernels share files.
_settings: ContextVar[str] = ContextVar("dartfx_kernel_settings", default="")
_LOCK = threading.Lock()
_installed: set[type] = set()

_INCLUDE = re.compile(r"^#include .*$\n?", re.MULTILINE)
_DEFINITION = re.compile(r'^(extern "C" +void +)kernel\(', re.MULTILINE)
_HEADER = "#include <torch/csrc/inductor/cpp_prefix.h>\n"


class Kernel(NamedTuple):
    """A kernel, until the code that calls it has asked for all of its kernels."""

    argument_types: Sequence[str]
    source: str

    @property
    def may_share(self) -> bool:
        """Whether it is one function without macros, which know no namespaces."""
        alone = len(re.findall(r"\bkernel\b", self.source)) == 1 and "#define" not in self.source
        headers = _INCLUDE.findall(self.source)
        return alone and headers == [_HEADER] and _DEFINITION.search(self.source) is not None

    def entry(self, number: int) -> str:
        """The name of its function as the kernel of this number in a file."""
        return f"kernel_{number}" if self.may_share else "kernel"


@contextmanager
def shared_files() -> Iterator[None]:
    """Let C++ kernels share files where code that calls them is loaded by this thread, inside of
    the ``with`` block.

    Does nothing for kernels of another form than the usual, or where torch compiles them otherwise.
    """
    asynchronous = compat.find("AsyncCompile")
    if asynchronous is not None:
        with _LOCK:
            _install(asynchronous)
    token = _settings.set(compiled_kernels.settings())
    try:
        yield
    finally:
        _settings.reset(token)


def _install(asynchronous: Any) -> None:
    """Make Inductor's code collect the kernels it asks for until it waits for them."""
    if asynchronous in _installed:
        return
    _installed.add(asynchronous)
    one, wait = asynchronous.cpp_pybinding, asynchronous.wait

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        compile_kernel = Kernel if _settings.get() else partial(one, self)
        return compile_kernel(argtypes, source_code)

    def wait_for_all(self: Any, scope: dict[str, Any]) -> None:
        waiting = {name: k for name, k in scope.items() if isinstance(k, Kernel)}
        try:
            scope.update(_compiled(waiting, self.submit))
        except Exception as error:
            log.warning("every kernel is compiled as a file, which takes longer: %s", error)
            scope.update({name: one(self, *kernel) for name, kernel in waiting.items()})
        wait(self, scope)

    asynchronous.cpp_pybinding, asynchronous.wait = cpp_pybinding, wait_for_all


def _compiled(kernels: dict[str, Kernel], submit: Callable[..., Any]) -> dict[str, Any]:
    """The Python function of every kernel."""
    # Without threads, submit would call a function that takes a lock, while that is held.
    parallel = submit if compat.get_compile_threads() > 1 else None
    groups = _groups(kernels)
    files = [_load_async([kernels[name] for name in group], parallel) for group in groups]
    found: dict[str, Any] = {}
    for group, load in zip(groups, files, strict=True):
        library = load()
        for number, name in enumerate(group):
            entry = kernels[name].entry(number)
            module = _bindings(entry)._load_library_inner(library.__file__, library.key)
            found[name] = getattr(module, entry)
    return found


def _groups(kernels: dict[str, Kernel]) -> list[list[str]]:
    """The kernels of each file."""
    shared = [name for name, kernel in kernels.items() if kernel.may_share]
    alone = [[name] for name, kernel in kernels.items() if not kernel.may_share]
    return [shared[i : i + AT_ONCE] for i in range(0, len(shared), AT_ONCE)] + alone


def _load_async(
    kernels: Sequence[Kernel], submit: Callable[..., Any] | None
) -> Callable[[], ModuleType]:
    """Start to compile a file that was not given; the function returned loads it."""
    text, bindings = _text(kernels), _bindings(kernels[0].entry(0))
    key = compiled_kernels.key_of(text, _settings.get())
    given = compiled_kernels.find(key)
    compiled = bindings.load_async(text, submit_fn=submit) if given is None else None

    def load() -> ModuleType:
        library: Any = compiled() if compiled else bindings._load_library(given, key)
        compiled_kernels.note(key, library.__file__)
        return library  # type: ignore[no-any-return]

    return load


def _bindings(entry: str) -> Any:
    """Inductor's class that loads kernels as Python modules, for this kernel of a file."""
    inductor = compat.CppPythonBindingsCodeCache
    return type(inductor.__name__, (inductor,), {"entry_function": entry})


def _text(kernels: Sequence[Kernel]) -> str:
    """A file of kernels, and behind them, as they have macros, the bindings of each."""
    if not kernels[0].may_share:
        (kernel,) = kernels
        return kernel.source + _bound(0, kernel)
    sources = [_DEFINITION.sub(rf"\1{k.entry(n)}(", k.source) for n, k in enumerate(kernels)]
    bound = [_bound(number, kernel) for number, kernel in enumerate(kernels)]
    includes = dict.fromkeys(i.strip() for part in sources + bound for i in _INCLUDE.findall(part))
    spaces = [
        f"namespace kernels_{number} {{\n{_INCLUDE.sub('', part)}\n}}"
        for parts in (sources, bound)
        for number, part in enumerate(parts)
    ]
    return "\n".join(["#define PY_SSIZE_T_CLEAN", *includes, *spaces]) + "\n"


def _bound(number: int, kernel: Kernel) -> str:
    """The Python bindings of a kernel, by Inductor's own template."""
    inductor, entry = compat.CppPythonBindingsCodeCache, kernel.entry(number)
    types = [each.replace("const ", "") for each in kernel.argument_types]
    arguments = ", ".join(f"parse_arg<{each}>(args, {i})" for i, each in enumerate(types))
    call = inductor.call_entry_function.format(arguments)
    text: str = inductor.suffix_template.format(
        arg_len=len(types),
        call_entry_func=entry + call.removeprefix(inductor.entry_function),
        entry_func=entry,
        extra_parse_arg=inductor.extra_parse_arg,
    )
    return text
