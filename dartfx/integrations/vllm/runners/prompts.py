"""What is known of the prompt in each row of the running batch.

Attention metadata does not say whose rows it is about.  The scheduler knows a request's images and
writes what is dropped into its sampling parameters, which vLLM brings to the workers.  How they are
found there by row of the batch differs between vLLM's model runners: v1.py and v2.py
each keep :func:`prompts_of` in step with the batch before a forward pass, and the cut need not know
which runner it works in.
"""

from __future__ import annotations

import copy
from typing import Any

from dartfx.integrations.vllm import options
from dartfx.integrations.vllm.batch import Prompt

__all__ = ["check_request", "prompts_of", "read", "write"]

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


def read(params: Any) -> Prompt | None:
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


def check_request(params: Any) -> None:
    """Refuse a request for log-probabilities of prompt tokens, some of which are dropped.

    Raises ValueError, which vLLM answers the request with.
    """
    if getattr(params, "prompt_logprobs", None) is not None:
        raise ValueError(
            "prompt_logprobs cannot be given where dartfx drops vision tokens of the prompt; "
            "leave it out, or serve without dartfx in --additional-config"
        )
