"""What ``dartfx.compile`` attaches to a model's instance: its call, ``generate``, replicas.

All of it overrides the class's methods on the instance, so removing it restores the model.  A copy
of the model, pickled or by ``copy.deepcopy``, is an uncompiled model with its class's methods.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any, cast

from torch import Tensor, nn

from dartfx.errors import SelectionError
from dartfx.model.arguments import Arguments, brings_media
from dartfx.model.caches.filling import note_most_tokens
from dartfx.model.caches.kv_cache import is_cache
from dartfx.model.compiled_model import Call, CompiledModel
from dartfx.model.target import replaced_call
from dartfx.model.tower import ENCODES, is_needed
from dartfx.passes.refusal import Declined
from dartfx.runtime import vision_mask
from dartfx.selection.quotas import frames_by
from dartfx.token_map.infer_layout import frame_lengths

__all__ = ["attach", "detach"]


def attach(
    model: nn.Module, compiled: CompiledModel, *, static: bool, dynamic: bool | None = None
) -> None:
    """Replace a model's call by the compiled one.

    static: ``generate`` uses a static cache where its caller names none; dynamic: as in
    ``torch.compile``, for models inside whose ``generate`` this model's calls.
    """
    detach(model)
    model._compiled_call_impl = compiled
    model.register_forward_pre_hook(_through_call)
    vars(model)[_REPLICATE] = _Replicate(model, compiled)
    if hasattr(type(model), "generate"):
        vars(model)["generate"] = _Generate(model, compiled, static, dynamic)
        vars(model)[_PREPARE] = _PrepareInputs(model, compiled, _PREPARE)
    if hasattr(type(model), ENCODES) and is_needed(compiled.config.selector):
        vars(model)[ENCODES] = _EncodesInGraph(model, compiled, ENCODES)
    if hasattr(type(model), _STATIC):
        vars(model)[_STATIC] = _PrepareStatic(model, compiled, _STATIC)


def detach(model: nn.Module) -> None:
    """Remove what :func:`attach` put on this model, or on the one it was copied from."""
    model._compiled_call_impl = None
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _through_call:
            del model._forward_pre_hooks[key]
    for name in ("generate", ENCODES, _PREPARE, _STATIC, _REPLICATE):
        if isinstance(vars(model).get(name), _Attached):
            del vars(model)[name]


def _through_call(*_: object) -> None:
    """A hook that does nothing.  Dynamo traces a model without hooks by its forward alone, so in a
    function compiled around it would never come to what was compiled here."""


_REPLICATE = "_replicate_for_data_parallel"  # DataParallel calls it in every one of its calls


class _Attached:
    """Overrides a method of one model.  A copy of the model has its class's method."""

    def __init__(self, model: nn.Module, compiled: CompiledModel, name: str) -> None:
        self.__self__, self._compiled, self._name = model, compiled, name
        self._own: Call = getattr(type(model), name)
        update_wrapper(cast(Call, self), self._own.__get__(model))

    def __reduce__(self) -> tuple[Any, ...]:
        # Copying and pickling drop what was compiled, so the class's method is left.
        return getattr, (self.__self__, self._name)


class _Generate(_Attached):
    """``generate`` with a static cache by default, and refusals of what cannot be pruned.

    That is a prompt in chunks, and a model inside this one that it calls instead in another way
    than by that one's ``generate``.
    """

    def __init__(
        self, model: nn.Module, compiled: CompiledModel, static: bool, dynamic: bool | None
    ) -> None:
        super().__init__(model, compiled, "generate")
        self._static = static
        inner = _generating_inside(model)
        self._inside = None if inner is None else _GenerateInside(inner, compiled, dynamic)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, compiled = self.__self__, self._compiled
        before = self._calls()
        _require_one_chunk(model, args, kwargs)
        if self._static and not _names_a_cache(model, kwargs):
            kwargs["cache_implementation"] = "static"
        with ExitStack() as stack:
            if self._inside is not None:
                stack.enter_context(_INSIDE)
                stack.enter_context(vision_mask.text_of(model, kwargs.get("input_ids")))
                stack.enter_context(self._inside.in_place())
            # It passes the images' features to the call, without the sizes that say where frames
            # end.
            stack.enter_context(frames_by(partial(frame_lengths, kwargs)))
            result = self._own(model, *args, **kwargs)
        if model._compiled_call_impl is compiled and self._calls() == before:
            declined = Declined(
                f"{type(model).__name__}.generate runs a model inside this one and never calls "
                "what was compiled",
                advice="dartfx.compile that inner model, and mark its vision tokens with "
                "dartfx.vision_tokens",
            )
            with compiled.reporting():
                compiled.refuse(declined)
        return result

    def _calls(self) -> int:
        """Calls of what was compiled: this model, and the one inside."""
        inside = 0 if self._inside is None else self._inside.compiled.calls
        return self._compiled.calls + inside


# A model inside is changed for the time of a call, so these calls wait for each other.
_INSIDE = threading.RLock()


