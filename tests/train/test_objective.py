"""The objective: keyed randomness, branches, weights, and a reference that never reaches the loss."""

from __future__ import annotations

import copy

import pytest
import torch

from data.cameras import CONVENTIONS, camera_conditioning, orbit_camera
from data.stream import Batch
from models.autoencoder import fit_patch_codec
from models.checkpoint import make_scheduler
from models.config import EmaConfig, ModelConfig, UNetConfig
from models.image_encoder import ClipImageEncoder
from models.multiview import build_unet
from train.config import ObjectiveConfig
from train.objective import (
    MULTI,
    REFERENCE,
    SINGLE,
    Encoders,
    choose_branch,
    draw,
    encode_batch,
    snr_weight,
    training_loss,
)

LATENT = (6, 4, 4)
EMA_DESIGNS = [
    EmaConfig(),
    EmaConfig(timestep="zero"),
    EmaConfig(camera="own"),
    EmaConfig(reads_views=False),
    EmaConfig(downscales=[2]),
    EmaConfig(references=3, camera="own", reads_views=False),
]


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "head_width": 48}
    codec = fit_patch_codec(torch.rand(20, 3, 32, 32) * 2 - 1, 8, 6).requires_grad_(False)
    unet = build_unet(UNetConfig(None, [32, 64], [1, 2], 1, 24, True), *LATENT[:2])
    return unet, Encoders(codec, ClipImageEncoder(24, vision).requires_grad_(False).eval())


