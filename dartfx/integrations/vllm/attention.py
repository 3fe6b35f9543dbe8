"""Attention backends of the served model, whose metadata remembers how it was built.

Each layer keeps the backend that vLLM chose, as a subclass.  vLLM builds metadata once for all
layers of a KV cache group with the same backend class, so layers behind the cut get separate
metadata.
"""

from __future__ import annotations

import functools
from typing import Any

from dartfx.integrations.vllm import vllm_api

__all__ = ["Source", "backend_before_cut", "backend_behind_cut"]


class Source:
    """The builder and batch that metadata was built from, to rebuild it for fewer tokens.

    Metadata of layers behind the cut carries this as ``dartfx_source``.
    """

    def __init__(self, builder: Any, batch: Any) -> None:
        self.builder = builder
        self.batch = batch

    def rebuild(self, batch: Any) -> Any:
        """Build metadata of the same layers for another batch."""
        return self.builder.build(0, batch)


@functools.cache
def backend_behind_cut(backend: Any, own_blocks: bool) -> Any:
    """Return a subclass of ``backend`` whose metadata remembers its source.

    own_blocks: the layers are in separate KV cache groups.
    """
    base: Any = backend.get_builder_cls()

    class Builder(base):  # type: ignore[misc]
        # Metadata must not be copied between groups: each has its own blocks.
        supports_update_block_table = False

        def __init__(
            self,
            kv_cache_spec: Any,
            layer_names: list[str],
            vllm_config: Any,
            *more: Any,
            **named: Any,
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, *more, **named)
            # Builders are created when weights are loaded, before anything is served.
            layers = vllm_config.compilation_config.static_forward_context
            for name in layer_names:
                if (check := layers[name].__dict__.pop("dartfx_when_ready", None)) is not None:
                    check(self.device)

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *more: Any) -> Any:
            metadata = super().build(0, common_attn_metadata, *more)
            metadata.dartfx_source = Source(self, common_attn_metadata)
            return metadata

    Builder.__name__ = Builder.__qualname__ = f"Pruned{base.__name__}"
    overrides = {"get_builder_cls": staticmethod(lambda: Builder)}
    return _subclass("BehindCut", backend, overrides, "BehindCutSpec" if own_blocks else None)


@functools.cache
def backend_before_cut(backend: Any) -> Any:
    """Return a subclass of ``backend`` for layers before the cut, in separate KV cache groups."""
    return _subclass("BeforeCut", backend, {}, "BeforeCutSpec")


def _subclass(prefix: str, backend: Any, overrides: dict[str, Any], spec: str | None) -> Any:
    if spec is not None:
        from dartfx.integrations.vllm import memory

        made = functools.partial(memory.respecify, getattr(memory, spec), backend)
        overrides = overrides | {"customize_spec": staticmethod(made)}
    return vllm_api.subclass_attention_backend_with_overrides(prefix, backend, overrides)
