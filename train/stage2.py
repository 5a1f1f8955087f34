"""Stage 2: `accelerate launch train/stage2.py [experiment=...] [key=value ...]`; see conf/train/stage2.yaml."""

from train.start import start

if __name__ == "__main__":
    start("train/stage2")
