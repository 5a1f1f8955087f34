"""What `train/stage1.py` and `train/stage2.py` do: compose the configuration, then plan or train."""

from conf.cli import run
from conf.submitit_job import take_rank
from data.files import require_writable
from data.processes import die_with_parent
from monitor.facts import require_key
from train.config import TrainConfig, with_parts_of_start


def start(primary: str) -> None:
    """primary: the YAML below `conf/` that makes the stage, for instance "train/stage1"."""
    die_with_parent()  # first of all: a launcher may be killed while its processes import torch
    run(TrainConfig, primary, plan_or_train)


def plan_or_train(config: TrainConfig) -> None:
    # Imports stand here, so that --help and wrong values do not wait for torch and diffusers.
    take_rank()
    config = with_parts_of_start(config)
    if config.dry_run:
        from train.dry_run import dry_run

        dry_run(config)
    elif config.tryrun:
        from train.try_run import try_run

        try_run(config)
    else:
        config.accumulation  # noqa: B018  raises when the batch does not divide
        require_writable(config.out, needed_mb=64)
        require_key(config.wandb)
        from data.shards import read_manifest
        from data.sources import ShardFolder

        read_manifest(ShardFolder(config.data.shards, config.data.cache))
        from train.loop import train

        train(config)
