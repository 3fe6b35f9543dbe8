"""Hooks on a decoder's layers: accelerate's for ``device_map`` and offloading, and FSDP2's.

They move or gather weights around each module's forward, in code that dynamo leaves to Python: the
decoder comes in a graph for every layer, or for every projection.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

from dartfx.passes.refusal import Declined

__all__ = ["hooks_in_decoder"]

_INDEXED = re.compile(r"(^|\.)\d+(\.|$)")


def hooks_in_decoder(model: nn.Module) -> Declined | None:
    """Why no graph of a model's call holds a whole decoder, or None."""
    # Both mark the model itself as well, so that decode steps need not look at all modules.
    sharded = isinstance(model, FSDPModule)
    if not (sharded or hasattr(model, "_hf_hook") or hasattr(model, "hf_device_map")):
        return None
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else model
    for path, module in decoder.named_modules():
        if sharded and path and isinstance(module, FSDPModule):
            return Declined(
                f"FSDP2 shards the decoder's layers one by one, {path} first: dynamo breaks the "
                "graph where each of them gathers its weights, so no graph holds the decoder, and "
                "the model runs uncompiled",
                advice="fully_shard(model) for the whole model, which gathers all weights at once; "
                "or tensor parallelism (see docs/parallel.md)",
            )
        hook = getattr(module, "_hf_hook", None)
        if hook is None or not _INDEXED.search(path):
            continue
        offloads = " and offload its weights" if getattr(hook, "offload", False) else ""
        return Declined(
            f"hooks of accelerate ({type(hook).__name__}, as device_map and offloading set them) "
            f"sit on the decoder's layers, {path} first{offloads}: dynamo breaks the graph at each "
            "of them, so no graph holds the decoder, and the model runs uncompiled",
            advice="the whole model on one device (no offload; device_map={'': device}), in fewer "
            "bits where it does not fit; accelerate.hooks.remove_hook_from_module(model, "
            "recurse=True) removes the hooks of a model that is loaded whole",
        )
    return None
