"""What dynamo does differently in the frames that it traces for our backend.

*Error texts that show a size* do not fix that size, so images of all sizes share one graph.
transformers checks every merge with a text like ``f"tokens: {mask.sum()}, features:
{features.shape[0]}"``.  torch.compile drops the text, yet dynamo (torch 2.11 to 2.13) joins its
parts at once and guards on the number shown: each image size is compiled again, and past
``recompile_limit`` the model runs eagerly, so unpruned.  A text that also shows a tensor is put
together only after the graph (dynamo's StringFormatVariable); here the sizes in such a text wait
until then, too.  Later torch goes the same way (pytorch/pytorch#185035).

*Rows of hidden states picked by a mask*, ``hidden[mask]``, do not break the graph, as they do not
with ``fullgraph=True``.  DeepStack adds features to such rows between decoder layers, and where
that breaks the graph every layer is one of its own.  ``capture_dynamic_output_shape_ops`` would
capture them as well, but in all frames, of which some must break for their numbers to be known.

*Branches on token ids*, ``if (input_ids == image_token).any():``, do not break the graph either
where one input of the frame decides them: the branch that this call takes is traced, and a guard
holds the answer.  Without, the break stands between the merge and the decoder, or in every layer
that routes tokens by their type.  The model waits for the answer in any case.

Dynamo traces a frame before it calls the backend, so the first compilation is too late to install
this.  It is installed when the backend is looked up (``dartfx.backend.dart``, which is what
``torch.compile(backend="dart")`` resolves) and by ``dartfx.compile``; never by an import alone.
"""

from __future__ import annotations

import dataclasses
import dis
import inspect
import logging
import operator
import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from dartfx import compat
from dartfx.compat import Unavailable

__all__ = ["CHANGES", "install", "uninstall"]

log = logging.getLogger(__name__)

Handler = Callable[[Any, dis.Instruction], None]
Ours = Callable[[object], bool]
Wrap = Callable[[Handler], Handler]

_LOCK = threading.Lock()
_attempted = False
_replaced: list[tuple[Any, int, Handler]] = []


def install(ours: Ours) -> bool:
    """Change dynamo's handling of these instructions in the frames it traces for our backend.

    ours: whether what dynamo calls with a frame's graph is that backend; no other torch.compile in
    the process changes.  Idempotent.  Returns whether all is installed; where torch differs from
    what is expected that change is not made, and one log line reports it.
    """
    global _attempted
    with _LOCK:
        if not _attempted:
            _attempted = True
            for name, (handling, without) in CHANGES.items():
                try:
                    _replace(name, handling, ours)
                except Unavailable as error:
                    log.warning("%s: %s", without, error)
        return len({opcode for _, opcode, _ in _replaced}) == len(CHANGES)


def uninstall() -> None:
    """Restore dynamo's own handlers; :func:`install` may then be called again."""
    global _attempted
    with _LOCK:
        for table, opcode, handler in _replaced:
            table[opcode] = handler
        _replaced.clear()
        _attempted = False


def _replace(name: str, handling: Callable[[Ours], Wrap], ours: Ours) -> None:
    """Wrap the handler of one instruction in every table.  Raises Unavailable, changing nothing."""
    translator, wrap = compat.InstructionTranslatorBase, handling(ours)
    opcode = dis.opmap.get(name)
    if opcode is None:
        raise Unavailable(f"this Python has no {name} instruction")
    tables: dict[int, Any] = {}
    for cls in _with_subclasses(translator):
        table = getattr(cls, "dispatch_table", None)
        try:
            fits = table is not None and callable(table[opcode])
        except (LookupError, TypeError):
            fits = False
        if not fits:
            raise Unavailable(f"dynamo's {cls.__name__} has no handler for {name}")
        tables[id(table)] = table
    for table in tables.values():
        _replaced.append((table, opcode, table[opcode]))
        table[opcode] = wrap(table[opcode])


def _with_subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    yield cls
    for below in cls.__subclasses__():
        yield from _with_subclasses(below)


# --- texts --------------------------------------------------------------------------------------


class _Types(NamedTuple):
    """Dynamo's classes of what a text is made of."""

    text: type[Any]
    lazy: type[Any]
    lazy_size: type[Any]


def _delayed_texts(ours: Ours) -> Wrap:
    types = _Types(
        compat.StringFormatVariable, compat.LazyVariableTracker, compat.LazySymNodeFormatString
    )
    try:
        inspect.signature(types.text).bind("{}", [], {})
    except (TypeError, ValueError) as error:
        raise Unavailable(
            f"dynamo's StringFormatVariable takes other arguments: {error}"
        ) from error

    def wrap(build: Handler) -> Handler:
        def build_string(translator: Any, instruction: Any) -> None:
            parts = translator.stack[-instruction.arg :]
            # type() and not isinstance(), for which dynamo looks into a lazy variable and fixes it.
            shows_tensor = any(type(part) is types.text for part in parts)
            if shows_tensor and ours(translator.output.compiler_fn):
                translator.stack[-instruction.arg :] = [_delayed(part, types) for part in parts]
            build(translator, instruction)

        return build_string

    return wrap


def _delayed(part: Any, types: _Types) -> Any:
    """A size in an error text, which is formatted only after the graph has run."""
    if type(part) is not types.lazy or part.is_realized():
        return part
    waiting = part._cache.value
    if not isinstance(waiting, types.lazy_size):
        return part
    return types.text(waiting.fmt_var.as_python_constant(), [waiting.sym_node_var], {})


# --- rows picked by a mask ----------------------------------------------------------------------


