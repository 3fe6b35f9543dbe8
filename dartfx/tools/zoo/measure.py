"""Compiles one family and compares the result with the hooks and the oracle."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from logging.handlers import BufferingHandler
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import dartfx
from dartfx.errors import PruningWarning, SelectionError
from dartfx.observe.report import Report
from dartfx.passes.outcome import Pruned
from dartfx.passes.refusal import Declined
from dartfx.runtime.vision_mask import LOST
from dartfx.tools.zoo import hooked
from dartfx.tools.zoo.family import Family, Inputs
from dartfx.tools.zoo.registry import load

RETAIN = 6
CALLS = ("one", "pad2", "generate")
CLOSE = 2e-4  # logits are of order 1; a misplaced token changes them a hundred times as much

# From best to worst; a family's status is its worst call's.
GOOD = ("pruned", "refused", "unsure", "absent")
BAD = ("SILENT", "UNCHECKED", "WRONG", "CRASH")
_ORDER = ("absent", "pruned", "refused", "unsure", *BAD)


@dataclass
class Call:
    """One call of a compiled model.

    status: in ``GOOD`` or ``BAD``; "unsure": dartfx logs that it may have missed vision tokens.
    difference: largest |logit difference| to the oracle, or to the eager model after a refusal.
    moved: largest |logit difference| between the oracle and the unpruned eager model at the last
    token, which makes a wrong answer detectable.
    graphs: the number of dynamo graphs.
    why: the refusal or the error; where: the user's line that stopped the compiler.
    """

    status: str
    difference: float | None = None
    moved: float | None = None
    graphs: int = 0
    how: str = ""
    kv_layout: str = ""
    crossings: tuple[str, ...] = ()
    why: str = ""
    where: str = ""
    advice: str = ""
    trace: str = ""


@dataclass
class Result:
    """A family's calls by name: forward of one prompt, of a padded pair, and generate."""

    name: str
    about: str
    calls: dict[str, Call] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def status(self) -> str:
        """The worst call's status; "partly" if some were pruned, others refused or unsure."""
        found = {call.status for call in self.calls.values()}
        if "pruned" in found and {"pruned"} < found <= {"pruned", "refused", "unsure"}:
            return "partly"
        return max(found, key=_ORDER.index)

    @property
    def good(self) -> bool:
        """Whether every call was pruned with parity or refused with a reason."""
        return all(call.status in GOOD for call in self.calls.values())

    def as_json(self) -> dict[str, Any]:
        """Everything, in JSON-compatible types."""
        return {"status": self.status, **asdict(self)}


def measure(
    name: str,
    about: str,
    *,
    lowering: str = "eager",
    calls: Sequence[str] = CALLS,
    steps: int = 8,
) -> Result:
    """Build a family and run its calls.  steps: tokens to generate.  Never raises."""
    result, start = Result(name, about), time.perf_counter()
    torch.compiler.reset()
    dartfx.reset()
    try:
        family = load(name)
    except (AttributeError, ImportError) as error:
        result.calls["build"] = Call("absent", why=f"not in this environment: {_first_line(error)}")
        return result
    except Exception as error:
        result.calls["build"] = _crash(error)
        return result
    options = {"retain_tokens": RETAIN, "layer": family.structure.layer, "lowering": lowering}
    attempts: dict[str, Callable[[], Call]] = {
        "one": lambda: _forward_one(family, options),
        "pad2": lambda: _forward_padded(family, options),
        "generate": lambda: _generate(family, options, steps),
    }
    result.calls |= {call: _attempt(attempts[call]) for call in calls}
    result.seconds = time.perf_counter() - start
    return result


def _attempt(call: Callable[[], Call]) -> Call:
    try:
        return call()
    except SelectionError as error:
        # A refusal that depends on a call's values, so it can only happen at run time.
        return Call("refused", why=_first_line(error))
    except Exception as error:
        return _crash(error)
    finally:
        torch.compiler.reset()
        dartfx.reset()


def _crash(error: Exception) -> Call:
    return Call("CRASH", why=_first_line(error), trace=traceback.format_exc())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip(':') if lines else ''}"


def _where(family: Family) -> dict[str, Any]:
    return {
        "decoder": family.decoder,
        "image_token_id": family.image_token_id,
        "layer": family.structure.layer,
        "retain": RETAIN,
        "latent_cache": family.structure.latent_cache,
    }


def _forward_one(family: Family, options: dict[str, Any]) -> Call:
    """Run one prompt without a mask through a bare ``torch.compile``."""
    inputs = family.make_inputs("one")
    del inputs["attention_mask"]
    compiled = torch.compile(family.model, backend="dart", options=options)
    return _forward(family, inputs, compiled)


def _forward_padded(family: Family, options: dict[str, Any]) -> Call:
    """Run two left-padded prompts of different lengths through ``dartfx.compile``."""
    with _quiet(), _compiled(family.model, options) as model:
        return _forward(family, family.make_inputs("pad2"), model)


