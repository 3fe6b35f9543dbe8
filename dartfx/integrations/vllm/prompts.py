"""Which row of the running batch belongs to which request, and what is known of its prompt.

Attention metadata does not say whose rows it is about.  The scheduler knows a request's images and
writes what is dropped into its sampling parameters; vLLM shows these to logits processors, by row
of the batch and before each forward pass.  This one changes no logits.
"""

from __future__ import annotations

import copy
from typing import Any

from dartfx.integrations.vllm import options, vllm_api
from dartfx.integrations.vllm.batch import Prompt

__all__ = ["PromptRows", "prompts_of", "write"]

_ROWS: dict[str, dict[int, Prompt]] = {}


def prompts_of(vllm_config: Any) -> dict[int, Prompt]:
    """Prompts that drop tokens, by row of the batch, of the engine that is configured so."""
    return _ROWS.setdefault(vllm_config.instance_id, {})


def write(params: Any, prompt: Prompt | None) -> Any:
    """Sampling parameters that bring ``prompt`` to the workers; not what a client wrote there."""
    given = {k: v for k, v in (params.extra_args or {}).items() if k != options.KEY}
    if prompt is None and len(given) == len(params.extra_args or {}):
        return params
    params = copy.copy(params)  # several requests of one process may share them
    if prompt is not None:
        given[options.KEY] = {
            "tokens": prompt.tokens,
            "first": prompt.first,
            "dropped": prompt.dropped,
        }
    params.extra_args = given
    return params


def _read(params: Any) -> Prompt | None:
    """The prompt that :func:`write` put there: the same object as long as the request lives.

    A request that leaves the batch and comes back, since it was not scheduled in a step, finds
    what is held of its prompt; when it ends, that goes with its parameters.
    """
    given = (getattr(params, "extra_args", None) or {}).get(options.KEY)
    if given is None:
        return None
    if "prompt" not in given:
        given["prompt"] = Prompt(given["tokens"], given["first"], given["dropped"])
    prompt: Prompt = given["prompt"]
    return prompt


class PromptRows(vllm_api.LogitsProcessor):  # type: ignore[misc]
    """Keeps ``prompts_of(vllm_config)`` in step with the batch."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request for log-probabilities of prompt tokens, some of which are dropped."""
        if getattr(sampling_params, "prompt_logprobs", None) is not None:
            raise ValueError(
                "prompt_logprobs cannot be given where dartfx drops vision tokens of the prompt; "
                "leave it out, or serve without dartfx in --additional-config"
            )

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.rows = prompts_of(vllm_config)
        self.rows.clear()

    def is_argmax_invariant(self) -> bool:
        """Greedy requests need not call :meth:`apply`."""
        return True

    def apply(self, logits: Any) -> Any:
        """The logits as they are."""
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Removed, added and moved rows, in the order that vLLM prescribes."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, _, _ in batch_update.added:
            self._put(row, _read(params))
        for source, target, direction in batch_update.moved:
            moved, replaced = self.rows.get(source), self.rows.get(target)
            self._put(target, moved)
            swap = direction == vllm_api.MoveDirectionality.SWAP
            self._put(source, replaced if swap else None)

    def _put(self, row: int, prompt: Prompt | None) -> None:
        if prompt is None:
            self.rows.pop(row, None)
        else:
            self.rows[row] = prompt
