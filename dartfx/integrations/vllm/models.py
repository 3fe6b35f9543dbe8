"""Subclasses of vLLM's models with a cut in the decoder.

Decoders that can be cut are recognised by their structure; no model is known by name.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

from torch import Tensor, nn

from dartfx.config import DartConfig
from dartfx.errors import ConfigError
from dartfx.integrations.vllm import options, refusals, vllm_api
from dartfx.integrations.vllm.decoder import PrunedDecoder

__all__ = ["attach", "attentions_of", "find_decoder", "pruned_class"]

logger = logging.getLogger("vllm.dartfx")

# A model's attribute for its PrunedDecoder: not a submodule, so that weights keep their names.
_ATTRIBUTE = "dartfx_decoder"


_DECODER_TAKES = ["input_ids", "positions", "intermediate_tensors", "inputs_embeds"]


def refused(model: Any, why: str) -> ConfigError:
    """The error for a model whose decoder cannot be cut."""
    return ConfigError(
        f"dartfx cannot prune {type(model).__name__}: {why}; serve it without dartfx in "
        "--additional-config"
    )


def find_decoder(model: Any) -> Any:
    """Find the module with the decoder layers and the final norm.

    Raises ConfigError if its forward takes more than embeddings and positions (such as visual
    features for later layers), or if its structure differs.
    """
    language = model.get_language_model()
    for decoder in (getattr(language, "model", None), language):
        if isinstance(decoder, nn.Module) and hasattr(decoder, "layers"):
            break
    else:
        raise refused(model, "no decoder with layers was found in its language model")
    if not hasattr(decoder, "norm"):
        raise refused(model, f"{type(decoder).__name__} has no final norm called norm")
    named = [
        p.name
        for p in inspect.signature(type(decoder).forward).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    ][1:]
    if more := [name for name in named if name not in _DECODER_TAKES]:
        raise refused(model, f"{type(decoder).__name__} also takes {', '.join(more)}")
    return decoder


def attentions_of(model: Any, decoder: Any, layer: int) -> list[Any]:
    """The attention module of each decoder layer; ``layer`` is the first behind the cut.

    Raises ConfigError for a layer of another structure, and for attention behind the cut that would
    read dropped tokens.
    """
    depth = len(decoder.layers)
    if not layer < depth:
        raise ConfigError(
            f"layer={layer}; a model of {depth} decoder layers can be cut at 1..{depth - 1}"
        )
    found = []
    for index, block in enumerate(decoder.layers):
        takes = list(inspect.signature(type(block).forward).parameters.values())[1:]
        needed = [p.name for p in takes if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if needed != ["positions", "hidden_states", "residual"]:
            raise refused(model, f"decoder layer {index} takes {', '.join(needed)}")
        inside = [m for m in block.modules() if isinstance(m, vllm_api.Attention)]
        if len(inside) != 1:
            raise refused(model, f"decoder layer {index} has {len(inside)} attention layers, not 1")
        attention = inside[0]
        if index >= layer and attention.sliding_window is not None:
            raise refused(
                model,
                f"decoder layer {index} attends within a window of {attention.sliding_window}, "
                f"which would count kept tokens only (layers before layer={layer} may)",
            )
        if getattr(attention, "kv_sharing_target_layer_name", None) is not None:
            raise refused(model, f"decoder layer {index} reads the KV cache of another layer")
        found.append(attention)
    return found


def attach(model: Any, vllm_config: Any, config: DartConfig) -> PrunedDecoder:
    """Cut the decoder of ``model`` before its weights are loaded.  Raises ConfigError."""
    refusals.check(vllm_config)
    options.check_ranks(config, vllm_config.parallel_config.tensor_parallel_size)
    decoder = find_decoder(model)
    attentions = attentions_of(model, decoder, config.layers[0])
    own_blocks = not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    if vllm_config.use_v2_model_runner:
        from dartfx.integrations.vllm.runners import v2

        if why := v2.attach(model, vllm_config):
            raise refused(model, f"{why}; or set VLLM_USE_V2_MODEL_RUNNER=0 in the environment")
    pruned = PrunedDecoder(decoder, attentions, vllm_config, config, own_blocks)
    pruned.install(decoder)
    blocks = (
        "KV blocks for the kept tokens only"
        if own_blocks
        else "KV blocks for all tokens, since the hybrid KV cache manager is off"
    )
    logger.info(
        "dartfx keeps %s from decoder layer %d of %d on in %s; layers behind the cut have %s",
        options.summary(config),
        config.layers[0],
        len(attentions),
        type(model).__name__,
        blocks,
    )
    return pruned


@functools.cache
def pruned_class(base: Any) -> Any:
    """Return a subclass of a multimodal vLLM model that prunes if ``additional_config`` says so."""

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.__dict__[_ATTRIBUTE] = None
        config = options.read(vllm_config.additional_config)
        if config is not None and not prefix:  # with a prefix: part of another model
            self.__dict__[_ATTRIBUTE] = attach(self, vllm_config, config)

    def embed_input_ids(
        self: Any,
        input_ids: Tensor,
        multimodal_embeddings: Any = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        if (pruned := self.__dict__[_ATTRIBUTE]) is not None:
            pruned.vision = is_multimodal
        embedded: Tensor = base.embed_input_ids(
            self, input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    members = {"__init__": __init__, "embed_input_ids": embed_input_ids}
    if "_processor_factory" in vars(base):  # vLLM looks it up in the class itself
        members["_processor_factory"] = base._processor_factory
    return type(base.__name__, (base,), members | {"__module__": base.__module__})
