"""Scores how well rendered objects agree with their captions, by CLIP, into `scores.json` in the views folder.

    python data/score.py views=views/
    python data/score.py views=views/ weights=open_clip_model.safetensors arch=ViT-L-14 pretrained=laion2b_s32b_b82k

Every setting is a field of ScoreConfig in data/clip_score.py.  Run again to resume, or after rendering more objects.
"""

from pathlib import Path

from conf.cli import run
from data.clip_score import SCORES, ScoreConfig, clip_scores, quantiles


def main(config: ScoreConfig) -> None:
    scores = clip_scores(Path(config.views), config)
    low, quarter, median, three_quarters, high = quantiles(scores.values())
    print(f"{len(scores)} objects scored: {config.views}/{SCORES}")
    print(f"{low:.3f} to {high:.3f}, median {median:.3f}, half of them in {quarter:.3f} to {three_quarters:.3f}")


if __name__ == "__main__":
    run(ScoreConfig, "data/score", main)
