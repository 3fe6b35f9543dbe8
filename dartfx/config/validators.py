"""Validation of options: one function per kind of value, and the table that assigns them."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping

import torch

from dartfx import compat
from dartfx.errors import ConfigError
from dartfx.ops import registration
from dartfx.selection.registry import needs_keys, optional_inputs, selector_names

__all__ = [
    "CHECKS",
    "check_calibrate",
    "check_first_layer",
    "check_frames",
    "check_merge",
    "check_quota",
    "check_stages",
    "check_tower",
    "choices",
    "describe",
    "require_kernel",
]

Check = Callable[[str, object], object]
"""(name of the option, value) -> the value to keep; raises ConfigError for an invalid one."""


def describe(value: object) -> str:
    """``value`` for an error message: its repr and its type."""
    return f"{value!r} ({type(value).__name__})"


def _nearest(value: object, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value).lower(), list(valid), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def choices(value: object, valid: Iterable[str]) -> str:
    """The name nearest to ``value``, if one is near, and all valid names."""
    names = sorted(valid)
    return f"{_nearest(value, names)}valid: {', '.join(names)}"


def _integer(minimum: int, optional: bool = False) -> Check:
    wanted = f"an int, at least {minimum}" + (", or None" if optional else "")

    def check(name: str, value: object) -> object:
        if optional and value is None:
            return None
        # bool is an int to Python; here True would silently mean one token.
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ConfigError(f"{name} must be {wanted}, got {describe(value)}")
        return int(value)

    return check


def _ratio(name: str, value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a number with 0 <= {name} < 1, got {describe(value)}")
    return float(value)  # type: ignore[arg-type]


def _staged(one: Check, otherwise: Check | None = None) -> Check:
    """One value, or a sequence of them: one for each stage, kept as a tuple.

    A sequence of one is that one value: it means, and is compiled as, the same.
    """

    def check_each(name: str, value: object) -> object:
        if not isinstance(value, list | tuple):
            return (otherwise or one)(name, value)
        if not value:
            raise ConfigError(f"{name} must hold a value for each stage, got {describe(value)}")
        checked = tuple(one(f"{name}[{i}]", v) for i, v in enumerate(value))
        return checked if len(checked) > 1 else checked[0]

    return check_each


def check_stages(layer: object, retain_tokens: object, reduction_ratio: object) -> None:
    """Raise ConfigError unless the stages ascend, and each keeps fewer tokens than the one before.

    Every stage has a layer and a number of tokens: either all options are single values, or
    ``layer`` and the one that sets the number have as many.
    """
    name, given = "reduction_ratio", reduction_ratio
    if retain_tokens is not None:
        name, given = "retain_tokens", retain_tokens
    layers, budgets = (v if isinstance(v, tuple) else (v,) for v in (layer, given))
    if len(layers) != len(budgets):
        raise ConfigError(
            f"layer={layer!r} has {len(layers)} and {name}={given!r} has {len(budgets)} values; "
            "pruning in stages needs one of each per stage"
        )
    steps = list(itertools.pairwise(layers)), list(itertools.pairwise(budgets))
    if any(one >= other for one, other in steps[0]):
        raise ConfigError(f"layer={layer!r} must ascend: each stage prunes what the last one left")
    rising = name == "reduction_ratio"
    if any((one >= other) if rising else (one <= other) for one, other in steps[1]):
        raise ConfigError(
            f"{name}={given!r} must {'rise' if rising else 'fall'} from stage to stage: a stage "
            "that keeps as many tokens drops none"
        )


def check_first_layer(layers: Iterable[int], selector: str) -> None:
    """Raise ConfigError for a selector that needs keys or queries before layer 0."""
    if 0 in layers and needs_keys(selector):
        able = ", ".join(repr(name) for name in selector_names() if not needs_keys(name))
        raise ConfigError(
            f"layer=0, but selector={selector!r} reads keys of the layer before the cut, and there "
            f"is none before layer 0; use layer=1 or a later one, or a selector without: {able}"
        )


def check_frames(selector: str, quota: object) -> None:
    """Raise ConfigError for a selector that compares frames where all of them are one."""
    if quota == "joint" and "before" in optional_inputs(selector):
        raise ConfigError(
            f"selector={selector!r} compares each frame with the one before, so it needs "
            "quota='frame', or quota='image' where the prompt has text between frames; quota is "
            "'joint'"
        )


def check_tower(selector: str, layers: tuple[int, ...]) -> None:
    """Raise ConfigError where a later stage would need the vision tower's attention once more."""
    if len(layers) > 1 and "tower_attention" in optional_inputs(selector):
        raise ConfigError(
            f"selector={selector!r} ranks by the vision tower's attention, which says the same at "
            f"every layer, but layer={list(layers)} names {len(layers)}; give one layer"
        )


def check_merge(merge: str, layers: tuple[int, ...]) -> None:
    """Raise ConfigError where merged tokens would be merged again."""
    if merge != "none" and len(layers) > 1:
        raise ConfigError(
            f"merge={merge!r} merges at one layer, but layer={list(layers)} names {len(layers)}; "
            "give one layer, or merge='none'"
        )


