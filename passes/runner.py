"""Running passes one by one: each is timed, logged and shown to an observer."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, Protocol, TypeVar

from torch.fx import GraphModule

from dartfx.passes.site import Site

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class Observer(Protocol):
    """Receives the graph after each pass, and the site of the cut once it is known."""

    def __call__(self, name: str, module: GraphModule, site: Site | None = None, /) -> None: ...


class PassTimer:
    """Seconds per pass, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


class PassRunner:
    """Runs passes over one graph as ``run(name, function, *args)``.

    current: the name of the pass that runs, or ran last; one that runs again is numbered.
    """

    def __init__(self, module: GraphModule, observe: Observer | None = None) -> None:
        self.current = ""
        self.timer = PassTimer()
        self.timer.seconds["normalise"] = module.meta.get("seconds", 0.0)
        self._module, self._observe = module, observe
        self._runs = Counter[str]()
        self._site: Site | None = None
        self._log("normalise")

    def __call__(self, name: str, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        self._runs[name] += 1
        self.current = name if self._runs[name] == 1 else f"{name} {self._runs[name]}"
        with self.timer(self.current):
            result = function(*args, **kwargs)
        self._log(self.current)
        # A site, or a result that is about one.
        self._site = result if isinstance(result, Site) else getattr(result, "site", self._site)
        if self._observe is not None:
            self._observe(self.current, self._module, self._site)
        return result

    def _log(self, name: str) -> None:
        nodes = len(self._module.graph.nodes)
        log.debug("pass %s: %.3f s, %d nodes", name, self.timer.seconds[name], nodes)
