"""How long the prompt of each request in the running batch is.

A preempted request is prefilled once more, with the tokens that it generated behind its prompt.
Those are no text of the prompt, so they must not become pivots: the second selection has to be the
first.  Attention metadata does not say where the prompt ends; vLLM says it to logits processors, by
row of the batch and before each forward pass.  This one changes no logits.
"""

from __future__ import annotations

from typing import Any

from dartfx.integrations.vllm import vllm_api

__all__ = ["PromptLengths", "lengths_of"]

_LENGTHS: dict[str, dict[int, int]] = {}


def lengths_of(vllm_config: Any) -> dict[int, int]:
    """Prompt lengths by row of the batch, of the engine that ``vllm_config`` configures."""
    return _LENGTHS.setdefault(vllm_config.instance_id, {})


class PromptLengths(vllm_api.LogitsProcessor):  # type: ignore[misc]
    """Keeps ``lengths_of(vllm_config)`` in step with the batch."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse a request for log-probabilities of prompt tokens, some of which are dropped."""
        if getattr(sampling_params, "prompt_logprobs", None) is not None:
            raise ValueError(
                "prompt_logprobs cannot be given where dartfx drops vision tokens of the prompt; "
                "leave it out, or serve without dartfx in --additional-config"
            )

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.lengths = lengths_of(vllm_config)
        self.lengths.clear()

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
            self.lengths.pop(row, None)
        for row, _, prompt, _ in batch_update.added:
            self.lengths[row] = len(prompt)
        for source, target, direction in batch_update.moved:
            moved, replaced = self.lengths.pop(source, None), self.lengths.pop(target, None)
            if moved is not None:
                self.lengths[target] = moved
            if replaced is not None and direction == vllm_api.MoveDirectionality.SWAP:
                self.lengths[source] = replaced
