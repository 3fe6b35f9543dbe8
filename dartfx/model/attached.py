"""What ``dartfx.compile`` attaches to a model's instance: its call, ``generate``, replicas.

All of it stands in for the class's own methods, so taking it off restores the model.  A copy of the
model, pickled or by ``copy.deepcopy``, is an uncompiled model with its class's methods.
"""

from __future__ import annotations

from functools import partial, update_wrapper
from typing import Any, cast

from torch import Tensor, nn

from dartfx.errors import SelectionError
from dartfx.model.arguments import Arguments, brings_media
from dartfx.model.compiled_model import Call, CompiledModel
from dartfx.passes.refusal import Declined
from dartfx.selection.quotas import frames_by
from dartfx.token_map.infer_layout import frame_lengths

__all__ = ["attach", "detach"]


def attach(model: nn.Module, compiled: CompiledModel, *, static: bool) -> None:
    """Put what was compiled in the place of a model's call.

    static: ``generate`` uses a static cache where its caller names none.
    """
    detach(model)
    model._compiled_call_impl = compiled
    model.register_forward_pre_hook(_through_call)
    vars(model)[_REPLICATE] = _Replicate(model, compiled)
    if hasattr(type(model), "generate"):
        vars(model)["generate"] = _Generate(model, compiled, static)


def detach(model: nn.Module) -> None:
    """Take off whatever :func:`attach` put on this model, or on the one it was made of."""
    model._compiled_call_impl = None
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _through_call:
            del model._forward_pre_hooks[key]
    for name in ("generate", _REPLICATE):
        if isinstance(vars(model).get(name), _Attached):
            del vars(model)[name]


def _through_call(*_: object) -> None:
    """A hook that does nothing.  Dynamo traces a model without hooks by its forward alone, so in a
    function compiled around it would never come to what was compiled here."""


_REPLICATE = "_replicate_for_data_parallel"  # what DataParallel calls, for every call of its own


class _Attached:
    """Stands in for a method of one model.  A copy of the model has its class's method."""

    def __init__(self, model: nn.Module, compiled: CompiledModel, name: str) -> None:
        self.__self__, self._compiled, self._name = model, compiled, name
        self._own: Call = getattr(type(model), name)
        update_wrapper(cast(Call, self), self._own.__get__(model))

    def __reduce__(self) -> tuple[Any, ...]:
        # Copying and pickling drop what was compiled, so the class's method is left.
        return getattr, (self.__self__, self._name)


class _Generate(_Attached):
    """``generate`` with a static cache by default, and refusals of what cannot be pruned.

    That is a prompt in chunks, and a model inside this one that it calls instead.
    """

    def __init__(self, model: nn.Module, compiled: CompiledModel, static: bool) -> None:
        super().__init__(model, compiled, "generate")
        self._static = static

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, compiled = self.__self__, self._compiled
        before = compiled.calls
        _require_one_chunk(model, args, kwargs)
        if self._static and not _names_a_cache(model, kwargs):
            kwargs["cache_implementation"] = "static"
        # It passes the pictures' features to the call, without the sizes that say where frames end.
        with frames_by(partial(frame_lengths, kwargs)):
            result = self._own(model, *args, **kwargs)
        if model._compiled_call_impl is compiled and compiled.calls == before:
            declined = Declined(
                f"{type(model).__name__}.generate runs a model inside this one and never calls "
                "what was compiled",
                advice="dartfx.compile that inner model, and mark its vision tokens with "
                "dartfx.vision_tokens",
            )
            with compiled.reporting():
                compiled.refuse(declined)
        return result


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
