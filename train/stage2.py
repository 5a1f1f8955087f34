"""Stage 2: `accelerate launch train/stage2.py [experiment=...] [key=value ...]`; see conf/train/stage2.yaml."""

from conf.cli import run
from train.config import TrainConfig


def main(config: TrainConfig) -> None:
    if config.dry_run:
        from train.dry_run import dry_run

        dry_run(config)
    else:
        from train.loop import train

        train(config)


if __name__ == "__main__":
    run(TrainConfig, "train/stage2", main)
