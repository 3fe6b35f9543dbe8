"""Model Runner V1: a logits processor receives the requests by batch row.

vLLM updates it before each forward pass.  This one changes no logits.
"""

from __future__ import annotations

from typing import Any

from dartfx.integrations.vllm import vllm_api
from dartfx.integrations.vllm.batch import Prompt
from dartfx.integrations.vllm.runners.prompts import check_request, prompts_of, read

__all__ = ["Requests"]


class Requests(vllm_api.LogitsProcessor):  # type: ignore[misc]
    """Keeps ``prompts_of(vllm_config)`` in step with the batch."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for a request that cannot be answered."""
        check_request(sampling_params)

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self.rows = prompts_of(vllm_config)
        self.rows.clear()

    def is_argmax_invariant(self) -> bool:
        """Greedy requests need not call :meth:`apply`."""
        return True

    def apply(self, logits: Any) -> Any:
        """Return the logits unchanged."""
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Apply removed, added and moved rows, in the order that vLLM prescribes."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.rows.pop(row, None)
        for row, params, _, _ in batch_update.added:
            self._put(row, read(params))
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
