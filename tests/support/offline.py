"""Records the kernels' launches without a device, and compiles them for an absent one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from dartfx.ops import triton_launch

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel: positional arguments, and constants with options like num_warps."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    def compile(self, target: GPUTarget, counts: str = "i32") -> CompiledKernel:
        """As the launch would compile it, with what Triton specialises on: 16-fold and 1.

        counts: the type of what is not specialised, or "constexpr" to make it the constant 1.
        """
        constants = dict(self.constants)
        options = {k: constants.pop(k) for k in ("num_warps",) if k in constants}
        types, hints = dict.fromkeys(constants, "constexpr"), {}
        fixed = [p for p in self.kernel.params if p.name not in constants]
        for parameter, value in zip(fixed, self.arguments, strict=True):
            name, special = parameter.name, not parameter.do_not_specialize
            types[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            if not special:
                types[name] = counts
                constants.update({name: 1} if counts == "constexpr" else {})
            elif isinstance(value, Tensor) or value % 16 == 0:
                hints[(parameter.num,)] = [["tt.divisibility", 16]]
            elif value == 1:
                types[name], constants[name] = "constexpr", 1
        # In the order of the parameters, on which the compiler relies.
        types = {p.name: types[p.name] for p in self.kernel.params}
        source = ASTSource(fn=self.kernel, signature=types, constexprs=constants, attrs=hints)
        # Said explicitly because Triton warns that the default will change.
        return triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})


@dataclass(frozen=True)
class Shape:
    """Sizes of a selection: see docs/kernel.md for the letters."""

    S: int
    H: int
    D: int
    Dh: int = 128
    dtype: torch.dtype = torch.bfloat16
    pivots: tuple[int, int] = (4, 4)
    padded: bool = False
    B: int = 2

    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
        """Every launch of one selection; nothing runs."""
        recorded: list[Launch] = []
        monkeypatch.setattr(
            triton_launch,
            "_now",
            lambda kernel, *g, **c: recorded.append(Launch(kernel, g[0], g[1:], c)),
        )
        mask = torch.empty(self.B, self.S, dtype=torch.bool, device="meta")
        triton_launch.select(
            torch.empty(self.B, self.S, self.D, dtype=self.dtype, device="meta"),
            torch.empty(self.B, self.H, self.S, self.Dh, dtype=self.dtype, device="meta"),
            mask,
            mask if self.padded else None,
            self.S - 60,
            64,
            pivot_image_tokens=self.pivots[0],
            pivot_text_tokens=self.pivots[1],
            traced=False,
        )
        return recorded


@dataclass(frozen=True)
class Usage:
    """Per thread: registers, and bytes (CUDA) or registers (HIP) spilled. Per program: bytes."""

    registers: int
    spilled: int
    shared: int


def usage(compiled: CompiledKernel, target: GPUTarget) -> Usage:
    """Read from the compiled object."""
    shared = compiled.metadata.shared
    if target.backend == "hip":
        found = dict(re.findall(r"\.(\w+):\s+(\d+)", compiled.asm["amdgcn"]))
        spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
        return Usage(int(found["vgpr_count"]), spilled, shared)
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    return Usage(int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), shared)