def _generating_inside(model: nn.Module) -> nn.Module | None:
    """The one model inside a model whose own ``generate`` may call that one's.

    None where several may write (text, then speech): the later ones read what the first returns
    by the prompt's positions.
    """
    transformers: Any = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.GenerationMixin):
        return None
    if type(model).generate is transformers.GenerationMixin.generate:
        return None  # which calls the model itself
    found: dict[str, nn.Module] = {}
    for path, inner in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if path and not nested and isinstance(inner, transformers.GenerationMixin):
            found[path] = inner
    return next(iter(found.values())) if len(found) == 1 else None


class _GenerateInside(_Attached):
    """``generate`` of a model inside the compiled one, while that one's ``generate`` runs."""

    def __init__(self, model: nn.Module, outer: CompiledModel, dynamic: bool | None) -> None:
        self.compiled = CompiledModel.of(model, outer.config, dynamic)
        self.compiled.history, self.compiled.budgeted = outer.history, outer.budgeted
        super().__init__(model, self.compiled, "generate")

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Override the model's own, unless something else does."""
        attributes = vars(self.__self__)
        if "generate" in attributes:
            yield
            return
        attributes["generate"] = self
        try:
            yield
        finally:
            del attributes["generate"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, ids = self.__self__, kwargs.get("input_ids")
        with replaced_call(model, self.compiled), vision_mask.text_of(model, ids):
            return self._own(model, *args, **kwargs)


def _require_one_chunk(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise SelectionError where ``generate`` would feed a prompt with images in several chunks."""
    size = kwargs.get("prefill_chunk_size")
    if size is None:
        size = getattr(_settings(model, kwargs), "prefill_chunk_size", None)
    prompt = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    if size is None or not isinstance(prompt, Tensor) or not brings_media((), kwargs):
        return
    if size < prompt.shape[1]:
        raise SelectionError(
            f"prefill_chunk_size={size} feeds the prompt of {prompt.shape[1]} tokens in several "
            "chunks, so no call of the model sees all of its vision tokens; leave it out, give at "
            f"least {prompt.shape[1]}, or call dartfx.uncompile(model) first"
        )


def _settings(model: nn.Module, kwargs: dict[str, Any]) -> Any:
    """The GenerationConfig of a call of ``generate``, if any."""
    return kwargs.get("generation_config") or getattr(model, "generation_config", None)


def _names_a_cache(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the caller of ``generate`` chose a cache, or none."""
    settings = _settings(model, kwargs)
    given = {"use_cache": getattr(settings, "use_cache", None)} | kwargs
    return (
        given["use_cache"] is False
        or given.get("past_key_values") is not None
        or "cache_implementation" in given
        or getattr(settings, "cache_implementation", None) is not None
    )


_PREPARE = "prepare_inputs_for_generation"


class _PrepareInputs(_Attached):
    """Slices off what a cache covers also in the first step of drafts, where transformers does not.

    There it takes the whole conversation for new tokens (5.23).
    """

    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        cache: Any = kwargs.get("past_key_values")
        # Positions are of all tokens; a mask that hides none is not passed on.
        every: Any = kwargs.get("position_ids", kwargs.get("attention_mask"))
        if not args and kwargs.get(_NEW, 0) is None and is_cache(cache) and every is not None:
            length, seen = input_ids.shape[1], cache.get_seq_length()
            if every.shape[-1] == length and 0 < seen < length:
                kwargs[_NEW] = length - int(seen)
        return self._own(self.__self__, input_ids, *args, **kwargs)


_NEW = "next_sequence_length"


class _EncodesInGraph(_Attached):
    """Leaves the features of ``generate`` to the model's call, whose graph then holds the tower."""

    def __call__(self) -> bool:
        return False


_STATIC = "_prepare_static_cache"  # what ``generate`` calls for a new one


class _PrepareStatic(_Attached):
    """Notes on a static cache how many tokens this ``generate`` may come to."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = self._own(self.__self__, *args, **kwargs)
        if is_cache(cache) and "max_cache_len" in kwargs:
            note_most_tokens(cache, kwargs["max_cache_len"])
        return cache


class _Replicate(_Attached):
    """Makes DataParallel's replica of a model, with the replica's own weights in its call."""

    def __init__(self, model: nn.Module, compiled: CompiledModel) -> None:
        super().__init__(model, compiled, _REPLICATE)

    def __call__(self) -> nn.Module:
        replica: nn.Module = self._own(self.__self__)
        detach(replica)
        replica._compiled_call_impl = _ReplicaCall(replica, self._compiled)
        return replica


class _ReplicaCall:
    """The uncompiled call of a replica, which lives for one call and so is not worth compiling."""

    def __init__(self, replica: nn.Module, compiled: CompiledModel) -> None:
        self._replica, self._compiled = replica, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if Arguments.of(self._replica.forward, args, kwargs).media:
            declined = Declined(
                "torch.nn.DataParallel copies the model for every call, and a copy is not compiled",
                advice="torch.nn.parallel.DistributedDataParallel, or one process for each GPU",
            )
            with self._compiled.reporting():
                self._compiled.refuse(declined)
        call: Call = self._replica._call_impl
        return call(*args, **kwargs)
