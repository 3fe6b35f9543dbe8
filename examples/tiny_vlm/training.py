"""A training phase of fixed wall time, with checkpoints, a log and optional data parallelism."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from variants import VARIANTS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def arguments(description: str, rate: float, **phases: float) -> argparse.Namespace:
    """Parse the command line of a phase: output folder, minutes for each of its parts, etc."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, help="checkpoints and logs; resumes from what is there"
    )
    for name, minutes in phases.items():
        parser.add_argument(f"--{name}", type=float, default=minutes, help="minutes (%(default)s)")
    add = parser.add_argument
    add("--variant", choices=VARIANTS, default="coarse", help="(default: %(default)s)")
    add("--scenes", type=int, default=8, help="in a step of each process (%(default)s)")
    add("--workers", type=int, default=0, help="processes that make scenes (%(default)s)")
    add("--rate", type=float, default=rate, help="of learning (%(default)s)")
    add("--every", type=float, default=60, help="seconds between two checkpoints (%(default)s)")
    add("--validation", type=int, default=96, help="scenes to measure with (%(default)s)")
    add("--weights", type=Path, help="also write weights in float16 and the log to this folder")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def join() -> int:
    """Join torchrun's process group, if there is one; returns this process's rank."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    return dist.get_rank() if dist.is_initialized() else 0


def autocast() -> torch.autocast:
    """Autocast matrix products to bfloat16."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


class Run:
    """AdamW on the trainable weights, with a cosine learning rate over the share of time used.

    folder/name.pt is the checkpoint that a run resumes from, folder/name.json the log.  Under
    torchrun gradients and clocks are averaged, so all processes stop at the same step.  The clock
    starts at the end of the first step, to exclude preparation.
    """

    def __init__(
        self, name: str, args: argparse.Namespace, module: nn.Module, minutes: float
    ) -> None:
        args.folder.mkdir(parents=True, exist_ok=True)
        self.name, self.checkpoint = name, args.folder / f"{name}.pt"
        self.logs = [folder for folder in (args.folder, args.weights) if folder]
        self.module, self.seconds = module, 60 * minutes
        self.rate, self.every = args.rate, args.every
        self.rank = join()
        self.elapsed, self.steps, self.loss, self.log = 0.0, 0, 0.0, []
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.dim() >= 2]
        vectors = [p for p in self.parameters if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors}]
        fused = self.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0, betas=(0.9, 0.98), fused=fused)
        if self.checkpoint.exists():
            self._resume()
        self._before = self.elapsed
        self._start: float | None = None
        # Without a terminal, print only the records.
        hidden = True if self.rank > 0 else None
        shape = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
        self._bar = tqdm(total=self.seconds, desc=name, disable=hidden, bar_format=shape)

    @property
    def share(self) -> float:
        """The share of time used, equal in all processes."""
        return self.elapsed / self.seconds

    def step(self, loss: Tensor) -> None:
        """Take an optimiser step."""
        self.optimizer.zero_grad()
        loss.backward()
        now = time.monotonic()
        self._start = now if self._start is None else self._start
        value, self.elapsed = self._average(loss.detach(), self._before + now - self._start)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, self.share)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * cosine * min(1, (self.steps + 1) / 150)
        self.optimizer.step()
        self.loss = 0.98 * self.loss + 0.02 * value if self.steps else value
        self.steps += 1
        if self.steps % 20 == 0 and not self._bar.disable:
            self._bar.n = min(self.elapsed, self.seconds)
            self._bar.set_postfix(step=self.steps, loss=f"{float(self.loss):.3f}")

    def due(self) -> bool:
        """Whether a record is due and this process writes records."""
        last = self.log[-1]["seconds"] if self.log else 0
        return self.rank == 0 and self.elapsed - last >= self.every

    def record(self, **values: object) -> None:
        """Add a line to the log; write log, checkpoint and weights."""
        if self.rank:
            return
        self.loss = float(self.loss)
        line = {"seconds": round(self.elapsed), "steps": self.steps, "loss": round(self.loss, 4)}
        self.log.append(line | values)
        self._bar.write(f"{self.name} {json.dumps(self.log[-1])}")
        for folder in self.logs:
            folder.mkdir(parents=True, exist_ok=True)
            text = "[\n" + ",\n".join(map(json.dumps, self.log)) + "\n]\n"
            (folder / f"{self.name}.json").write_text(text)
        state = {name: getattr(self, name) for name in ("elapsed", "steps", "loss", "log")}
        weights = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state | weights, partial)
        partial.replace(self.checkpoint)  # atomic: an interruption leaves the last one intact
        half = {name: tensor.half() for name, tensor in self.module.state_dict().items()}
        for folder in self.logs[1:]:
            torch.save({"module": half}, folder / f"{self.name}.partial")
            (folder / f"{self.name}.partial").replace(folder / f"{self.name}.pt")

    def close(self) -> None:
        """Close the progress bar and leave the process group."""
        self._bar.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, map_location=DEVICE)
        self.module.load_state_dict(saved.pop("module"))
        self.optimizer.load_state_dict(saved.pop("optimizer"))
        self.__dict__.update(saved)

    def _average(self, loss: Tensor, elapsed: float) -> tuple[Tensor, float]:
        """Average gradients and these values over all processes."""
        if not dist.is_initialized():
            return loss, elapsed
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([torch.tensor([loss, elapsed]), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat[2:].split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[0], float(flat[1])
