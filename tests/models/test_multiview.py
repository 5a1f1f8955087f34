"""The multi-view UNet: view folding, EMA, and what must not change when views are permuted."""

from __future__ import annotations

import pytest
import torch

from models.config import UNetConfig
from models.multiview import build_unet, predict_noise_output, predict_with_reference


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    config = UNetConfig(None, [32, 64], [1, 2], 1, 24, True)
    return build_unet(config, latent_channels=4, latent_size=8).eval()


def inputs(b: int = 2, v: int = 4):
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(b, v, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([37, 811])[:b],
        "context": torch.randn(b, 1, 24, generator=generator),
        "camera": torch.randn(b, v, 16, generator=generator),
    }


def test_full_size_is_mvdreams() -> None:
    with torch.device("meta"):
        unet = build_unet(UNetConfig(), 4, 32)
    assert sum(p.numel() for p in unet.parameters()) == 867_572_164


@torch.no_grad()
def test_views_of_an_object_see_each_other_and_no_other_object(unet) -> None:
    x = inputs()
    whole = predict_noise_output(unet, **x)
    changed = {**x, "latents": x["latents"].clone()}
    changed["latents"][0, 3] += 1
    moved = (predict_noise_output(unet, **changed) - whole).abs().flatten(2).amax(dim=2)
    assert (moved[0] > 1e-4).all(), "every view of object 0 must react to its view 3"
    assert (moved[1] < 1e-6).all(), "object 1 must not"


@torch.no_grad()
def test_one_view_is_the_stock_unet(unet) -> None:
    x = inputs(v=1)
    stock = type(unet).from_config(unet.config).eval()
    stock.load_state_dict(unet.state_dict())
    expected = stock(
        x["latents"][:, 0], x["timesteps"], encoder_hidden_states=x["context"], class_labels=x["camera"][:, 0]
    ).sample
    torch.testing.assert_close(predict_noise_output(unet, **x)[:, 0], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_folding_equals_attention_over_concatenated_views(unet) -> None:
    """Against plain scaled dot-product attention written out for one layer."""
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokens = torch.randn(2 * 4, 5, 32, generator=torch.Generator().manual_seed(2))
    folded = attn(tokens, num_views=4)
    for o in range(2):
        joined = tokens[4 * o : 4 * o + 4].flatten(0, 1)
        q, k, v = attn.to_q(joined), attn.to_k(joined), attn.to_v(joined)
        expected = attn.to_out[0](torch.softmax(q @ k.T / q.shape[-1] ** 0.5, dim=-1) @ v)
        torch.testing.assert_close(folded[4 * o : 4 * o + 4].flatten(0, 1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_target_views_are_equivariant_under_permutation(unet) -> None:
    x = inputs()
    reference = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    order = torch.tensor([2, 0, 3, 1])
    straight = predict_with_reference(unet, **x, reference=reference)
    permuted = predict_with_reference(
        unet,
        **{**x, "latents": x["latents"][:, order], "camera": x["camera"][:, order]},
        reference=reference,
    )
    torch.testing.assert_close(permuted, straight[:, order], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_reference_informs_the_targets(unet) -> None:
    x = inputs()
    reference = torch.zeros(2, 4, 8, 8)
    a = predict_with_reference(unet, **x, reference=reference)
    b = predict_with_reference(unet, **x, reference=reference + 1)
    assert a.shape == x["latents"].shape
    assert (a - b).abs().flatten(2).amax(dim=2).min() > 1e-4
    zero = predict_with_reference(unet, **x, reference=reference, reference_timestep="zero")
    assert (a - zero).abs().max() > 1e-5


def test_reference_gradients_equal_a_naive_concatenation(unet) -> None:
    x = inputs()
    reference = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))

    def gradients(output: torch.Tensor) -> list[torch.Tensor]:
        unet.zero_grad()
        output.square().sum().backward()
        return [p.grad.clone() for p in unet.parameters() if p.grad is not None]

    ours = gradients(predict_with_reference(unet, **x, reference=reference))
    joined = predict_noise_output(
        unet,
        torch.cat([x["latents"], reference[:, None]], dim=1),
        x["timesteps"],
        x["context"],
        torch.cat([x["camera"], torch.zeros(2, 1, 16)], dim=1),
    )
    for a, b in zip(ours, gradients(joined[:, :4]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
