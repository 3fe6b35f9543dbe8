"""Writes the code that Inductor generates for a CUDA device, on a machine that has none.

    python cuda_codegen.py static|dynamic

A stub stands in for the device while Inductor compiles norm, selection, gather and norm, as they
follow each other in a pruned decoder; nothing is launched. It replaces private functions of torch,
so it is a program for a process of its own, and its test names the torch it was written for.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import dartfx.ops  # noqa: F401  (registers the operator)

S, D, HEADS, TEXT, RETAIN = 640, 4096, 32, 64, 64


class Driver:
    """As much of a Triton driver as compiling needs."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


PROPERTIES = SimpleNamespace(
    name="stub",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    gcnArchName="",
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
)


def pretend() -> None:
    """Make torch believe in a device of compute capability 9.0."""
    driver.set_active(Driver())
    # Both trace examples of their patterns on real CUDA tensors.
    for module, name in (
        (fuse_attention, "_sfdp_init"),
        (pad_mm, "_pad_mm_init"),
        (misc_patterns, "_misc_patterns_init"),
    ):
        setattr(module, name, lambda *a, **k: None)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    cuda, interface = torch.cuda, torch._dynamo.device_interface.CudaInterface
    shared: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
        "synchronize": lambda *a: None,
    }
    for name, function in shared.items():
        setattr(cuda, name, function)
        setattr(interface, name, staticmethod(function))
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda._lazy_init = lambda: None
    cuda.get_rng_state = lambda *a, **k: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda *a, **k: None
    cuda._exchange_device = cuda._maybe_exchange_device = lambda device: 0
    for name, value in (
        ("get_compute_capability", 90),
        ("is_triton_capable", True),
        ("raise_if_triton_unavailable", None),
        ("get_raw_stream", 0),
    ):
        setattr(interface, name, staticmethod(lambda *a, value=value: value))
    interface.Worker.get_device_properties = staticmethod(lambda device=None: PROPERTIES)
    interface.Worker.current_device = staticmethod(lambda: 0)
    interface.Worker.set_device = staticmethod(lambda device: None)


def norm(hidden: Tensor, weight: Tensor) -> Tensor:
    wide = hidden.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (wide * scale).to(hidden.dtype) * weight


def cut(hidden: Tensor, weight: Tensor, keys: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
    keep_idx = torch.ops.dartfx.select_tokens(
        *(norm(hidden, weight), keys * 1.5, vision, None, hidden.shape[1] - TEXT, RETAIN),
        *(4, 4, "dart", "auto"),
    )
    index = keep_idx.unsqueeze(-1).expand(-1, -1, D)
    hidden = hidden.gather(1, index)
    return hidden, norm(hidden, weight)


def generate(dynamic: bool) -> tuple[str, list[str]]:
    """Inductor's code, and the guards that compiling it put on S."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    shapes = ShapeEnv()
    sequence: Any = S
    if dynamic:
        source = torch._dynamo.source.ConstantSource("S")
        symbol = shapes.create_symbol(S, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        sequence = shapes.create_symintnode(symbol, hint=S)
    code: list[str] = []

    class Generated(Exception):
        pass

    def stop(self: GraphLowering) -> None:
        code.append(self.codegen()[0].value)
        raise Generated

    GraphLowering.compile_to_module = stop  # type: ignore[method-assign]
    with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True) as mode:
        cuda: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        arguments = [
            torch.empty(1, sequence, D, **cuda),
            torch.empty(D, **cuda),
            torch.empty(1, HEADS, sequence, D // HEADS, **cuda),
            torch.empty(1, sequence, device="cuda", dtype=torch.bool),
        ]
        # A plain function of tensors only: make_fx would take the default values for inputs.
        trace = make_fx(lambda *a: cut(*a), tracing_mode="symbolic" if dynamic else "real")
        graph = trace(*arguments)
    try:
        with tracing(TracingContext(mode)), torch._inductor.config.patch(fx_graph_cache=False):
            compile_fx(graph, arguments)
    except Exception:
        if not code:
            raise
    return code[0], [str(guard.expr) for guard in shapes.guards]


if __name__ == "__main__":
    pretend()
    text, guards = generate(sys.argv[1] == "dynamic")
    sys.stdout.write(f"{text}\n# guards: {guards}\n")
