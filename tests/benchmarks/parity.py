"""How far our networks are from the released ones' mathematics, up to full width: `python tests/benchmarks/parity.py`.

For each width a random ldm checkpoint is made and converted as models/convert.py does it.  Ours runs on what came out;
the other side is tests/models/ldm_oracle.py on the ldm tensors themselves, and for the image encoder open_clip's own
model of that architecture.  All in fp32, on the CPU.  Where an output's size or guidance lifts fp32's own rounding
above the bound, the oracle runs in float64 too, and ours is to be as near to it as the oracle in fp32, within a factor
of two.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "models")]

import open_clip  # noqa: E402
from ldm_oracle import Oracle, VaeOracle, ddim  # noqa: E402
from released_values import FOLDER, draw, fill  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from data.cameras import camera_conditioning, orbit_camera  # noqa: E402
from models.autoencoder import encode_images  # noqa: E402
from models.checkpoint import make_scheduler  # noqa: E402
from models.convert import Settings, map_part  # noqa: E402
from models.ldm_parts import empty  # noqa: E402
from models.multiview import MultiViewAttention, predict_noise_output  # noqa: E402
from models.released import IMAGE_ENCODER, PREFIXES, UNET, VAE  # noqa: E402
from models.sampling import sample_latents  # noqa: E402

BOUND = 1e-5
VIEWS = 4


class Row(NamedTuple):
    """A line of the table; all differences are the largest absolute ones, in fp32."""

    part: str
    width: int
    parameters: int
    difference: float
    spread: float  # the expected output's standard deviation
    from_exact: tuple[float, float] | None  # ours and the oracle, from the oracle in float64; where above the bound


class Cast(UserDict[str, Tensor]):
    """Tensors of another type, made when they are asked for: a whole network in float64 may not fit."""

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype):
        super().__init__(tensors)
        self.dtype = dtype

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).to(self.dtype)


def largest(a: Tensor, b: Tensor) -> float:
    """a, b of any one shape -> the largest absolute difference."""
    assert a.shape == b.shape
    return float((a - b).abs().max())


def compared(
    part: str, width: int, weights: dict[str, Tensor], ours: Tensor, oracle: Callable[[torch.dtype], Tensor]
) -> Row:
    """ours of any shape, and the oracle's output of the same shape when it computes in the given type."""
    expected = oracle(torch.float32)
    assert ours.dtype == expected.dtype == torch.float32
    difference, exact = largest(ours, expected), None
    if difference > BOUND:
        truth = oracle(torch.float64)
        exact = largest(ours, truth), largest(expected, truth)
    return Row(part, width, sum(t.numel() for t in weights.values()), difference, float(expected.std()), exact)


def ldm_weights(prefix: str, width: int, context: int = 48) -> dict[str, Tensor]:
    """Random tensors by their released names: the recorded network of width 32, made `width` wide."""
    recorded = json.loads((FOLDER / "released_w32_names.json").read_text())

    def side(length: int) -> int:
        if length == recorded["context"]:
            return context
        return length * width // recorded["width"] if length >= recorded["width"] else length

    shapes = {name: tuple(map(side, shape)) for name, shape in recorded["tensors"].items() if name.startswith(prefix)}
    return {name: fill(name, shape) for name, shape in shapes.items()}


def converted(name: str, weights: dict[str, Tensor], head_dim: int = 64) -> Any:
    """Our network `name` ("unet", "vae", "image_encoder") on the tensors of an ldm checkpoint."""
    part = map_part(name, PREFIXES[name], weights, Settings(head_dim), None)
    assert not part.missing and not part.unexpected
    network = empty(part)
    network.load_state_dict(part.tensors, assign=True)
    return network.eval().requires_grad_(False)


