"""How far our network is from the released one's mathematics, at any width: `python tests/benchmarks/parity.py`.

For each width a random ldm UNet is made, converted by models/released.py, and run by diffusers with our attention; the
other side is the oracle of tests/models/ldm_oracle.py on the ldm tensors themselves, fp32, on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "models")]

from diffusers import UNet2DConditionModel  # noqa: E402
from ldm_oracle import Oracle  # noqa: E402
from released_values import draw, fill  # noqa: E402

from models.config import UNetConfig  # noqa: E402
from models.multiview import MultiViewAttention, build_unet, predict_noise_output  # noqa: E402
from models.released import renamed, swapped, unet_config, unet_pairs  # noqa: E402

ATTENDS = [True, True, True, False]


def ldm_weights(width: int, head_dim: int, context: int) -> dict[str, torch.Tensor]:
    """A random UNet by its released names, weights from the recorded rule."""
    channels = [width, 2 * width, 4 * width, 4 * width]
    config = UNetConfig(None, channels, [c // head_dim for c in channels], 2, context)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build_unet(config, 4, 32).state_dict().items()}
    names = renamed(shapes, swapped(unet_pairs(2, ATTENDS)))
    return {ldm: fill(f"model.diffusion_model.{ldm}", shapes[name]) for name, ldm in names.items()}


@torch.no_grad()
def difference(width: int, head_dim: int, context: int, size: int) -> tuple[float, float, int]:
    """Largest absolute difference, the output's own standard deviation, and the network's parameters."""
    weights = ldm_weights(width, head_dim, context)
    config = unet_config({name: tuple(t.shape) for name, t in weights.items()}, head_dim)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    pairs = renamed(weights, unet_pairs(config["layers_per_block"], ATTENDS))
    unet.load_state_dict({pairs[name]: tensor for name, tensor in weights.items()}, assign=True)
    unet.set_attn_processor(MultiViewAttention())
    x, camera = draw("x", (4, 4, size, size)), draw("camera", (4, 16))
    embedding, times = draw("context", (1, 1, context)), torch.tensor([611])
    ours = predict_noise_output(unet.eval(), x[None], times, embedding, camera[None])[0]
    theirs = Oracle(weights, head_dim)(x, times.expand(4), embedding.expand(4, -1, -1), camera, 4)
    count = sum(tensor.numel() for tensor in weights.values())
    return float((ours - theirs).abs().max()), float(theirs.std()), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 320])
    parser.add_argument("--size", type=int, default=32, help="latent size")
    arguments = parser.parse_args()
    print(f"{'width':>6}{'parameters':>14}{'largest difference':>22}{'output std':>14}")
    worst = 0.0
    for width in arguments.widths:
        gap, spread, count = difference(
            width, 64 if width % 64 == 0 else 32, 1024 if width == 320 else 64, arguments.size
        )
        print(f"{width:>6}{count / 1e6:>12.1f} M{gap:>22.2e}{spread:>14.3f}", flush=True)
        worst = max(worst, gap)
    if worst > 1e-5:
        raise SystemExit(f"error: the largest difference is {worst:.2e}, above 1e-5")


if __name__ == "__main__":
    main()
