"""What every run and every test starts from: own compile caches, no leftover compiled code."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import dartfx
from tests.support.running.cheap_dynamo import cut_costs
from tests.support.running.order import longest_first
from tests.support.running.timing import Timing

# The models are so small that a second thread only waits for the first.
torch.set_num_threads(1)

# Dynamo's objects live until a test resets it, and then nearly all of them go without the garbage
# collector: looking through them while they live took a tenth of a run's CPU at 100,000 objects.
# Dynamo itself looks once more after each frame.
gc.set_threshold(1_000_000, 5, 5)
torch._dynamo.config.run_gc_after_compile = False

cut_costs()

# What Inductor says once in each process, of float32 matrices and of a first graph without kernels.
_GPU_WARNINGS = (
    "ignore:TensorFloat32 tensor cores:UserWarning",
    "ignore:The CUDA Graph is empty:UserWarning",
)

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_FOLDERS = pytest.StashKey[tempfile.TemporaryDirectory[str]]()

# The same examples in every run of quick and long; other ones every night.
_PROFILES = {"quick": 30, "long": 150, "nightly": int(os.environ.get("EXAMPLES", 10_000))}
for _name, _count in _PROFILES.items():
    settings.register_profile(
        _name,
        max_examples=_count,
        derandomize=_name != "nightly",
        database=None,
        deadline=None,
        phases=[Phase.generate],
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
settings.load_profile("quick")  # until --hypothesis-profile names another one


def pytest_configure(config: pytest.Config) -> None:
    """Give the run one folder of compile caches, which xdist's workers inherit.

    A new one per run: what an earlier run compiled must not decide whether this one passes.  One
    for all of it: every folder costs the seconds in which Inductor compiles torch's headers.
    """
    if hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(Timing())
    folder = tempfile.TemporaryDirectory(prefix="dartfx-tests-", ignore_cleanup_errors=True)
    config.stash[_FOLDERS] = folder
    os.environ[_CACHE] = folder.name
    # The processor says which vector instructions it has; trying them takes Inductor ten seconds.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    for variable in ("DARTFX_DUMP", "DARTFX_OPTIONS"):
        os.environ.pop(variable, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _FOLDERS in config.stash:
        config.stash[_FOLDERS].cleanup()


def pytest_collection_finish() -> None:
    """What is imported stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """The process ends: pytest would collect all garbage once more, twice, for eight seconds."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items)
    marks = [pytest.mark.filterwarnings(each) for each in _GPU_WARNINGS]
    if not torch.cuda.is_available():
        marks = [pytest.mark.skip(reason="needs a CUDA device")]
    for item in filter(lambda each: each.get_closest_marker("gpu"), items):
        for mark in marks:
            item.add_marker(mark)


@pytest.fixture(autouse=True, scope="module")
def fresh_file() -> Iterator[None]:
    """Nothing that an earlier file compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def own_objects() -> Iterator[None]:
    """For tests that call the collector: what earlier files left would take it five seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fixed seed; nothing that an earlier test reported or noted, or compiled unless it is shared.

    A file marked ``shares_compiled`` asks one compiled model several questions: what its earlier
    tests compiled stays, and more kinds of calls come to it than to a model in use.
    """
    torch.manual_seed(0)
    dartfx.reset()
    if request.node.get_closest_marker("shares_compiled"):
        with torch._dynamo.config.patch(recompile_limit=64):
            yield
        return
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaVA of 4 by 4 vision tokens, its processor, and an image of noise."""
    from PIL import Image

    examples = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, examples)
    try:
        import vlm
    finally:
        sys.path.remove(examples)
    folder, size = tmp_path_factory.mktemp("model"), vlm.SIZES["tiny"]
    vlm.build_model(size, seed=3).save_pretrained(folder)
    vlm.build_processor(size).save_pretrained(folder)
    Image.effect_noise((56, 56), 80.0).save(folder / "image.png")
    return folder
