"""Model Runner V2: the model state receives each request, and each batch before it runs.

The state is a subclass of the one that vLLM would choose, and keeps its behaviour.
"""

from __future__ import annotations

import functools
from typing import Any

from dartfx.integrations.vllm import vllm_api
from dartfx.integrations.vllm.batch import Prompt
from dartfx.integrations.vllm.runners.prompts import check_request, prompts_of, read

__all__ = ["Requests", "attach", "state_class"]


class Requests(vllm_api.LogitsProcessorV2):  # type: ignore[misc]
    """Checks incoming requests; changes no logits."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError for a request that cannot be answered."""
        check_request(sampling_params)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """No request's logits are changed."""
        return False

    def apply(self, logits: Any, ctx: Any) -> Any:
        """Return the logits unchanged."""
        return logits


@functools.cache
def state_class(base: Any) -> Any:
    """A subclass of a model state that keeps ``prompts_of(vllm_config)`` in step with the batch."""

    class PrunedState(base):  # type: ignore[misc]
        def __init__(self, vllm_config: Any, *more: Any) -> None:
            super().__init__(vllm_config, *more)
            self.dartfx_prompts: dict[str, Prompt] = {}
            self.dartfx_rows = prompts_of(vllm_config)
            self.dartfx_rows.clear()

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            if (prompt := read(new_req_data.sampling_params)) is not None:
                self.dartfx_prompts[new_req_data.req_id] = prompt

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.dartfx_prompts.pop(req_id, None)

        def prepare_attn(self, input_batch: Any, *more: Any, **named: Any) -> Any:
            self.dartfx_rows.clear()
            for row, request in enumerate(input_batch.req_ids):
                if (prompt := self.dartfx_prompts.get(request)) is not None:
                    self.dartfx_rows[row] = prompt
            return super().prepare_attn(input_batch, *more, **named)

    PrunedState.__name__ = PrunedState.__qualname__ = f"Pruned{base.__name__}"
    return PrunedState


def attach(model: Any, vllm_config: Any) -> str:
    """Give ``model`` a state that tracks its prompts; returns why it cannot, or an empty string.

    Only for pruned models: others keep the state that vLLM chooses.
    """
    chosen = vllm_api.resolve_model_state_cls(vllm_config, model)
    if chosen is not vllm_api.DefaultModelState:
        return f"in Model Runner V2 it has a state of its own ({chosen.__name__})"
    model.get_model_state_cls = lambda: state_class(chosen)
    return ""
