"""dartfx inside vLLM: a plugin that prunes vision tokens in the decoder of the served model.

vLLM loads :func:`register` in each of its processes through the entry point group
``vllm.general_plugins``.  It has no effect unless the server is started with
``--additional-config '{"dartfx": {"retain_tokens": 64}}'``.  No class, function or file of vLLM is
replaced: :mod:`dartfx.integrations.vllm.plugin` adds entries to vLLM's registries of models,
config checks and KV cache specs.  docs/vllm.md lists what is supported and what is refused.
"""

from __future__ import annotations

import logging

__all__ = ["register"]

# A child of vLLM's logger, which inherits its handler and level.
logger = logging.getLogger("vllm.dartfx")


def register() -> None:
    """Add dartfx's entries to vLLM's registries; log a line if this vLLM lacks one of them."""
    from dartfx.compat import Unavailable
    from dartfx.integrations.vllm import plugin

    try:
        plugin.install()
    except Unavailable as error:
        logger.error("dartfx prunes nothing in this vLLM: %s", error)
