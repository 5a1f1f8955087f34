"""Steps that are left out because a gradient was not finite: counted, named, and only so many in a row."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from train.checkpoints import TrainState
from train.engine import OnEveryRank

SHOWN = 10  # objects that a message lists


class Skips:
    """most: in a row.  scaled: fp16, whose gradients overflow now and then while their scale is found."""

    def __init__(self, most: int, scaled: bool = False):
        self.most, self.scaled, self.in_a_row = most, scaled, 0
        self.named: dict[str, None] = {}  # objects of the steps in a row

    def note(self, state: TrainState, losses: list[tuple[list[str], torch.Tensor]]) -> str:
        """A batch that left no step.  losses: of this rank's micro-batches, the objects and the loss of each.

        Returns what happened, in words.  Collective; OnEveryRank on every rank after more than `most` in a row.
        """
        state.skipped += 1
        self.named = self.named if self.in_a_row else {}
        self.in_a_row += 1
        pairs = [pair for keys, values in losses for pair in zip(keys, values.tolist(), strict=True)]
        everyone: list[tuple[list[str], list[str]]] = [([], [])] * dist.get_world_size()
        dist.all_gather_object(
            everyone, ([key for key, value in pairs if not math.isfinite(value)], [key for key, _ in pairs])
        )
        keys, seen = (list(dict.fromkeys(key for one in everyone for key in one[kind])) for kind in (0, 1))
        if self.scaled and not keys:
            self.in_a_row -= 1
            words = (
                f"after step {state.step}: fp16's scale was too large for batch {state.batch - 1}, which is left out"
            )
            if dist.get_rank() == 0:
                print(f"{words}; the scale is lowered", flush=True)
            return words
        self.named |= dict.fromkeys(keys or seen)
        what = f"the loss of {listed(keys)} is not finite" if keys else f"a gradient is not finite, of {listed(seen)}"
        words = f"after step {state.step}: {what}; batch {state.batch - 1} is left out"
        if self.in_a_row > self.most:
            raise OnEveryRank(
                f"{words}, with it {self.in_a_row} in a row, and max_skipped={self.most}; lower optim.lr or lengthen "
                f"optim.warmup_steps, look at {listed(list(self.named))}, and start again: the run goes on from its "
                "last checkpoint"
            )
        if dist.get_rank() == 0:
            print(f"warning: {words}; weights, averages and schedule stay as they were", flush=True)
        return words


def listed(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else "")