def batch(positions: list[int], references: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(9)
    count = len(positions)
    return Batch(
        images=torch.rand(count, 4, 3, 32, 32, generator=generator) * 2 - 1,
        references=torch.rand(count, references, 3, 32, 32, generator=generator),
        reference_c2w=orbit_camera(torch.arange(references) * 15.0, torch.tensor(5.0), 2.0).expand(count, -1, 4, 4),
        c2w=orbit_camera(torch.arange(4) * 90.0, torch.tensor(10.0), torch.tensor(2.0)).expand(count, 4, 4, 4),
        positions=positions,
        keys=[str(p) for p in positions],
    )


def loss(
    networks,
    branch: str,
    config: ObjectiveConfig | None = None,
    positions=(3, 8),
    prediction="v_prediction",
    ema: EmaConfig = EmaConfig(),  # noqa: B008  never changed
    camera: str = "mvdream",
):
    unet, encoders = networks
    scheduler = make_scheduler(prediction, zero_terminal_snr=prediction == "v_prediction")
    data, model = batch(list(positions), ema.references), ModelConfig(ema=ema, camera=camera)
    return training_loss(unet, encoders, scheduler, data, branch, config or ObjectiveConfig(), model, LATENT, 0)[0]


def test_draws_depend_on_position_alone() -> None:
    config = ObjectiveConfig(condition_dropout=0.5)
    together = draw(config, 0, [5, 6, 7], (4, *LATENT), 1000)
    alone = draw(config, 0, [6], (4, *LATENT), 1000)
    assert torch.equal(together.noise[1], alone.noise[0])
    assert together.timesteps[1] == alone.timesteps[0] and together.drop[1] == alone.drop[0]
    assert not torch.equal(draw(config, 1, [6], (4, *LATENT), 1000).noise, alone.noise)


def test_draws_have_the_right_distribution() -> None:
    config = ObjectiveConfig(condition_dropout=0.25)
    many = draw(config, 0, list(range(4000)), (1, 1, 1, 1), 1000)
    assert abs(float(many.drop.float().mean()) - 0.25) < 0.03
    assert abs(float(many.timesteps.float().mean()) - 499.5) < 20
    assert many.timesteps.min() >= 0 and many.timesteps.max() <= 999
    assert abs(float(many.noise.mean())) < 0.05 and abs(float(many.noise.std()) - 1) < 0.05


def test_branches_are_mixed_as_configured() -> None:
    config = ObjectiveConfig(single_view_probability=0.3, reference_probability=0.5)
    drawn = [choose_branch(config, 0, step) for step in range(4000)]
    for branch, share in ((SINGLE, 0.3), (MULTI, 0.35), (REFERENCE, 0.35)):
        assert abs(drawn.count(branch) / 4000 - share) < 0.03
    assert {choose_branch(ObjectiveConfig(single_view_probability=0), 0, s) for s in range(50)} == {MULTI}


@pytest.mark.parametrize("branch", [SINGLE, MULTI, REFERENCE])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_branch_trains_all_weights_and_repeats(networks, branch, prediction) -> None:
    unet, _ = networks
    unet.zero_grad()
    first = loss(networks, branch, prediction=prediction)
    first.mean().backward()
    assert first.shape == (2,) and torch.isfinite(first).all()
    without = [name for name, p in unet.named_parameters() if p.grad is None]
    assert without == []
    # A single-token context makes cross-attention's queries and keys idle, so only look where a gradient must be.
    assert float(unet.conv_in.weight.grad.abs().sum()) > 0
    torch.testing.assert_close(loss(networks, branch, prediction=prediction), first)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_network_that_knows_the_target_has_no_loss(networks, prediction) -> None:
    """The target is the very noise that was drawn, or the velocity of it; the reference's output is not asked for."""
    _, encoders = networks
    drawn = draw(ObjectiveConfig(), 0, [3, 8], (4, *LATENT), 1000)
    scheduler = make_scheduler(prediction, zero_terminal_snr=prediction == "v_prediction")
    target = drawn.noise
    if prediction == "v_prediction":  # arXiv 2202.00512, appendix D
        latents = encode_batch(encoders.vae, batch([3, 8]), drawn.posterior[:, :4])
        kept = scheduler.alphas_cumprod[drawn.timesteps][:, None, None, None, None]
        target = kept.sqrt() * drawn.noise - (1 - kept).sqrt() * latents

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = torch.nn.Conv2d(1, 1, 1)

        def forward(self, sample, timesteps, cross_attention_kwargs, **_):
            views = cross_attention_kwargs["num_views"] + cross_attention_kwargs["num_references"]
            output = torch.full((2, views, *LATENT), 1e6)  # whatever the network says of the references
            output[:, :4] = target
            return (output.flatten(0, 1),)

    config = ObjectiveConfig(condition_dropout=0)
    for ema in EMA_DESIGNS:
        data = batch([3, 8], ema.references)
        value, _ = training_loss(
            Oracle(), encoders, scheduler, data, REFERENCE, config, ModelConfig(ema=ema), LATENT, 0
        )
        assert value.max() <= (0 if prediction == "epsilon" else 1e-12)


@pytest.mark.parametrize("ema", EMA_DESIGNS)
def test_every_ema_design_trains(networks, ema: EmaConfig) -> None:
    unet, _ = networks
    unet.zero_grad()
    value = loss(networks, REFERENCE, ema=ema)
    value.mean().backward()
    assert torch.isfinite(value).all() and float(unet.conv_in.weight.grad.abs().sum()) > 0


def test_single_views_do_not_see_each_other(networks) -> None:
    unet, encoders = networks
    scheduler = make_scheduler("v_prediction", zero_terminal_snr=True)

    def view_losses(branch: str, changed: bool) -> torch.Tensor:
        data = batch([3])
        if changed:
            data.images[0, 0] *= -1
        seen = []
        handle = unet.register_forward_hook(lambda m, a, out: seen.append(out[0]))
        with torch.no_grad():
            training_loss(unet, encoders, scheduler, data, branch, ObjectiveConfig(), ModelConfig(), LATENT, 0)
        handle.remove()
        return seen[0]

    for branch, alike in ((SINGLE, True), (MULTI, False)):
        difference = (view_losses(branch, False)[1:] - view_losses(branch, True)[1:]).abs().max()
        assert (difference < 1e-6) == alike


@pytest.mark.parametrize("camera", CONVENTIONS)
def test_cameras_are_told_in_the_models_convention(networks, camera: str) -> None:
    unet, _ = networks
    seen = []
    handle = unet.register_forward_pre_hook(lambda m, a, k: seen.append(k["class_labels"]), with_kwargs=True)
    loss(networks, REFERENCE, positions=[3], ema=EmaConfig(camera="own", references=2), camera=camera)
    handle.remove()
    data = batch([3], 2)
    told = torch.cat([camera_conditioning(c2w, camera)[0] for c2w in (data.c2w, data.reference_c2w)])
    assert torch.equal(seen[0], told)


def test_dropped_condition_is_zeros(networks) -> None:
    unet, encoders = networks
    blind = copy.deepcopy(encoders)
    for p in blind.image_encoder.parameters():
        p.zero_()
    everything = ObjectiveConfig(condition_dropout=1.0)
    torch.testing.assert_close(loss((unet, encoders), MULTI, everything), loss((unet, blind), MULTI, everything))


def test_min_snr_weights() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.1])  # SNR 9, 1, 1/9
    assert snr_weight(alphas, None, "epsilon").tolist() == [1, 1, 1]
    torch.testing.assert_close(snr_weight(alphas, 5.0, "epsilon"), torch.tensor([5 / 9, 1.0, 1.0]))
    torch.testing.assert_close(snr_weight(alphas, 5.0, "v_prediction"), torch.tensor([0.5, 0.5, 0.1]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_object_by_its_timestep(networks, prediction) -> None:
    alphas = make_scheduler(prediction, zero_terminal_snr=prediction == "v_prediction").alphas_cumprod
    timesteps = draw(ObjectiveConfig(), 0, [3, 8], (4, *LATENT), 1000).timesteps
    weighed = loss(networks, MULTI, ObjectiveConfig(min_snr_gamma=0.5), prediction=prediction)
    plain = loss(networks, MULTI, prediction=prediction)
    torch.testing.assert_close(weighed, plain * snr_weight(alphas, 0.5, prediction)[timesteps])
    assert not torch.allclose(weighed, plain)


def test_offset_noise_is_the_same_for_all_pixels_of_a_view_and_channel() -> None:
    shape, positions = (4, 6, 8, 8), list(range(100))
    plain, offset = (draw(ObjectiveConfig(offset_noise=size), 0, positions, shape, 1000).noise for size in (0, 0.1))
    added = offset - plain
    torch.testing.assert_close(added, added[..., :1, :1].expand_as(added), atol=1e-6, rtol=0)
    assert abs(float(added[..., 0, 0].std()) - 0.1) < 0.005


def test_draws_made_ahead_are_those_made_on_the_spot(networks) -> None:
    unet, encoders = networks
    scheduler, config = make_scheduler("epsilon", zero_terminal_snr=False), ObjectiveConfig()
    ahead = batch([3, 8])
    ahead.drawn = draw(config, 0, [3, 8], (4, *LATENT), 1000)
    given = (MULTI, config, ModelConfig(), LATENT, 0)
    values = [training_loss(unet, encoders, scheduler, data, *given)[0] for data in (ahead, batch([3, 8]))]
    assert torch.equal(*values)
