"""How each ATen operator relates its dims: the table behind axis inference.

A rule gets ``(axes, node, out)``.  ``out`` is ``node``, or one ``getitem`` of a multi-output
call.  It ties dims that the operator keeps one to one, and *handles* dims that it sums away in a
way that does not depend on token order.  A dim that a rule leaves alone is opaque: if the token
axis reaches it after the cut, the graph is declined and the operator named.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from .graph import argument, aten, expr, hint, is_one, packet, same_size, sizes, tensor

if TYPE_CHECKING:
    from .axes import Axes

Rule = Callable[["Axes", Node, Node], None]
RULES: dict[object, Rule] = {}
END = torch.iinfo(torch.int64).max


def rule(*packets: object) -> Callable[[Rule], Rule]:
    """Register a rule for operator packets."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(packets, function))
        return function

    return register


def _named(*names: str) -> tuple[object, ...]:
    """ATen packets by name; those this torch does not have are left out."""
    return tuple(getattr(aten, n) for n in names if hasattr(aten, n))


_MANY = set(
    _named(
        "split", "split_with_sizes", "chunk", "tensor_split", "unbind", "topk", "max", "min",
        "sort", "cummax", "native_layer_norm",
    )
)  # fmt: skip


def relate(axes: Axes, node: Node) -> None:
    """Apply the rule of ``node``'s operator, if there is one."""
    if node.op != "call_function":
        return
    if node.target is operator.getitem:
        source = node.args[0]
        if isinstance(source, Node) and tensor(node) is not None:
            known = RULES.get(packet(source)) if packet(source) in _MANY else None
            if known is not None:
                known(axes, source, node)
        return
    if tensor(node) is None:
        return
    known = RULES.get(packet(node))
    if known is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
        known = broadcast
    if known is not None:
        known(axes, node, node)


# --- one value to one value -----------------------------------------------------------------


@rule(*_named("__and__", "__or__", "__xor__", "dropout", "masked_fill", "where", "copy_", "rsub"))
def broadcast(axes: Axes, node: Node, out: Node) -> None:
    """Pointwise: dims align from the right."""
    for operand in node.all_input_nodes:
        _align(axes, node, operand, out)


def _align(axes: Axes, node: Node, operand: Node, out: Node) -> None:
    if tensor(operand) is not None:
        for back in range(1, min(len(sizes(operand)), len(sizes(out))) + 1):
            axes.tie(node, (operand, -back), (out, -back))


@rule(
    *_named(
        "to", "_to_copy", "type_as", "alias", "detach", "detach_", "clone", "contiguous",
        "lift_fresh", "lift_fresh_copy", "zeros_like", "ones_like", "full_like", "empty_like",
        "rand_like", "randn_like", "softmax", "_softmax", "_safe_softmax", "log_softmax",
        "_log_softmax", "fill_", "zero_", "bernoulli", "bernoulli_",
    )
)  # fmt: skip
def same_shape(axes: Axes, node: Node, out: Node) -> None:
    """The first operand's dims, unchanged.  Softmax weighs tokens but does not order them."""
    first = node.all_input_nodes[0]
    for dim in range(len(sizes(out))):
        axes.tie(node, (first, dim), (out, dim))


@rule(*_named("layer_norm", "rms_norm", "native_layer_norm"))
def normalise_last(axes: Axes, node: Node, out: Node) -> None:
    """Normalised over trailing dims; weights align with them."""
    first, *rest = node.all_input_nodes
    if len(sizes(out)) == len(sizes(first)):
        for operand in (first, *rest):
            _align(axes, node, operand, out)


@rule(*_named("masked_scatter", "masked_scatter_"))
def masked_scatter(axes: Axes, node: Node, out: Node) -> None:
    """Takes the source's rows by how many True came before, so the mask's dims stay opaque."""
    _align(axes, node, argument(node, "self"), out)
    mask = argument(node, "mask")
    for back in range(1, len(sizes(mask)) + 1):
        axes.unify((mask, -back), (out, -back))