def bare(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


@torch.no_grad()
def unet_rows(width: int, size: int, steps: int, guidances: list[float]) -> Iterator[Row]:
    """One prediction for four views, and whole DDIM runs from given noise; the latents are `size` a side."""
    head_dim, context = 64 if width % 64 == 0 else 32, 1024 if width == 320 else 64
    weights = ldm_weights(UNET, width, context)
    unet, tensors = converted("unet", weights, head_dim), bare(weights, UNET)
    unet.set_attn_processor(MultiViewAttention())
    x, camera = draw("x", (VIEWS, 4, size, size)), draw("camera", (VIEWS, 16))
    embedding, times = draw("context", (1, 1, context)), torch.tensor([611])

    def predicted(dtype: torch.dtype) -> Tensor:
        oracle, contexts = Oracle(Cast(tensors, dtype), head_dim), embedding.to(dtype).expand(VIEWS, -1, -1)
        return oracle(x.to(dtype), times.expand(VIEWS), contexts, camera.to(dtype), VIEWS)

    ours = predict_noise_output(unet, x[None], times, embedding, camera[None])[0]
    yield compared("UNet", width, weights, ours, predicted)

    alphas = load_file(FOLDER / "released_w32.safetensors")["alphas_cumprod"]
    c2w = orbit_camera(torch.arange(VIEWS) * 360.0 / VIEWS, torch.tensor(15.0), 1.0)[None]
    poses = camera_conditioning(c2w)[0]

    def sampled(dtype: torch.dtype, guidance: float) -> Tensor:
        oracle = Oracle(Cast(tensors, dtype), head_dim)
        predict = guided(oracle, embedding.to(dtype), poses.to(dtype), guidance)
        return ddim(predict, x.to(dtype), alphas.to(dtype), steps)

    for scale in guidances:
        ours = sample_latents(
            unet, make_scheduler("epsilon", False), embedding, c2w, guidance_scale=scale, steps=steps, latents=x[None],
            latent_size=size,
        )[0]  # fmt: skip
        part = f"DDIM, {steps} steps, guidance {scale:g}"
        yield compared(part, width, weights, ours, partial(sampled, guidance=scale))


def guided(oracle: Oracle, embedding: Tensor, camera: Tensor, scale: float) -> Callable[[Tensor, int], Tensor]:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6): (x (V, C, h, w), timestep) -> epsilon (V, C, h, w).

    embedding (1, 1, D), zeros for the unconditional network; camera (V, 16).
    """

    def predict(x: Tensor, timestep: int) -> Tensor:
        times, context = torch.full((len(x),), timestep), embedding.expand(len(x), -1, -1)
        conditional = oracle(x, times, context, camera, len(x))
        if scale == 1:
            return conditional
        unconditional = oracle(x, times, torch.zeros_like(context), camera, len(x))
        return unconditional + scale * (conditional - unconditional)

    return predict


@torch.no_grad()
def vae_rows(width: int, size: int) -> Iterator[Row]:
    """A picture to the posterior's mean, scaled, and latents, `size` a side, to a picture that is not clamped."""
    weights = ldm_weights(VAE, width)
    vae, tensors = converted("vae", weights), bare(weights, VAE)
    image, latents = draw("image", (1, 3, 8 * size, 8 * size)).tanh(), draw("latent", (1, 4, size, size))
    ours = encode_images(vae, image, sample=False)
    yield compared("VAE encode", width, weights, ours, lambda d: VaeOracle(Cast(tensors, d)).encode(image.to(d)))
    ours = vae.decode(latents / vae.config.scaling_factor).sample
    yield compared("VAE decode", width, weights, ours, lambda d: VaeOracle(Cast(tensors, d)).decode(latents.to(d)))


@torch.no_grad()
def image_encoder_rows(arch: str) -> Iterator[Row]:
    """The configuration that the shapes tell, against open_clip's own of that name, on the same tensors."""
    with torch.device("meta"):
        visual = open_clip.create_model(arch, device="meta").visual.eval()
    weights = {IMAGE_ENCODER + name: fill(name, tuple(t.shape)) for name, t in visual.state_dict().items()}
    visual.load_state_dict(bare(weights, IMAGE_ENCODER), assign=True)
    encoder = converted("image_encoder", weights)
    pixels = draw("pixels", (2, 3, encoder.image_size, encoder.image_size))
    ours = encoder(pixels).flatten(1)
    width = encoder.config.vision_cfg["width"]
    yield compared(f"image encoder {arch}", width, weights, ours, lambda d: visual.to(d)(pixels.to(d)))


def main(argv: list[str] | None = None) -> None:
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of towers without pretrained weights
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128, 320], help="of the UNet and DDIM; 320: full")
    parser.add_argument("--vae-widths", type=int, nargs="*", default=[32, 128], help="128: full")
    parser.add_argument("--towers", nargs="*", default=["ViT-S-32", "ViT-H-14"], help="open_clip architectures")
    parser.add_argument("--size", type=int, default=32, help="latent size")
    parser.add_argument("--steps", type=int, default=3, help="of DDIM")
    parser.add_argument("--guidances", type=float, nargs="*", default=[1.0, 10.0], help="of DDIM")
    arguments = parser.parse_args(argv)
    print(f"{'part':<30}{'width':>6}{'parameters':>14}{'largest difference':>22}{'output std':>14}")
    works = [unet_rows(width, arguments.size, arguments.steps, arguments.guidances) for width in arguments.widths]
    works += [vae_rows(width, arguments.size) for width in arguments.vae_widths]
    works += [image_encoder_rows(arch) for arch in arguments.towers]
    failed = []
    for row in (row for rows in works for row in rows):
        print(line(row), flush=True)
        if not within(row):
            failed.append(row)
    if failed:
        worst = max(failed, key=lambda row: row.difference)
        raise SystemExit(f"error: {worst.part} differs by {worst.difference:.2e}, above {BOUND:.0e} and above rounding")


CEILING = 2e-4  # even where the oracle rounds as much


def within(row: Row) -> bool:
    """Within the bound, or as near to the exact result as the oracle's own rounding."""
    if row.from_exact is None:
        return row.difference <= BOUND
    ours, oracle = row.from_exact
    return ours <= 2 * oracle and row.difference <= CEILING


def line(row: Row) -> str:
    """The row as printed; with the difference as a share of the output where its scale is far from 1."""
    text = f"{row.part:<30}{row.width:>6}{row.parameters / 1e6:>12.1f} M{row.difference:>22.2e}{row.spread:>14.3f}"
    if not 0.5 <= row.spread <= 2:
        text += f"   {row.difference / row.spread:.1e} of the std"
    if row.from_exact is not None:
        text += "   from float64: ours {:.2e}, the oracle {:.2e}".format(*row.from_exact)
    return text


if __name__ == "__main__":
    main()
