"""torch.compile of the multi-view UNet: one graph, eager's values and gradients, nothing compiled twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from models.config import EmaConfig, UNetConfig
from models.multiview import build_unet, predict_noise_output, predict_with_references


@pytest.fixture
def unet() -> Iterator[Any]:
    """Attention at the latent's resolution and, in the middle block, at half of it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield build_unet(UNetConfig(None, [32, 64], [1, 2], 1, 24), latent_channels=4, latent_size=8)
    torch._dynamo.reset()


def inputs(seed: int, b: int = 2, v: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(b, v, 4, 8, 8, generator=generator),
        "timesteps": torch.randint(1000, (b,), generator=generator),
        "context": torch.randn(b, 1, 24, generator=generator),
        "camera": torch.randn(b, v, 16, generator=generator),
        "references": torch.randn(b, 1, 4, 8, 8, generator=generator),
        "reference_camera": torch.randn(b, 1, 16, generator=generator),
    }


def predict(unet: Any, x: dict[str, torch.Tensor], ema: EmaConfig | None) -> torch.Tensor:
    if ema is None:
        return predict_noise_output(unet, x["latents"], x["timesteps"], x["context"], x["camera"])
    return predict_with_references(unet, **x, ema=replace(ema))


def gradients(unet: Any, output: torch.Tensor) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    output.square().sum().backward()
    return {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


def assert_equals_eager(unet: Any, ema: EmaConfig | None) -> None:
    """Also with other values, for which the graph that the first ones compiled must do."""
    counters.clear()
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):
        x = inputs(seed)
        ours, expected = predict(compiled, x, ema), predict(unet, x, ema)
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gradients(unet, ours), gradients(unet, expected), atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "ema",
    [
        pytest.param(None, id="views only", marks=pytest.mark.slow),
        pytest.param(EmaConfig(), id="one reference"),
        pytest.param(EmaConfig(reads_views=False), id="reads itself only", marks=pytest.mark.slow),
        pytest.param(EmaConfig(downscales=[2]), id="coarse only", marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_and_equals_eager(unet, ema: EmaConfig | None) -> None:
    assert_equals_eager(unet, ema)


@pytest.mark.slow
def test_compiles_with_gradient_checkpointing(unet) -> None:
    unet.enable_gradient_checkpointing()
    assert_equals_eager(unet.train(), EmaConfig())
