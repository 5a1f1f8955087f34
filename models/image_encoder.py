"""The condition: one CLIP embedding of the reference picture, and how a picture from outside becomes its input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.files import UserError
from models.config import ImageEncoderConfig
from models.folders import class_name, load_network

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # others start programs (EPS) or are no pictures of objects
MAX_SIDE = 16384  # pixels; a larger picture is refused before it is decoded


class ClipImageEncoder(ModelMixin, ConfigMixin):
    """An open_clip image tower: pictures -> pooled, projected embedding, not L2-normalised.

    embed_dim and vision_cfg as in open_clip's model configurations.
    """

    @register_to_config
    def __init__(self, embed_dim: int, vision_cfg: dict[str, Any], quick_gelu: bool = False):
        super().__init__()
        if ":" in str(vision_cfg.get("timm_model_name") or ""):
            raise ValueError(f"timm_model_name={vision_cfg['timm_model_name']} would be fetched from elsewhere")
        vision_cfg = vision_cfg | {"timm_model_pretrained": False}  # weights come from the file, never from a hub
        self.visual = _build_vision_tower(embed_dim, CLIPVisionCfg(**vision_cfg), quick_gelu)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S), CLIP-normalised -> (N, D)."""
        return self.visual(pixels)

    @property
    def image_size(self) -> int:
        size = self.config.vision_cfg.get("image_size", 224)
        return size if isinstance(size, int) else size[0]


def preprocess(images: Tensor, size: int) -> Tensor:
    """images (N, 3, H, W) in [0, 1] -> (N, 3, size, size), CLIP-normalised, as the released code does it.

    Bicubic with aligned corners, after a Gaussian blur where the picture shrinks (kornia.geometry.resize with
    antialias); no crop, no clamp.
    """
    shrink = [max(side / size, 1.0) for side in images.shape[-2:]]
    for dim, factor in zip((2, 3), shrink, strict=True):
        if max(shrink) > 1:
            images = _blur(images, dim, sigma=max((factor - 1) / 2, 0.001))
    resized = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True)
    mean, std = (torch.tensor(v, dtype=images.dtype, device=images.device) for v in (CLIP_MEAN, CLIP_STD))
    return (resized - mean[:, None, None]) / std[:, None, None]


def _blur(images: Tensor, dim: int, sigma: float) -> Tensor:
    """Gaussian along dimension 2 or 3 with mirrored borders; kernel of 4 sigma, odd, at least 3 (kornia's choice)."""
    width = int(max(4 * sigma, 3)) | 1
    offset = torch.arange(width, dtype=images.dtype, device=images.device) - width // 2
    kernel = torch.exp(-offset.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, *((width, 1) if dim == 2 else (1, width)))
    half = width // 2
    padded = F.pad(images, (0, 0, half, half) if dim == 2 else (half, half, 0, 0), mode="reflect")
    return F.conv2d(padded, kernel.expand(images.shape[1], 1, *kernel.shape[2:]), groups=images.shape[1])


def embed_image(encoder: ClipImageEncoder, images: Tensor) -> Tensor:
    """images (N, 3, H, W) in [0, 1] -> context (N, 1, D) in fp32."""
    weight = next(encoder.parameters())
    pixels = preprocess(images.to(weight.device), encoder.image_size)
    return encoder(pixels.to(weight.dtype)).float()[:, None]


