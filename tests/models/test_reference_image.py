"""Pictures from outside: what is none, compositing, cutting out, centring."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conf.cli import ConfigError
from data.files import UserError
from models.config import ReferenceConfig
from models.reference_image import centred, cut_out, has_alpha, load_reference_image


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


def disc(tmp_path, background: tuple[int, int, int], alpha: bool = False):
    """A dark red disc of radius 10 about (30, 20), in 100 x 60."""
    y, x = np.mgrid[:60, :100]
    inside = (x - 30) ** 2 + (y - 20) ** 2 <= 100
    rgb = np.where(inside[..., None], (120, 0, 0), background).astype(np.uint8)
    if alpha:
        rgb = np.concatenate([rgb, np.where(inside, 255, 0)[..., None].astype(np.uint8)], axis=2)
    path = tmp_path / "disc.png"
    Image.fromarray(rgb).save(path)
    return path


@pytest.mark.parametrize("alpha", [False, True])
def test_centring(tmp_path, alpha: bool) -> None:
    path = disc(tmp_path, (255, 255, 255), alpha)
    image = load_reference_image(path, ReferenceConfig(fill=0.5))
    assert image.shape == (3, 42, 42)
    rows = torch.nonzero((image[1] < 0.5).any(dim=1))[:, 0]
    columns = torch.nonzero((image[1] < 0.5).any(dim=0))[:, 0]
    for found in (rows, columns):
        assert len(found) == 21 and abs(int(found[0] + found[-1]) - 41) <= 1
    assert load_reference_image(path).shape == (3, 60, 100)


def test_nothing_to_centre(tmp_path) -> None:
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    with pytest.raises(UserError, match=r"white\.png shows nothing"):
        load_reference_image(tmp_path / "white.png", ReferenceConfig(fill=0.8))
    with pytest.raises(ConfigError, match=r"reference\.fill=1\.5"):
        ReferenceConfig(fill=1.5)
    with pytest.raises(ConfigError, match=r"reference\.matting_model=elsewhere"):
        ReferenceConfig(matting_model="elsewhere")  # rembg has models that send the picture away


def matting_network(path) -> None:
    """An .onnx file with U2-Net's inputs and outputs, which takes what is red for the object."""
    from onnx import TensorProto, helper, numpy_helper, save

    weights = numpy_helper.from_array(np.array([5, -5, 0], np.float32).reshape(1, 3, 1, 1), "w")
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 320, 320])
    result = helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1, 1, 320, 320])
    nodes = [helper.make_node("Conv", ["input", "w"], ["redness"]), helper.make_node("Sigmoid", ["redness"], ["mask"])]
    graph = helper.make_graph(nodes, "red", [given], [result], [weights])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))


def test_cutting_out(tmp_path, capsys) -> None:
    """rembg and onnxruntime themselves; only the network is a small one."""
    matting_network(tmp_path / "red.onnx")
    path = disc(tmp_path, (0, 90, 90))
    config = ReferenceConfig(matting=True, matting_model=str(tmp_path / "red.onnx"))
    image = load_reference_image(path, config)
    assert image[:, 20, 30].tolist() == pytest.approx([120 / 255, 0, 0], abs=0.02)
    assert image[:, 50, 80].tolist() == pytest.approx([1, 1, 1], abs=0.02)
    assert load_reference_image(path, ReferenceConfig(True, config.matting_model, 0.5)).shape[1] < 50
    # What is transparent already is not cut out again.
    whole = load_reference_image(disc(tmp_path, (0, 90, 90), alpha=True), ReferenceConfig(True, "none.onnx"))
    assert whole[:, 50, 80].tolist() == [1, 1, 1]


def test_a_background_is_refused_with_the_ways_out(tmp_path, capsys) -> None:
    with pytest.raises(UserError, match=r"disc\.png has a background.*cut .*reference\.matting=true.*background=keep"):
        load_reference_image(disc(tmp_path, (0, 90, 90)))
    kept = load_reference_image(disc(tmp_path, (0, 90, 90)), ReferenceConfig(background="keep"))
    assert kept[:, 0, 0].tolist() == pytest.approx([0, 90 / 255, 90 / 255])
    load_reference_image(disc(tmp_path, (250, 250, 250)))
    load_reference_image(disc(tmp_path, (0, 90, 90), alpha=True))
    assert capsys.readouterr().out == ""
    with pytest.raises(ConfigError, match=r"reference\.background=blur"):
        ReferenceConfig(background="blur")


