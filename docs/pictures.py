"""The pictures of docs/design.md, drawn from real runs: python docs/pictures.py [FOLDER]

lengths.svg and passes.svg: a dump of one LLaVA-shaped graph; kept.png: the small trained model of
examples/tiny_vlm and a held-out picture.  Numbers in them are those of the run.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path

import torch

import dartfx

ROOT = Path(__file__).parent.parent
MODEL, PICTURE = ROOT / "examples/tiny_vlm/model", ROOT / "examples/tiny_vlm/heldout/000.png"
QUESTION, RETAIN, LAYERS = "<image> read row four ?", 64, 32

# What each stage of a dump is: its box in passes.svg.
STAGES = {
    "dynamo": ("torch.compile", "the model's graph"),
    "normalise": ("normalise", "one IR: ATen"),
    "locate": ("locate", "where to cut"),
    "axes": ("infer axes", "which dims are tokens"),
    "insert": ("insert", "choose the tokens"),
    "gather": ("gather", "what crosses the cut"),
    "shrink": ("shrink", "sizes after the cut"),
    "trim_cache": ("trim cache", "what decode can read"),
    "check": ("check", "shapes as inferred?"),
}
_BOX, _GAP, _ROW = (136, 70), 14, 5
_PAPER = '<rect width="100%" height="100%" fill="#fff"/>'
_STYLE = (
    "svg { --faint: #aaa; --line: #ddd; --cut: #d33; --bar: #38c; } "
    "text { font: 10px system-ui, sans-serif; fill: #222; }"
)


def dump(folder: Path) -> Path:
    """The dump of a prefill of 576 vision tokens through 32 small layers: the pruned graph's."""
    from dartfx.tools.zoo.registry import load

    family = load("llava", side=24, layers=LAYERS, max_position_embeddings=1024)
    dartfx.compile(family.model, retain_tokens=RETAIN, lowering="eager", dump=str(folder))
    family.model.generate(**family.make_inputs(), max_new_tokens=1, do_sample=False)
    for report in sorted(folder.glob("*/report.json")):
        if json.loads(report.read_text())["kind"] == "pruned":
            return report.parent
    raise SystemExit("nothing was pruned")


def lengths(folder: Path) -> str:
    """The drawing of a dump's report.html as a file of its own."""
    page = (folder / "report.html").read_text()
    found = re.search(r'<svg id="lengths" viewBox="([\d. ]+)".*?</svg>', page, re.DOTALL)
    if found is None:
        raise SystemExit(f"{folder / 'report.html'} holds no drawing")
    drawing = found[0].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    head, body = drawing.split(">", 1)
    return f"{head}>\n<style>{_STYLE}</style>\n{_PAPER}{body}\n"


def passes(folder: Path) -> str:
    """The stages of a dump as boxes in order, with the number of calls in each one's graph."""
    boxes = []
    for file in sorted(folder.glob("[0-9][0-9]_*.txt")):
        name = file.stem[3:]
        title, what = STAGES[name]
        calls = len(re.findall(r"^ +\w+(?:: \S.*)? = (?!\w+$)", file.read_text(), re.MULTILINE))
        boxes.append((title, what, f"{calls:,} calls"))
    boxes.append(("Inductor", "or eager", ""))
    wide, high = (_BOX[0] + _GAP) * _ROW + _GAP, 2 * (_BOX[1] + 2 * _GAP) + 64
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}">',
            f"<style>{_STYLE} .t {{ font-weight: bold; font-size: 13px; }}</style>",
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#888"/></marker></defs>',
            _PAPER,
            *_boxes(boxes),
            f'<text x="{wide / 2}" y="{high - 14}" text-anchor="middle">Any step may refuse: the '
            "rewritten graph is dropped, torch.compile's own goes to Inductor as it was, and the "
            "reason is told.</text>",
            "</svg>\n",
        ]
    )


def _boxes(boxes: list[tuple[str, str, str]]) -> Iterator[str]:
    """Boxes row after row, an arrow from each to the next."""
    wide, high = _BOX
    down = high + 3 * _GAP
    for i, (title, what, cost) in enumerate(boxes):
        x, y = _GAP + i % _ROW * (wide + _GAP), _GAP + i // _ROW * down
        fill = "#e8f1fa" if title not in ("torch.compile", "Inductor") else "#eee"
        place = f'x="{x}" y="{y}" width="{wide}" height="{high}"'
        yield f'<rect {place} rx="5" fill="{fill}" stroke="#888"/>'
        for line, (text, kind) in enumerate([(title, ' class="t"'), (what, ""), (cost, "")]):
            middle = x + wide / 2
            yield (
                f'<text x="{middle}" y="{y + 22 + 18 * line}"{kind} text-anchor="middle">'
                f"{escape(text)}</text>"
            )
        if i + 1 == len(boxes):
            continue
        path = f"M{x + wide} {y + high / 2}h{_GAP}"
        if i % _ROW == _ROW - 1:
            back = _GAP + wide / 2
            path = f"M{x + wide / 2} {y + high}v{1.5 * _GAP}H{back}v{1.5 * _GAP}"
        yield f'<path d="{path}" fill="none" stroke="#888" marker-end="url(#a)"/>'


def kept(file: Path) -> None:
    """A held-out picture next to the tokens that the trained model keeps of it for one question."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype="float32").eval()
    picture = Image.open(PICTURE).convert("RGB")
    inputs = AutoProcessor.from_pretrained(MODEL)(
        images=picture, text=QUESTION, return_tensors="pt"
    )
    found = dartfx.explain(
        model.generate, **inputs, options={"retain_tokens": RETAIN}, tokens=True,
        max_new_tokens=1, do_sample=False,
    )  # fmt: skip
    side = 480
    both = Image.new("RGB", (2 * side + 16, side), "white")
    both.paste(picture.resize((side, side)), (0, 0))
    both.paste(dartfx.overlay(picture, found.tokens[0]).resize((side, side)), (side + 16, 0))
    both.quantize(256).save(file, optimize=True)


def main() -> None:
    """Draw all of them."""
    to = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/pictures"
    to.mkdir(exist_ok=True, parents=True)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = dump(Path(temporary))
        (to / "lengths.svg").write_text(lengths(folder))
        (to / "passes.svg").write_text(passes(folder))
    kept(to / "kept.png")
    print(*sorted(to.iterdir()), sep="\n")


if __name__ == "__main__":
    main()
