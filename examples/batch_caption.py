"""Questions about a folder of images, answered by several processes, resumed after a kill.

    torchrun --nproc-per-node 2 examples/batch_caption.py OUT.jsonl --images FOLDER
    accelerate launch --num-processes 2 examples/batch_caption.py OUT.jsonl --questions IN.jsonl

Every process holds the whole model and processes its share of the lines (data parallel); without a
launcher, one process does all.  Each line of IN.jsonl is {"image": path, "question": text}, with
paths relative to its folder; --images asks one --question about every image in a folder.  Each line
of OUT.jsonl is an input line with its "number" and the generated "answer".

While running, each process appends lines to a part file next to OUT.jsonl.  Restarted with the same
arguments after a kill, on any number of processes, it continues with the missing lines; none is
lost or written twice.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

import dartfx
from dartfx.integrations.hf import load_model, read_image, to_model

HERE = Path(__file__).parent
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Line = dict[str, Any]


class InputError(Exception):
    """An error that the user must fix, shown without a traceback."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="JSONL file to write")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of images")
    source.add_argument("--questions", type=Path, help="JSONL file with image and question")
    add("--question", default="how many digits ?", help="asked of every image of --images")
    add("--model", default=str(HERE / "tiny_vlm" / "model"), help="(%(default)s)")
    add("--retain-tokens", type=int, default=64, help="vision tokens kept (%(default)s)")
    add("--batch-size", type=int, default=4, help="(%(default)s)")
    add("--max-new-tokens", type=int, default=8, help="(%(default)s)")
    add("--cpu", action="store_true", help="even where there is an accelerator")
    add("--lowering", choices=("inductor", "aot_eager", "eager"), default="inductor")
    return parser.parse_args(argv)


def read_lines(args: argparse.Namespace) -> list[Line]:
    """Read the input's lines, each with its number; image paths are made absolute."""
    if args.images is not None:
        found = sorted(p for p in args.images.glob("*") if p.suffix.lower() in SUFFIXES)
        lines = [{"image": p.name, "question": args.question} for p in found]
    elif args.questions.is_file():
        lines = [json.loads(text) for text in args.questions.read_text().splitlines() if text]
    else:
        raise InputError(f"no file {args.questions}")
    if not lines:
        raise InputError(f"no images in {args.images or args.questions}")
    return [{"number": number, **line} for number, line in enumerate(lines)]


def settings(args: argparse.Namespace, lines: Sequence[Line]) -> Line:
    """Everything the answers depend on: an output can be continued only with equal settings."""
    named = ("model", "retain_tokens", "max_new_tokens")
    return {name: getattr(args, name) for name in named} | {"lines": lines}


# --- files: OUT.jsonl, its parts while it is being made, and what it is made with ----------------


def part(out: Path, rank: int) -> Path:
    """The part file that one process appends to."""
    return out.with_name(f"{out.name}.part{rank}")


def parts(out: Path) -> list[Path]:
    """All part files written by this run or a killed one."""
    return sorted(out.parent.glob(f"{out.name}.part*"))


def complete_lines(path: Path) -> Iterator[Line]:
    """The complete lines of a file; a kill may have truncated the last one."""
    for text in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if text.endswith("\n"):
            yield json.loads(text)


def resume(out: Path, wanted: Line) -> set[int]:
    """The numbers already answered.  Run by one process before any other writes."""
    about = out.with_name(f"{out.name}.settings")
    if not about.exists():
        if out.exists() or parts(out):
            raise InputError(f"{out} is there, but not {about}: remove it, or name another file")
        replace_with(about, [json.dumps(wanted)])
    if json.loads(about.read_text()) != wanted:
        raise InputError(f"{out} was begun with other arguments: remove {about.name} and it")
    for path in parts(out):
        # Appending to a truncated line would corrupt the next one, too.
        replace_with(path, [json.dumps(line) for line in complete_lines(path)])
    return {line["number"] for path in (out, *parts(out)) for line in complete_lines(path)}


def replace_with(path: Path, texts: Sequence[str]) -> None:
    """Write a file's lines so that a kill leaves either the old file or the new one."""
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as file:
        file.writelines(f"{text}\n" for text in texts)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def merge(out: Path) -> int:
    """Merge all parts into the output, by number; returns its number of lines."""
    found = {line["number"]: line for path in (out, *parts(out)) for line in complete_lines(path)}
    replace_with(out, [json.dumps(found[number]) for number in sorted(found)])
    for path in parts(out):  # a kill before this leaves parts whose lines are merged again
        path.unlink()
    return len(found)


# --- answers -------------------------------------------------------------------------------------


class Captioner:
    """A pruned model and its processor."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.folder = args.images or args.questions.parent
        model, self.processor = load_model(args.model, device)
        self.processor.tokenizer.padding_side = "left"
        self.model = dartfx.compile(model, retain_tokens=args.retain_tokens, lowering=args.lowering)

    def __call__(self, lines: Sequence[Line]) -> list[str]:
        """The answers to a batch of lines."""
        images = [read_image(self.folder / line["image"]) for line in lines]
        texts = [self._prompt(line["question"]) for line in lines]
        made = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs = to_model(made, self.model)
        with torch.inference_mode():
            out = self.model.generate(
                **inputs, max_new_tokens=self.args.max_new_tokens, do_sample=False
            )
        new = out[:, inputs["input_ids"].shape[1] :]
        answers: list[str] = self.processor.batch_decode(new, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        return text


def run(args: argparse.Namespace) -> None:
    """Process one share; the first process manages the files."""
    state = PartialState(cpu=args.cpu or not torch.cuda.is_available())
    lines = read_lines(args)
    shared: list[Any] = [None]
    if state.is_main_process:
        try:
            shared = [sorted(resume(args.out, settings(args, lines)))]
        except InputError as error:
            shared = [str(error)]  # the other processes wait for it
    if state.num_processes > 1:
        broadcast_object_list(shared)
    if isinstance(shared[0], str):
        raise InputError(shared[0])
    done = set(shared[0])
    left = [line for line in lines if line["number"] not in done]
    share = left[state.process_index :: state.num_processes]
    answer_all(args, share, state)
    state.wait_for_everyone()
    if state.is_main_process:
        print(f"{args.out}: {merge(args.out)} lines, {len(done)} of them from before")
    state.destroy_process_group()


def answer_all(args: argparse.Namespace, share: Sequence[Line], state: PartialState) -> None:
    """Answer a share batch by batch, and write each batch at once."""
    if not share:
        return
    caption = Captioner(args, state.device)
    progress = tqdm(
        total=len(share),
        desc=f"process 0 of {state.num_processes}",
        unit="line",
        disable=not state.is_main_process,
    )
    with part(args.out, state.process_index).open("a") as file, progress:
        for start in range(0, len(share), args.batch_size):
            batch = share[start : start + args.batch_size]
            answers = caption(batch)
            for line, answer in zip(batch, answers, strict=True):
                file.write(json.dumps({**line, "answer": answer}) + "\n")
            file.flush()
            progress.update(len(batch))


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, or 1 for unusable input."""
    try:
        run(parse(argv))
    except (InputError, dartfx.DartfxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
