"""Error texts that show a size do not fix that size, so images of all sizes share one graph.

transformers checks every merge with a text like ``f"tokens: {mask.sum()}, features:
{features.shape[0]}"``.  torch.compile drops the text, yet dynamo (torch 2.11 to 2.13) joins its
parts at once and guards on the number shown: each image size is compiled again, and past
``recompile_limit`` the model runs eagerly, so unpruned.  A text that also shows a tensor is put
together only after the graph (dynamo's StringFormatVariable); here the sizes in such a text wait
until then, too.  Later torch goes the same way (pytorch/pytorch#185035).

Dynamo traces a frame before it calls the backend, so the first compilation is too late to install
this.  It is installed when the backend is looked up (``dartfx.backend.dart``, which is what
``torch.compile(backend="dart")`` resolves) and by ``dartfx.compile``; never by an import alone.
"""

from __future__ import annotations

import dis
import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dartfx import compat
from dartfx.compat import Unavailable

__all__ = ["install", "uninstall"]

log = logging.getLogger(__name__)

Handler = Callable[[Any, dis.Instruction], None]

_LOCK = threading.Lock()
_attempted = False
_replaced: list[tuple[Any, int, Handler]] = []


class _Types(NamedTuple):
    """Dynamo's classes that the handler looks for."""

    text: type[Any]
    lazy: type[Any]
    lazy_size: type[Any]


def install(ours: Callable[[object], bool]) -> bool:
    """Let dynamo delay texts with sizes and tensors in the frames it traces for our backend.

    ours: whether what dynamo calls with a frame's graph is that backend; no other torch.compile in
    the process changes.  Idempotent.  Returns whether it is installed; where torch differs from
    what is expected nothing is changed and one log line says so.
    """
    global _attempted
    with _LOCK:
        if _attempted:
            return bool(_replaced)
        _attempted = True
        try:
            opcode, types, tables = _expected()
        except Unavailable as error:
            log.warning("images of different sizes may be compiled one by one: %s", error)
            return False
        for table in tables:
            _replaced.append((table, opcode, table[opcode]))
            table[opcode] = _delaying(table[opcode], ours, types)
        return True


def uninstall() -> None:
    """Restore dynamo's own handlers; :func:`install` may then be called again."""
    global _attempted
    with _LOCK:
        for table, opcode, handler in _replaced:
            table[opcode] = handler
        _replaced.clear()
        _attempted = False


def _expected() -> tuple[int, _Types, list[Any]]:
    """The opcode, the classes and the dispatch tables.  Raises Unavailable where torch differs."""
    translator = compat.InstructionTranslatorBase
    types = _Types(
        compat.StringFormatVariable, compat.LazyVariableTracker, compat.LazySymNodeFormatString
    )
    opcode = dis.opmap.get("BUILD_STRING")
    if opcode is None:
        raise Unavailable("this Python has no BUILD_STRING instruction")
    try:
        inspect.signature(types.text).bind("{}", [], {})
    except (TypeError, ValueError) as error:
        raise Unavailable(
            f"dynamo's StringFormatVariable takes other arguments: {error}"
        ) from error
    tables: dict[int, Any] = {}
    for cls in _with_subclasses(translator):
        table = getattr(cls, "dispatch_table", None)
        try:
            fits = table is not None and callable(table[opcode])
        except (LookupError, TypeError):
            fits = False
        if not fits:
            raise Unavailable(f"dynamo's {cls.__name__} has no handler for BUILD_STRING")
        tables[id(table)] = table
    return opcode, types, list(tables.values())


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _with_subclasses(below)


def _delaying(build: Handler, ours: Callable[[object], bool], types: _Types) -> Handler:
    def build_string(translator: Any, instruction: Any) -> None:
        parts = translator.stack[-instruction.arg :]
        # type() and not isinstance(), for which dynamo looks into, and so fixes, a lazy variable.
        shows_tensor = any(type(part) is types.text for part in parts)
        if shows_tensor and ours(translator.output.compiler_fn):
            translator.stack[-instruction.arg :] = [_delayed(part, types) for part in parts]
        build(translator, instruction)

    return build_string


def _delayed(part: Any, types: _Types) -> Any:
    """A size waiting to be shown as text, as a text of its own to be made after the graph."""
    if type(part) is not types.lazy or part.is_realized():
        return part
    waiting = part._cache.value
    if not isinstance(waiting, types.lazy_size):
        return part
    return types.text(waiting.fmt_var.as_python_constant(), [waiting.sym_node_var], {})
