"""The VAE's oracle is the released network, and the parity command finds ours equal to the oracles at small widths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from ldm_oracle import VaeOracle, ddim
from released_values import FOLDER, draw, released_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from data.cameras import camera_conditioning, orbit_camera
from models.checkpoint import make_scheduler
from models.multiview import MultiViewAttention, predict_noise_output
from models.released import UNET
from models.sampling import sample_latents

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import parity


def test_the_vae_oracle_is_the_released_network() -> None:
    recorded = load_file(FOLDER / "released_w32.safetensors")
    prefix = "first_stage_model."
    oracle = VaeOracle({n.removeprefix(prefix): t for n, t in released_checkpoint().items() if n.startswith(prefix)})
    latents = oracle.encode(draw("image", (1, 3, 32, 32)).tanh())
    assert parity.largest(latents, recorded["latent_mode_scaled"]) < 1e-5
    assert parity.largest(oracle.decode(draw("latent", (1, 4, 4, 4))), recorded["decoded"]) < 1e-5


def test_the_vae_of_another_picture_size() -> None:
    rows = list(parity.vae_rows(32, 6))
    assert [row.part for row in rows] == ["VAE encode", "VAE decode"]
    assert max(row.difference for row in rows) < 1e-5, rows


def test_the_unet_and_ddim() -> None:
    """Guidance 10 multiplies the rounding of two networks by up to 19: the oracle's fp32 is not within 1e-5 either."""
    rows = list(parity.unet_rows(32, 8, 3, [1.0, 10.0]))
    assert [row.part for row in rows] == ["UNet", "DDIM, 3 steps, guidance 1", "DDIM, 3 steps, guidance 10"]
    assert max(row.difference for row in rows[:2]) < 1e-5, rows
    assert parity.within(rows[2]), rows


@torch.no_grad()
def test_guidance_and_ddim_with_one_network_on_both_sides() -> None:
    """What the sampler adds to the network's own rounding: nothing."""
    unet = parity.converted("unet", parity.ldm_weights(UNET, 32), 32)
    unet.set_attn_processor(MultiViewAttention())
    scheduler = make_scheduler("epsilon", False)
    noise, context = draw("x", (1, 4, 4, 8, 8)), draw("context", (1, 1, 48))
    c2w = orbit_camera(torch.arange(4) * 90.0, torch.tensor(15.0), 1.0)[None]
    contexts, cameras = torch.cat([context, torch.zeros_like(context)]), camera_conditioning(c2w).repeat(2, 1, 1)

    def guided(x: Tensor, timestep: int) -> Tensor:
        both = predict_noise_output(unet, torch.stack([x, x]), torch.tensor([timestep] * 2), contexts, cameras)
        return both[1] + 10 * (both[0] - both[1])

    expected = ddim(guided, noise[0], scheduler.alphas_cumprod, 3)
    ours = sample_latents(unet, scheduler, context, c2w, guidance_scale=10.0, steps=3, latents=noise, latent_size=8)[0]
    assert parity.largest(ours, expected) < 1e-5


def test_the_image_encoder() -> None:
    (row,) = parity.image_encoder_rows("ViT-S-32")
    assert row.width == 384 and row.spread > 0.5 and row.difference < 1e-5, row


def test_the_command_fails_where_it_must(monkeypatch, capsys) -> None:
    arguments = ["--widths", "--vae-widths", "32", "--towers", "--size", "4"]
    parity.main(arguments)
    scaled = parity.encode_images
    monkeypatch.setattr(parity, "encode_images", lambda *a, **k: scaled(*a, **k) * (1 + 1e-3))
    with pytest.raises(SystemExit, match=r"VAE encode differs by .* above rounding"):
        parity.main(arguments)
    assert "from float64" in capsys.readouterr().out