def _captured_rows(ours: Ours) -> Wrap:
    lazy, tensor, tuples = compat.LazyVariableTracker, compat.TensorVariable, compat.TupleVariable

    def example(variable: Any) -> Any:
        if type(variable) is lazy:
            variable = variable.realize()  # as indexing is about to
        node = variable.as_proxy().node if isinstance(variable, tensor) else None
        return None if node is None else node.meta.get("example_value")

    def picks_rows(of: Any, key: Any) -> bool:
        value = example(of)
        if not isinstance(value, Tensor) or value.ndim != 3 or not value.is_floating_point():
            return False
        key = key.realize() if type(key) is lazy else key
        mask = example(key.items[0] if isinstance(key, tuples) and key.items else key)
        return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim in (2, 3)

    def wrap(index: Handler) -> Handler:
        def binary_subscr(translator: Any, instruction: Any) -> None:
            if ours(translator.output.compiler_fn) and picks_rows(*translator.stack[-2:]):
                _allow_dynamic_shapes(translator.output.shape_env)
            index(translator, instruction)

        return binary_subscr

    return wrap


def _allow_dynamic_shapes(shape_env: Any) -> None:
    """Let operators of this frame from here on have outputs whose sizes depend on data.

    For as long as its graph lives, since the passes and Inductor trace it again.
    """
    settings = shape_env.settings
    shape_env.settings = dataclasses.replace(settings, allow_dynamic_output_shape_ops=True)


# --- branches that an input decides -------------------------------------------------------------

# What may stand between an input and the answer: it is computed once more for each guard.
_TESTS: frozenset[object] = frozenset(
    {
        *(operator.eq, operator.ne, operator.gt, operator.lt, operator.ge, operator.le),
        *(operator.invert, torch.any, torch.all, torch.eq, torch.ne),
    }
)
_COMPARED = {"__eq__", "__ne__", "__gt__", "__lt__", "__ge__", "__le__", "__invert__"}  # torch 2.11
_TEST_METHODS = _COMPARED | {"any", "all", "bool", "eq", "ne", "to", "unsqueeze", "view", "reshape"}


class _Question(NamedTuple):
    """Calls that take an input [B, S] of the frame to a bool, first to last."""

    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...]

    def __call__(self, value: Any) -> bool:
        for function, args, kwargs in self.steps:
            filled = [value if argument is Tensor else argument for argument in args]
            value = function(*filled, **kwargs)
        return bool(value)


def _computed_from(node: Node) -> tuple[Node, _Question] | None:
    """The one input that a bool is computed from, and how; None where it is not as simple."""
    steps: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    while node.op != "placeholder":
        method = node.op == "call_method" and node.target in _TEST_METHODS
        if not (method or (node.op == "call_function" and node.target in _TESTS)):
            return None
        if len(node.all_input_nodes) != 1 or any(isinstance(v, Node) for v in node.kwargs.values()):
            return None
        function = getattr(Tensor, str(node.target)) if method else node.target
        args = tuple(Tensor if isinstance(argument, Node) else argument for argument in node.args)
        steps.append((function, args, dict(node.kwargs)))
        node = node.all_input_nodes[0]
    return node, _Question(tuple(reversed(steps)))


def _decided_branches(ours: Ours) -> Wrap:
    tensor, constant = compat.TensorVariable, compat.ConstantVariable
    install_guard, fake = compat.install_guard, compat.FakeTensor

    def answer(variable: Any) -> bool | None:
        computed = _computed_from(variable.as_proxy().node)
        given = computed and computed[0].meta.get("grapharg")
        if not computed or given is None or given.source is None or _written(computed[0]):
            return None
        value = given.example
        if not isinstance(value, Tensor) or isinstance(value, fake) or value.is_floating_point():
            return None
        found = computed[1](value)
        guard = partial(_guard_answer, question=computed[1], answer=found)
        install_guard(given.source.make_guard(guard))
        return found

    def wrap(jump: Handler) -> Handler:
        def jump_if(translator: Any, instruction: Any) -> None:
            value = translator.stack[-1]
            if isinstance(value, tensor) and ours(translator.output.compiler_fn):
                found = answer(value)
                if found is not None:
                    translator.stack[-1] = constant.create(found)
            jump(translator, instruction)

        return jump_if

    return wrap


def _written(placeholder: Node) -> bool:
    """Whether a frame writes into its input, so that the answer may be another one inside."""
    methods = (str(user.target) for user in placeholder.users if user.op == "call_method")
    writes = (name[-1] == "_" and name not in _TEST_METHODS for name in methods)
    return any(writes) or any(u.target is operator.setitem for u in placeholder.users)


def _guard_answer(builder: Any, guard: Any, question: _Question, answer: bool) -> None:
    def same(value: Any) -> bool:
        return isinstance(value, Tensor) and question(value) == answer

    add = builder.get_guard_manager(guard).add_lambda_guard
    parts = [f"a branch on {guard.name} is {answer}"]
    try:
        add(same, parts, guard.user_stack)
    except TypeError:  # a torch that keeps no stack with it
        add(same, parts)


# As Python 3.11 and as later ones call them.
_JUMPS = [n for n in dis.opmap if re.fullmatch("POP_JUMP_(FORWARD_)?IF_(TRUE|FALSE)", n)]

# By instruction: what wraps its handler, and what it is like without.
CHANGES: dict[str, tuple[Callable[[Ours], Wrap], str]] = {
    "BUILD_STRING": (_delayed_texts, "images of different sizes may be compiled one by one"),
    "BINARY_SUBSCR": (_captured_rows, "forwards with DeepStack may stay unpruned"),
    **dict.fromkeys(_JUMPS, (_decided_branches, "branches on token ids break the graph")),
}
