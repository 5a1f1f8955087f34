"""What `train/stage1.py` and `train/stage2.py` do: compose the configuration, then plan or train."""

from conf.cli import run
from train.config import TrainConfig


def start(primary: str) -> None:
    """primary: the YAML below `conf/` that makes the stage, for instance "train/stage1"."""
    run(TrainConfig, primary, plan_or_train)


def plan_or_train(config: TrainConfig) -> None:
    # Imported here, so that --help and a wrong configuration do not wait for torch.
    if config.dry_run:
        from train.dry_run import dry_run

        dry_run(config)
    else:
        from train.loop import train

        train(config)
