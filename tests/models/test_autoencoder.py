"""The small codec answers as AutoencoderKL does, and PCA is what it claims."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from data.files import UserError
from models.autoencoder import decode_latents, encode_images, fit_patch_codec, load_autoencoder


def pictures(count: int = 24) -> torch.Tensor:
    """Smooth random pictures (N, 3, 32, 32) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=True).clamp(-1, 1)


def test_codec_is_pca_of_patches() -> None:
    images = pictures()
    errors = []
    for channels in (4, 8, 16):
        codec = fit_patch_codec(images, 8, channels)
        latents = encode_images(codec, images)
        assert latents.shape == (24, channels, 4, 4)
        assert abs(float(latents.var()) - 1) < 0.05
        decoded = decode_latents(codec, latents) * 2 - 1
        errors.append(float((decoded - images).square().mean()))
    patches = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2).flatten(0, 1)
    centred = patches - patches.mean(dim=0)
    residual = torch.linalg.svdvals(centred)[16:].square().sum() / patches.numel()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < float(residual) + 2e-4, "16 components must come near the best rank-16 reconstruction"


def test_both_autoencoders_answer_alike(tmp_path) -> None:
    kl = AutoencoderKL(block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
                       up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4)  # fmt: skip
    for name, model, shape in (("kl", kl, (2, 4, 16, 16)), ("codec", fit_patch_codec(pictures(), 8, 6), (2, 6, 4, 4))):
        model.save_pretrained(tmp_path / name)
        loaded = load_autoencoder(tmp_path / name)
        images = pictures(2).requires_grad_()
        latents = encode_images(loaded, images, sample=False)
        assert latents.shape == shape
        latents.sum().backward()
        assert images.grad is not None and images.grad.abs().sum() > 0, "SDS needs gradients through the encoder"
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            again = [encode_images(loaded, images, noise=noise) for _ in range(2)]
            assert torch.equal(*again)
            decoded = decode_latents(loaded, latents)
        assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1


def test_what_is_no_autoencoder(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "os.system"}')
    with pytest.raises(UserError, match=r"os\.system"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "PatchCodec"}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_autoencoder(tmp_path)
