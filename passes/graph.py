"""Reading and writing FX nodes: the one file that touches ``meta`` and inserts nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer, Proxy

from dartfx import compat
from dartfx.passes.casting import as_noted, notes_before

aten = torch.ops.aten
Size = int | torch.SymInt

# Of the user's code; scans.py is what dynamo traces in place of some functions.
_FILE = r'File "(?P<file>[^"]+)(?<!/dartfx/backend/tracing/scans.py)"'
_FRAME = re.compile(_FILE + r", line (?P<line>\d+), in (?P<fn>.+)\n\s*(?P<code>.*)")
# A module that is reached from its own forward, which something was wrapped around.
_BY_WRAPPED_FORWARD = re.compile(r"\.\w*forward(\.\w+|\[\d+\])*\.__self__(?=\.|$)")
_INDEXED = re.compile(r"^(?P<container>.+?)(?:\.(\d+)|\[(\d+)\])$")


def tensor(node: object) -> torch.Tensor | None:
    """The node's fake tensor, or None when it yields no single tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def sizes(node: Node) -> tuple[Size, ...]:
    """The node's shape.  Raises KeyError when the node yields no tensor."""
    value = tensor(node)
    if value is None:
        raise KeyError(f"{node} yields no tensor")
    return tuple(value.shape)


def expr(size: Size) -> sympy.Expr:
    """A size as a sympy expression; reading it installs no guard."""
    return sympy.Integer(size) if type(size) is int else size.node.expr  # type: ignore[union-attr]


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every input, decided without installing a guard."""
    if type(a) is int and type(b) is int:
        return a == b
    return bool(sympy.expand(expr(a) - expr(b)) == 0)


def is_one(size: Size) -> bool:
    """Whether a size is the constant 1."""
    return type(size) is int and size == 1


def hint(size: Size) -> int:
    """The size in the traced example; installs no guard."""
    if type(size) is int:
        return size
    if depends_on_data(size):
        raise ValueError(f"size {size} depends on data and has no example value")
    return int(size.node.hint)  # type: ignore[union-attr]


def depends_on_data(size: Size) -> bool:
    """Whether a size is known only once the graph has run (``nonzero``, a bool index)."""
    return type(size) is not int and size.node.hint is None  # type: ignore[union-attr]


def frame(node: Node) -> tuple[str, int, str, str] | None:
    """File, line, function and code of the innermost user frame, or None."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return None
    file, line, function, code = frames[-1]
    return file, int(line), function, code.strip()


def source_line(node: Node) -> str:
    """``file:line in function: code`` of the innermost user frame, or ""."""
    found = frame(node)
    return "{}:{} in {}: {}".format(*found) if found else ""


def module_paths(node: Node) -> list[str]:
    """Module paths that enclose the node, outermost first."""
    paths = (str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values())
    return [_BY_WRAPPED_FORWARD.sub("", path) for path in paths]


def split_index(path: str) -> tuple[str, int] | None:
    """``a.layers.3`` -> (``a.layers``, 3); None when the path does not end in an index."""
    match = _INDEXED.match(path)
    if match is None:
        return None
    return match["container"], int(match[2] or match[3])


@cache
def argument_names(target: object) -> tuple[str, ...]:
    """The names of an operator's arguments, in order."""
    schema = getattr(target, "_schema", None)
    return tuple(a.name for a in schema.arguments) if schema is not None else ()


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An ATen call's argument by its schema name, however it was passed."""
    if name in node.kwargs:
        return node.kwargs[name]
    names = argument_names(node.target)
    if name in names and names.index(name) < len(node.args):
        return node.args[names.index(name)]
    return default


def set_argument(node: Node, name: str, value: Any) -> None:
    """Replace an ATen call's argument by its schema name."""
    names = argument_names(node.target)
    if name in names and names.index(name) < len(node.args):
        node.update_arg(names.index(name), value)
    else:
        node.update_kwarg(name, value)


def packet(node: Node) -> Any:
    """The overload packet of an ATen call (``aten.view``), or the bare target."""
    return getattr(node.target, "overloadpacket", node.target)


def mutated_operands(node: Node) -> list[Node]:
    """The operands that an in-place ATen call writes to."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = [
        a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    values = [argument(node, name) for name in written]
    return [n for v in values for n in (v if isinstance(v, list) else [v]) if isinstance(n, Node)]


def _viewed(node: Node) -> Node | None:
    """The operand that the node's result is a view of."""
    first = node.args[0] if node.args else None
    if node.target is operator.getitem and isinstance(first, Node):
        return _viewed(first)  # one of several views, as ``chunk`` gives
    schema = getattr(node.target, "_schema", None)
    if schema is None or not any(r.alias_info is not None for r in schema.returns):
        return None
    return first if isinstance(first, Node) else None


def is_view(node: Node) -> bool:
    """Whether the node's result shares memory with an operand."""
    return _viewed(node) is not None


