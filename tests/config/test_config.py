"""DartConfig: accepted and refused values, error messages, and Inductor's patches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dartfx.config.options import DartConfig
from dartfx.errors import ConfigError, KernelUnavailableError
from dartfx.ops import registration
from dartfx.selection.registry import optional_inputs, selector_names


def refused(options: dict[str, object], *words: str, mode: str | None = None) -> None:
    with pytest.raises(ConfigError) as caught:
        DartConfig.from_options(options, mode)
    for word in words:
        assert word in str(caught.value)


# Accepting


def test_no_options_give_the_documented_defaults() -> None:
    assert DartConfig.from_options(None) == DartConfig.from_options({}) == DartConfig()
    config = DartConfig()
    assert (config.retain_tokens, config.reduction_ratio, config.layer) == (None, 0.778, 2)
    assert (config.pivot_image_tokens, config.pivot_text_tokens) == (4, 4)
    assert (config.selector, config.kv_layout, config.kernel) == ("dart", "auto", "auto")
    assert (config.lowering, config.inductor, config.mode) == ("inductor", {}, None)
    assert (config.on_unsupported, config.dump) == ("warn", None)


def test_every_option_arrives(tmp_path: Path) -> None:
    options = {
        "retain_tokens": 64,
        "layer": 3,
        "pivot_image_tokens": 2,
        "pivot_text_tokens": 0,
        "selector": "uniform",
        "kv_layout": "uniform",
        "kernel": "torch",
        "lowering": "inductor",
        "inductor": {"max_autotune": True},
        "mode": "reduce-overhead",
        "on_unsupported": "error",
        "dump": tmp_path,
        "tokens": True,
    }
    config = DartConfig.from_options(options)
    assert {name: getattr(config, name) for name in options} == options | {"dump": str(tmp_path)}


@pytest.mark.parametrize("selector", sorted(selector_names()))
def test_every_registered_selector_is_valid(selector: str) -> None:
    quota = "frame" if "before" in optional_inputs(selector) else "joint"
    assert DartConfig(selector=selector, quota=quota).selector == selector


def test_the_config_is_frozen_hashable_and_apart_from_the_callers_dict() -> None:
    inductor: dict[str, object] = {"debug": False}
    config = DartConfig(inductor=inductor)
    inductor["debug"] = True
    assert config.inductor == {"debug": False}
    assert hash(config) == hash(DartConfig(inductor={"debug": False}))
    with pytest.raises(AttributeError):
        config.layer = 3  # type: ignore[misc]


# Refusing


def test_unknown_key_names_itself_all_valid_keys_and_the_nearest() -> None:
    every = DartConfig.__dataclass_fields__
    refused({"retain_token": 64}, "'retain_token'", "did you mean 'retain_tokens'?", *every)


def test_unknown_key_with_nothing_near_gets_no_guess() -> None:
    with pytest.raises(ConfigError) as caught:
        DartConfig.from_options({"zzz": 1})
    assert "did you mean" not in str(caught.value)


def test_a_key_that_is_no_string_is_unknown() -> None:
    refused({3: 1}, "unknown option 3")  # type: ignore[dict-item]


def test_options_that_are_no_dict_are_refused() -> None:
    with pytest.raises(ConfigError, match="options must be a dict"):
        DartConfig.from_options(["retain_tokens"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("retain_tokens", -1),
        ("retain_tokens", True),
        ("retain_tokens", 64.0),
        ("retain_tokens", "64"),
        ("reduction_ratio", 1.0),
        ("reduction_ratio", -0.1),
        ("reduction_ratio", float("nan")),
        ("reduction_ratio", False),
        ("reduction_ratio", "0.5"),
        ("reduction_ratio", None),
        ("layer", -1),
        ("layer", True),
        ("layer", None),
        ("pivot_image_tokens", -1),
        ("pivot_text_tokens", -1),
        ("pivot_text_tokens", 2.0),
        ("selector", None),
        ("kv_layout", 1),
        ("lowering", None),
        ("kernel", True),
        ("on_unsupported", False),
        ("mode", 1),
        ("inductor", None),
        ("inductor", ["max_autotune"]),
        ("dump", 1),
        ("dump", ""),
        ("dump", b"/tmp"),
        ("tokens", 1),
        ("tokens", None),
    ],
)
def test_wrong_type_or_range_names_key_and_value(name: str, value: object) -> None:
    refused({name: value}, name, repr(value), type(value).__name__)
    with pytest.raises(ConfigError):
        DartConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "nearest"),
    [
        ("selector", "darts", "dart"),
        ("kv_layout", "layerd", "layered"),
        ("kernel", "Triton", "triton"),
        ("lowering", "aot-eager", "aot_eager"),
        ("on_unsupported", "warning", "warn"),
        ("mode", "max_autotune", "max-autotune"),
    ],
)
def test_wrong_choice_names_the_nearest(name: str, value: str, nearest: str) -> None:
    refused({name: value}, name, repr(value), f"did you mean {nearest!r}?", "valid: ")


def test_two_ways_to_say_how_many_are_refused() -> None:
    refused({"retain_tokens": 64, "reduction_ratio": 0.5}, "retain_tokens=64", "0.5", "one of them")
    given_none = DartConfig.from_options({"retain_tokens": None, "reduction_ratio": 0.5})
    assert given_none.reduction_ratio == 0.5


def test_kernel_triton_is_validated_by_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lookups = []

    def unavailable(kernel: str, device: torch.device) -> None:
        lookups.append((kernel, device.type))
        raise KernelUnavailableError("no device here")

    monkeypatch.setattr(registration, "choose_kernel", unavailable)
    DartConfig(kernel="auto")
    DartConfig(kernel="torch")
    assert lookups == []
    with pytest.raises(KernelUnavailableError, match="no device here"):
        DartConfig(kernel="triton")
    assert lookups == [("triton", "cuda" if torch.cuda.is_available() else "cpu")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel may exist here")
def test_kernel_triton_is_refused_without_a_gpu() -> None:
    with pytest.raises(KernelUnavailableError, match="use kernel='auto'"):
        DartConfig(kernel="triton")


# mode and inductor


def test_mode_is_taken_from_either_place() -> None:
    by_option = DartConfig.from_options({"mode": "max-autotune"})
    by_argument = DartConfig.from_options({}, mode="max-autotune")
    by_both = DartConfig.from_options({"mode": "max-autotune"}, mode="max-autotune")
    assert by_option == by_argument == by_both


def test_modes_that_disagree_are_refused() -> None:
    refused({"mode": "max-autotune"}, "'max-autotune'", "'lite'", "disagree", mode="lite")


def test_inductor_overlays_mode() -> None:
    config = DartConfig(mode="max-autotune", inductor={"max-autotune": False, "debug": True})
    patches = config.inductor_patches()
    expected = dict(torch._inductor.list_mode_options("max-autotune"))
    assert expected["max_autotune"] is True
    assert patches == expected | {"max_autotune": False, "debug": True}


def test_no_mode_and_the_default_mode_patch_nothing() -> None:
    assert DartConfig().inductor_patches() == DartConfig(mode="default").inductor_patches() == {}


def test_every_patch_is_one_that_inductor_takes() -> None:
    patches = DartConfig(mode="max-autotune", inductor={"debug": False}).inductor_patches()
    with torch._inductor.config.patch(patches):
        assert torch._inductor.config.max_autotune is True


def test_unknown_inductor_option_names_the_nearest() -> None:
    refused({"inductor": {"max_autotun": True}}, "max_autotun", "did you mean 'max_autotune'?")
    refused({"inductor": {1: True}}, "inductor[1]")


def test_inductor_option_of_the_wrong_type_is_refused_as_inductor_would() -> None:
    refused({"inductor": {"max_autotune": "yes"}}, "max_autotune", "bool", "'yes'")


def test_one_inductor_option_in_two_spellings_is_refused() -> None:
    refused({"inductor": {"max-autotune": True, "max_autotune": False}}, "max_autotune", "twice")


@pytest.mark.parametrize("lowering", ["eager", "aot_eager"])
def test_what_only_inductor_reads_is_refused_elsewhere(lowering: str) -> None:
    refused({"lowering": lowering, "mode": "max-autotune"}, "mode", lowering)
    refused({"lowering": lowering, "inductor": {"debug": True}}, "inductor", lowering)
    DartConfig(lowering=lowering, inductor={}, mode="default")


# dump


def test_dump_comes_from_the_environment_only_when_not_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DARTFX_DUMP", str(tmp_path / "env"))
    assert DartConfig.from_options({}).dump == str(tmp_path / "env")
    assert DartConfig.from_options({"dump": None}).dump == str(tmp_path / "env")
    assert DartConfig.from_options({"dump": tmp_path}).dump == str(tmp_path)
    monkeypatch.setenv("DARTFX_DUMP", "")
    assert DartConfig.from_options({}).dump is None