def check_calibrate(calibrate: bool, layers: tuple[int, ...], kv_layout: str) -> None:
    """Raise ConfigError where kept keys could not keep the sizes of their groups."""
    if calibrate and len(layers) > 1:
        raise ConfigError(
            f"calibrate=True counts the tokens dropped at one layer, but layer={list(layers)} "
            f"names {len(layers)}; give one layer, or calibrate=False"
        )
    if calibrate and kv_layout == "layered":
        raise ConfigError(
            "calibrate=True needs the same tokens in the KV caches of all layers, so that one mask "
            "fits them; leave kv_layout='layered' out, or use calibrate=False"
        )


def check_quota(
    quota: object, min_tokens: object, retain_tokens: object, ratio_given: bool, layers: int
) -> None:
    """Raise ConfigError where quota and another option contradict each other."""
    if min_tokens != 1 and quota not in ("image", "frame"):
        raise ConfigError(f"min_tokens={min_tokens} applies only with quota='image' or 'frame'")
    if not isinstance(quota, tuple):
        return
    if layers > 1:
        raise ConfigError(
            f"quota={list(quota)} gives the tokens that one cut keeps, but layer names {layers} "
            "cuts; use quota='image' with retain_tokens for each"
        )
    if ratio_given:
        raise ConfigError(
            f"quota={list(quota)} and reduction_ratio both set how many vision tokens are kept; "
            "give one of them, or quota='image' with reduction_ratio"
        )
    if retain_tokens is not None and sum(quota) != retain_tokens:
        raise ConfigError(
            f"quota={list(quota)} adds up to {sum(quota)}, but retain_tokens={retain_tokens}; give "
            "numbers that add up to it, or leave retain_tokens out"
        )


def _quota(name: str, value: object) -> object:
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError(f"{name} must hold a number for each image, got {describe(value)}")
        return tuple(_integer(1)(f"{name}[{i}]", number) for i, number in enumerate(value))
    return _choice(lambda: ("joint", "image", "frame"))(name, value)


def _choice(valid: Callable[[], Iterable[str]], optional: bool = False) -> Check:
    def check(name: str, value: object) -> object:
        if optional and value is None:
            return None
        names = list(valid())
        if not isinstance(value, str) or value not in names:
            raise ConfigError(f"{name} cannot be {describe(value)}; {choices(value, names)}")
        return value

    return check


def require_kernel(kernel: str) -> None:
    """Raise KernelUnavailableError unless ``kernel`` can run on this machine."""
    # The model's device is not known yet; the operator checks again with the one it runs on.
    registration.choose_kernel(kernel, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _modes() -> Iterable[str]:
    return {"default", *compat.list_mode_options()}


def _inductor(name: str, value: object) -> object:
    """``value`` with its keys spelled as Inductor spells them, after Inductor's own type check."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a dict of Inductor options, got {describe(value)}")
    patches: dict[str, object] = {}
    if not value:
        return patches
    valid, types = compat.list_options(), compat.inductor_config
    for key, setting in value.items():
        spelled = key.replace("-", "_") if isinstance(key, str) else key
        if spelled not in valid:
            raise ConfigError(
                f"unknown Inductor option {name}[{key!r}]; {_nearest(spelled, valid)}"
                f"torch._inductor.list_options() has all {len(valid)}"
            )
        if spelled in patches:
            raise ConfigError(f"{name} gives {spelled!r} twice, with '-' and with '_'")
        wanted = types.get_type(spelled)
        if isinstance(wanted, type) and not isinstance(setting, wanted):
            raise ConfigError(
                f"{name}[{key!r}] must be of type {wanted.__name__}, got {describe(setting)}"
            )
        patches[spelled] = setting
    return patches


def _path(name: str, value: object) -> object:
    if value is None:
        return None
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else value
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{name} must be the path of a directory, got {describe(value)}")
    return path


def _pattern(name: str, value: object) -> object:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a regular expression, got {describe(value)}")
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"{name} is not a regular expression: {value!r}: {error}") from error
    return value


def _flag(name: str, value: object) -> object:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {describe(value)}")
    return value


CHECKS: dict[str, Check] = {
    "retain_tokens": _staged(_integer(0), otherwise=_integer(0, optional=True)),
    "reduction_ratio": _staged(_ratio),
    "layer": _staged(_integer(0)),
    "pivot_image_tokens": _integer(0),
    "pivot_text_tokens": _integer(0),
    "selector": _choice(selector_names),
    "quota": _quota,
    "min_tokens": _integer(0),
    "kv_layout": _choice(lambda: ("auto", "layered", "uniform")),
    "order_mixing": _choice(lambda: ("allow", "refuse")),
    "kernel": _choice(lambda: registration.KERNELS),
    "lowering": _choice(lambda: ("inductor", "aot_eager", "eager")),
    "inductor": _inductor,
    "mode": _choice(_modes, optional=True),
    "on_unsupported": _choice(lambda: ("warn", "error", "ignore")),
    "dump": _path,
    "dump_graphs": _pattern,
    "dump_passes": _pattern,
    "tokens": _flag,
    "check_ranks": _flag,
    "outline_layers": _flag,
    "merge": _choice(lambda: ("none", "nearest")),
    "calibrate": _flag,
}
