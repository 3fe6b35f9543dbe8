"""Shows what dropping vision tokens costs in answers and saves in time.

First, a small model trained for this demo answers questions about unseen images, with all vision
tokens and with a few; one image is written with an overlay of the kept tokens.

Then one photograph and one question go through a larger model twice, in this process and with the
same weights: compiled by plain Inductor, and by dartfx, which keeps a few of the vision tokens
before it lowers to Inductor. The output shows what was pruned and where, the lengths of the
sequence and the KV cache, the time of a prefill, and the generated text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import seeing
import torch
import vlm
from PIL import Image
from progress import working
from torch import nn
from torch._dynamo.exc import TorchDynamoException

import dartfx
from dartfx.integrations.hf import load_model, prompt_inputs, read_image, to_model
from dartfx.passes.outcome import Pruned

SAMPLES = ("china.jpg", "flower.jpg")
DTYPES = ("float32", "bfloat16", "float16")


class DemoError(Exception):
    """An error that stops the demo, shown without a traceback."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model",
        help="a vision-language model on the Hugging Face hub or in a folder, for example "
        "llava-hf/llava-1.5-7b-hf, without the first part (default: a LLaVA-1.5 shape with random "
        "weights, made here)",
    )
    add("--questions", type=int, default=40, help="asked in the first part (%(default)s); 0: none")
    add("--out", type=Path, default=Path("kept.png"), help="its picture (%(default)s)")
    add("--image", default=SAMPLES[0], help=f"an image file, or scikit-learn's {SAMPLES}")
    add("--prompt", default="What is shown in this photograph?", help="the question")
    add("--retain-tokens", type=int, help="kept per sample (64; 4 with --tiny)")
    add("--layer", type=int, default=2, help="first decoder layer that sees the pruned sequence")
    add("--max-new-tokens", type=int, default=8, help="tokens to generate (%(default)s)")
    add("--repeat", type=int, default=5, help="timed prefills of each (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")
    add("--tiny", action="store_true", help="without --model: 16 vision tokens, for a quick try")
    add(
        "--lowering",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="what compiles both; anything but inductor compiles fast and runs slowly",
    )
    args = parser.parse_args(argv)
    if args.questions < 0:
        parser.error("--questions must not be negative")
    for name in ("max_new_tokens", "repeat"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def load_image(name: str) -> Image.Image:
    """Load the image file, or one of scikit-learn's sample photographs."""
    if name in SAMPLES and not Path(name).is_file():
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    image: Image.Image = read_image(name)
    return image


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Load a pretrained model and its processor, or build a small one."""
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    if args.model is not None:
        return load_model(args.model, args.device, dtype)
    size = vlm.SIZES["tiny" if args.tiny else "small"]
    model = vlm.build_model(size, device=args.device, dtype=getattr(torch, dtype))
    return model, vlm.build_processor(size)


def compile_plain(model: nn.Module, inputs: vlm.Inputs, lowering: str) -> tuple[float, str]:
    """Compile without dartfx, as one graph if possible: seconds of the first call, and how."""
    model.compile(backend=lowering, fullgraph=True)
    try:
        return vlm.seconds(partial(vlm.prefill, model, inputs)), "one graph"
    except TorchDynamoException:
        model.compile(backend=lowering)
        return vlm.seconds(partial(vlm.prefill, model, inputs)), "several graphs"


def compile_dart(
    model: nn.Module, inputs: vlm.Inputs, args: argparse.Namespace
) -> tuple[float, dartfx.Report]:
    """Compile with dartfx: seconds of the first call, and what it did to the prefill."""
    dartfx.reset()
    dartfx.compile(
        model,
        retain_tokens=args.retain_tokens,
        layer=args.layer,
        lowering=args.lowering,
        on_unsupported="ignore",  # everything is shown below
    )
    took = vlm.seconds(partial(vlm.prefill, model, inputs))
    for report in dartfx.reports():
        if report.pruned:
            return took, report
    reports = "\n".join(map(str, dartfx.reports())) or "dynamo made no graph of this call"
    raise DemoError(f"no vision token was pruned:\n{reports}")


def show_memory(plain: Any, dart: Any, pruned: Pruned) -> None:
    """Tokens and bytes of both caches after the same prefill, checked against the report."""
    before, after = (vlm.cache_lengths(c)[pruned.layer] for c in (plain, dart))
    first = vlm.cache_lengths(dart)[0]
    measured = vlm.cache_bytes(plain), vlm.cache_bytes(dart)
    if measured != pruned.kv_bytes or (before, after) != pruned.sequence:
        raise DemoError(
            f"the caches hold {measured} bytes and {before, after} tokens, but the report says "
            f"{pruned.kv_bytes} and {pruned.sequence}; please report this"
        )
    print(f"tokens from layer {pruned.layer} on: {before} -> {after}")
    print(f"tokens in layers 0..{pruned.layer - 1}:  {before} -> {first}")
    print(
        f"KV cache bytes: {measured[0]:,} -> {measured[1]:,} "
        f"({measured[1] / measured[0]:.1%}; measured in the caches, equal to the report)"
    )


def show_answers(models: Sequence[Any], inputs: vlm.Inputs, args: Any, processor: Any) -> None:
    """Print both models' greedy answers."""
    start = inputs["input_ids"].shape[1]
    for name, model in zip(("plain", "dart"), models, strict=True):
        with working(f"generating with {name}"):
            if args.model is None:
                out = vlm.decode_eagerly(model, inputs, args.max_new_tokens)
            else:
                out = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        ids = out[0, start:]
        print(f"{name + ' ids:':<11}{ids.tolist()}")
        if args.model is not None:
            text = processor.batch_decode(ids[None], skip_special_tokens=True)[0]
            print(f"{name + ' text:':<11}{text}")
    if args.model is None:
        print("(random weights: the ids show that both generate, not how well they answer;")
        print("only the prefill is compiled: the decode steps run eagerly, and none was timed)")


def run(args: argparse.Namespace) -> None:
    """Run the demo; raises DemoError if something is missing or nothing was pruned."""
    if args.model is None and args.questions:
        print("1. WHAT IT COSTS: a small trained model that sees (examples/tiny_vlm)\n")
        retain = 64 if args.retain_tokens is None else args.retain_tokens
        try:
            seeing.show(args.questions, retain, args.layer, args.out)
        except ValueError as error:
            raise DemoError(f"the trained model: {error}; try --questions 0") from error
        print("\nso small a model gains no time; a larger one, with RANDOM weights, shows that:\n")
        print('2. WHAT IT SAVES: plain Inductor beside backend="dart"\n')
    if args.retain_tokens is None:
        args.retain_tokens = 4 if args.tiny else 64
    compare(args)


def compare(args: argparse.Namespace) -> None:
    """Run the second part; raises DemoError if something is missing or nothing was pruned."""
    image = load_image(args.image)
    model, processor = load(args)
    inputs = to_model(prompt_inputs(processor, image, args.prompt), model)
    made = "tiny" if args.tiny else "small"
    name = args.model or f"LLaVA-1.5 shape, {made}, RANDOM weights (seed 0)"
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"model:  {name}, {weights:.1f}M parameters, {model.dtype}, {args.device}")
    print(f"image:  {args.image} {image.size[0]}x{image.size[1]}; prompt: {args.prompt!r}")
    print(f"prompt: {inputs['input_ids'].shape[1]} tokens, vision tokens included")

    plain, dart = vlm.twin(model), vlm.twin(model)
    print(f"\ncompiling both with {args.lowering} ...", flush=True)
    with working("compiling dart"):
        took, report = compile_dart(dart, inputs, args)  # first: it may refuse
    print(f"dart:   first prefill {took:.1f} s", flush=True)
    with working("compiling plain"):
        took, how = compile_plain(plain, inputs, args.lowering)
    print(f"plain:  first prefill {took:.1f} s ({how})")
    print(f"\n{report}\n")
    assert isinstance(report.outcome, Pruned)
    calls = [partial(vlm.prefill, m, inputs) for m in (plain, dart)]
    full, pruned = (call().past_key_values for call in calls)
    show_memory(full, pruned, report.outcome)

    with working("timing prefills"):
        a, b = map(median, vlm.alternate(calls, args.repeat))
    print(f"\nprefill, median of {args.repeat}: {a * 1e3:.1f} ms -> {b * 1e3:.1f} ms")
    print(f"speed-up: {a / b:.2f}x")
    print("(timed: generate() for one new token, in turns: vision tower, merge, all layers)\n")
    show_answers((plain, dart), inputs, args, processor)


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, or 1 if there is nothing to show."""
    try:
        run(parse(argv))
    except (DemoError, dartfx.DartfxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
