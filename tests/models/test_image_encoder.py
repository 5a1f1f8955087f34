"""Pictures from outside, the released preprocessing, and the small tower."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.files import UserError
from models.config import ImageEncoderConfig
from models.image_encoder import (
    ClipImageEncoder,
    build_image_encoder,
    embed_image,
    fit_random_tower,
    load_image_encoder_folder,
    load_reference_image,
    preprocess,
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


def test_any_open_clip_architecture() -> None:
    with torch.device("meta"):
        encoder = build_image_encoder(ImageEncoderConfig())
        assert isinstance(encoder, ClipImageEncoder) and encoder.image_size == 224
        assert encoder(torch.empty(1, 3, 224, 224)).shape == (1, 1024)
    with pytest.raises(UserError, match="ViT-Z"):
        build_image_encoder(ImageEncoderConfig(arch="ViT-Z"))


def test_reference_is_composited_on_white(tmp_path) -> None:
    rgba = np.zeros((16, 16, 4), dtype=np.uint8)
    rgba[:8] = (255, 0, 0, 255)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = load_reference_image(tmp_path / "a.png")
    assert image.shape == (3, 16, 16)
    assert image[:, 0, 0].tolist() == [1, 0, 0] and image[:, 15, 15].tolist() == [1, 1, 1]


def test_what_is_no_picture(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_reference_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("I am no picture")
    with pytest.raises(UserError, match=r"text\.png is not a picture"):
        load_reference_image(tmp_path / "text.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"cut\.png"):
        load_reference_image(tmp_path / "cut.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    with pytest.raises(UserError, match="too small"):
        load_reference_image(tmp_path / "dot.png")
    Image.new("L", (20000, 8)).save(tmp_path / "long.png")
    with pytest.raises(UserError, match="20000"):
        load_reference_image(tmp_path / "long.png")
    Image.new("CMYK", (32, 32)).save(tmp_path / "cmyk.jpg")
    assert load_reference_image(tmp_path / "cmyk.jpg").shape == (3, 32, 32)
