"""Questions about a folder of images, answered by several processes, resumed after a kill.

    torchrun --nproc-per-node 2 examples/batch_caption.py OUT.jsonl --images FOLDER
    accelerate launch --num-processes 2 examples/batch_caption.py OUT.jsonl --questions IN.jsonl

Every process holds the whole model and takes its share of the lines (data parallel); started
without a launcher, one process takes all.  IN.jsonl has {"image": path, "question": text} in each
line, paths seen from its folder; --images asks one --question of every image in a folder.  Each
line of OUT.jsonl is the line of the input with its "number" and the "answer" that was generated.

While it runs, each process appends to a part file next to OUT.jsonl, line by line.  Restarted with
the same arguments after a kill, on any number of processes, it continues with what is missing; no
line is lost or written twice.
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
    """What the user must change, shown without a traceback."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
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
    """The input's lines, each with its number; image paths made absolute for reading."""
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
    """All that the answers depend on: an output can be continued only with the same."""
    named = ("model", "retain_tokens", "max_new_tokens")
    return {name: getattr(args, name) for name in named} | {"lines": lines}


# --- files: OUT.jsonl, its parts while it is being made, and what it is made with ----------------


def part(out: Path, rank: int) -> Path:
    """What one process appends to."""
    return out.with_name(f"{out.name}.part{rank}")


def parts(out: Path) -> list[Path]:
    """All that processes of this run or a killed one have written."""
    return sorted(out.parent.glob(f"{out.name}.part*"))


def complete_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that were written whole; a kill may have cut the last one."""
    for text in path.read_text().splitlines(keepends=True) if path.exists() else ():
        if text.endswith("\n"):
            yield json.loads(text)


def resume(out: Path, wanted: Line) -> set[int]:
    """The numbers that are answered already.  Run by one process before any other writes."""
    about = out.with_name(f"{out.name}.settings")
    if not about.exists():
        if out.exists() or parts(out):
            raise InputError(f"{out} is there, but not {about}: remove it, or name another file")
        replace_with(about, [json.dumps(wanted)])
    if json.loads(about.read_text()) != wanted:
        raise InputError(f"{out} was begun with other arguments: remove {about.name} and it")
    for path in parts(out):
        # Appending to a line that a kill cut would spoil the next one too.
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
    """Put all parts into the output, by number; how many lines it has then."""
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
    """One process's share; the first process looks after the files."""
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
    """Answer a share batch by batch, writing each batch as soon as it is answered."""
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
    """Exit status: 0, or 1 when there is nothing to do it with."""
    try:
        run(parse(argv))
    except (InputError, dartfx.DartfxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
