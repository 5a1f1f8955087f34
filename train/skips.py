"""Steps that are left out because a gradient was not finite: counted, named, and only so many in a row."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from data.files import UserError
from train.checkpoints import TrainState

SHOWN = 10  # objects that a message lists


class Skips:
    def __init__(self, most: int):
        self.most, self.in_a_row = most, 0

    def note(self, state: TrainState, losses: list[tuple[list[str], torch.Tensor]]) -> str:
        """A batch that left no step.  losses: of this rank's micro-batches, the objects and the loss of each.

        Returns what happened, in words.  Collective; UserError on every rank when there were more than `most` in a row.
        """
        state.skipped += 1
        self.in_a_row += 1
        pairs = [pair for keys, values in losses for pair in zip(keys, values.tolist(), strict=True)]
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, [key for key, value in pairs if not math.isfinite(value)])
        keys = list(dict.fromkeys(key for one in everyone for key in one))
        objects = f"the loss of {', '.join(keys[:SHOWN])} is not finite" if keys else "a gradient is not finite"
        words = f"after step {state.step}: {objects}; batch {state.batch - 1} is left out"
        if self.in_a_row > self.most:
            raise UserError(
                f"{words}, the {self.in_a_row}th in a row, and max_skipped={self.most}; lower optim.lr or lengthen "
                "optim.warmup_steps, look at those objects, and start again: the run goes on from its last checkpoint"
            )
        if dist.get_rank() == 0:
            print(f"warning: {words}; weights, averages and schedule stay as they were", flush=True)
        return words