@torch.no_grad()
def fit_random_tower(
    images: Tensor, objects: Tensor, size: int = 64, width: int = 192, layers: int = 2, embed_dim: int = 64
) -> ClipImageEncoder:
    """A small tower for machines without pretrained weights: random features, projected so that objects stand apart.

    images (N, 3, H, W) in [0, 1], objects (N,) int: which object each shows.  Fisher's linear discriminant in closed
    form: the final norm's bias removes the features' mean, and the projection whitens the spread between pictures of
    the same object (shrunk towards its mean), then takes the principal components, scaled to unit mean variance.
    Random features alone would give all pictures almost the same embedding.
    """
    vision = {
        "image_size": size,
        "patch_size": 8,
        "width": width,
        "layers": layers,
        "head_width": 48,
        "pool_type": "avg",
    }
    tower = ClipImageEncoder(embed_dim, vision)
    visual = tower.visual
    visual.proj.data = torch.eye(width)
    features = tower(preprocess(images, size)).double()
    mean = features.mean(dim=0)
    centres = torch.stack([features[objects == o].mean(dim=0) for o in objects.unique()])
    within = features - centres[torch.unique(objects, return_inverse=True)[1]]
    spread, axes = torch.linalg.eigh(within.T @ within / len(within))
    spread = 0.95 * spread.clamp(min=0) + 0.05 * spread.mean()
    whiten = axes @ torch.diag(spread.rsqrt()) @ axes.T
    white = (features - mean) @ whiten
    _, singular, basis = torch.linalg.svd(white, full_matrices=True)
    scale = (singular[:embed_dim].square().sum() / len(white) / min(embed_dim, len(singular))).sqrt()
    visual.ln_post.bias.sub_(mean.float())
    visual.proj.data = (whiten @ basis[:embed_dim].T / scale).float()
    return tower.requires_grad_(False).eval()


def build_image_encoder(config: ImageEncoderConfig) -> ClipImageEncoder:
    """The architecture of `config.arch` with random weights, on torch's current default device."""
    known = open_clip.get_model_config(config.arch)
    if known is None or "vision_cfg" not in known:
        raise UserError(
            f"model.image_encoder.arch={config.arch} is not an open_clip architecture; see open_clip.list_models()"
        )
    return ClipImageEncoder(known["embed_dim"], copy.deepcopy(known["vision_cfg"]), known.get("quick_gelu", False))


def in_cache(config: ImageEncoderConfig) -> bool:
    """Whether open_clip's weights have been fetched from the hub before."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.pretrained import get_pretrained_cfg

    repository = get_pretrained_cfg(config.arch, config.pretrained).get("hf_hub", "").rstrip("/")
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return bool(repository) and any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)


def load_image_encoder(config: ImageEncoderConfig) -> ClipImageEncoder:
    """Frozen, in fp32: from `config.weights`, or open_clip's `arch` with the hub's `pretrained` weights."""
    if config.weights is not None:
        return load_image_encoder_folder(config.weights)
    encoder = build_image_encoder(config)
    try:
        donor = open_clip.create_model(config.arch, pretrained=config.pretrained)
    except Exception as error:  # open_clip and the hub raise many kinds; all mean the same to the user
        raise UserError(
            f"model.image_encoder: open_clip {config.arch}/{config.pretrained} cannot be had: {error}; "
            "connect to the hub once, or set model.image_encoder.weights to a local folder"
        ) from error
    encoder.visual.load_state_dict(donor.visual.state_dict())
    return encoder.requires_grad_(False).eval()


def load_image_encoder_folder(folder: str | Path) -> ClipImageEncoder:
    require_image_encoder(folder)
    return load_network(ClipImageEncoder, folder, "image encoder").requires_grad_(False).eval()


def require_image_encoder(folder: str | Path) -> None:
    name = class_name(folder, "image encoder")
    if name != "ClipImageEncoder":
        raise UserError(f"image encoder: {folder} holds {name!r}, not a ClipImageEncoder")


def load_reference_image(path: str | Path) -> Tensor:
    """A picture file -> (3, H, W) in [0, 1], composited on white.  UserError for what is not a picture."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"image {path} does not exist")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if max(picture.size) > MAX_SIDE:
                raise UserError(f"image {path} is {picture.width} x {picture.height}; scale it below {MAX_SIDE} a side")
            if min(picture.size) < 8:
                raise UserError(
                    f"image {path} is {picture.width} x {picture.height} pixels: too small to show an object"
                )
            return picture_to_tensor(picture)
    except UserError:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"image {path} is not a picture that can be read ({error}); give a PNG, JPEG or WebP") from None


def picture_to_tensor(picture: Image.Image) -> Tensor:
    """-> (3, H, W) in [0, 1], composited on white."""
    rgba = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    return torch.from_numpy(composite_on_white(rgba)).permute(2, 0, 1).contiguous()


def composite_on_white(rgba: np.ndarray) -> np.ndarray:
    """(..., 4) float in [0, 1], straight alpha -> (..., 3)."""
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + (1 - alpha)
