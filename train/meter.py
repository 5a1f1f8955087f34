"""What a run reports of itself: losses by branch and by noise, speed, waiting, memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from train.objective import MULTI, REFERENCE, SINGLE

BRANCHES = (SINGLE, MULTI, REFERENCE)
BANDS = 4  # of timesteps, from little noise to much
GIB = 2**30


class Meter:
    """Sums between two reports, on the device, so that counting never waits for it.

    flops: of one object on each branch; peak: FLOP/s of one device, None where it is not known.
    """

    def __init__(self, device: torch.device, timesteps: int, flops: dict[str, float], peak: float | None):
        self.device, self.timesteps, self.flops, self.peak = device, timesteps, flops, peak
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(len(BRANCHES) + BANDS, dtype=torch.float64, device=self.device)
        self.counts = torch.zeros_like(self.sums)
        self.computed, self.objects, self.steps, self.waited = 0.0, 0, 0, 0.0
        self.began = time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time that data are waited for."""
        began = time.monotonic()
        yield
        self.waited += time.monotonic() - began

    def add(self, branch: str, loss: Tensor, timesteps: Tensor) -> None:
        """loss (B,) and timesteps (B,) of this rank's objects."""
        loss = loss.detach().double()
        band = len(BRANCHES) + timesteps * BANDS // self.timesteps
        place = torch.cat([torch.full_like(band, BRANCHES.index(branch)), band]).to(self.device)
        self.sums.index_add_(0, place, loss.repeat(2))
        self.counts.index_add_(0, place, torch.ones_like(loss).repeat(2))
        self.objects += len(loss)
        self.computed += self.flops.get(branch, 0.0) * len(loss)

    def totals(self) -> list[list[float]]:
        """Sums and counts of all ranks since the last report; what a run keeps that goes on later.  Collective."""
        totals = torch.stack([self.sums, self.counts])
        dist.all_reduce(totals)
        return totals.tolist()

    def restore(self, totals: list[list[float]]) -> None:
        """Of one rank, since they are of all."""
        self.sums, self.counts = (torch.tensor(one, dtype=torch.float64, device=self.device) for one in totals)

    def report(self, views: int, steps_left: int) -> dict[str, float]:
        """Of all ranks since the last report, and begins anew.  Collective."""
        world = dist.get_world_size()
        sums, counts = self.totals()
        slowest = torch.tensor([self.waited, float(memory_peak(self.device))], dtype=torch.float64, device=self.device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)  # one rank's slow data is waited for by all
        waited, memory = slowest.tolist()
        names = [f"loss/{branch}" for branch in BRANCHES]
        width = self.timesteps // BANDS
        names += [f"loss/t{band * width}-{(band + 1) * width - 1}" for band in range(BANDS)]
        branches = slice(len(BRANCHES))
        seconds = time.monotonic() - self.began
        values = {"loss": sum(sums[branches]) / max(sum(counts[branches]), 1)}
        values |= {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n > 0}
        rate = self.computed / seconds
        values |= {
            "steps_per_s": self.steps / seconds,
            "samples_per_s": world * self.objects / seconds,
            "images_per_s": world * self.objects * views / seconds,
            "data_wait_share": waited / seconds,
            "tflops_per_s_a_process": rate / 1e12,
            "eta_s": steps_left * seconds / max(self.steps, 1),
            "memory_gib": memory / GIB,
        }
        if self.peak is not None:
            values["mfu"] = rate / self.peak
        self.reset()
        return values


def memory_peak(device: torch.device) -> int:
    """The most bytes that this process has held on the device; on the CPU, of memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
