"""dartfx's entries in vLLM's registries.

Models: each registered one is wrapped so that vLLM loads a subclass.  Config checks: one runs for
every architecture while vLLM assembles its config, in the process that the user started, so that
errors surface there.  :mod:`dartfx.integrations.vllm.memory` adds KV cache specs, if needed.
"""

from __future__ import annotations

from typing import Any

from dartfx.errors import ConfigError
from dartfx.integrations.vllm import options, refusals, vllm_api

__all__ = ["install", "prepare"]


def install() -> None:
    """Add the entries; idempotent.  Raises compat.Unavailable."""
    models, checks = vllm_api.ModelRegistry.models, vllm_api.MODELS_CONFIG_MAP
    tested = vllm_api.is_tested(vllm_api.installed() or "")
    for architecture in list(models):
        if not isinstance(checks.get(architecture), _Check):
            checks[architecture] = _Check(checks.get(architecture))
        if tested:
            models[architecture] = _wrapped(models[architecture])


def prepare(vllm_config: Any) -> None:
    """Check a VllmConfig and add what pruning needs.  Raises ConfigError."""
    config = options.read(vllm_config.additional_config)
    if config is None:
        return
    version = vllm_api.installed() or "unknown"
    if not vllm_api.is_tested(version):
        raise ConfigError(
            f"dartfx was tested with vLLM {vllm_api.TESTED}, and this is {version}: pip install "
            f"'vllm=={vllm_api.TESTED}.*', or leave dartfx out of --additional-config"
        )
    refusals.check(vllm_config)
    options.check_ranks(config, vllm_config.parallel_config.tensor_parallel_size)
    vllm_config.scheduler_config.scheduler_cls = options.SCHEDULER
    processors = list(vllm_config.model_config.logits_processors or [])
    ours = options.LOGITS_PROCESSORS["V2" if vllm_config.use_v2_model_runner else "V1"]
    if ours not in processors:
        vllm_config.model_config.logits_processors = [*processors, ours]


class _Check:
    """An entry in vLLM's config checks: the architecture's own check, then dartfx's."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def verify_and_update_config(self, vllm_config: Any) -> None:
        if self.own is not None:
            self.own.verify_and_update_config(vllm_config)
        prepare(vllm_config)

    def verify_and_update_model_config(self, model_config: Any) -> None:
        if self.own is not None:
            self.own.verify_and_update_model_config(model_config)


def _wrapped(entry: Any) -> Any:
    """Wrap an entry of vLLM's model registry so that it loads the subclass that can prune."""

    class Wrapped(vllm_api.BaseRegisteredModel):  # type: ignore[misc]
        dartfx = True

        def inspect_model_cls(self) -> Any:
            return entry.inspect_model_cls()

        def load_model_cls(self) -> Any:
            from dartfx.integrations.vllm.models import pruned_class

            loaded = entry.load_model_cls()
            return pruned_class(loaded) if getattr(loaded, "supports_multimodal", False) else loaded

    return entry if getattr(entry, "dartfx", False) else Wrapped()