def test_an_object_that_reaches_the_edges_is_no_background(tmp_path) -> None:
    cropped = Image.new("RGB", (40, 40), "white")
    cropped.paste((120, 0, 0), (0, 10, 40, 20))
    cropped.save(tmp_path / "cropped.png")
    assert load_reference_image(tmp_path / "cropped.png").shape == (3, 40, 40)


def test_greys_of_16_bits_keep_their_range(tmp_path) -> None:
    grey = np.full((32, 32), 65535, dtype=np.uint16)
    grey[8:24, 8:24] = 128 * 257
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert load_reference_image(tmp_path / "grey.png")[:, 16, 16].tolist() == pytest.approx([128 / 255] * 3)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "grey.tif")
    with pytest.raises(UserError, match=r"grey\.tif .*floating-point"):
        load_reference_image(tmp_path / "grey.tif")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_large_pictures_are_shrunk(tmp_path, mode: str) -> None:
    large = Image.new("RGB", (5000, 2500), "white")
    large.paste((120, 0, 0), (2000, 1000, 3000, 1500))
    large.convert(mode).save(tmp_path / "large.png")
    image = load_reference_image(tmp_path / "large.png")
    assert image.shape == (3, 1024, 2048)
    assert image[:, 512, 1024].tolist() == pytest.approx([120 / 255, 0, 0], abs=0.01) and float(image[:, 0].min()) == 1


def test_cutting_out_without_what_it_needs(tmp_path, monkeypatch) -> None:
    picture = Image.new("RGBA", (32, 32))
    with pytest.raises(UserError, match=r"matting_model=.*none\.onnx cannot be used"):
        cut_out(picture, str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(UserError, match=r"text\.onnx cannot be used"):
        cut_out(picture, str(tmp_path / "text.onnx"))
    monkeypatch.setitem(sys.modules, "rembg", None)  # as where the extra is not installed
    with pytest.raises(UserError, match=r"pip install '\.\[matting\]'"):
        cut_out(picture, "u2net")


def test_a_stray_transparent_pixel_hides_nothing() -> None:
    """Its hidden colour is not the picture's: an object of 40 pixels stays all there is to centre."""
    picture = Image.new("RGBA", (200, 200), "white")
    picture.paste((200, 30, 30, 255), (20, 20, 60, 60))
    picture.putpixel((199, 199), (0, 0, 0, 0))
    assert not has_alpha(picture)
    assert centred(picture, 0.8).size == (50, 50)


def test_odd_pictures_get_a_word(tmp_path, capsys) -> None:
    for colour in ("white", "black"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{colour}.png")
        assert load_reference_image(tmp_path / f"{colour}.png").shape == (3, 32, 32)
        assert f"{colour}.png is of one colour throughout" in capsys.readouterr().out
    Image.new("RGBA", (32, 32), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    load_reference_image(tmp_path / "clear.png")
    assert "clear.png is of one colour throughout" in capsys.readouterr().out
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].paste("green", (8, 8, 20, 20))
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    first = load_reference_image(tmp_path / "moving.gif", ReferenceConfig(background="keep"))
    assert "moving.gif is animated; its first frame is taken" in capsys.readouterr().out
    assert first[0, 0, 0] > 0.9 and first[1, 12, 12] > 0.4
    for size, words in (
        ((1, 1), "is 1 x 1 pixels: too small"),
        ((12500, 12500), r"is too large: 12500 x 12500; scale it to at most .* 150 megapixels"),
        ((20000, 20000), "is too large .*at most 16384 pixels a side and 150 megapixels"),
    ):
        Image.new("1", size).save(tmp_path / "size.png")
        with pytest.raises(UserError, match=words):
            load_reference_image(tmp_path / "size.png")
