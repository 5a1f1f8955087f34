"""Run on two ranks by test_checkpoints.py: steps of a real engine, a checkpoint after each, until killed or at the end.

checkpoint_script.py FOLDER LAST: goes on from the newest whole checkpoint of FOLDER/checkpoints to step LAST.  Rank 0
writes a line a step, with the number and a hash of its weights, into FOLDER/steps.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from step_script import state
from torch import nn

from train.checkpoints import Checkpoints, TrainState, load_checkpoint, newest_checkpoint
from train.config import TrainConfig
from train.engine import WeightAverage, any_rank, build_engine, prepare_environment, take_step

if __name__ == "__main__":
    folder, last = Path(sys.argv[1]), int(sys.argv[2])
    prepare_environment(cpu=True)
    torch.manual_seed(0)
    config = TrainConfig(cpu=True, precision="fp32", batch_size=8, micro_batch_size=4)
    _, engine = build_engine(config, nn.Sequential(nn.Linear(64, 2048), nn.SiLU(), nn.Linear(2048, 64)))
    average, train_state = WeightAverage(engine, 0.9), TrainState([])
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is not None:
        train_state = load_checkpoint(newest, engine, average, [])
    checkpoints = Checkpoints(folder / "checkpoints", engine, average, {}, config, train_state.step)
    while train_state.step < last:
        number = 10 * train_state.step + dist.get_rank()
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(number))
        engine.backward((engine(x) - x).square().mean())
        assert take_step(engine, config.optim.clip_norm)
        average.update()
        train_state.step += 1
        if dist.get_rank() == 0:
            with open(folder / "steps.jsonl", "a") as file:
                file.write(json.dumps([train_state.step, state(engine)]) + "\n")
        (writing,) = any_rank([checkpoints.writing], engine.device)
        if not writing:
            checkpoints.finish()
            checkpoints.begin(train_state)
    checkpoints.begin(train_state)
    checkpoints.finish()
    dist.destroy_process_group()
