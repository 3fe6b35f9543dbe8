"""CUDA graphs of prefills: the launches of compiled code, recorded per shape and replayed.

Inductor's CUDA graphs (``mode="reduce-overhead"``) are unsuitable here.  Their next run overwrites
their outputs, and a KV cache outlives many runs; torch keeps them per thread, and servers generate
in threads; they also record decode steps, whose growing caches would need one per token; and their
number is unbounded.  A recording here serves only calls with vision inputs, is made when a shape
occurs for the second time, and its outputs are copied out.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph

from dartfx.runtime.prefill.checks import Unrecordable, alike, on_host, require_here
from dartfx.runtime.prefill.recorder import Compiled, Recorder, Replay

__all__ = ["Recorded", "Recordings", "replaying"]

log = logging.getLogger(__name__)

Check = Callable[..., Callable[[], object]]
Key = tuple[object, ...]
T = TypeVar("T")


@dataclass
class Recordings:
    """The recordings of one compiled model.  limit: how many each of its graphs keeps."""

    model: nn.Module
    recorder: Recorder
    limit: int = 8

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        self.made = 0
        self._queue: object = None

    def may_replay(self) -> bool:
        """Whether current launches can be replayed: recordings share memory on one queue."""
        if torch.is_autocast_enabled(self.recorder.here().type):
            return False  # autocast's weight casts live outside recordings
        queue = self.recorder.queue()
        self._queue = queue if self._queue is None else self._queue
        return self._queue == queue

    def state(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Indices of parameters and buffers, which a recording reads in place."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        known = {(t.data_ptr(), t.shape) for t in tensors if t.data_ptr()}
        given = [(n, a) for n, a in enumerate(args) if isinstance(a, Tensor)]
        return tuple(n for n, a in given if (a.data_ptr(), a.shape) in known)


_active: ContextVar[Recordings | None] = ContextVar("dartfx_recordings", default=None)


@contextmanager
def replaying(recordings: Recordings | None) -> Iterator[None]:
    """Run compiled graphs inside the ``with`` block as recordings; None: run them normally."""
    token = _active.set(recordings)
    try:
        yield
    finally:
        _active.reset(token)


@dataclass
class _Recording:
    buffers: dict[int, Tensor]  # by input index
    replay: Replay
    outputs: Sequence[Any]
    state: set[int]
    unchecked: int = 2  # replays still to be compared

    def load(self, args: Sequence[Any]) -> None:
        for place, buffer in self.buffers.items():
            _single(buffer).copy_(_single(args[place]))

    def run(self) -> list[Any]:
        self.replay()
        return _copied(self.outputs, self.state)


class Recorded:
    """Runs compiled code; inside :func:`replaying`, replays a recording for shapes seen before.

    graph: the compiled graph, which shows some reasons why it cannot be recorded.  check: takes the
    inputs, launches what the host has to read of them, and returns what waits for it and raises
    where the code must not run.
    """

    def __init__(
        self, compiled: Compiled, graph: Graph | None = None, check: Check | None = None
    ) -> None:
        self._compiled, self._check = compiled, check
        self._state: tuple[int, ...] | None = None  # indices of parameters and buffers
        self._by_shape: OrderedDict[object, _Recording | None] = OrderedDict()
        self.refused = ""
        if graph is not None and (found := on_host(graph)):
            self._refuse(found)

    def __call__(self, *args: Any) -> Any:
        recordings = _active.get()
        require = self._check(*args) if self._check is not None else _nothing
        if recordings is None or self.refused or torch.is_grad_enabled():
            require()
            return self._compiled(*args)
        with recordings.lock:
            # The host prepares the launch while the device computes what is read.
            key = self._unless_refused(self._loaded, recordings, args)
            require()
            if key is not None:
                replayed = self._unless_refused(self._replayed, recordings, args, key)
                if replayed is not None:
                    return replayed
        return self._compiled(*args)

    def _unless_refused(self, step: Callable[..., T], *args: Any) -> T | None:
        try:
            return step(*args)
        except Exception as error:
            # The code itself raises if anything is wrong with it.
            self._refuse(str(error))
            return None

    def _loaded(self, recordings: Recordings, args: Sequence[Any]) -> Key | None:
        """The key of these inputs, copied to their recording if there is one; None: run normally.

        Raises Unrecordable.
        """
        if not recordings.may_replay():
            return None
        if self._state is None:
            self._state = recordings.state(args)
        key = _key(args, self._state)
        if (recording := self._by_shape.get(key)) is not None:
            recording.load(args)
        return key

    def _replayed(self, recordings: Recordings, args: Sequence[Any], key: Key) -> list[Any] | None:
        """Replay and return the outputs; None while there is no recording for these inputs."""
        recording = self._recording(recordings, args, key)
        if recording is None:
            return None
        outputs = recording.run()
        if recording.unchecked:
            recording.unchecked -= 1
            if not alike(outputs, self._compiled(*args)):
                raise Unrecordable("its replay returned something else")
        return outputs

    def _refuse(self, because: str) -> None:
        self.refused = because
        self._by_shape.clear()
        log.warning("a prefill is launched kernel by kernel, not as a recording: %s", because)

    def _recording(
        self, recordings: Recordings, args: Sequence[Any], key: Key
    ) -> _Recording | None:
        """The recording for these inputs; None if their shape occurs for the first time."""
        if key not in self._by_shape:  # the call runs normally, which initialises what it uses
            self._by_shape[key] = None
            while len(self._by_shape) > recordings.limit:
                self._by_shape.popitem(last=False)
            return None
        self._by_shape.move_to_end(key)
        if (found := self._by_shape[key]) is None:
            assert self._state is not None
            found = self._by_shape[key] = _record(recordings, self._compiled, args, self._state)
        return found


def _nothing() -> None:
    """The check of code that has none."""


def _key(args: Sequence[Any], state: tuple[int, ...]) -> Key:
    """The key by which a recording serves these inputs.  Raises Unrecordable.

    The device waits for this, and a model has hundreds of parameters: their shapes are left to
    dynamo's guards, which every call passes before.
    """
    fixed, known = set(state), [args[n] for n in state]
    found: list[object] = [*map(Tensor.data_ptr, known)]
    found += [value.shape for value in known if type(value) is not nn.Parameter]
    for value in [value for place, value in enumerate(args) if place not in fixed]:
        if isinstance(value, Tensor):
            found.append((value.dtype, value.device, value.shape, value.stride()))
        elif value is None or isinstance(value, bool | int | float | str):
            found.append((type(value), value))
        else:
            raise Unrecordable(f"it takes a {type(value).__name__}")
    return tuple(found)


def _record(
    recordings: Recordings, run: Compiled, args: Sequence[Any], state: tuple[int, ...]
) -> _Recording:
    """Record ``run(*args)`` and replay it once.  Raises Unrecordable, and recording's errors."""
    recorder = recordings.recorder
    tensors = {place: value for place, value in enumerate(args) if isinstance(value, Tensor)}
    require_here(tensors.values(), recorder.here())
    with torch.inference_mode(False):
        varying = {place: value for place, value in tensors.items() if place not in state}
        buffers = {place: _buffer(value) for place, value in varying.items()}
    given = [buffers.get(place, value) for place, value in enumerate(args)]
    versions = [_version(given[place]) for place in tensors]
    drawn = torch.random.get_rng_state()
    replay, outputs = recorder.record(run, given)
    if not torch.equal(drawn, torch.random.get_rng_state()):
        torch.random.set_rng_state(drawn)
        raise Unrecordable("it draws random numbers on the host")
    if versions != [_version(given[place]) for place in tensors]:
        raise Unrecordable("it writes to one of its inputs")
    taken = {buffer.untyped_storage().data_ptr() for buffer in buffers.values()}
    returned = {t.untyped_storage().data_ptr() for t in outputs if isinstance(t, Tensor)}
    if taken & returned:
        raise Unrecordable("it returns one of its inputs")
    of_state = {args[place].untyped_storage().data_ptr() for place in state}
    made = _Recording(buffers, replay, outputs, of_state)
    made.run()
    if not all(torch.equal(buffer, varying[place]) for place, buffer in buffers.items()):
        raise Unrecordable("it writes to one of its inputs")
    recordings.made += 1
    return made


def _version(value: Tensor) -> int:
    """A tensor's version counter; 0 where torch keeps none."""
    return 0 if value.is_inference() else value._version


def _buffer(value: Tensor) -> Tensor:
    """Allocate a buffer for an input's later values, initialised with this one."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    _single(made).copy_(_single(value))
    return made


def _single(value: Tensor) -> Tensor:
    """A view with every element once, where expanded dimensions repeat them."""
    if 0 not in value.stride():
        return value
    return value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]


def _copied(outputs: Sequence[Any], state: set[int]) -> list[Any]:
    """Copy the outputs, preserving shared storage; parameters are returned as they are."""
    storages: dict[int, torch.UntypedStorage] = {}
    return [
        _moved(value, state, storages) if isinstance(value, Tensor) else value for value in outputs
    ]


def _moved(value: Tensor, state: set[int], storages: dict[int, torch.UntypedStorage]) -> Tensor:
    storage = value.untyped_storage()
    address = storage.data_ptr()
    if not address or address in state:
        return value
    if address not in storages:
        storages[address] = storage.clone()  # type: ignore[no-untyped-call]
    made = torch.empty(0, dtype=value.dtype, device=value.device)
    return made.set_(storages[address], value.storage_offset(), value.shape, value.stride())
