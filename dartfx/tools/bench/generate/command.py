"""``generate`` from the photograph to the last token: eager, hooks, plain Inductor and dart.

  eager           the model as it is
  eager + hooks   pruned by forward hooks, as those before dartfx do it, with dartfx's selection
  plain Inductor  model.compile(), one graph where dynamo can
  dart            dartfx.compile(model)
  plain Inductor, dart + static cache + compiled decode
                  the same with cache_implementation="static"; on CUDA decode runs as CUDA graphs
and by name only: dart_layered (kv_layout= of dartfx.compile), dart_graphs, dart_bucketed
(prefill=), dart_reduced (mode=) and dart_eager_tower (not compiled, where generate does not run it
before the model).

Shapes: llava-1.5-7b, llava-next-7b, llava-next-8 (8 layers of it), qwen2.5-vl-7b; small, for a CPU;
tiny, to see whether it runs.

All share one set of weights and run in one process in turns; figures are medians. transformers
runs the vision tower eagerly inside generate in every row. A row that refuses or fails is printed
with its reason. Peak memory is the CUDA allocator's while generating one token: the weights and
what the row has allocated since it was first run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

import dartfx
from dartfx import compat
from dartfx.config.options import DartConfig
from dartfx.tools.bench.generate.arguments import SHAPES, check, configure
from dartfx.tools.bench.generate.figures import limits, row_figures, speed_ups, tables
from dartfx.tools.bench.generate.gate import Gate
from dartfx.tools.bench.generate.kernels import profile_table
from dartfx.tools.bench.timing import device_name

if TYPE_CHECKING:  # they import transformers, which `bench kernel` does without
    from dartfx.tools.bench.generate.rows import Progress, Row
    from dartfx.tools.bench.generate.variants import Settings
    from dartfx.tools.bench.generate.workload import Workload

__all__ = ["HELP", "configure", "run"]

HELP = "generate, compared with eager execution, hooks and plain Inductor"

# Every variant shares the model's code, so dynamo counts the compilations of all of them together.
_RECOMPILE_LIMIT = 256


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 0, also when rows failed.  Raises InputError before anything long."""
    check(arguments)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result = measure(arguments)
    print(_heading(result))
    print(tables(result))
    if "turns" in result:
        from dartfx.tools.bench.generate.turns import turns_table

        print(f"\n{turns_table(result['turns'])}")
    if "profile" in result:
        print(f"\n{profile_table(result['profile'])}")
    if arguments.plot:
        from dartfx.tools.bench.generate.plot import draw

        draw(result, arguments.plot)
    return 0


def _workload(arguments: argparse.Namespace) -> Workload:
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # whose queue and memory are meant where none is named
    default = "float32" if device.type == "cpu" else "bfloat16"
    dtype = getattr(torch, arguments.dtype or default)
    zoo = import_module(SHAPES)
    if arguments.model_shape:
        counts = {"images": arguments.images, "batch": arguments.batch}
        work: Workload = zoo.build(arguments.model_shape, device, dtype, **counts)
    else:
        work = zoo.load(arguments.model, device, dtype, arguments.image, arguments.prompt)
    return work


def _settings(work: Workload, arguments: argparse.Namespace) -> Settings:
    from dartfx.tools.bench.generate.variants import Settings

    retain = arguments.retain_tokens
    if retain is None and arguments.model_shape:
        retain = import_module(SHAPES).SHAPES[work.name][1] * arguments.images
    retain = DartConfig().retain_for(work.vision_tokens) if retain is None else retain
    return Settings(retain, arguments.layer, arguments.lowering, arguments.dynamic or None)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the benchmark, as the JSON file holds it from the first round on."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from dartfx.tools.bench.generate.rows import Progress, rewarm, time_round

    load = os.getloadavg()[0]
    patch = compat.dynamo_config.patch(
        recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=_RECOMPILE_LIMIT
    )
    dartfx.reset()
    with ExitStack() as held:
        held.enter_context(patch)
        gate = held.enter_context(Gate(arguments.gate))
        work = _workload(arguments)
        settings = _settings(work, arguments)
        rows = _rows(work, arguments)
        lengths = list(rows[0].samples)
        calls = len(rows) * len(lengths) * (arguments.warmup + arguments.repeat)
        calls *= 1 + 2 * (arguments.turns - 1)  # two rows of later turns for each, most often
        progress = Progress(held.enter_context(tqdm(total=calls, unit="call")), lengths)
        _warm_up(rows, work, settings, arguments, progress)
        if arguments.gate:
            torch.cuda.empty_cache()  # others compile on the same device
            gate.alone()
            rewarm(rows)
        for _ in range(arguments.repeat):
            time_round(rows, work, progress)
            result = {
                "machine": _machine(work, load),
                "model": _model(work, settings),
                "settings": {"new_tokens": lengths, **_plain(arguments)},
                **_figures(rows, work.batch, progress.towers, settings.layer / _layers(work)),
            }
            _write(result, arguments.json)
        _profile(rows, result, arguments)
        for figures in _later_turns(rows, work, arguments, progress, arguments.repeat):
            result["turns"] = figures
            _write(result, arguments.json)
    return result


