"""Towers of any kind, what becomes of a picture before them, and the small tower."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from data.files import UserError
from models.config import ImageEncoderConfig
from models.image_encoder import (
    ClipImageEncoder,
    build_image_encoder,
    embed_image,
    fit_random_tower,
    load_image_encoder,
    load_image_encoder_folder,
    preprocess,
    preprocess_open_clip,
)

RECORDED = np.load(Path(__file__).with_name("released_preprocessing.npz"))


@pytest.mark.parametrize(("name", "size"), [("picture", 64), ("big", 300)])
def test_preprocessing_is_the_released_one(name: str, size: int) -> None:
    """Against values that the released code computed (every 7th row and column)."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    image = torch.randn(1, 3, size, size, generator=generator).tanh()
    ours = preprocess(image / 2 + 0.5, 224)[..., ::7, ::7]
    torch.testing.assert_close(ours, torch.from_numpy(RECORDED[name]), atol=2e-5, rtol=1e-5)


def test_tower_tells_objects_apart(tmp_path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(6, 3, 64, 64, generator=generator)
    objects = torch.arange(6).repeat_interleave(5)
    images = (base[objects] + 0.2 * torch.randn(30, 3, 64, 64, generator=generator)).clamp(0, 1)
    torch.manual_seed(0)
    tower = fit_random_tower(images, objects, embed_dim=16)
    fresh = (base + 0.2 * torch.randn(6, 3, 64, 64, generator=generator)).clamp(0, 1)
    with torch.no_grad():
        known, new = embed_image(tower, images), embed_image(tower, fresh)
    assert known.shape == (30, 1, 16)
    centres = torch.stack([known[objects == o].mean(dim=0)[0] for o in range(6)])
    assert torch.cdist(new[:, 0], centres).argmin(dim=1).tolist() == list(range(6))
    tower.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(embed_image(load_image_encoder_folder(tmp_path), fresh), new)


@pytest.mark.parametrize("arch", ["ViT-H-14", "RN50", "coca_ViT-B-32", "ViT-B-16-SigLIP", "convnext_base"])
def test_any_open_clip_architecture(arch: str) -> None:
    with torch.device("meta"):
        encoder = build_image_encoder(ImageEncoderConfig(arch=arch))
        size = encoder.image_size
        pooled = encoder(torch.empty(2, 3, size, size))
    assert isinstance(encoder, ClipImageEncoder)
    assert pooled.shape == (2, 1, open_clip.get_model_config(arch)["embed_dim"]) == (2, 1, encoder.width)


def test_an_unknown_architecture() -> None:
    with pytest.raises(UserError, match="ViT-Z"):
        build_image_encoder(ImageEncoderConfig(arch="ViT-Z"))


@pytest.mark.parametrize(("arch", "count", "width"), [("ViT-H-14", 256, 1280), ("ViT-B-16-SigLIP", 196, 768)])
def test_patch_tokens_at_full_size(arch: str, count: int, width: int) -> None:
    with torch.device("meta"):
        encoder = build_image_encoder(ImageEncoderConfig(arch=arch, tokens="patches"))
        shape = encoder(torch.empty(1, 3, 224, 224)).shape
    assert shape == (1, count, width) and encoder.width == width


@pytest.mark.parametrize("arch", ["RN50", "coca_ViT-B-32", "convnext_base"])
def test_towers_without_patch_tokens_say_so(arch: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=f"{arch}.*no patch tokens"):
        build_image_encoder(ImageEncoderConfig(arch=arch, tokens="patches"))


VISION = {"image_size": 28, "patch_size": 14, "width": 32, "layers": 2, "head_width": 16}


@torch.no_grad()
def test_patch_tokens_are_open_clips() -> None:
    """Against open_clip's own way to return them, with the same weights."""
    encoder = ClipImageEncoder(24, VISION, tokens="patches").eval()
    theirs = _build_vision_tower(24, CLIPVisionCfg(**VISION, output_tokens=True)).eval()
    theirs.load_state_dict(encoder.visual.state_dict())
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    pooled, tokens = theirs(pixels)
    torch.testing.assert_close(encoder(pixels), tokens, atol=1e-6, rtol=1e-5)
    encoder.register_to_config(tokens="pooled")
    torch.testing.assert_close(encoder(pixels)[:, 0], pooled, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("sides", [(300, 300), (100, 331), (451, 120), (40, 30)])
def test_open_clips_preprocessing(mode: str, sides: tuple[int, int]) -> None:
    """Against its own transform of the PIL picture, which rounds to 8 bits once more."""
    cfg = PreprocessCfg(size=64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize_mode=mode, fill_color=127)
    noise = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
    theirs = image_transform_v2(cfg, is_train=False)(picture)
    pixels = torch.from_numpy(np.asarray(picture).astype(np.float32) / 255).permute(2, 0, 1)
    ours = preprocess_open_clip(pixels[None], 64, cfg)[0]
    assert ours.shape == theirs.shape == (3, 64, 64)
    assert float((ours - theirs).abs().max()) <= 2.1 / 255 / 0.5


def test_the_choice_of_preprocessing_is_saved_and_used(tmp_path) -> None:
    encoder = ClipImageEncoder(24, VISION, preprocess="open_clip", preprocess_cfg={"mean": [0.5] * 3, "std": [0.5] * 3})
    encoder.save_pretrained(tmp_path)
    loaded = load_image_encoder_folder(tmp_path)
    images = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = loaded(preprocess_open_clip(images, 28, PreprocessCfg(mean=(0.5,) * 3, std=(0.5,) * 3)))
        assert torch.equal(embed_image(loaded, images), expected)
        other = load_image_encoder(ImageEncoderConfig(weights=str(tmp_path), preprocess="released", tokens="patches"))
        expected = other(preprocess(images, 28, PreprocessCfg(mean=(0.5,) * 3, std=(0.5,) * 3)))
        assert torch.equal(embed_image(other, images), expected) and expected.shape == (2, 4, 32)


def test_each_tags_own_normalisation() -> None:
    with torch.device("meta"):
        siglip = build_image_encoder(ImageEncoderConfig(arch="ViT-B-16-SigLIP", pretrained="webli"))
        clip = build_image_encoder(ImageEncoderConfig())
    assert tuple(siglip.preprocess_cfg.mean) == (0.5, 0.5, 0.5) and siglip.preprocess_cfg.resize_mode == "squash"
    assert clip.preprocess_cfg.mean[0] == pytest.approx(0.48145466)


def test_a_local_open_clip_file(tmp_path) -> None:
    model = open_clip.create_model("RN50", pretrained=None)
    torch.save(model.state_dict(), tmp_path / "rn50.pt")
    save_file({f"module.{n}": t for n, t in model.state_dict().items()}, tmp_path / "rn50.safetensors")
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.eval().encode_image(pixels)
        for name in ("rn50.pt", "rn50.safetensors"):
            config = ImageEncoderConfig(weights=str(tmp_path / name), arch="RN50", pretrained="none")
            encoder = load_image_encoder(config)
            assert torch.equal(encoder(pixels)[:, 0], expected)
    with pytest.raises(UserError, match=r"rn50\.pt is not of model\.image_encoder\.arch=ViT-B-32"):
        load_image_encoder(ImageEncoderConfig(str(tmp_path / "rn50.pt"), "ViT-B-32", "openai"))
    with pytest.raises(
        UserError, match=r"pretrained=laion2b_s32b_b79k is not one of RN50's \(openai, yfcc15m, cc12m\)"
    ):
        load_image_encoder(ImageEncoderConfig(str(tmp_path / "rn50.pt"), "RN50"))
    (tmp_path / "cut.pt").write_bytes((tmp_path / "rn50.pt").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.pt is not a checkpoint"):
        load_image_encoder(ImageEncoderConfig(str(tmp_path / "cut.pt"), "RN50", "openai"))


def test_random_weights_are_keyed_by_the_seed() -> None:
    config = ImageEncoderConfig(arch="ViT-S-32-alt", from_scratch=True)
    a, b, c = (load_image_encoder(config, seed).visual.proj for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
