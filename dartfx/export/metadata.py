"""What was pruned in an exported program, stored in the program itself.

It survives ``torch.export.save`` and ``load``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from dartfx import compat
from dartfx.config.options import DartConfig
from dartfx.passes.graph import expr
from dartfx.passes.outcome import Pruned

__all__ = ["ChangedOutput", "ExportedPruning", "exported_pruning", "note_pruning"]

_KEY = "dartfx"


@dataclass(frozen=True)
class ChangedOutput:
    """One output that no longer has the shape it had.

    name: where it is in what the program returns, such as ``.logits`` or ``[0]``.  place: its
    number among the flat outputs.  dims: those that now run over the kept tokens.  before, after:
    shapes, symbolic sizes as text.
    """

    name: str
    place: int
    dims: tuple[int, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class ExportedPruning:
    """How a program differs from the one it was made of.

    outputs: those of another shape; all others are as they were.  kept: place of keep_idx among the
    flat outputs, None without the option ``tokens``.  stack, layers: where the cuts are.
    vision_tokens, retained: per sample; sequence: before and after; symbolic sizes as in the traced
    example.  kv_layout: "layered", "uniform" or "none returned".  fingerprint: of the options and
    of the dartfx that did it.
    """

    stack: str
    layers: tuple[int, ...]
    vision_tokens: int
    retained: int
    sequence: tuple[int, int]
    kv_layout: str
    outputs: tuple[ChangedOutput, ...]
    kept: int | None
    fingerprint: str

    def __str__(self) -> str:
        cuts, (before, after) = ", ".join(map(str, self.layers)), self.sequence
        lines = [
            f"pruned before decoder layer {cuts} of {self.stack}: {before} -> {after} "
            f"tokens, {self.vision_tokens} -> {self.retained} vision tokens per sample"
        ]
        for o in self.outputs:
            shapes = f"[{', '.join(o.before)}] -> [{', '.join(o.after)}]"
            lines.append(f"  {o.name}: {shapes}, kept tokens along {o.dims}")
        return "\n".join(lines)


def exported_pruning(program: ExportedProgram) -> ExportedPruning | None:
    """What :func:`prune_exported` did to this program; None for one that it did not make.

    Also of a program that was saved and loaded since.
    """
    noted = (program.graph_module.meta.get("custom") or {}).get(_KEY)
    if noted is None:
        return None
    outputs = tuple(
        ChangedOutput(o["name"], o["place"], *(tuple(o[k]) for k in ("dims", "before", "after")))
        for o in noted["outputs"]
    )
    pairs = {k: tuple(noted[k]) for k in ("sequence", "layers")}
    return ExportedPruning(**{**noted, "outputs": outputs, **pairs})


def note_pruning(
    pruned: ExportedProgram, original: ExportedProgram, outcome: Pruned, config: DartConfig
) -> None:
    """Store in ``pruned`` how it differs from ``original``."""
    changed = _changed(pruned, original)
    noted = ExportedPruning(
        stack=outcome.stack,
        layers=tuple(cut.layer for cut in outcome.cuts),
        vision_tokens=outcome.vision_tokens,
        retained=outcome.retained,
        sequence=outcome.sequence,
        kv_layout=outcome.kv_layout,
        outputs=changed,
        kept=len(_returned(original)) if config.tokens else None,
        fingerprint=config.fingerprint(),
    )
    meta = pruned.graph_module.meta
    meta["custom"] = {**(meta.get("custom") or {}), _KEY: asdict(noted)}


def _returned(program: ExportedProgram) -> list[object]:
    """The values that the program's flat outputs have in its graph."""
    (output,) = program.graph.find_nodes(op="output")
    count = len(program.graph_signature.user_outputs)
    return list(output.args[0])[len(output.args[0]) - count :]


def _changed(pruned: ExportedProgram, original: ExportedProgram) -> tuple[ChangedOutput, ...]:
    found = []
    for place, (old, new) in enumerate(zip(_returned(original), _returned(pruned), strict=False)):
        before, after = _shape(old), _shape(new)
        dims = tuple(d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        if dims:
            found.append(ChangedOutput("", place, dims, before, after))
    names = _names(original, len(_returned(original)))
    return tuple(replace(o, name=names[o.place]) for o in found)


def _shape(value: object) -> tuple[str, ...]:
    held = value.meta.get("val") if isinstance(value, Node) else None
    return tuple(str(expr(s)) for s in held.shape) if isinstance(held, Tensor) else ()


def _names(program: ExportedProgram, count: int) -> list[str]:
    """Each flat output's path in what the program returns."""
    try:
        result = compat.pytree.tree_unflatten(list(range(count)), program.call_spec.out_spec)
        paths, _ = compat.pytree.tree_flatten_with_path(result)
        return [compat.pytree.keystr(path) for path, _ in paths]
    except Exception:  # a type that was registered without names, or whose library is not imported
        return [f"[{place}]" for place in range(count)]
