"""vLLM features that a pruned decoder cannot support: refused at start, with a flag to avoid it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dartfx.errors import ConfigError
from dartfx.integrations.vllm import options

__all__ = ["REFUSALS", "Refusal", "check", "found_in"]


@dataclass(frozen=True)
class Refusal:
    """A refused feature: its name, whether a VllmConfig enables it, the reason, and advice."""

    feature: str
    is_on: Callable[[Any], object]
    why: str
    instead: str


def _more_than_one(name: str) -> Callable[[Any], object]:
    return lambda c: getattr(c.parallel_config, name, 1) > 1


def _graphs(config: Any) -> bool:
    # None until vLLM has chosen a mode; checked again when the model is created.
    mode = getattr(config.compilation_config, "cudagraph_mode", None)
    return getattr(mode, "name", mode) not in (None, "NONE")


def _other_scheduler(config: Any) -> bool:
    return config.scheduler_config.scheduler_cls not in (None, options.SCHEDULER)


def _drafts_by_ngrams(config: Any) -> bool:
    return getattr(config.speculative_config, "method", None) in ("ngram", "ngram_gpu")


def _video_pruning(config: Any) -> object:
    return getattr(config.model_config.multimodal_config, "video_pruning_rate", None)


_BOTH_WAYS = "image tokens attend to each other in both directions, which kept tokens cannot"
_SHARED = "blocks that hold dropped and kept tokens of one prompt cannot be shared"

REFUSALS = (
    Refusal(
        "a scheduler of your own",
        _other_scheduler,
        "dartfx's scheduler says which tokens a request drops",
        "leave out --scheduler-cls",
    ),
    Refusal(
        "prefix caching without the hybrid KV cache manager",
        lambda c: (
            c.cache_config.enable_prefix_caching
            and c.scheduler_config.disable_hybrid_kv_cache_manager
        ),
        _SHARED,
        "--no-enable-prefix-caching, or leave out --disable-hybrid-kv-cache-manager",
    ),
    Refusal(
        "CUDA graphs",
        _graphs,
        "a graph is chosen by the number of tokens, which differs behind the cut",
        """--compilation-config '{"cudagraph_mode": "NONE"}', or --enforce-eager""",
    ),
    Refusal(
        "n-gram drafts in Model Runner V1",
        lambda c: _drafts_by_ngrams(c) and not c.use_v2_model_runner,
        "with drafts it takes no logits processor, and one tells rows of the batch apart",
        "set VLLM_USE_V2_MODEL_RUNNER=1 in the environment, or leave out --speculative-config",
    ),
    Refusal(
        "speculative decoding by a model",
        lambda c: c.speculative_config and not _drafts_by_ngrams(c),
        "a draft model reads the hidden states of all tokens or has layers that are not pruned",
        "leave out --speculative-config, or give it the method ngram",
    ),
    Refusal(
        "pipeline parallelism",
        _more_than_one("pipeline_parallel_size"),
        "the number of tokens changes inside the decoder",
        "--pipeline-parallel-size 1; --tensor-parallel-size works",
    ),
    Refusal(
        "data parallelism",
        _more_than_one("data_parallel_size"),
        "it has not been tried",
        "--data-parallel-size 1, and one server for each copy",
    ),
    Refusal(
        "decode context parallelism",
        _more_than_one("decode_context_parallel_size"),
        "KV behind the cut is not split by context",
        "--decode-context-parallel-size 1",
    ),
    Refusal(
        "prefill context parallelism",
        _more_than_one("prefill_context_parallel_size"),
        "tokens are selected from the whole prompt",
        "--prefill-context-parallel-size 1",
    ),
    Refusal(
        "dual batch overlap",
        lambda c: getattr(c.parallel_config, "enable_dbo", False),
        "it has not been tried",
        "leave out --enable-dbo",
    ),
    Refusal(
        "KV transfer",
        lambda c: c.kv_transfer_config,
        "what is transferred assumes a KV entry for each token in each layer",
        "leave out --kv-transfer-config",
    ),
    Refusal(
        "KV offloading",
        lambda c: getattr(c.cache_config, "kv_offloading_size", None),
        "what is offloaded assumes a KV entry for each token in each layer",
        "leave out --kv-offloading-size",
    ),
    Refusal(
        "fast prefill with shared KV",
        lambda c: getattr(c.cache_config, "kv_sharing_fast_prefill", False),
        "it shortens the later layers itself",
        "--no-kv-sharing-fast-prefill",
    ),
    Refusal(
        "pooling",
        lambda c: c.model_config.runner_type == "pooling",
        "dropped tokens have no hidden state to pool",
        "--runner generate",
    ),
    Refusal(
        "prompt embeddings",
        lambda c: getattr(c.model_config, "enable_prompt_embeds", False),
        "they do not say which rows are vision tokens",
        "leave out --enable-prompt-embeds",
    ),
    Refusal(
        "video pruning before the decoder",
        _video_pruning,
        "it changes the number of vision tokens after scheduling",
        "leave out --video-pruning-rate; dartfx prunes videos too",
    ),
    Refusal(
        "a model without vision input",
        lambda c: not c.model_config.is_multimodal_model,
        "there is nothing to prune",
        "leave dartfx out of --additional-config",
    ),
    Refusal(
        "a model with bidirectional image attention",
        lambda c: getattr(c.model_config, "is_mm_prefix_lm", False),
        _BOTH_WAYS,
        "serve this model without dartfx",
    ),
    Refusal(
        "a window for generated tokens only (R-SWA)",
        lambda c: getattr(c.model_config, "rswa_window", None),
        "it begins at the prompt's length, which differs behind the cut",
        "serve this model without dartfx",
    ),
    Refusal(
        "a hybrid decoder",
        lambda c: getattr(c.model_config, "is_hybrid", False),
        "recurrent layers hold a state, which has no tokens to drop",
        "serve this model without dartfx",
    ),
    Refusal(
        "an encoder-decoder",
        lambda c: getattr(c.model_config, "is_encoder_decoder", False),
        "its vision tokens never enter the decoder",
        "serve this model without dartfx",
    ),
)


def found_in(vllm_config: Any) -> list[Refusal]:
    """The refused features that a VllmConfig enables."""
    return [refusal for refusal in REFUSALS if refusal.is_on(vllm_config)]


def check(vllm_config: Any) -> None:
    """Raise ConfigError with each refused feature and the flag that avoids it."""
    found = found_in(vllm_config)
    if found:
        lines = [f"  {r.feature}: {r.why}; {r.instead}" for r in found]
        raise ConfigError("dartfx cannot prune with these settings:\n" + "\n".join(lines))
