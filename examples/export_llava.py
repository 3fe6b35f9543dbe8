"""Exports a LLaVA-1.5-shaped model, prunes the program, and packages both ahead of time.

Prints what changed, the size of both packages and their latency, measured in turns (A B A B ...),
then loads the pruned package in a fresh Python process without transformers or dartfx.
The weights are random: no time here depends on their values.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import vlm
from torch import Tensor, nn
from torch.export import ExportedProgram

import dartfx

BEFORE, AFTER = 35, 19  # text tokens around the image: 35 is LLaVA-1.5's system prompt
# Runs with nothing but torch imported; arguments: package, inputs, outputs.
ALONE = """
import sys
import torch

package, inputs, outputs = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save(model(**torch.load(inputs)), outputs)
assert not {"transformers", "dartfx"} & set(sys.modules)
"""


class Prefill(nn.Module):
    """Returns the last logits and the KV caches as plain tensors: packages support no classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Any:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            use_cache=True,
            logits_to_keep=1,
        )
        layers = output.past_key_values.layers
        return output.logits, [layer.keys for layer in layers], [layer.values for layer in layers]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=sorted(vlm.SIZES), default="small", help="default: %(default)s")
    add("--retain-tokens", type=int, help="vision tokens kept (64; 4 with --size tiny)")
    add("--repeat", type=int, default=15, help="timed prefills of each (%(default)s)")
    add("--strict", action="store_true", help="export with strict=True")
    add("--out", type=Path, metavar="DIR", help="keep the packages and the pruned program there")
    args = parser.parse_args(argv)
    if args.repeat < 1:
        parser.error("--repeat must be at least 1")
    if args.retain_tokens is None:
        args.retain_tokens = 4 if args.size == "tiny" else 64
    return args


def export(model: nn.Module, inputs: vlm.Inputs, strict: bool) -> ExportedProgram:
    """Export the model; calls it once before, since transformers installs hooks in a call."""
    with torch.no_grad():
        model(**inputs)
        return torch.export.export(model, (), inputs, strict=strict)


def package(program: ExportedProgram, path: Path) -> Any:
    """Compile the program ahead of time into ``path``, and load it."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def run_alone(path: Path, inputs: vlm.Inputs, folder: Path) -> Tensor:
    """Compute the package's logits in a separate process."""
    given, returned = folder / "inputs.pt", folder / "outputs.pt"
    torch.save(inputs, given)
    command = [sys.executable, "-c", ALONE, str(path), str(given), str(returned)]
    # In another folder: a package must not need files next to the example.
    subprocess.run(command, check=True, cwd=folder)
    logits: Tensor = torch.load(returned)[0]
    return logits


def main(argv: Sequence[str] | None = None) -> None:
    """Run the example."""
    args = parse(argv)
    size = vlm.SIZES[args.size]
    model = vlm.build_model(size)
    inputs = vlm.random_inputs(size, BEFORE, AFTER, model)
    with TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        program = export(Prefill(model), inputs, args.strict)
        pruned = dartfx.prune_exported(program, retain_tokens=args.retain_tokens)
        print(dartfx.exported_pruning(pruned))
        torch.export.save(pruned, folder / "pruned_program.pt2")
        paths = [folder / f"{name}.pt2" for name in ("plain", "pruned")]
        loaded = [package(p, path) for p, path in zip((program, pruned), paths, strict=True)]
        calls = [lambda call=call: call(**inputs) for call in loaded]
        times = [median(column) for column in vlm.alternate(calls, args.repeat)]
        for path, seconds in zip(paths, times, strict=True):
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {1e3 * seconds:.1f} ms")
        print(f"{times[0] / times[1]:.2f}x faster, medians of {args.repeat} in turns")
        apart = (run_alone(paths[1], inputs, folder) - pruned.module()(**inputs)[0]).abs().max()
        print(f"loaded without transformers and dartfx: logits differ by {apart:.1e} from eager")


if __name__ == "__main__":
    main()