def _profile(rows: Sequence[Row], result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Add what each row does on the GPU for one token, where wanted; written as it comes."""
    from dartfx.tools.bench.generate.rows import profiled

    for row in rows if arguments.profile else ():
        result.setdefault("profile", {})[row.name] = profiled(row)
        _write(result, arguments.json)


def _warm_up(
    rows: Sequence[Row],
    work: Workload,
    settings: Settings,
    arguments: argparse.Namespace,
    progress: Progress,
) -> None:
    """Call everything that is going to be timed, until nothing compiles any more."""
    from dartfx.tools.bench.generate.rows import prepare

    for row in rows:
        prepare(row, work, settings, progress, arguments.warmup)
    for _ in _later_turns(rows, work, arguments, progress, arguments.warmup):
        pass


def _later_turns(
    rows: Sequence[Row],
    work: Workload,
    arguments: argparse.Namespace,
    progress: Progress,
    calls: int,
) -> Iterator[list[dict[str, Any]]]:
    """The figures of later turns, if there are any, after every round of calls."""
    from dartfx.tools.bench.generate.turns import converse, talks_of

    if arguments.turns > 1:
        talks = talks_of(rows, work.inputs["input_ids"])
        longest = max(progress.lengths)
        yield from converse(talks, work, arguments.turns, longest, calls, progress.count)


def _write(result: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(result, indent=2) + "\n")


def _rows(work: Workload, arguments: argparse.Namespace) -> list[Row]:
    from dartfx.tools.bench.generate.rows import Row
    from dartfx.tools.bench.generate.variants import USUAL, VARIANTS

    on_cpu = work.model.device.type == "cpu"
    lengths = sorted({1, *(arguments.new_tokens or ((8,) if on_cpu else (8, 64, 256)))})
    return [
        Row(name, label, {n: [] for n in lengths})
        for name, (label, _) in VARIANTS.items()
        if name in (arguments.rows or USUAL)
    ]


def _figures(rows: list[Row], batch: int, towers: list[float], unpruned: float) -> dict[str, Any]:
    """Figures derived from the samples; ``unpruned`` is the share of layers before the cut."""
    tower = median(towers) if towers else None
    good = {row.name: row for row in rows if not row.failed}
    table = [
        {
            "name": row.name,
            "label": row.label,
            "failed": row.failed,
            **({} if row.failed else _row(row, batch, tower)),
        }
        for row in rows
    ]
    ratios: dict[str, Any] = {"speed_ups": {}, "limits": {}}
    if "plain" in good and tower is not None:
        base = good["plain"].totals()
        others = {name: row for name, row in good.items() if name != "plain"}
        ratios["speed_ups"] = {k: speed_ups(base, r.totals(), tower) for k, r in others.items()}
        if "dart" in good and (pruned := good["dart"].pruned) is not None:
            ratios["limits"] = {
                "flops": limits(base, tower, pruned.flops[1] / pruned.flops[0]),
                "unpruned": limits(base, tower, unpruned),
            }
    return {"vision_tower_seconds": tower, "vision_tower_samples": towers, "rows": table, **ratios}


def _row(row: Row, batch: int, tower: float | None) -> dict[str, Any]:
    assert row.ready is not None
    return {
        "note": row.ready.note,
        "samples": row.samples,
        "kv_bytes": row.kv_bytes,
        "peak_bytes": row.peak_bytes,
        "warmup_seconds": row.warmup_seconds,
        **row_figures(row.totals(), tower, batch),
    }


def _layers(work: Workload) -> int:
    return len(work.model.get_decoder().layers)


def _model(work: Workload, settings: Settings) -> dict[str, Any]:
    from dartfx.tools.bench.generate.rows import weight_bytes

    return {
        "name": work.name,
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "weight_bytes": weight_bytes(work),
        "dtype": str(work.model.dtype).removeprefix("torch."),
        "layers": _layers(work),
        "layer": settings.layer,
        "batch": work.batch,
        "prompt_tokens": work.inputs["input_ids"].shape[1],
        "vision_tokens": work.vision_tokens,
        "retained": settings.retain,
    }


def _machine(work: Workload, load: float) -> dict[str, Any]:
    import transformers

    return {
        "device": device_name(work.model.device),
        "date": date.today().isoformat(),
        "load": round(load, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dartfx": dartfx.__version__,
    }


def _plain(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("repeat", "warmup", "lowering", "dynamic")}


def _heading(result: dict[str, Any]) -> str:
    model = result["model"]
    lines = [
        ", ".join(f"{k} {v}" for k, v in result["machine"].items()),
        f"{model['name']}, {model['parameters'] / 1e9:.2f} G parameters, {model['dtype']}, "
        f"batch {model['batch']}: "
        f"{model['prompt_tokens']} tokens, {model['vision_tokens']} of them vision, "
        f"{model['retained']} retained from layer {model['layer']} of {model['layers']} on",
        ", ".join(f"{k} {v}" for k, v in result["settings"].items()),
    ]
    return "\n".join(lines) + "\n"
