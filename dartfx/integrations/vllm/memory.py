"""KV blocks of layers behind the cut: only as many as the kept tokens need.

vLLM has one block table per KV cache group.  Layers before and behind the cut get specs of
different classes, so they never share a group, and the manager of the groups behind the cut
allocates blocks for the kept tokens only.  The scheduler knows a request's vision tokens before its
first step, and thus the number dropped.
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

_SECONDS_BETWEEN_LINES = 10.0  # as for vLLM's own statistics

# Prompts with images, by request; only in the scheduler's process.
_PROMPTS: dict[str, Prompt] = {}


def _behind(request_id: str, num_tokens: int) -> int:
    prompt = _PROMPTS.get(request_id)
    return num_tokens if prompt is None else prompt.behind(num_tokens)


class _Apart:
    """A spec that merges only with its own class; FullAttentionSpec accepts any subclass."""

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        """Merge the specs of a group's layers into one."""
        if any(type(spec) is not cls for spec in specs):
            # vLLM takes this error to mean that they need separate groups.
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
    """Adapt ``spec`` to ``backend``, as a ``spec_class`` where it is plain full attention."""
    spec = backend.customize_spec(spec)
    if type(spec) is not vllm_api.FullAttentionSpec:
        return spec
    return spec_class(**{f.name: getattr(spec, f.name) for f in fields(spec) if f.init})


class BehindCutManager(vllm_api.FullAttentionManager):  # type: ignore[misc]
    """Counts a request's tokens without those that are dropped or still held at the cut.

    Blocks are shared up to the first image: later KV depends on what is dropped, and thus on the
    whole prompt.  This holds where nothing is dropped, too, since the next turn may drop tokens.
    """

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *more: Any, **named: Any
    ) -> int:
        """The number of blocks that the request still needs."""
        left = _behind(request_id, num_tokens)
        needed: int = super().get_num_blocks_to_allocate(request_id, left, *more, **named)
        return needed

    def allocate_new_blocks(self, request_id: str, num_tokens: int, main_model: int) -> Any:
        """Allocate those blocks."""
        left = _behind(request_id, num_tokens), _behind(request_id, main_model)
        return super().allocate_new_blocks(request_id, *left)

    def cache_blocks(self, request: Any, num_tokens: int, *more: Any, **named: Any) -> None:
        """Register the blocks that other requests may share."""
        prompt = _PROMPTS.get(request.request_id)
        shared = num_tokens if prompt is None else min(num_tokens, prompt.first)
        super().cache_blocks(request, shared, *more, **named)


def vision_tokens(request: Any) -> int:
    """The number of droppable vision tokens in a request's prompt.

    A prompt's last token is never one: its logits predict the first answer token.
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
    """A counter, created once per process, since engines of one process share a registry."""
    return Counter(f"dartfx:{name}", what)


class Counters:
    """Counts requests with vision tokens as the scheduler adds them."""

    def __init__(self) -> None:
        self.requests = self.kept = self.dropped = 0
        self._next_line = 0.0

    def add(self, kept: int, dropped: int) -> None:
        """Count one request, and log the sums at most every ten seconds."""
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
    """vLLM's scheduler, which records what each request drops before allocating its first block."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = options.read(self.vllm_config.additional_config)
        self.counters = Counters()

    def add_request(self, request: Any) -> None:
        """Add a request."""
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
    """Register the manager of each spec with vLLM."""
    registry = vllm_api.KVCacheSpecRegistry
    # vLLM would not add its own entries after ours.
    registry._ensure_registered()
    registry.register(BeforeCutSpec, vllm_api.FullAttentionManager)
    registry.register(BehindCutSpec, BehindCutManager)


# On import, which happens only in processes that create or receive such specs: without pruning,
# vLLM's registry stays unchanged.
_register()