def _forward(family: Family, inputs: Inputs, compiled: Any) -> Call:
    with torch.no_grad(), _quiet() as warned:
        logits = compiled(**inputs).logits
        reports = dartfx.reports()
    family.model._compiled_call_impl = None
    with torch.no_grad():
        plain = family.model(**inputs).logits
    call = _call_of(reports, warned)
    if call.status != "pruned":
        return _compare(call, logits, plain)
    cache = {} if family.structure.makes_cache else {"past_key_values": DynamicCache()}
    try:
        oracle = hooked.pruned_forward(family.model, inputs | cache, **_where(family))
    except (TypeError, ValueError) as error:
        return _unchecked(call, error)
    valid = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    kept = valid.gather(1, oracle.keep_idx)
    call.moved = _difference(plain[:, -1], oracle.logits[:, -1])
    if call.moved < 50 * CLOSE:
        return _unchecked(call, ValueError(f"pruning moves the logits by {call.moved:.0e} only"))
    return _compare(call, logits, oracle.logits, kept)


def _generate(family: Family, options: dict[str, Any], steps: int) -> Call:
    """Run one prompt through ``dartfx.compile`` and ``generate``."""
    inputs = family.make_inputs("one")
    del inputs["attention_mask"]
    arguments: dict[str, Any] = {
        "max_new_tokens": steps,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with _quiet() as warned, _compiled(family.model, options) as model:
        output = model.generate(**inputs, **arguments)
        reports = dartfx.reports()
    call = _call_of(reports, warned)
    logits = torch.stack(output.logits, 1)
    if call.status != "pruned":
        plain = family.model.generate(**inputs, **arguments)
        return _compare(call, logits, torch.stack(plain.logits, 1))
    layout: Any = call.kv_layout if call.kv_layout == "uniform" else "layered"
    where = {**_where(family), "max_new_tokens": steps, "kv_layout": layout}
    try:
        oracle = hooked.pruned_generate(family.model, inputs, **where)
    except (TypeError, ValueError) as error:
        return _unchecked(call, error)
    call = _compare(call, logits, oracle.logits)
    if call.status == "pruned" and not torch.equal(output.sequences[:, -steps:], oracle.token_ids):
        call.status, call.why = "WRONG", "other tokens than the oracle's"
    return call


@contextmanager
def _compiled(model: Any, options: dict[str, Any]) -> Iterator[Any]:
    try:
        yield dartfx.compile(model, **options)
    finally:
        dartfx.uncompile(model)


@contextmanager
def _quiet() -> Iterator[list[str]]:
    """Collect dartfx's warnings, and suppress those of torch and transformers."""
    warned: list[str] = []
    logged = BufferingHandler(1000)  # a bare compile cannot report on a whole call otherwise
    logging.getLogger("dartfx").addHandler(logged)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield warned
    finally:
        logging.getLogger("dartfx").removeHandler(logged)
    warned += [str(w.message) for w in caught if issubclass(w.category, PruningWarning)]
    warned += [said for r in logged.buffer if (said := r.getMessage()).startswith(LOST)]


def _call_of(reports: list[Report], warned: list[str]) -> Call:
    """Summarise dartfx's reports on a call."""
    for report in reports:
        if isinstance(pruned := report.outcome, Pruned):
            crossings = (f"{c.name} [{', '.join(c.shape)}]" for c in pruned.crossings)
            return Call(
                "pruned",
                graphs=len(reports),
                how=pruned.how,
                kv_layout=pruned.kv_layout,
                crossings=tuple(crossings),
            )
    for report in reports:
        if isinstance(no := report.outcome, Declined):
            status = "refused" if warned else "SILENT"
            if no.because.startswith("internal error"):
                status = "CRASH"  # caught by the compiler, but not actionable for a user
            return Call(
                status, graphs=len(reports), why=no.because, where=no.where, advice=no.advice
            )
    said = dict.fromkeys(getattr(report.outcome, "because", "") for report in reports)
    status = "unsure" if any(getattr(r.outcome, "unsure", False) for r in reports) else "SILENT"
    if lost := [each for each in warned if each.startswith(LOST)]:
        status, said = "refused", dict.fromkeys(lost)
    return Call(status, graphs=len(reports), why="; ".join(said) or "dynamo made no graph")


def _unchecked(call: Call, error: Exception) -> Call:
    call.status, call.why = "UNCHECKED", _first_line(error)
    call.trace = traceback.format_exc()
    return call


def _compare(call: Call, ours: Tensor, theirs: Tensor, valid: Tensor | None = None) -> Call:
    """Fill in the difference of ``call``; its status is WRONG if that is too large."""
    if ours.shape != theirs.shape:
        call.status = "WRONG"
        call.why = f"logits {list(ours.shape)}, expected {list(theirs.shape)}; {call.why}"
        return call
    if valid is not None:
        ours, theirs = ours[valid], theirs[valid]
    call.difference = _difference(ours, theirs)
    if not call.difference <= CLOSE:
        call.status, call.why = "WRONG", f"logits differ by {call.difference:.1e}; {call.why}"
    return call


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max())
