"""dartfx inside vLLM: a plugin that prunes vision tokens in the decoder of the served model.

vLLM loads :func:`register` in each of its processes by the entry point group
``vllm.general_plugins``.  It changes nothing until a server is started with
``--additional-config '{"dartfx": {"retain_tokens": 64}}'``.  No class, function or file of vLLM is
replaced: :mod:`dartfx.integrations.vllm.plugin` puts entries into vLLM's tables of models,
of config checks and of KV cache specs.  docs/vllm.md says what runs and what is refused.
"""

from __future__ import annotations

import logging

__all__ = ["register"]

# Below vLLM's own logger, whose handler and level it takes over.
logger = logging.getLogger("vllm.dartfx")


def register() -> None:
    """Put dartfx's entries into vLLM's tables; a vLLM that lacks one gets a line in its log."""
    from dartfx.compat import Unavailable
    from dartfx.integrations.vllm import plugin

    try:
        plugin.install()
    except Unavailable as error:
        logger.error("dartfx prunes nothing in this vLLM: %s", error)
