"""The options of the backend: their meaning, validation, and the fingerprint of a result."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, overload

import torch

from dartfx import compat
from dartfx.config.fingerprint import digest
from dartfx.config.validators import (
    CHECKS,
    check_calibrate,
    check_first_layer,
    check_frames,
    check_merge,
    check_quota,
    check_stages,
    check_tower,
    choices,
    describe,
    require_kernel,
)
from dartfx.errors import ConfigError
from dartfx.selection.registry import selector_fingerprint

__all__ = ["DUMP_VARIABLE", "OPTIONS_VARIABLE", "DartConfig"]

DUMP_VARIABLE = "DARTFX_DUMP"
OPTIONS_VARIABLE = "DARTFX_OPTIONS"

# None affects a tensor: they control how a refusal is reported and which graphs are written.
_NO_EFFECT_ON_RESULT = frozenset({"dump", "dump_graphs", "dump_passes", "on_unsupported"})

# A synonym for tokens of any kind, audio for example.
_SYNONYMS = {"pivot_media_tokens": "pivot_image_tokens"}

# Compiled code does size arithmetic in 64 bits. Below this numerator, 2 * N * p + q stays inside
# them for every N up to 2**24 vision tokens (a float has at most 17 decimals, so q <= 10**17).
_LARGEST_SYMBOLIC_NUMERATOR = 1 << 37


@dataclass(frozen=True)
class DartConfig:
    """The checked options of one compiled model; raises ConfigError for any that is not valid.

    retain_tokens: vision tokens kept per sample; None means: follow ``reduction_ratio``.
    reduction_ratio: share of the vision tokens that is dropped, in [0, 1).
    layer: index of the first decoder layer that sees the pruned sequence; 0 for selectors that
        need no keys.  Several
        ascending layers prune in stages; then ``retain_tokens`` (falling) or ``reduction_ratio``
        (rising; of the prompt's vision tokens) gives one value for each.
    pivot_image_tokens, pivot_text_tokens: pivots of either kind.  ``pivot_media_tokens`` in
        options is the first by a name that fits audio as well.
    selector: a name in the selector registry.
    quota: "joint" spends a row's budget on all its vision tokens alike; "image" shares it out by
        the images' sizes, "frame" by those of a video's frames; numbers give each image's, and
        without ``retain_tokens`` their sum is R.
    min_tokens: with quota "image" or "frame", the least of each; a smaller one is kept whole.
    kv_layout: "layered", "uniform" or "auto".
    order_mixing: "allow" lets causal convolutions and scans behind the cut run over the kept
        tokens, closed up; "refuse" leaves such a model unpruned.
    kernel: "triton", "torch" or "auto"; "triton" raises KernelUnavailableError where it cannot run.
    lowering: what compiles the rewritten graph: "inductor", "aot_eager" or "eager".
    inductor: Inductor options by name, laid over those of ``mode``.
    mode: a ``torch.compile`` mode; an option too, since torch.compile refuses ``mode=`` with
        ``options=``.
    on_unsupported: "warn", "error" or "ignore" when vision tokens cannot be pruned.
    dump: directory for graph dumps.
    dump_graphs: a regular expression: only graphs are dumped in whose "graph_003 pruned
        modeling_x.py:12 in forward" (number, outcome, source line) it is found.
    dump_passes: a regular expression: the graph is written only after passes in whose name it is
        found ("gather", "check 2").
    tokens: record which tokens each pruned call keeps, for :func:`dartfx.kept_tokens`.
    check_ranks: under tensor parallelism, compare at run time that all ranks keep the same tokens,
        and raise SelectionError naming the rank that does not.
    outline_layers: compile equal layers of a pruned graph once, where that can be; see
        docs/design.md.
    merge: "nearest" averages each dropped vision token into the kept one that is most like it, at
        the one layer of the cut; "none" drops it.
    calibrate: add the log of the number of tokens that a kept vision token stands for, itself and
        the dropped ones most like it, to its attention scores, in this call and in later ones.
    """

    retain_tokens: int | tuple[int, ...] | None = None
    reduction_ratio: float | tuple[float, ...] = 0.778
    layer: int | tuple[int, ...] = 2
    pivot_image_tokens: int = 4
    pivot_text_tokens: int = 4
    selector: str = "dart"
    kv_layout: str = "auto"
    order_mixing: str = "allow"
    kernel: str = "auto"
    lowering: str = "inductor"
    inductor: Mapping[str, object] = field(default_factory=dict, hash=False)
    mode: str | None = None
    on_unsupported: str = "warn"
    dump: str | os.PathLike[str] | None = None
    tokens: bool = False
    check_ranks: bool = False
    quota: str | tuple[int, ...] = "joint"
    min_tokens: int = 1
    dump_graphs: str | None = None
    dump_passes: str | None = None
    outline_layers: bool = True
    merge: str = "none"
    calibrate: bool = False

    def __post_init__(self) -> None:
        for name, check in CHECKS.items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        ratio_given = self.reduction_ratio != type(self).reduction_ratio
        check_quota(self.quota, self.min_tokens, self.retain_tokens, ratio_given, len(self.layers))
        if isinstance(self.quota, tuple):
            object.__setattr__(self, "retain_tokens", sum(self.quota))
        check_stages(self.layer, self.retain_tokens, self.reduction_ratio)
        check_first_layer(self.layers, self.selector)
        check_merge(self.merge, self.layers)
        check_calibrate(self.calibrate, self.layers, self.kv_layout)
        check_frames(self.selector, self.quota)
        check_tower(self.selector, self.layers)
        if self.lowering != "inductor":
            _refuse_inductor_options(self)
        if self.kernel == "triton":
            if self.quota != "joint":
                raise ConfigError(
                    f"kernel='triton' chooses among all vision tokens of a row, but quota="
                    f"{self.quota!r} sets budgets per image; use kernel='auto' or 'torch'"
                )
            require_kernel(self.kernel)

    @classmethod
    def from_options(
        cls, options: Mapping[str, object] | None, mode: str | None = None
    ) -> DartConfig:
        """The config of ``torch.compile(..., mode=mode, options=options)``.

        Raises ConfigError for an unknown key, a value that is not valid, and two values that
        contradict each other.  ``DARTFX_DUMP`` is the default of ``dump``.
        """
        if not isinstance(options, Mapping | None):
            raise ConfigError(f"options must be a dict, got {describe(options)}")
        given: dict[str, Any] = dict(options or {})
        valid = [f.name for f in fields(cls)]
        for key in given:
            if key not in valid and key not in _SYNONYMS:
                raise ConfigError(f"unknown option {key!r}; {choices(key, valid)}")
        for key, name in _SYNONYMS.items():
            if key in given and name in given:
                raise ConfigError(f"{key} and {name} are the same option; give one of them")
            if key in given:
                given[name] = given.pop(key)
        if given.get("retain_tokens") is not None and "reduction_ratio" in given:
            raise ConfigError(
                f"retain_tokens={given['retain_tokens']!r} and "
                f"reduction_ratio={given['reduction_ratio']!r} both set how many vision tokens "
                "are kept; give one of them"
            )
        if mode is not None:
            if given.get("mode") not in (None, mode):
                raise ConfigError(
                    f"mode={mode!r} and options['mode']={given['mode']!r} disagree; give one"
                )
            given["mode"] = mode
        if given.get("dump") is None:
            given["dump"] = os.environ.get(DUMP_VARIABLE) or None
        return cls(**given)

    @classmethod
    def of_call(cls, options: Mapping[str, object] | None, mode: str | None = None) -> DartConfig:
        """The config of a call: of its options, of ``DARTFX_OPTIONS`` (JSON) where it gives none.

        The two are not mixed, so a caller's options never conflict with ones it does not know of.
        Raises ConfigError as :meth:`from_options`; it names the variable where the options are
        from there.
        """
        text = os.environ.get(OPTIONS_VARIABLE)
        if options or not text:
            return cls.from_options(options, mode)
        try:
            return cls.from_options(_parsed(text), mode)
        except ConfigError as error:
            raise ConfigError(f"the environment's {OPTIONS_VARIABLE}: {error}") from error

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of every stage, ascending."""
        return self.layer if isinstance(self.layer, tuple) else (self.layer,)

    @overload
    def retain_for(self, n: int, stage: int = 0) -> int: ...
    @overload
    def retain_for(self, n: int | torch.SymInt, stage: int = 0) -> int | torch.SymInt: ...

    def retain_for(self, n: int | torch.SymInt, stage: int = 0) -> int | torch.SymInt:
        """How many of a sample's ``n`` vision tokens are kept from the stage on (R).

        ``retain_tokens`` when given, even if it exceeds ``n``; otherwise
        max(1, round(n * (1 - reduction_ratio))) with the ratio read as the decimal that was
        written and halves rounded up, so an int and a SymInt give the same number.  A SymInt
        gets no guard.  Raises ConfigError for a SymInt when the ratio has so many decimals that
        compiled size arithmetic could overflow.
        """
        budgets, ratios = self.retain_tokens, self.reduction_ratio
        if budgets is not None:
            return budgets[stage] if isinstance(budgets, tuple) else budgets
        ratio = ratios[stage] if isinstance(ratios, tuple) else ratios
        keep = 1 - Fraction(str(ratio))
        p, q = keep.numerator, keep.denominator
        if not isinstance(n, int) and p >= _LARGEST_SYMBOLIC_NUMERATOR:
            raise ConfigError(
                f"reduction_ratio={ratio!r} has too many decimals for a compilation "
                "with dynamic shapes: its size arithmetic would leave 64 bits; write at most 11 "
                "decimals, or give retain_tokens"
            )
        # floor(n*p/q + 1/2).  Rounding halves to even would take a Mod more, which makes sympy ten
        # times slower at every shape of the compiled graph.
        nearest = (2 * n * p + q) // (2 * q)
        retained: int | torch.SymInt = torch.sym_max(1, nearest)  # type: ignore[no-untyped-call]
        return retained

    def inductor_patches(self) -> dict[str, object]:
        """Inductor's config patches: those of ``mode``, overlaid by ``inductor``."""
        patches: dict[str, object] = {}
        if self.mode not in (None, "default"):
            patches.update(compat.list_mode_options(self.mode))
        patches.update(self.inductor)
        return patches

    def fingerprint(self) -> str:
        """Hex digest of all that decides what compiled code computes, for compiler cache keys.

        The options (without those of dumps and ``on_unsupported``, which change no tensor), the
        source of dartfx and its passes, the selector's own fingerprint, and the versions of dartfx
        and torch.  Equal in every process, unless an Inductor option holds an object that has no
        ``uuid()`` to identify it: such a config equals only itself.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        decisive = {k: v for k, v in options.items() if k not in _NO_EFFECT_ON_RESULT}
        selector = selector_fingerprint(self.selector)
        return digest({"options": decisive, "selector": selector})


def _parsed(text: str) -> dict[str, object]:
    """The options in ``DARTFX_OPTIONS``.  Raises ConfigError for anything but a JSON object."""
    example = f"""write for example {OPTIONS_VARIABLE}='{{"retain_tokens": 64}}'"""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{text!r} is not JSON ({error}); {example}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"it must hold a JSON object, got {describe(given)}; {example}")
    return given


def _refuse_inductor_options(config: DartConfig) -> None:
    for name, value in (("mode", config.mode), ("inductor", config.inductor)):
        # mode="default" sets no option of Inductor, so nothing would be ignored.
        if value and value != "default":
            raise ConfigError(
                f"{name}={value!r} is for Inductor, but lowering={config.lowering!r} does not use "
                f"it; drop {name}, or use lowering='inductor'"
            )
