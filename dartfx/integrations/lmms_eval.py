"""lmms-eval's model "dartfx": any Hugging Face vision-language model, pruned during evaluation.

lmms-eval finds it through dartfx's entry point: ``lmms-eval --model dartfx --model_args
pretrained=NAME,retain_tokens=64 --tasks pope``.  Written against lmms-eval 0.7.3.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from loguru import logger
from tqdm import tqdm  # type: ignore[import-untyped]

from dartfx.errors import ConfigError
from dartfx.integrations.answering import Answering
from dartfx.integrations.hf import load_model
from dartfx.integrations.lmms_requests import OnDemand, document, from_visuals, settings_of
from dartfx.integrations.prompts import Conversation

__all__ = ["Dartfx", "DartfxSimple"]

T = TypeVar("T")


@register_model("dartfx")
class Dartfx(lmms):  # type: ignore[misc]
    """The model for chat-message tasks, which all generation tasks of lmms-eval are.

    pretrained: a name on the hub or a folder.  device: defaults to the process's own.  dtype:
    defaults to float32 on a CPU, else bfloat16.  batch_size: prompts per batch; does not change
    answers.  prune: False measures the unpruned model.  num_frames: per video.
    attn_implementation, revision, trust_remote_code: of ``from_pretrained``.  All other arguments
    go to :func:`dartfx.compile`; values that start with a bracket or brace are parsed as JSON.
    Raises ConfigError for an invalid argument.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        prune: bool = True,
        num_frames: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        alone = self._world_size == 1
        self.device = device if device is not None and alone else self.accelerator.device
        if not str(batch_size).isdecimal():
            raise ConfigError(f"batch_size is {batch_size!r}; give a number, none is searched for")
        of_loading = ("attn_implementation", "revision", "trust_remote_code")
        loaded = {name: arguments.pop(name) for name in of_loading if name in arguments}
        if arguments and not prune:
            raise ConfigError(f"prune=False leaves no use for {', '.join(sorted(arguments))}")
        options = {name: _value(name, given) for name, given in arguments.items()}
        model, processor = load_model(pretrained, self.device, dtype, **loaded)
        self.config, self.batch_size = model.config, int(batch_size)
        self._answering = Answering(
            model,
            processor,
            options if prune else None,
            batch_size=self.batch_size,
            num_frames=num_frames,
        )

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """Return the answers, each with its numbers of prompt and generated tokens."""
        ignored: set[str] = set()
        arguments = [self._generation(request.args) for request in requests]
        settings = [settings_of(given, ignored) for given in arguments]
        if ignored:
            logger.info(f"dartfx ignores generation arguments {', '.join(sorted(ignored))}")
        start = time.monotonic()
        done = self._in_order(
            self._answering.answer(self._conversations(requests), settings), arguments
        )
        for request, given, answer in zip(requests, arguments, done, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], given), answer.text)
        self._log_throughput(time.monotonic() - start, sum(answer.written for answer in done))
        return [
            GenerationResult(a.text, TokenCounts(input_tokens=a.read, output_tokens=a.written))
            for a in done
        ]

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        """Return each continuation's mean negative log-likelihood, and whether it is greedy.

        lmms-eval documents a log-likelihood here, but its models return losses and its multiple
        choice takes the minimum.
        """
        start = time.monotonic()
        said = [self._continuation(request.args) for request in requests]
        losses = self._answering.losses(self._conversations(requests), said)
        done = self._in_order(losses, said)
        self._log_throughput(time.monotonic() - start, 0)
        # lmms-eval 0.7.3 turns a bare pair into a string, but leaves unwrapped values as they are.
        return [GenerationResult(pair) for pair in done]

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        """Unsupported: a second round would continue a pruned cache, which dartfx refuses."""
        raise NotImplementedError(
            "dartfx answers tasks of one round; a second would continue a cache that was pruned"
        )

    def clean(self) -> None:
        """Free the model's memory."""
        del self._answering
        super().clean()

    def _generation(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        given: dict[str, Any] = arguments[2]
        return given

    def _conversation(self, arguments: tuple[Any, ...]) -> Conversation:
        messages = ChatMessages(messages=arguments[1](document(self.task_dict, arguments)))
        conversation: Conversation = messages.to_hf_messages()
        kinds = {part["type"] for message in conversation for part in message["content"]}
        if unknown := kinds - {"text", "image", "video"}:
            raise TypeError(f"task {arguments[4]} has {', '.join(unknown)}, not offered here")
        return conversation

    def _continuation(self, arguments: tuple[Any, ...]) -> str:
        given = arguments[1]
        return str(given(document(self.task_dict, arguments)) if callable(given) else given)

    def _conversations(self, requests: list[Any]) -> OnDemand[Conversation]:
        return OnDemand(len(requests), lambda i: self._conversation(requests[i].args))

    def _in_order(self, answered: Iterator[tuple[int, T]], requests: list[Any]) -> list[T]:
        found: dict[int, T] = {}
        for number, answer in tqdm(
            answered, total=len(requests), disable=self.rank != 0, desc="Model Responding"
        ):
            found[number] = answer
        return [found[number] for number in range(len(requests))]

    def _log_throughput(self, seconds: float, written: int) -> None:
        """Report what was pruned in the log and in the results' "throughput"."""
        tally = self._answering.tally
        logger.info(f"dartfx: {tally}")
        figures: dict[str, float] = {
            "prompts_with_vision": tally.with_vision,
            "prompts_pruned": tally.pruned,
        }
        if tally.pruned:
            figures["sequence_tokens"] = tally.tokens / tally.pruned
            figures["sequence_tokens_kept"] = tally.kept / tally.pruned
        speed = written / seconds if seconds else 0.0
        log_metrics(seconds, written, speed, additional_metrics=figures)


class DartfxSimple(Dartfx):
    """The model for ``--force_simple``, which likelihood and multiple-choice tasks need."""

    is_simple = True

    def _generation(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        given: dict[str, Any] = arguments[1]
        return given

    def _conversation(self, arguments: tuple[Any, ...]) -> Conversation:
        shown = document(self.task_dict, arguments)
        return from_visuals(arguments[0], arguments[2](shown))


def _value(name: str, given: Any) -> Any:
    """Parse a command-line argument; lists and mappings are JSON."""
    if not isinstance(given, str) or given[:1] not in ("[", "{"):
        return given
    try:
        return json.loads(given)
    except ValueError as error:
        raise ConfigError(f"{name} is {given!r}, which is not JSON: {error}") from error
