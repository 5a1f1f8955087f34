"""Score distillation against formulas known by other means."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from distill import sds


def scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=prediction_type)


def test_timesteps_anneal_as_released() -> None:
    ends = {"lowest": [0.98, 0.02], "highest": [0.98, 0.50], "share": 0.8}
    assert sds.timestep_range(0.0, **ends) == (980, 980)
    assert sds.timestep_range(0.4, **ends) == (500, 740)
    assert sds.timestep_range(0.8, **ends) == sds.timestep_range(1.0, **ends) == (20, 500)


def test_ramp_of_the_orientation_weight() -> None:
    assert [sds.ramp(p, (10, 1000), 0.5) for p in (0, 0.25, 0.5, 1)] == [10, 505, 1000, 1000]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_x0_agree_with_diffusers(prediction_type: str) -> None:
    torch.manual_seed(0)
    noise_schedule = scheduler(prediction_type)
    x, noise, output = torch.randn(3, 2, 4, 4, 8, 8).double()
    for t in (20, 500, 980):
        alpha_bar = noise_schedule.alphas_cumprod[t].double()
        noisy = sds.add_noise(x, noise, alpha_bar)
        theirs = noise_schedule.add_noise(x.flatten(0, 1), noise.flatten(0, 1), torch.full((8,), t)).view_as(x)
        assert torch.allclose(noisy, theirs, atol=1e-6)
        x0 = sds.predict_x0(noisy, output, alpha_bar, prediction_type)
        noise_schedule.config.clip_sample = False
        noise_schedule.set_timesteps(1000)
        step = noise_schedule.step(output, t, noisy)
        assert torch.allclose(x0, step.pred_original_sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_gradient_is_the_classical_one(prediction_type: str) -> None:
    """Toy network tanh(k x): d loss / d latents = sqrt((1 - a) / a) (eps' - eps) / (B V), guidance included."""
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    noise = torch.randn_like(latents)
    alpha_bar = scheduler().alphas_cumprod[300].double()
    noisy = sds.add_noise(latents, noise, alpha_bar)
    conditional, unconditional = torch.tanh(0.7 * noisy), torch.tanh(0.4 * noisy)
    target = sds.reconstruction_target(noisy, conditional, unconditional, alpha_bar, prediction_type, 10.0, 0.0)
    sds.reconstruction_loss(latents, target).backward()
    guided = unconditional + 10 * (conditional - unconditional)
    # v = sqrt(a) eps - sqrt(1 - a) x0  =>  eps = sqrt(a) v + sqrt(1 - a) noisy
    epsilon = guided if prediction_type == "epsilon" else alpha_bar.sqrt() * guided + (1 - alpha_bar).sqrt() * noisy
    expected = ((1 - alpha_bar) / alpha_bar).sqrt() * (epsilon - noise) / 8
    assert latents.grad is not None and torch.allclose(latents.grad, expected.detach(), atol=1e-10)


def test_rescaling_is_per_set_and_half_way() -> None:
    torch.manual_seed(0)
    alpha_bar = torch.tensor(0.3, dtype=torch.float64)
    noisy, conditional, unconditional = torch.randn(3, 2, 4, 3, 8, 8, dtype=torch.float64)
    conditional[1] *= 5

    def target(rescale: float) -> torch.Tensor:
        return sds.reconstruction_target(noisy, conditional, unconditional, alpha_bar, "epsilon", 7.0, rescale)

    plain = sds.predict_x0(noisy, conditional, alpha_bar, "epsilon")
    full, half = target(1.0), target(0.5)
    for b in range(2):
        assert float(full[b].std()) == pytest.approx(float(plain[b].std()), rel=1e-6)
    assert torch.allclose(half, (full + target(0.0)) / 2)


def test_perfect_network_gives_no_gradient() -> None:
    latents = torch.randn(1, 4, 3, 8, 8, requires_grad=True)
    noise, alpha_bar = torch.randn(1, 4, 3, 8, 8), torch.tensor(0.5)
    noisy = sds.add_noise(latents, noise, alpha_bar).detach()
    sds.reconstruction_loss(latents, sds.predict_x0(noisy, noise, alpha_bar, "epsilon")).backward()
    assert latents.grad is not None and latents.grad.abs().max() < 1e-6


def test_regularizers() -> None:
    directions = torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    normals = torch.tensor([[-1.0, 0, 0], [0.6, 0.8, 0]], requires_grad=True)  # faces the camera; turns away
    weights = torch.tensor([0.5, 0.25], requires_grad=True)
    loss = sds.orientation_loss(weights, normals, directions, torch.tensor([0.75, 0.0]))
    assert loss.item() == pytest.approx(0.25 * 0.36)
    loss.backward()
    assert weights.grad is None and normals.grad is not None  # visibility is held fixed
    assert float(sds.opaque_loss(torch.tensor([0.0, 1.0]))) < 0.01 < float(sds.opaque_loss(torch.tensor([0.5, 0.5])))
    assert float(sds.sparsity_loss(torch.zeros(3))) == pytest.approx(0.1)
    assert float(sds.depth_variance_loss(torch.tensor([2.0, 9.0]), torch.tensor([0.9, 0.1]))) == pytest.approx(2)
    assert math.isfinite(float(sds.depth_variance_loss(torch.zeros(2), torch.zeros(2))))


def test_the_asynchronous_shift() -> None:
    assert sds.asynchronous_shift(520, 20, 0.1, 0.999) == 49 and sds.asynchronous_shift(520, 20, 0.1, 0.0) == 0
    assert sds.asynchronous_shift(980, 20, 0.5, 0.9) == 19, "not beyond the last timestep"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_asynchronous_score_distillation(prediction_type: str) -> None:
    """No pull where both predictions agree; else by the classical weight against their difference."""
    torch.manual_seed(0)
    x, noise, other = torch.randn(3, 2, 4, 4, 8, 8).double()
    alpha_bar = scheduler().alphas_cumprod[500].double()
    noisy = sds.add_noise(x, noise, alpha_bar)
    perfect = noise if prediction_type == "epsilon" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x
    found = sds.predict_noise(noisy, perfect, alpha_bar, prediction_type)
    torch.testing.assert_close(found, noise)
    assert torch.equal(sds.asynchronous_target(x, found, found, alpha_bar), x)
    latents = x.clone().requires_grad_()
    sds.reconstruction_loss(latents, sds.asynchronous_target(x, noise, other, alpha_bar)).backward()
    torch.testing.assert_close(latents.grad, (1 - alpha_bar) * (noise - other) / 8)
