"""Error texts that show a size do not fix that size, so images of all sizes share one graph.

transformers checks every merge with a text like ``f"tokens: {mask.sum()}, features:
{features.shape[0]}"``.  torch.compile drops the text, yet dynamo (torch 2.11 to 2.13) joins its
parts at once and guards on the number shown: each image size compiles anew, and past
``recompile_limit`` the model runs eagerly, so unpruned.  A text that also shows a tensor is put
together only after the graph (dynamo's StringFormatVariable); here the sizes in such a text wait
until then, too.  Later torch goes the same way (pytorch/pytorch#185035).
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from typing import Any

from torch._dynamo.symbolic_convert import InstructionTranslatorBase
from torch._dynamo.variables.lazy import LazySymNodeFormatString, LazyVariableTracker
from torch._dynamo.variables.misc import StringFormatVariable

__all__ = ["keep_sizes_symbolic"]

Handler = Callable[[Any, dis.Instruction], None]


def keep_sizes_symbolic(ours: Callable[[object], bool]) -> None:
    """Let dynamo delay texts with sizes and tensors in the frames it traces for our backend.

    ours: whether what dynamo calls with a frame's graph is that backend; no other torch.compile in
    the process is touched.  To be called once.
    """
    opcode = dis.opmap["BUILD_STRING"]
    for translator in _with_subclasses(InstructionTranslatorBase):
        table = translator.dispatch_table
        table[opcode] = _delaying(table[opcode], ours)


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _with_subclasses(below)


def _delaying(build: Handler, ours: Callable[[object], bool]) -> Handler:
    def build_string(translator: Any, instruction: Any) -> None:
        parts = translator.stack[-instruction.arg :]
        # type() and not isinstance(), for which dynamo looks into, and so fixes, a lazy variable.
        shows_tensor = any(type(part) is StringFormatVariable for part in parts)
        if shows_tensor and ours(translator.output.compiler_fn):
            translator.stack[-instruction.arg :] = map(_delayed, parts)
        build(translator, instruction)

    return build_string


def _delayed(part: Any) -> Any:
    """A size waiting to be shown as text, as a text of its own to be made after the graph."""
    if type(part) is not LazyVariableTracker or part.is_realized():
        return part
    waiting = part._cache.value
    if not isinstance(waiting, LazySymNodeFormatString):
        return part
    return StringFormatVariable(waiting.fmt_var.as_python_constant(), [waiting.sym_node_var], {})
