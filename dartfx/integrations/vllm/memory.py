"""KV blocks of layers behind the cut: as many as their kept tokens need.

vLLM gives each KV cache group a block table of its own.  Layers before and behind the cut get specs
of different classes, so they never share a group, and the manager of the groups behind the cut
allocates for the tokens that are left.  The scheduler knows a request's vision tokens before its
first step, so the number dropped is known as well.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass, fields
from typing import Any

from prometheus_client import Counter

from dartfx.integrations.vllm import options, vllm_api
from dartfx.integrations.vllm.batch import Prompt
from dartfx.integrations.vllm.runners.prompts import write

__all__ = [
    "BeforeCutSpec",
    "BehindCutManager",
    "BehindCutSpec",
    "Counters",
    "PrunedScheduler",
    "respecify",
    "vision_tokens",
]

logger = logging.getLogger("vllm.dartfx")

_SECONDS_BETWEEN_LINES = 10.0  # as vLLM's own lines of statistics

# Prompts with images, by request; only in the scheduler's process.
_PROMPTS: dict[str, Prompt] = {}


def _behind(request_id: str, num_tokens: int) -> int:
    prompt = _PROMPTS.get(request_id)
    return num_tokens if prompt is None else prompt.behind(num_tokens)


class _Apart:
    """A spec that is merged with its own class only; FullAttentionSpec takes any subclass."""

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """One spec for the layers of a group."""
        if any(type(spec) is not cls for spec in specs):
            # vLLM takes this error for: they need groups of their own.
            raise AssertionError(
                "dartfx: layers before and behind the cut need KV cache groups of their own"
            )
        return super().merge(specs)  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True)
class BeforeCutSpec(_Apart, vllm_api.FullAttentionSpec):  # type: ignore[misc]
    """Full attention of a layer before the cut."""


@dataclass(frozen=True, kw_only=True)
class BehindCutSpec(_Apart, vllm_api.FullAttentionSpec):  # type: ignore[misc]
    """Full attention of a layer behind the cut."""


def respecify(spec_class: Any, backend: Any, spec: Any) -> Any:
    """``spec`` as ``backend`` wants it, as a ``spec_class`` where it is plain full attention."""
    spec = backend.customize_spec(spec)
    if type(spec) is not vllm_api.FullAttentionSpec:
        return spec
    return spec_class(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})


class BehindCutManager(vllm_api.FullAttentionManager):  # type: ignore[misc]
    """Counts a request's tokens without those that are dropped or not there yet.

    Blocks are shared up to the first image: KV behind it depends on what is dropped, by the whole
    prompt.  Where nothing is dropped they are not shared either, since the next turn may drop.
    """

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *more: Any, **named: Any
    ) -> int:
        """Blocks that the request still needs."""
        left = _behind(request_id, num_tokens)
        needed: int = super().get_num_blocks_to_allocate(request_id, left, *more, **named)
        return needed

    def allocate_new_blocks(self, request_id: str, num_tokens: int, main_model: int) -> Any:
        """Those blocks."""
        left = _behind(request_id, num_tokens), _behind(request_id, main_model)
        return super().allocate_new_blocks(request_id, *left)

    def cache_blocks(self, request: Any, num_tokens: int, *more: Any, **named: Any) -> None:
        """Let other requests find the blocks that they may share."""
        prompt = _PROMPTS.get(request.request_id)
        shared = num_tokens if prompt is None else min(num_tokens, prompt.first)
        super().cache_blocks(request, shared, *more, **named)


def vision_tokens(request: Any) -> int:
    """Vision tokens of a request's prompt that may be dropped.

    A prompt's last token is never one of them: the first answer token is read off it.
    """
    count = 0
    for feature in request.mm_features:
        position = feature.mm_position
        count += position.get_num_embeds()
        if position.offset + position.length == request.num_prompt_tokens:
            count -= position.is_embed is None or bool(position.is_embed[-1])
    return count


@functools.cache
def _exported(name: str, what: str) -> Any:
    """A counter of this process; made once, since engines of one process share a registry."""
    return Counter(f"dartfx:{name}", what)


class Counters:
    """Counts requests with vision tokens as the scheduler takes them in."""

    def __init__(self) -> None:
        self.requests = self.kept = self.dropped = 0
        self._next_line = 0.0

    def add(self, kept: int, dropped: int) -> None:
        """Count one request; logs the sums, at most every ten seconds."""
        self.requests += 1
        self.kept += kept
        self.dropped += dropped
        _exported("requests", "Requests with vision tokens.").inc()
        _exported("vision_tokens_kept", "Vision tokens kept behind the cut.").inc(kept)
        _exported("vision_tokens_dropped", "Vision tokens dropped at the cut.").inc(dropped)
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            logger.info("%s", self)

    def __str__(self) -> str:
        return (
            f"dartfx: {self.requests} requests with vision tokens, {self.kept} of "
            f"{self.kept + self.dropped} vision tokens kept behind the cut"
        )


class PrunedScheduler(vllm_api.AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler; notes what each request drops, before its first block is allocated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = options.read(self.vllm_config.additional_config)
        self.counters = Counters()

    def add_request(self, request: Any) -> None:
        """Take in a request."""
        prompt = None
        if self._config is not None and request.mm_features:
            vision = vision_tokens(request)
            lost = options.dropped(self._config, vision)
            first = min(feature.mm_position.offset for feature in request.mm_features)
            prompt = Prompt(request.num_prompt_tokens, first, lost)
            _PROMPTS[request.request_id] = prompt
            self.counters.add(vision - lost, lost)
            logger.debug(
                "request %s: %d of %d vision tokens kept", request.request_id, vision - lost, vision
            )
        drops = prompt if prompt is not None and prompt.dropped else None
        request.sampling_params = write(request.sampling_params, drops)
        super().add_request(request)

    def _free_request(self, request: Any, *more: Any, **named: Any) -> Any:
        freed = super()._free_request(request, *more, **named)
        _PROMPTS.pop(request.request_id, None)
        return freed


def _register() -> None:
    """Tell vLLM which manager serves which spec."""
    registry = vllm_api.KVCacheSpecRegistry
    # A first entry of ours would keep vLLM's own out.
    registry._ensure_registered()
    registry.register(BeforeCutSpec, vllm_api.FullAttentionManager)
    registry.register(BehindCutSpec, BehindCutManager)


# Once the module is imported, as a process does that makes or receives such specs: where nothing is
# pruned vLLM's table stays as it is.
_register()