@rule(*_named("index_put", "index_put_"))
def index_put(axes: Axes, node: Node, out: Node) -> None:
    """Written at positions that the indices name: the shape stays, every dim is opaque."""
    first = argument(node, "self")
    for dim in range(len(sizes(out))):
        axes.unify((first, dim), (out, dim))


@rule(*_named("cumsum", "cumprod", "cummax", "logcumsumexp", "flip", "roll", "sort", "argsort"))
def ordered(axes: Axes, node: Node, out: Node) -> None:
    """Keeps its shape but reads positions along some dims: those stay opaque."""
    first = node.all_input_nodes[0]
    dims = argument(node, "dim", argument(node, "dims", -1))
    if packet(node) is aten.roll and not argument(node, "dims"):
        return  # rolls the flattened tensor
    reading = {d % len(sizes(out)) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    for dim in range(len(sizes(out))):
        if dim in reading:
            axes.unify((first, dim), (out, dim))
        else:
            axes.tie(node, (first, dim), (out, dim))


@rule(*_named("tril", "triu"))
def triangle(axes: Axes, node: Node, out: Node) -> None:
    """Reads positions of the last two dims."""
    first = node.all_input_nodes[0]
    for dim in range(len(sizes(out))):
        if dim < len(sizes(out)) - 2:
            axes.tie(node, (first, dim), (out, dim))
        else:
            axes.unify((first, dim), (out, dim))


# --- moving dims ----------------------------------------------------------------------------


def _permuted(axes: Axes, node: Node, out: Node, order: list[int]) -> None:
    first = node.all_input_nodes[0]
    for to, source in enumerate(order):
        axes.tie(node, (first, source), (out, to))


@rule(*_named("transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T"))
def transpose(axes: Axes, node: Node, out: Node) -> None:
    """Two dims trade places."""
    rank = len(sizes(out))
    order = list(range(rank))
    if len(node.args) >= 3:
        one, other = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    else:
        one, other = rank - 2, rank - 1
    if rank > 1:
        order[one], order[other] = order[other], order[one]
    _permuted(axes, node, out, order)


@rule(*_named("permute"))
def permute(axes: Axes, node: Node, out: Node) -> None:
    """Dims in a given order."""
    _permuted(axes, node, out, [d % len(sizes(out)) for d in argument(node, "dims")])


@rule(*_named("unsqueeze"))
def unsqueeze(axes: Axes, node: Node, out: Node) -> None:
    """A new size-1 dim."""
    first, at = node.all_input_nodes[0], argument(node, "dim") % len(sizes(out))
    for dim in range(len(sizes(first))):
        axes.tie(node, (first, dim), (out, dim if dim < at else dim + 1))


@rule(*_named("squeeze"))
def squeeze(axes: Axes, node: Node, out: Node) -> None:
    """Size-1 dims leave."""
    first = node.all_input_nodes[0]
    rank, dims = len(sizes(first)), argument(node, "dim")
    chosen = range(rank) if dims is None else (dims if isinstance(dims, list) else [dims])
    gone = {d % rank for d in chosen if is_one(sizes(first)[d])}
    kept = [d for d in range(rank) if d not in gone]
    for to, source in enumerate(kept):
        axes.tie(node, (first, source), (out, to))


@rule(*_named("expand", "expand_as", "broadcast_to"))
def expand(axes: Axes, node: Node, out: Node) -> None:
    """Size-1 dims repeat; new dims come in front."""
    _align(axes, node, node.all_input_nodes[0], out)


@rule(*_named("select"))
def select(axes: Axes, node: Node, out: Node) -> None:
    """One index of a dim.  The last token stays the last; any other may not survive."""
    first = node.all_input_nodes[0]
    at = argument(node, "dim") % len(sizes(first))
    for dim in range(len(sizes(out))):
        axes.tie(node, (first, dim if dim < at else dim + 1), (out, dim))
    if argument(node, "index") == -1:
        axes.handle(node, (first, at))


@rule(*_named("slice", "narrow"))
def slice_(axes: Axes, node: Node, out: Node) -> None:
    """A range of a dim.  All of it stays the axis; the last few tokens stay the last few."""
    first = node.all_input_nodes[0]
    at = argument(node, "dim", 0) % len(sizes(first))
    for dim in range(len(sizes(out))):
        if dim != at or same_size(sizes(first)[dim], sizes(out)[dim]):
            axes.tie(node, (first, dim), (out, dim))
    start, end = argument(node, "start"), argument(node, "end")
    if packet(node) is aten.slice and type(start) is int and start < 0 and end in (None, END):
        axes.handle(node, (first, at))


# --- regrouping dims ------------------------------------------------------------------------


@rule(*_named("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"))
def regroup(axes: Axes, node: Node, out: Node) -> None:
    """Memory order decides: equal running products delimit groups of dims."""
    if node.target is aten.view.dtype:
        return  # the same bytes read as another type
    first = node.all_input_nodes[0]
    for left, right in _groups(first, out):
        if len(left) == len(right) == 1:
            axes.tie(node, (first, left[0]), (out, right[0]))
        elif len(right) == 1 and left:
            axes.product((out, right[0]), tuple((first, d) for d in left))
            for dim in left:
                axes.handle(node, (first, dim))
        elif len(left) == 1 and right:
            axes.product((first, left[0]), tuple((out, d) for d in right))
            axes.handle(node, (first, left[0]))


def _groups(first: Node, out: Node) -> list[tuple[list[int], list[int]]]:
    """Matching runs of dims; size-1 dims pair up when both sides have as many before a run."""
    a, b = sizes(first), sizes(out)
    i = j = 0
    groups: list[tuple[list[int], list[int]]] = []
    while i < len(a) or j < len(b):
        ones_a, ones_b = [], []
        while i < len(a) and is_one(a[i]):
            ones_a.append(i)
            i += 1
        while j < len(b) and is_one(b[j]):
            ones_b.append(j)
            j += 1
        if len(ones_a) == len(ones_b):
            groups += [([x], [y]) for x, y in zip(ones_a, ones_b, strict=True)]
        if i >= len(a) and j >= len(b):
            break
        left, right, i, j = _run(a, b, i, j)
        groups.append((left, right))
    return groups


def _run(a: tuple, b: tuple, i: int, j: int) -> tuple[list[int], list[int], int, int]:  # type: ignore[type-arg]
    """The shortest runs from ``i`` and ``j`` with equal products.

    Equality is exact; the example's sizes only tell which side to lengthen.
    """
    left, right = ([i] if i < len(a) else []), ([j] if j < len(b) else [])
    i, j = i + len(left), j + len(right)
    product_a, product_b = _product(a, left), _product(b, right)
    while not bool((product_a[0] - product_b[0]).expand() == 0) and (i < len(a) or j < len(b)):
        if j >= len(b) or (i < len(a) and product_a[1] <= product_b[1]):
            left.append(i)
            i += 1
            product_a = _product(a, left)
        else:
            right.append(j)
            j += 1
            product_b = _product(b, right)
    return ([d for d in left if not is_one(a[d])] or left[:1],
            [d for d in right if not is_one(b[d])] or right[:1], i, j)  # fmt: skip


def _product(shape: tuple, dims: list[int]) -> tuple:  # type: ignore[type-arg]
    exact, example = expr(1), 1
    for dim in dims:
        exact, example = exact * expr(shape[dim]), example * hint(shape[dim])
    return exact, example


@rule(*_named("cat", "concat"))
def cat(axes: Axes, node: Node, out: Node) -> None:
    """Joined along one dim; an empty part joins nothing."""
    dim = argument(node, "dim", 0) % len(sizes(out))
    parts = [p for p in argument(node, "tensors") if not _is_empty(p)]
    for part in parts:
        for d in range(len(sizes(out))):
            if d != dim or len(parts) == 1:
                axes.tie(node, (part, d), (out, d))


def _is_empty(part: Node) -> bool:
    return any(type(s) is int and s == 0 for s in sizes(part))


@rule(*_named("stack"))
def stack(axes: Axes, node: Node, out: Node) -> None:
    """Joined along a new dim."""
    at = argument(node, "dim", 0) % len(sizes(out))
    for part in node.all_input_nodes:
        for dim in range(len(sizes(part))):
            axes.tie(node, (part, dim), (out, dim if dim < at else dim + 1))


@rule(*_named("split", "split_with_sizes", "chunk", "tensor_split", "unbind"))
def split(axes: Axes, node: Node, out: Node) -> None:
    """Cut along one dim, or (``unbind``) without it."""
    first = node.all_input_nodes[0]
    at = argument(node, "dim", 0) % len(sizes(first))
    gone = len(sizes(out)) < len(sizes(first))
    for dim in range(len(sizes(first))):
        if dim != at:
            axes.tie(node, (first, dim), (out, dim - 1 if gone and dim > at else dim))


@rule(*_named("repeat"))
def repeat(axes: Axes, node: Node, out: Node) -> None:
    """Dims repeated once stay; the others are new."""
    first, times = node.all_input_nodes[0], argument(node, "repeats")
    for back in range(1, len(sizes(first)) + 1):
        if type(times[-back]) is int and times[-back] == 1:
            axes.tie(node, (first, -back), (out, -back))


@rule(*_named("pad", "constant_pad_nd"))
def pad(axes: Axes, node: Node, out: Node) -> None:
    """Dims without padding stay."""
    first, amounts = node.all_input_nodes[0], argument(node, "pad")
    for back in range(1, len(sizes(out)) + 1):
        if all(a == 0 for a in amounts[2 * back - 2 : 2 * back]):
            axes.tie(node, (first, -back), (out, -back))


# --- reductions and products ----------------------------------------------------------------


@rule(*_named("mean", "sum", "amax", "amin", "any", "all", "var", "std", "logsumexp", "norm",
              "linalg_vector_norm", "max", "min", "topk"))  # fmt: skip
def reduce(axes: Axes, node: Node, out: Node) -> None:
    """Dims summed away do not depend on token order; which index won does, so it stays opaque."""
    first = node.all_input_nodes[0]
    rank = len(sizes(first))
    if packet(node) in (aten.max, aten.min) and len(node.all_input_nodes) == 2:
        broadcast(axes, node, out)
        return
    dims = argument(node, "dim")
    if dims is None:
        dims = [-1] if packet(node) is aten.topk else range(rank)
    reduced = {d % rank for d in (dims if isinstance(dims, list | range) else [dims])}
    kept = len(sizes(out)) == rank
    to = 0
    for dim in range(rank):
        if dim not in reduced:
            axes.tie(node, (first, dim), (out, dim if kept else to))
            to += 1
        elif out is node:
            axes.handle(node, (first, dim))


@rule(*_named("linear"))
def linear(axes: Axes, node: Node, out: Node) -> None:
    """x [.., I] @ weight [O, I].T; a weight along the token axis would mix positions: opaque."""
    x, weight = argument(node, "input"), argument(node, "weight")
    for dim in range(len(sizes(out)) - 1):
        axes.tie(node, (x, dim), (out, dim))
    axes.unify((x, -1), (weight, -1))
    if len(sizes(weight)) == 2:
        axes.unify((weight, 0), (out, -1))


@rule(*_named("matmul", "bmm", "mm"))
def matmul(axes: Axes, node: Node, out: Node) -> None:
    """[.., M, C] @ [.., C, N]: the contracted dim is a sum over tokens when it is the axis."""
    a, b = node.args[:2]
    assert isinstance(a, Node) and isinstance(b, Node)
    if min(len(sizes(a)), len(sizes(b))) < 2:
        return
    _contract(axes, node, (a, -1), (b, -2))
    axes.tie(node, (a, -2), (out, -2))
    axes.tie(node, (b, -1), (out, -1))
    for operand in (a, b):
        for back in range(3, len(sizes(operand)) + 1):
            axes.tie(node, (operand, -back), (out, -back))


def _contract(axes: Axes, node: Node, a: tuple[Node, int], b: tuple[Node, int]) -> None:
    # A parameter as long as the sequence weighs fixed positions: not a sum over tokens.
    if a[0].op == "placeholder" or b[0].op == "placeholder":
        axes.unify(a, b)
    else:
        axes.tie(node, a, b)


@rule(*_named("addmm", "baddbmm"))
def addmm(axes: Axes, node: Node, out: Node) -> None:
    """bias + a [.., M, C] @ b [.., C, N]."""
    bias, a, b = node.args[:3]
    assert isinstance(bias, Node) and isinstance(a, Node) and isinstance(b, Node)
    _align(axes, node, bias, out)
    _contract(axes, node, (a, -1), (b, -2))
    for back in range(2, len(sizes(out)) + 1):
        axes.tie(node, (a, -back), (out, -back))
    axes.tie(node, (b, -1), (out, -1))
    if len(sizes(b)) == 3:
        axes.tie(node, (b, 0), (out, 0))


@rule(*_named("einsum"))
def einsum(axes: Axes, node: Node, out: Node) -> None:
    """Letters are the dims; an ellipsis is left opaque."""
    equation = str(node.args[0]).replace(" ", "")
    if "." in equation or "->" not in equation:
        return
    left, right = equation.split("->")
    seen: dict[str, tuple[Node, int]] = {c: (out, i) for i, c in enumerate(right)}
    operands = argument(node, "tensors")
    for operand, letters in zip(operands, left.split(","), strict=True):
        for dim, letter in enumerate(letters):
            axes.tie(node, (operand, dim), seen.setdefault(letter, (operand, dim)))


@rule(*_named("scaled_dot_product_attention"))
def attention(axes: Axes, node: Node, out: Node) -> None:
    """q [.., Q, D], k [.., K, D], v [.., K, E], mask [.., Q, K] -> [.., Q, E]."""
    query, key, value = (argument(node, n) for n in ("query", "key", "value"))
    mask = argument(node, "attn_mask")
    axes.tie(node, (query, -2), (out, -2))
    axes.tie(node, (key, -2), (value, -2))
    axes.unify((query, -1), (key, -1))
    axes.unify((value, -1), (out, -1))
    for back in range(3, len(sizes(out)) + 1):
        axes.tie(node, (query, -back), (out, -back))
        axes.tie(node, (key, -back), (value, -back))
    if mask is not None:
        axes.tie(node, (mask, -2), (query, -2))
        axes.tie(node, (mask, -1), (key, -2))
        for back in range(3, len(sizes(mask)) + 1):
            axes.tie(node, (mask, -back), (out, -back))


# --- indexing -------------------------------------------------------------------------------


@rule(*_named("embedding"))
def embedding(axes: Axes, node: Node, out: Node) -> None:
    """weight [V, D] at indices: the indices' dims, then D."""
    indices = argument(node, "indices")
    for dim in range(len(sizes(indices))):
        axes.tie(node, (indices, dim), (out, dim))


@rule(*_named("index"))
def index(axes: Axes, node: Node, out: Node) -> None:
    """Integer indices of every dim broadcast to the result; anything else is opaque."""
    chosen = argument(node, "indices")
    if any(i is None or getattr(tensor(i), "dtype", None) == torch.bool for i in chosen):
        return
    if len(chosen) == len(sizes(argument(node, "self"))):
        for indices in chosen:
            _align(axes, node, indices, out)
