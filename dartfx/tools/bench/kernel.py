"""The selection and its baselines, at the shapes of real models.

  image   LLaVA-1.5-7B, one image of 576 vision tokens, 64 kept
  tiles   LLaVA-NeXT-7B, one image in five tiles, 2880 vision tokens, 320 kept
  gqa     Qwen2.5-VL-7B, 4 key heads for 28 query heads, 4000 vision tokens, 888 kept
  video   the same model on a long video, 16128 vision tokens, 3580 kept

For each: the node (kernel="auto"), its torch form (kernel="torch"), both compiled by Inductor; the
published algorithm, a Python loop over pivots with set and tolist; and one decoder layer at full
length, compiled. On a CUDA device also the node in a CUDA graph, without launch cost, and the time
of each of its kernels there. --selectors times others, which have no kernels, in the same way as
the torch form, but few calls of each, one at a time.

The floor is what reading the keys and vision tokens once takes at the copy bandwidth measured here.
Prefill is the decoder layer times the number of layers: vision tower and logits are left out, so
the node's share is stated too high rather than too low.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dartfx.integrations.outputs import check_file
from dartfx.ops import registration  # noqa: F401  (registers torch.ops.dartfx.select_tokens)
from dartfx.selection.registry import BUILT_IN, optional_inputs
from dartfx.tools.bench.baselines import Layer, published
from dartfx.tools.bench.launches import launches, peak_bytes
from dartfx.tools.bench.timing import device_name

__all__ = ["HELP", "SHAPES", "Shape", "configure", "run"]

HELP = "the selection, its floor, its torch form, the published loop and a decoder layer"

_COPY_BYTES = 1 << 28
OTHERS = tuple(n for n in BUILT_IN if n not in ("dart", "changed", "attended"))


@dataclass(frozen=True)
class Shape:
    """A prompt and a decoder: vision tokens first .. first + N of S, of which R are kept."""

    S: int
    N: int
    R: int
    D: int
    heads: int
    key_heads: int
    head: int
    inner: int
    layers: int
    first: int = 35
    B: int = 1

    def shrunk(self) -> Shape:
        """The same prompt with a decoder an eighth as wide."""
        few = {"heads": max(1, self.heads // 8), "key_heads": max(1, self.key_heads // 8)}
        return replace(self, D=few["heads"] * self.head, inner=self.inner // 8, **few)

    def bytes_read(self, size: int) -> int:
        """Keys of all positions and hidden states of vision tokens, ``size`` bytes a number."""
        keys = self.S * self.key_heads * self.head
        return self.B * (keys + self.N * self.D) * size


_GQA = Shape(4096, 4000, 888, 3584, 28, 4, 128, 18944, 28)
SHAPES = {
    "image": Shape(640, 576, 64, 4096, 32, 32, 128, 11008, 32),
    "tiles": Shape(2930, 2880, 320, 4096, 32, 32, 128, 11008, 32),
    "gqa": _GQA,
    "video": replace(_GQA, S=16384, N=16128, R=3580),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add("--shape", action="append", choices=list(SHAPES), help="default: image; on CUDA all")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="float32; on CUDA bfloat16")
    add("--repeat", type=int, default=20, help="timed calls of each (%(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--quick", action="store_true", help="a decoder an eighth as wide: does it run?")
    add("--selectors", nargs="+", default=[], choices=OTHERS, help="time these as well")
    add("--backend", default="inductor", help="compiles node and layer (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print one table per shape; returns 0."""
    check_file("json", arguments.json)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if on_gpu else "float32"))
    bandwidth = copy_bandwidth(device)
    result: dict[str, Any] = {
        "machine": machine(device),
        "dtype": str(dtype),
        "copy_bytes_per_second": bandwidth,
        "shapes": {},
    }
    print(", ".join(f"{k} {v}" for k, v in result["machine"].items()))
    print(f"{dtype}, copies at {bandwidth / 1e9:.1f} GB/s (read + written)")
    for name in arguments.shape or (SHAPES if on_gpu else ["image"]):
        shape = SHAPES[name].shrunk() if arguments.quick else SHAPES[name]
        torch.compiler.reset()
        seconds, on_device = measure(shape, device, dtype, arguments)
        figures = {**asdict(shape), **figures_of(shape, dtype, bandwidth, seconds), **on_device}
        result["shapes"][name] = figures
        print(table(name, shape, figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def machine(device: torch.device) -> dict[str, object]:
    """Where, when and with what the figures are measured."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "not installed"
    return {
        "device": device_name(device),
        "date": date.today().isoformat(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    return 2 * _COPY_BYTES / median(timed(copy, device, 10))


def timed(
    call: Callable[[], object], device: torch.device, repeat: int, calls: int | None = None
) -> list[float]:
    """Seconds per call of ``repeat`` samples, after three calls that do not count.

    calls: how many in a row are a sample; on a GPU ten, so that waiting for the device is not what
    is timed, elsewhere one.
    """
    calls = calls or (10 if device.type == "cuda" else 1)
    for _ in range(3):
        call()
    samples = []
    for _ in range(repeat):
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        _wait(device)
        samples.append((time.perf_counter() - start) / calls)
    return samples


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def inputs_of(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states and keys, and the vision mask."""
    torch.manual_seed(0)
    hidden = torch.randn(shape.B, shape.S, shape.D, device=device, dtype=dtype)
    keys = torch.randn(shape.B, shape.key_heads, shape.S, shape.head, device=device, dtype=dtype)
    vision = torch.zeros(shape.B, shape.S, dtype=torch.bool, device=device)
    vision[:, shape.first : shape.first + shape.N] = True
    return hidden, keys, vision


def node(
    shape: Shape, selector: str, kernel: str, hidden: Tensor, keys: Tensor, vision: Tensor
) -> Tensor:
    """The selection as a compiled graph holds it; queries, where asked for, are the keys."""
    queries = None
    if "queries" in optional_inputs(selector):
        queries = keys.repeat_interleave(shape.heads // shape.key_heads, 1)
    kept: Tensor = torch.ops.dartfx.select_tokens(
        hidden, keys, vision, None, shape.N, shape.R, 4, 4, selector, kernel, queries
    )
    return kept


def measure(
    shape: Shape, device: torch.device, dtype: torch.dtype, arguments: argparse.Namespace
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each contestant, and the node's kernels and memory on a GPU."""
    tensors, few = inputs_of(shape, device, dtype), max(3, arguments.repeat // 4)
    compiled = partial(torch.compile, backend=arguments.backend, dynamic=False)
    calls: dict[str, Callable[[], object]] = {
        "node": partial(compiled(partial(node, shape, "dart", "auto")), *tensors),
        "torch": partial(compiled(partial(node, shape, "dart", "torch")), *tensors),
        "published": partial(published, tensors[0], tensors[1], shape.first, shape.N, shape.R),
    }
    if device.type == "cuda":
        calls["graph"] = graphed(calls["node"])
    with torch.inference_mode():
        seconds = {k: median(timed(c, device, arguments.repeat)) for k, c in calls.items()}
        for name in arguments.selectors:
            call = partial(compiled(partial(node, shape, name, "torch")), *tensors)
            seconds[f"selector {name}"] = median(timed(call, device, few, 1))
        with device:
            layer = Layer(shape.D, shape.heads, shape.key_heads, shape.head, shape.inner)
        run_layer = compiled(layer.to(dtype))
        seconds["layer"] = median(timed(partial(run_layer, tensors[0]), device, few))
        on_device: dict[str, Any] = {"launches": {}, "peak_bytes": None}
        if device.type == "cuda":
            found, peak = launches(calls["node"]), peak_bytes(calls["node"])
            on_device = {"launches": found, "peak_bytes": peak}
    return seconds, on_device


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """``call`` captured into a CUDA graph, and how to replay it."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def figures_of(
    shape: Shape, dtype: torch.dtype, bandwidth: float, seconds: dict[str, float]
) -> dict[str, Any]:
    """Times with the ratios that the goals are about."""
    count = shape.bytes_read(dtype.itemsize)
    floor, prefill = count / bandwidth, seconds["layer"] * shape.layers
    own = seconds.get("graph", seconds["node"])
    return {
        "bytes": count,
        "floor_seconds": floor,
        "seconds": seconds,
        "prefill_seconds": prefill,
        "of_floor": own / floor,
        "of_prefill": seconds["node"] / prefill,
        "published_over_node": seconds["published"] / seconds["node"],
        "torch_over_node": seconds["torch"] / seconds["node"],
    }


_NAMES = {
    "node": "node, compiled",
    "graph": "node in a CUDA graph",
    "torch": "torch form, compiled",
    "published": "published loop",
    "layer": "one decoder layer",
}


def table(name: str, shape: Shape, figures: dict[str, Any]) -> str:
    """The figures of one shape as Markdown."""
    floor, prefill = figures["floor_seconds"], figures["prefill_seconds"]
    sizes = f"B={shape.B} S={shape.S} N={shape.N} R={shape.R} D={shape.D}"
    rows = [
        f"\n{name}: {sizes} Hkv={shape.key_heads} Dh={shape.head}, {shape.layers} layers; reads "
        f"{figures['bytes'] / 1e6:.1f} MB, floor {floor * 1e6:.1f} us\n",
        "| | us | x floor | % of prefill |",
        "|---|---|---|---|",
    ]
    for key, spent in figures["seconds"].items():
        label = _NAMES.get(key, f"{key}, compiled")
        rows.append(
            f"| {label} | {spent * 1e6:.1f} | {spent / floor:.1f} | {spent / prefill:.3%} |"
        )
    for kernel, spent in figures["launches"].items():
        rows.append(f"| {kernel}, {spent['number']:g} x | {spent['seconds'] * 1e6:.1f} | | |")
    if figures["peak_bytes"] is not None:
        rows.append(f"\nmemory of the node: {figures['peak_bytes'] / 1e6:.1f} MB at most")
    rows.append(f"\npublished / node: {figures['published_over_node']:.1f}")
    return "\n".join(rows)
