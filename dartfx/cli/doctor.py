"""``python -m dartfx doctor``: whether dartfx works on this machine, and how to fix it if not."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import dartfx
from dartfx import compat
from dartfx.cli.tiny_model import Tiny, prompt
from dartfx.integrations.vllm import vllm_api
from dartfx.ops.triton_launch import unavailable

__all__ = ["Finding", "configure", "examine", "run"]

LEAST = {"torch": (2, 11), "transformers": (5, 17)}


@dataclass(frozen=True)
class Finding:
    """One check.  state: "ok", "note" (works, but) or "bad"; fix: what to do about it."""

    state: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"\n       fix: {self.fix}" if self.fix else ""
        return f"{self.state:>4}   {self.what}{fix}"


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--lowering",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="what compiles the tiny model (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="leave out the compilation")


def run(arguments: argparse.Namespace) -> int:
    """Print every finding; 1 when anything is bad."""
    bad = 0
    for finding in examine(arguments.lowering, arguments.quick):
        print(finding, flush=True)
        bad += finding.state == "bad"
    good = "everything checked works" if arguments.quick else "everything dartfx needs works"
    print(f"{bad} of the above must be fixed" if bad else good)
    return 1 if bad else 0


def examine(lowering: str, quick: bool = False) -> Iterator[Finding]:
    """All findings, check by check: one that fails does not stop the next."""
    checks: list[Callable[[], Finding]] = [
        _python,
        lambda: _version("torch", needed=True),
        lambda: _version("transformers", needed=False),
        _vllm,
        _device,
        _triton,
        _entry_point,
        _private_names,
        lambda: _compiler(lowering),
        _no_model if quick else lambda: _tiny_model(lowering),
    ]
    for check in checks:
        try:
            yield check()
        except Exception as error:  # any failure is a finding
            text = f"{type(error).__name__}: {error}"
            yield Finding("bad", text.strip().split("\n")[0], "see the error; please report it if "
                          "it comes from dartfx")  # fmt: skip


def _python() -> Finding:
    return Finding("ok", f"Python {platform.python_version()}, {platform.platform()}")


def _version(name: str, needed: bool) -> Finding:
    least = ".".join(map(str, LEAST[name]))
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        text = f"{name} is not installed"
        if needed:
            return Finding("bad", text, f"pip install '{name}>={least}'")
        return Finding("note", f"{text}; only models that come from it need it", "")
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if numbers < LEAST[name]:
        wanted = f"pip install --upgrade '{name}>={least}'"
        return Finding("bad", f"{name} {found} is older than {least}", wanted)
    return Finding("ok", f"{name} {found}")


def _vllm() -> Finding:
    version, wanted = vllm_api.installed(), f"pip install 'vllm=={vllm_api.TESTED}.*'"
    if version is None:
        return Finding("note", "vLLM is not installed; only serving with it needs it")
    if not vllm_api.is_tested(version):
        text = f"vLLM {version}: dartfx prunes inside vLLM {vllm_api.TESTED} only"
        return Finding("note", text, wanted)
    if missing := vllm_api.missing():
        names = "; ".join(map(str, missing))
        return Finding("bad", f"vLLM {version} lacks {names}", f"{wanted}, from its own wheel")
    return Finding("ok", f"vLLM {version}, which dartfx was tested inside of")


def _device() -> Finding:
    if not torch.cuda.is_available():
        return Finding("ok", f"device: CPU, {torch.get_num_threads()} threads; no CUDA device")
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return Finding("ok", f"device: {torch.cuda.get_device_name()}, compute capability {capability}")


def _triton() -> Finding:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = unavailable(device)
    if not reason:
        return Finding("ok", f"Triton {importlib.metadata.version('triton')} selects tokens here")
    if device.type == "cuda":
        return Finding("bad", reason, "pip install triton, in the version that torch names")
    return Finding("ok", f"tokens are selected by compiled torch code ({reason})")


def _entry_point() -> Finding:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="dart")
    if not found:
        return Finding(
            "bad",
            'no entry point: backend="dart" is unknown to torch unless dartfx is imported first',
            "pip install dartfx (or pip install -e . in a checkout): it registers the entry point",
        )
    values = sorted({point.value for point in found})
    if values != ["dartfx.backend:dart"]:
        text = f"the entry point dart means {', '.join(values)}"
        return Finding("bad", text, "uninstall the other package that registers a backend dart")
    if "dart" not in torch.compiler.list_backends():
        return Finding("bad", "torch does not list the backend dart", "restart Python")
    return Finding("ok", f'backend="dart" is {values[0]} of {dartfx.__file__}')


def _private_names() -> Finding:
    missing = compat.missing()
    if not missing:
        return Finding("ok", "torch has the private names that dartfx was written for")
    names = "; ".join(map(str, missing))
    return Finding("note", f"names that the versions dartfx was tested with have: {names}")


def _compiler(lowering: str) -> Finding:
    if lowering != "inductor":
        return Finding("note", f"Inductor is not checked with --lowering {lowering}")
    try:
        return Finding("ok", f"C++ compiler: {compat.get_cpp_compiler()}")
    except compat.errors("InvalidCxxCompiler"):
        state = "note" if torch.cuda.is_available() else "bad"
        text = "no C++ compiler, which Inductor needs for the CPU"
        return Finding(state, text, "apt-get install g++, or set CXX")


def _no_model() -> Finding:
    return Finding("note", "no model was pruned and compiled (--quick)")


# Half of it occurs once per machine: Inductor probes vector instructions and compiles a header.
_LONG = ", which takes about half a minute where Inductor's cache is empty"


def _say(what: str) -> None:
    """Print the current step on stderr: stdout holds only findings."""
    print(f"...    {what}", file=sys.stderr, flush=True)


def _tiny_model(lowering: str) -> Finding:
    """Compile a tiny model, and compare its output with the same pruning run eagerly."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model, inputs = Tiny().to(device), prompt(device)
        _say("pruning a tiny model and running it eagerly")
        wanted, _ = _run(model, inputs, "eager")
        start = time.perf_counter()
        _say(f"compiling a tiny model by {lowering}{_LONG if lowering == 'inductor' else ''}")
        made, reports = _run(model, inputs, lowering)
        seconds = time.perf_counter() - start
    if not any(report.pruned for report in reports):
        text = "; ".join(str(report.outcome) for report in reports) or "dynamo made no graph"
        return Finding("bad", f"a tiny model was not pruned: {text}", "please report it")
    apart = float((made - wanted).abs().max())
    if not apart < 1e-3:
        text = f"a tiny model compiled by {lowering} is off by {apart:.1e}"
        return Finding("bad", text, "please report it; until then: options={'lowering': 'eager'}")
    text = f"a tiny model was pruned and compiled by {lowering} in {seconds:.1f} s"
    return Finding("ok", f"{text}; largest difference from eager {apart:.1e}")


def _run(model: Tiny, inputs: Any, lowering: str) -> tuple[torch.Tensor, list[dartfx.Report]]:
    options: dict[str, Any] = {
        "layer": 1,
        "retain_tokens": 4,
        "lowering": lowering,
        "on_unsupported": "ignore",
    }
    seen = len(dartfx.reports())
    output = torch.compile(model, backend="dart", fullgraph=True, options=options)(*inputs)
    return output, dartfx.reports()[seen:]
