"""A picture from outside, made what the image encoder was trained on: one object on white."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data.files import UserError
from models.config import ReferenceConfig

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # others start programs (EPS) or are no pictures of objects
MAX_SIDE, MAX_MEGAPIXELS = 16384, 150  # a larger picture is refused before it is decoded
LARGE = 2048  # pixels a side; what is larger is shrunk, since encoders look at a few hundred
OPAQUE = 8 / 255  # alpha below this is background


def load_reference_image(path: str | Path, config: ReferenceConfig | None = None) -> Tensor:
    """A picture file -> (3, H, W) in [0, 1], composited on white.  UserError for what is not a picture.

    `config` says whether the object is cut out first, and whether it is centred.
    """
    config = config or ReferenceConfig()
    picture = read_picture(Path(path))
    pixels = np.asarray(on_white(picture))
    blank = bool((pixels == pixels[0, 0]).all())
    if blank:
        print(f"note: {path} is of one colour throughout: there is no object in it to see")
    if has_alpha(picture):
        pass
    elif config.matting:
        picture = cut_out(picture, config.matting_model)
    elif config.background == "refuse" and not (blank or white_border(picture)):
        raise UserError(
            f"image {path} has a background, which the embedding would see too, and the model knows objects on white "
            "alone; cut the object out (transparent or white around it), give reference.matting=true (pip install "
            "'.[matting]'), or reference.background=keep to take it as it is"
        )
    if config.fill is not None:
        picture = centred(picture, config.fill, path)
    return picture_to_tensor(picture)


SCALE_IT = f"scale it to at most {MAX_SIDE} pixels a side and {MAX_MEGAPIXELS} megapixels"


def read_picture(path: Path, whole: bool = False) -> Image.Image:
    """RGBA, upright, at most LARGE a side, or `whole` as it is.  UserError: not a picture, or too small or large."""
    if path.is_dir():
        raise UserError(f"image {path} is a folder; give it alone, as image=, to take all pictures in it")
    if not path.is_file():
        raise UserError(f"image {path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_MEGAPIXELS is our own limit
            opened = Image.open(path, formats=FORMATS)
        with opened as picture:
            if max(picture.size) > MAX_SIDE or picture.width * picture.height > MAX_MEGAPIXELS * 1e6:
                raise UserError(f"image {path} is too large: {picture.width} x {picture.height}; {SCALE_IT}")
            if min(picture.size) < 8:
                raise UserError(
                    f"image {path} is {picture.width} x {picture.height} pixels: too small to show an object"
                )
            if getattr(picture, "n_frames", 1) > 1:
                print(f"note: {path} is animated; its first frame is taken")
            eight_bits = in_eight_bits(picture)
            return ImageOps.exif_transpose(eight_bits if whole else shrunk(eight_bits)).convert("RGBA")
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"image {path} is too large ({error}); {SCALE_IT}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {path} is not a picture that can be read ({error}); give a PNG, JPEG or WebP") from None


def in_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey of 16 bits, which Pillow's own conversion would clip at 255.  ValueError for grey of unknown range."""
    if picture.mode == "F":
        raise ValueError("its greys are floating-point numbers")
    if not picture.mode.startswith("I"):
        return picture
    upright = np.asarray(ImageOps.exif_transpose(picture), dtype=np.float32)
    return Image.fromarray((upright / 257).round().clip(0, 255).astype(np.uint8))


def shrunk(picture: Image.Image) -> Image.Image:
    if max(picture.size) <= LARGE:
        return picture
    plain = picture.mode in ("L", "RGB", "CMYK") and "transparency" not in picture.info
    small = picture if plain else picture.convert("RGBA")
    small.thumbnail((LARGE, LARGE))
    return small


def has_alpha(picture: Image.Image) -> bool:
    """Whether an RGBA picture is cut out: a few stray pixels that are not quite opaque do not make it so."""
    return bool((np.asarray(picture.getchannel("A")) < 250).mean() > 1e-3)


def on_white(picture: Image.Image) -> Image.Image:
    """RGBA -> RGB."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def white_border(picture: Image.Image) -> bool:
    """Whether most of the outermost pixels are nearly white; the object may touch the edges."""
    rgb = np.asarray(on_white(picture)).min(axis=2)
    border = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    return bool((border >= 240).mean() > 0.7)


def cut_out(picture: Image.Image, model: str) -> Image.Image:
    """The object of a picture without alpha, by a network of rembg's.  UserError when it cannot be had.

    model: a name that rembg knows (it fetches the weights once), or an .onnx file of U2-Net's inputs and outputs.
    """
    try:
        session = matting_session(model)
        import rembg

        mask: Any = rembg.remove(on_white(picture), session=session, only_mask=True)
    except (ImportError, SystemExit) as error:  # rembg ends the process when it finds no onnxruntime
        raise UserError(
            f"reference.matting=true needs rembg ({error}); pip install '.[matting]' in this repository, or give a "
            "picture with a transparent background"
        ) from None
    except Exception as error:  # onnxruntime, the download and rembg raise many kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"reference.matting_model={model} cannot be used ({reason}); connect to the network once, give an .onnx "
            "file, or a picture with a transparent background"
        ) from None
    result = picture.copy()
    result.putalpha(mask.convert("L").resize(picture.size))
    return result


@functools.cache
def matting_session(model: str) -> Any:
    """The network, loaded once for all pictures."""
    # numba would compile pymatting for a minute or more at its first import, and of rembg only the mask is taken.
    with environment("NUMBA_DISABLE_JIT", "1"):
        import rembg
    if not model.endswith(".onnx"):
        return rembg.new_session(model)
    with environment("U2NET_HOME", str(Path(model).resolve().parent)):  # rembg opens nothing outside its own folder
        return rembg.new_session("u2net_custom", model_path=str(Path(model).resolve()))


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def centred(picture: Image.Image, fill: float, path: str | Path = "the picture") -> Image.Image:
    """RGBA -> a square RGBA picture whose object's longer side takes `fill` of it, in the middle.

    The object is what is not transparent or, in a picture without alpha, not nearly white.
    """
    if has_alpha(picture):
        solid = np.asarray(picture.getchannel("A")) > OPAQUE * 255
    else:
        solid = np.asarray(on_white(picture)).min(axis=2) < 240
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    if not len(rows):
        raise UserError(f"image {path} shows nothing but background, so there is nothing to centre")
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    cropped = picture.crop(box)
    side = max(round(max(cropped.size) / fill), 8)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(cropped, ((side - cropped.width) // 2, (side - cropped.height) // 2))
    return square


def picture_to_tensor(picture: Image.Image) -> Tensor:
    """-> (3, H, W) in [0, 1], composited on white."""
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    return torch.from_numpy(composite_on_white(rgba)).permute(2, 0, 1).contiguous()


def composite_on_white(rgba: np.ndarray) -> np.ndarray:
    """(..., 4) float in [0, 1], straight alpha -> (..., 3)."""
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + (1 - alpha)
