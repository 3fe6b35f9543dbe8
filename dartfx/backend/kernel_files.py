"""Several of Inductor's C++ kernels compiled as one file.

Inductor compiles every kernel of a CPU graph as a file of its own, and two thirds of what a file
costs are the same for any: reading the headers, and linking.  A pruned graph has about twice the
kernels of the plain one, since its layers have two lengths.  Here up to ``AT_ONCE`` kernels share a
file, each in a namespace of its own, with the text, the flags and the Python bindings that Inductor
gives it alone.  The code that calls them stays as it is, so caches hold the same code.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

from dartfx import compat

__all__ = ["AT_ONCE", "shared_files"]

log = logging.getLogger(__name__)

# Kernels in a file.  Files are compiled in parallel where Inductor has threads for that.
AT_ONCE = 12

_active: ContextVar[bool] = ContextVar("dartfx_shared_kernel_files", default=False)
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
    token = _active.set(True)
    try:
        yield
    finally:
        _active.reset(token)


def _install(asynchronous: Any) -> None:
    """Make Inductor's code collect the kernels it asks for until it waits for them."""
    if asynchronous in _installed:
        return
    _installed.add(asynchronous)
    one, wait = asynchronous.cpp_pybinding, asynchronous.wait

    def cpp_pybinding(self: Any, argtypes: list[str], source_code: str) -> Any:
        kernel = Kernel(argtypes, source_code)
        return kernel if _active.get() and kernel.may_share else one(self, argtypes, source_code)

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
    if not kernels:
        return {}
    names = list(kernels)
    groups = [names[i : i + AT_ONCE] for i in range(0, len(names), AT_ONCE)]
    # Without threads, submit would call a function that takes a lock, while that is held.
    parallel = submit if compat.get_compile_threads() > 1 else None
    load_async = _bindings(0).load_async
    texts = [_text([kernels[name] for name in group]) for group in groups]
    files = [load_async(text, submit_fn=parallel) for text in texts]
    found: dict[str, Any] = {}
    for group, load in zip(groups, files, strict=True):
        library = load()
        for number, name in enumerate(group):
            module = _bindings(number)._load_library_inner(library.__file__, library.key)
            found[name] = getattr(module, _name(number))
    return found


def _name(number: int) -> str:
    return f"kernel_{number}"


def _bindings(number: int) -> Any:
    """Inductor's class that loads kernels as Python modules, for this kernel of a file."""
    inductor = compat.CppPythonBindingsCodeCache
    return type(inductor.__name__, (inductor,), {"entry_function": _name(number)})


def _text(kernels: Sequence[Kernel]) -> str:
    """A file of kernels, and behind them, as they have macros, the bindings of each."""
    sources = [_DEFINITION.sub(rf"\1{_name(n)}(", k.source) for n, k in enumerate(kernels)]
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
    inductor = compat.CppPythonBindingsCodeCache
    types = [each.replace("const ", "") for each in kernel.argument_types]
    arguments = ", ".join(f"parse_arg<{each}>(args, {i})" for i, each in enumerate(types))
    call = inductor.call_entry_function.format(arguments)
    text: str = inductor.suffix_template.format(
        arg_len=len(types),
        call_entry_func=_name(number) + call.removeprefix(inductor.entry_function),
        entry_func=_name(number),
        extra_parse_arg=inductor.extra_parse_arg,
    )
    return text
