"""A training phase boxed in wall time, with checkpoints, a log and optional data parallelism."""

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


def arguments(description: str, **phases: float) -> argparse.Namespace:
    """The command line of a phase: where to write, minutes for each of its parts, a seed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "folder", type=Path, help="checkpoints and logs; resumes from what is there"
    )
    for name, minutes in phases.items():
        parser.add_argument(f"--{name}", type=float, default=minutes, help="minutes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def join() -> int:
    """Joins the processes that torchrun started, if it did; returns this one's rank."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    return dist.get_rank() if dist.is_initialized() else 0


class Run:
    """AdamW on what is trainable, with a cosine learning rate over the share of time used.

    folder/name.pt is the checkpoint, from which a run continues; folder/name.json the log.  Under
    torchrun gradients and clocks are averaged, so all processes stop at the same step.
    """

    def __init__(
        self, name: str, folder: Path, module: nn.Module, minutes: float, rate: float
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint, self.path = folder / f"{name}.pt", folder / f"{name}.json"
        self.module, self.seconds, self.rate = module, 60 * minutes, rate
        self.rank = join()
        self.elapsed, self.steps, self.loss, self.log = 0.0, 0, math.nan, []
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in self.parameters if p.dim() >= 2]
        vectors = [p for p in self.parameters if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0, betas=(0.9, 0.98))
        if self.checkpoint.exists():
            self._resume()
        self._before = self.elapsed
        self._start = time.monotonic()
        hidden = self.rank > 0
        shape = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
        self._bar = tqdm(total=self.seconds, desc=name, disable=hidden, bar_format=shape)

    @property
    def share(self) -> float:
        """Share of the time that is used, the same in all processes."""
        return self.elapsed / self.seconds

    def step(self, loss: Tensor) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        loss.backward()
        elapsed = self._before + time.monotonic() - self._start
        value, self.elapsed = self._average(loss.item(), elapsed)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        cosine = 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, self.share)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * cosine * min(1, (self.steps + 1) / 150)
        self.optimizer.step()
        self.steps += 1
        self.loss = value if math.isnan(self.loss) else 0.98 * self.loss + 0.02 * value
        self._bar.n = min(self.elapsed, self.seconds)
        self._bar.set_postfix(step=self.steps, loss=f"{self.loss:.3f}")

    def due(self, seconds: float) -> bool:
        """Whether so much time has passed since the last record, and this process keeps them."""
        last = self.log[-1]["seconds"] if self.log else 0
        return self.rank == 0 and self.elapsed - last >= seconds

    def record(self, **values: object) -> None:
        """Adds a line to the log and writes log and checkpoint."""
        if self.rank:
            return
        line = {"seconds": round(self.elapsed), "steps": self.steps, "loss": round(self.loss, 4)}
        self.log.append(line | values)
        self._bar.write(json.dumps(self.log[-1]))
        self.path.write_text("[\n" + ",\n".join(map(json.dumps, self.log)) + "\n]\n")
        state = {name: getattr(self, name) for name in ("elapsed", "steps", "loss", "log")}
        weights = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state | weights, partial)
        partial.replace(self.checkpoint)  # so that an interruption leaves the last one whole

    def close(self) -> None:
        """Ends the progress bar and leaves the other processes."""
        self._bar.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint)
        self.module.load_state_dict(saved.pop("module"))
        self.optimizer.load_state_dict(saved.pop("optimizer"))
        self.__dict__.update(saved)

    def _average(self, *values: float) -> list[float]:
        """Averages gradients and these values over all processes."""
        if not dist.is_initialized():
            return list(values)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([torch.tensor(values), *(g.flatten() for g in gradients)])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat[len(values) :].split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[: len(values)].tolist()
