"""Stage 1: `accelerate launch train/stage1.py [experiment=...] [key=value ...]`; see conf/train/stage1.yaml."""

from train.start import start

if __name__ == "__main__":
    start("train/stage1")