def bases(node: Node) -> list[Node]:
    """The value and every value that it is a view of: what a write to it writes to."""
    found = [node]
    while (base := _viewed(found[-1])) is not None:
        found.append(base)
    return found


def written_after(start: Node, value: Node, end: Node | None = None) -> list[Node]:
    """The calls between two nodes (or to the end) that write to what ``value`` is or views."""
    found, base, node = [], bases(value)[-1], start.next
    while node is not end and node.op != "root":
        if any(bases(w)[-1] is base for w in mutated_operands(node)):
            found.append(node)
        node = node.next
    return found


def is_state(node: Node) -> bool:
    """Whether a dynamo input is a parameter or a buffer."""
    return compat.STATIC_INPUT in node.meta.get("tensor_dict", {})


def only_of_state(node: Node) -> bool:
    """Whether a value is computed from parameters and buffers, and from no other input."""
    inputs = [n for n in upstream([node]) if n.op == "placeholder"]
    return bool(inputs) and all(map(is_state, inputs))


def upstream(nodes: Iterable[Node]) -> set[Node]:
    """Some nodes and all that they are computed from."""
    found, ahead = set[Node](), set(nodes)
    while ahead:
        found |= ahead
        ahead = {operand for node in ahead for operand in node.all_input_nodes} - found
    return found


def downstream(graph: Graph, starts: Iterable[Node]) -> list[Node]:
    """Every node computed from the starts' values, the starts included, in graph order.

    A value written in place (through a view, too) counts from the write on.  Sizes read off a
    tensor do not count: they are not data.
    """
    tainted = set(starts)
    reached = []
    for node in graph.nodes:
        from_start = node in tainted
        if not from_start and node.target is not aten.sym_size.int:
            from_start = any(i in tainted for i in node.all_input_nodes)
        if not from_start:
            continue
        reached.append(node)
        tainted.add(node)
        for written in mutated_operands(node):
            tainted.update(bases(written))
    return reached


def without_gradient(node: Node, before: Node | None) -> Node | None:
    """The call that turned gradients off for what follows ``node``, given that for ``node``."""
    if node.target is not compat.set_grad_enabled:
        return before
    return None if node.args[0] else before or node


def fake_mode(graph: Graph) -> compat.FakeTensorMode:
    """The fake mode of the graph's values.  Raises ValueError when it has none."""
    for node in graph.nodes:
        if isinstance(value := tensor(node), compat.FakeTensor):
            return value.fake_mode
    raise ValueError("the graph holds no fake tensors; normalise it first")


def evaluate(node: Node, mode: compat.FakeTensorMode) -> Any:
    """The node's fake value computed from its operands' recorded ones."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    # Composite operators read sizes in C++, which knows no symbols, unless Python takes them apart.
    with mode, torch.no_grad(), compat.enable_python_dispatcher(), as_noted(node):
        return node.target(*args, **kwargs)  # type: ignore[operator]


class Emitter:
    """Inserts calls before one anchor, each with its fake value, as ``emit(op, *args)``."""

    def __init__(self, anchor: Node) -> None:
        self.anchor = anchor
        self.graph = anchor.graph
        self.mode = fake_mode(anchor.graph)

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = notes_before(self.anchor)
        node.meta["val"] = evaluate(node, self.mode)
        return node

    def copy(self, node: Node, renamed: dict[Node, Node]) -> Node:
        """Insert a copy of ``node`` whose operands are renamed."""
        with self.graph.inserting_before(self.anchor):
            twin = self.graph.node_copy(node, lambda n: renamed.get(n, n))
        twin.meta = notes_before(self.anchor, node)
        twin.meta["val"] = evaluate(twin, self.mode)
        return twin

    def size(self, node: Node, dim: int) -> int | Node:
        """One size of ``node`` as an argument: a literal, or a node when it is symbolic."""
        size = sizes(node)[dim]
        return size if type(size) is int else self(aten.sym_size.int, node, dim)

    def shape(self, node: Node) -> list[int | Node]:
        """The sizes of ``node`` as arguments."""
        return [self.size(node, dim) for dim in range(len(sizes(node)))]

    def arithmetic(self, function: Callable[..., Any], *args: Any) -> int | Node:
        """``function`` on sizes, or lists of them: folded to a literal, else recorded as nodes."""
        tracer, before = GraphAppendingTracer(self.graph), self.anchor.prev
        with self.graph.inserting_before(self.anchor):
            operands: Any = map_arg(args, lambda node: cast(Node, Proxy(node, tracer)))
            result = function(*operands)
        while (node := before.next) is not self.anchor:
            node.meta["val"] = evaluate(node, self.mode)
            before = node
        return result.node if isinstance(result, Proxy) else int(result)


def value_of(arg: int | Node) -> Size:
    """A size argument's value: the literal, or the node's SymInt."""
    if isinstance(arg, Node):
        value: Size = arg.meta["val"]
        return value
    return arg


def render(module: GraphModule) -> str:
    """The graph as readable code with shapes and source lines."""
    return str(module.print_readable(print_output=False, include_stride=False))
