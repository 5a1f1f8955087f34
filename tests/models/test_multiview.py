"""The multi-view UNet: view folding, EMA, and what must not change when views are permuted."""

from __future__ import annotations

import pytest
import torch

from models.config import EmaConfig, UNetConfig
from models.multiview import MultiViewAttention, build_unet, predict_noise_output, predict_with_references


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


DESIGNS = {
    "paper": EmaConfig(),
    "zero timestep": EmaConfig(timestep="zero"),
    "own camera": EmaConfig(camera="own"),
    "reads itself only": EmaConfig(reads_views=False),
    "coarse only": EmaConfig(downscales=[2]),
    "three references": EmaConfig(references=3, camera="own"),
    "all at once": EmaConfig(2, "zero", "own", False, [1]),
}


def references(ema: EmaConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "references": torch.randn(2, ema.references, 4, 8, 8, generator=generator),
        "reference_camera": torch.randn(2, ema.references, 16, generator=generator),
    }


designs = pytest.mark.parametrize("ema", DESIGNS.values(), ids=DESIGNS.keys())


@designs
@torch.no_grad()
def test_target_views_are_equivariant_under_permutation(unet, ema: EmaConfig) -> None:
    x, given = inputs(), references(ema)
    order = torch.tensor([2, 0, 3, 1])
    straight = predict_with_references(unet, **x, **given, ema=ema)
    permuted = predict_with_references(
        unet, **{**x, "latents": x["latents"][:, order], "camera": x["camera"][:, order]}, **given, ema=ema
    )
    torch.testing.assert_close(permuted, straight[:, order], atol=1e-5, rtol=1e-4)


@designs
@torch.no_grad()
def test_references_inform_the_targets(unet, ema: EmaConfig) -> None:
    x, given = inputs(), references(ema)
    a = predict_with_references(unet, **x, **given, ema=ema)
    b = predict_with_references(unet, **x, **(given | {"references": given["references"] + 1}), ema=ema)
    assert a.shape == x["latents"].shape
    assert (a - b).abs().flatten(2).amax(dim=2).min() > 1e-4


@torch.no_grad()
def test_every_choice_matters(unet) -> None:
    x = inputs()
    outputs = []
    for ema in DESIGNS.values():
        given = {name: tensor[:, : ema.references] for name, tensor in references(EmaConfig(3)).items()}
        outputs.append(predict_with_references(unet, **x, **given, ema=ema))
    for i, first in enumerate(outputs):
        for second in outputs[i + 1 :]:
            assert float((first - second).abs().max()) > 1e-5


@torch.no_grad()
def test_without_references_it_is_multi_view_attention_exactly(unet) -> None:
    x = inputs()
    plain = predict_noise_output(unet, **x)
    for ema in DESIGNS.values():
        none = {name: tensor[:, :0] for name, tensor in references(ema).items()}
        assert torch.equal(predict_with_references(unet, **x, **none, ema=ema), plain)


@torch.no_grad()
def test_references_that_do_not_read_do_not_depend_on_the_views(unet) -> None:
    """Their own prediction, which training cuts off, shows what they have seen."""
    x, given = inputs(), references(EmaConfig())

    def of_reference(ema: EmaConfig, latents: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([latents, given["references"]], dim=1)
        camera = torch.cat([x["camera"], given["reference_camera"]], dim=1)
        return predict_noise_output(unet, joined, x["timesteps"], x["context"], camera, 1, ema)[:, 4:]

    for reads, changes in ((True, True), (False, False)):
        ema = EmaConfig(reads_views=reads)
        difference = (of_reference(ema, x["latents"]) - of_reference(ema, x["latents"] + 1)).abs().max()
        assert (float(difference) > 1e-4) == changes


@torch.no_grad()
def test_levels_that_take_no_part_do_not_mix(unet) -> None:
    """At the full resolution a stranger's tokens must not change the targets' attention; at half they must."""
    attn = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    tokens = torch.randn(5, 64, 32, generator=torch.Generator().manual_seed(2))
    other = torch.cat([tokens[:4], tokens[4:] + 1])
    for downscales, alike in (([2], True), ([1], False), (None, False)):
        keywords = {"num_views": 4, "num_references": 1, "ema": EmaConfig(downscales=downscales), "latent_tokens": 64}
        same = torch.allclose(attn(tokens, **keywords)[:4], attn(other, **keywords)[:4], atol=1e-6)
        assert same == alike


class NaiveAttention:
    """All tokens of an object in one sequence, and a mask that says who reads whom; written out, without folding."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *, num_views, num_references=0, ema=None,
                 latent_tokens=0, **_):  # fmt: skip
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        views, tokens = num_views + num_references, hidden_states.shape[1]
        mask = torch.ones(tokens, context.shape[1], dtype=torch.bool)
        if encoder_hidden_states is None:
            q, k, v = (t.reshape(-1, views * tokens, t.shape[-1]) for t in (q, k, v))
            is_reference = torch.arange(views).repeat_interleave(tokens) >= num_views
            mask = torch.ones(views * tokens, views * tokens, dtype=torch.bool)
            if num_references:
                joins = ema.downscales is None or (latent_tokens // tokens) ** 0.5 in ema.downscales
                mask[~is_reference[:, None] & is_reference] = joins
                mask[is_reference[:, None] & ~is_reference] = joins and ema.reads_views
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(-2)).reshape(hidden_states.shape)


@designs
def test_output_and_gradients_equal_a_naive_concatenation(unet, ema: EmaConfig) -> None:
    x, given = inputs(), references(ema)
    own = x["timesteps"] if ema.timestep == "shared" else torch.zeros_like(x["timesteps"])
    told = given["reference_camera"] if ema.camera == "own" else torch.zeros_like(given["reference_camera"])

    def naive() -> torch.Tensor:
        sample = torch.cat([x["latents"], given["references"]], dim=1)
        times = torch.stack([x["timesteps"]] * 4 + [own] * ema.references, dim=1)
        output = unet(
            sample.flatten(0, 1), times.flatten(), x["context"].repeat_interleave(sample.shape[1], dim=0),
            torch.cat([x["camera"], told], dim=1).flatten(0, 1), return_dict=False,
            cross_attention_kwargs={"num_views": 4, "num_references": ema.references, "ema": ema, "latent_tokens": 64},
        )[0]  # fmt: skip
        return output.unflatten(0, sample.shape[:2])[:, :4]

    results = []
    for processor, call in (
        (MultiViewAttention(), lambda: predict_with_references(unet, **x, **given, ema=ema)), (NaiveAttention(), naive),
    ):  # fmt: skip
        unet.set_attn_processor(processor)
        unet.zero_grad()
        output = call()
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in unet.parameters() if p.grad is not None)])
    unet.set_attn_processor(MultiViewAttention())
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
