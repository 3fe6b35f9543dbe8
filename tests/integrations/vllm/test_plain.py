"""The parts of the vLLM plugin that need no vLLM: options, refusals, arithmetic on blocks."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from dartfx.config import DartConfig
from dartfx.errors import ConfigError
from dartfx.integrations import vllm as integration
from dartfx.integrations.vllm import options, plugin, refusals, vllm_api
from dartfx.selection import registry


def test_options_are_absent_or_checked() -> None:
    assert options.read({}) is None
    assert options.read({"dartfx": None}) is None
    assert options.read(None) is None
    config = options.read({"dartfx": {"retain_tokens": 64, "layer": 3}})
    assert config == DartConfig.from_options({"retain_tokens": 64, "layer": 3})
    assert options.read({"dartfx": {}}) == DartConfig()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"retain_token": 64}, "'retain_token'.*did you mean 'retain_tokens'"),
        ({"lowering": "eager"}, "'lowering'.*not one that works in vLLM"),
        ({"retain_tokens": -1}, "retain_tokens must be an int"),
        ({"retain_tokens": 64, "reduction_ratio": 0.5}, "both set"),
        ({"layer": [2, 4], "retain_tokens": [64, 32]}, r"layer=\[2, 4\] has several stages"),
        ({"layer": 0, "selector": "uniform"}, "layer=0 prunes before the first decoder layer"),
        ({"selector": "fastv"}, "'fastv' needs attention queries"),
        ({"selector": "attended"}, "'attended' needs the vision tower's attention"),
        (64, "must be a dict, got 64"),
    ],
)
def test_bad_options_are_named(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options.read({"dartfx": given})


def test_tokens_dropped() -> None:
    by_number, by_share = DartConfig(retain_tokens=64), DartConfig(reduction_ratio=0.75)
    assert [options.dropped(by_number, n) for n in (0, 10, 64, 576)] == [0, 0, 0, 512]
    assert [options.dropped(by_share, n) for n in (0, 1, 8, 100)] == [0, 0, 6, 75]


def test_selectors_that_ranks_could_run_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    @registry.register_selector("of the user")
    def select(hidden: Any, keys: Any, vision: Any, text: Any, budget: Any, **_: Any) -> Any:
        return vision

    config = DartConfig(selector="of the user")
    options.check_ranks(config, 1)
    options.check_ranks(DartConfig(), 2)
    with pytest.raises(ConfigError, match="2 tensor-parallel ranks could keep different tokens"):
        options.check_ranks(config, 2)


def served(**changes: Any) -> Any:
    """The parts of a VllmConfig that are looked at; ``group__name`` sets one."""
    groups: dict[str, Any] = {
        "scheduler_config": {
            "enable_chunked_prefill": True,
            "scheduler_cls": None,
            "disable_hybrid_kv_cache_manager": None,
        },
        "cache_config": {"enable_prefix_caching": True},
        "compilation_config": {"cudagraph_mode": None},
        "parallel_config": {"pipeline_parallel_size": 1, "tensor_parallel_size": 1},
        "model_config": {
            "runner_type": "generate",
            "is_multimodal_model": True,
            "logits_processors": None,
        },
    }
    plain: dict[str, Any] = {
        "use_v2_model_runner": False,
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    groups["model_config"]["multimodal_config"] = SimpleNamespace(video_pruning_rate=None)
    for name, value in changes.items():
        group, _, attribute = name.partition("__")
        if attribute:
            groups[group][attribute] = value
        else:
            plain[group] = value
    return SimpleNamespace(**plain, **{k: SimpleNamespace(**v) for k, v in groups.items()})


NGRAMS = SimpleNamespace(method="ngram")
ON: dict[str, tuple[dict[str, Any], str]] = {
    "a scheduler of your own": (
        {"scheduler_config__scheduler_cls": "of.the_user"}, "--scheduler-cls"),
    "prefix caching without the hybrid KV cache manager": (
        {"scheduler_config__disable_hybrid_kv_cache_manager": True}, "--no-enable-prefix-caching"),
    "CUDA graphs": (
        {"compilation_config__cudagraph_mode": SimpleNamespace(name="FULL")}, "cudagraph_mode"),
    "n-gram drafts in Model Runner V1": (
        {"speculative_config": NGRAMS}, "VLLM_USE_V2_MODEL_RUNNER=1"),
    "speculative decoding by a model": (
        {"speculative_config": SimpleNamespace(method="eagle")}, "the method ngram"),
    "pipeline parallelism": (
        {"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
    "data parallelism": ({"parallel_config__data_parallel_size": 2}, "--data-parallel-size 1"),
    "decode context parallelism": (
        {"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size 1"),
    "prefill context parallelism": (
        {"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 1"),
    "dual batch overlap": ({"parallel_config__enable_dbo": True}, "--enable-dbo"),
    "KV transfer": ({"kv_transfer_config": object()}, "--kv-transfer-config"),
    "KV offloading": ({"cache_config__kv_offloading_size": 4.0}, "--kv-offloading-size"),
    "fast prefill with shared KV": (
        {"cache_config__kv_sharing_fast_prefill": True}, "--no-kv-sharing-fast-prefill"),
    "pooling": ({"model_config__runner_type": "pooling"}, "--runner generate"),
    "prompt embeddings": ({"model_config__enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "video pruning before the decoder": (
        {"model_config__multimodal_config": SimpleNamespace(video_pruning_rate=0.5)},
        "--video-pruning-rate"),
    "a model without vision input": (
        {"model_config__is_multimodal_model": False}, "leave dartfx out"),
    "a model with bidirectional image attention": (
        {"model_config__is_mm_prefix_lm": True}, "without dartfx"),
    "a window for generated tokens only (R-SWA)": (
        {"model_config__rswa_window": 128}, "without dartfx"),
    "a hybrid decoder": ({"model_config__is_hybrid": True}, "without dartfx"),
    "an encoder-decoder": ({"model_config__is_encoder_decoder": True}, "without dartfx"),
}  # fmt: skip


def test_every_refusal_is_tested() -> None:
    assert [refusal.feature for refusal in refusals.REFUSALS] == list(ON)
    refusals.check(served())
    refusals.check(served(use_v2_model_runner=True, speculative_config=NGRAMS))


@pytest.mark.parametrize("feature", ON)
def test_a_refusal_names_the_feature_and_the_flag(feature: str) -> None:
    changes, flag = ON[feature]
    config = served(**changes)
    assert [refusal.feature for refusal in refusals.found_in(config)] == [feature]
    with pytest.raises(ConfigError) as error:
        refusals.check(config)
    assert feature in str(error.value)
    assert flag in str(error.value)


def test_all_refusals_come_at_once() -> None:
    config = served(kv_transfer_config=object(), speculative_config=NGRAMS)
    with pytest.raises(ConfigError, match=r"(?s)n-gram drafts.*KV transfer"):
        refusals.check(config)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_api, "installed", lambda: "0.32.0")


def wanted(**changes: Any) -> Any:
    return served(additional_config={"dartfx": {"retain_tokens": 64}}, **changes)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_what_pruning_needs_is_added_once(runner: str) -> None:
    v2 = {"use_v2_model_runner": runner == "V2"}
    config = wanted(model_config__logits_processors=["of:the_user"], **v2)
    for _ in range(2):
        plugin.prepare(config)
        assert config.scheduler_config.scheduler_cls == (
            "dartfx.integrations.vllm.memory.PrunedScheduler"
        )
        assert config.model_config.logits_processors == [
            "of:the_user",
            f"dartfx.integrations.vllm.runners.{runner.lower()}:Requests",
        ]


@pytest.mark.usefixtures("installed")
def test_refusals_come_while_the_config_is_put_together() -> None:
    with pytest.raises(ConfigError, match="leave out --speculative-config"):
        plugin.prepare(wanted(speculative_config=NGRAMS))


def test_without_the_key_a_config_stays_as_it_is() -> None:
    config = served(additional_config={}, speculative_config=NGRAMS)
    plugin.prepare(config)
    assert config.scheduler_config.scheduler_cls is None
    assert config.model_config.logits_processors is None


def test_another_version_is_refused_with_the_one_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_api, "installed", lambda: "0.33.0")
    with pytest.raises(ConfigError, match=r"this is 0\.33\.0: pip install 'vllm==0\.32\.\*'"):
        plugin.prepare(wanted())
    plugin.prepare(served(additional_config={}))


def test_the_version_that_is_tested() -> None:
    assert vllm_api.is_tested("0.32.0")
    assert vllm_api.is_tested("0.32.1+cpu")
    assert not vllm_api.is_tested("0.33.0")
    assert not vllm_api.is_tested("0.3.2")
    assert not vllm_api.is_tested("")


@pytest.mark.skipif(vllm_api.installed() is not None, reason="vLLM is installed")
def test_a_vllm_that_lacks_a_name_gets_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "vllm.dartfx"):
        integration.register()
    (line,) = caplog.messages
    assert "dartfx prunes nothing in this vLLM" in line
    assert "vllm.model_executor.models.ModelRegistry (seen in vLLM 0.32.0) is missing" in line
