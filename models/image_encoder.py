"""The condition: the CLIP embedding of a picture, by any open_clip image tower."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transform import PreprocessCfg, center_crop_or_pad, merge_preprocess_dict
from torch import Tensor
from torchvision.transforms import InterpolationMode

from data.files import UserError
from models.config import ImageEncoderConfig
from models.folders import class_name, load_network


class ClipImageEncoder(ModelMixin, ConfigMixin):
    """An open_clip image tower: pictures -> what the UNet attends to.

    embed_dim, vision_cfg and quick_gelu as in open_clip's model configurations.  tokens: "pooled", the one projected
    embedding, not L2-normalised (T = 1, D = embed_dim), or "patches", the last layer's normalised patch tokens (D the
    tower's own width).  preprocess: "released" or "open_clip"; preprocess_cfg: open_clip's PreprocessCfg, where it is
    not CLIP's.  ValueError for a tower without patch tokens when they are asked for.
    """

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any],
        quick_gelu: bool = False,
        tokens: str = "pooled",
        preprocess: str = "released",
        preprocess_cfg: dict[str, Any] | None = None,
    ):
        super().__init__()
        if ":" in str(vision_cfg.get("timm_model_name") or ""):
            raise ValueError(f"timm_model_name={vision_cfg['timm_model_name']} would be fetched from elsewhere")
        # Weights come from the file, never from a hub; CoCa's towers would return a pair.
        vision_cfg = vision_cfg | {"timm_model_pretrained": False, "output_tokens": False}
        self.visual = _build_vision_tower(embed_dim, CLIPVisionCfg(**vision_cfg), quick_gelu)
        self.require_choices(tokens, preprocess)

    def require_choices(self, tokens: str, preprocess: str) -> None:
        if tokens not in ("pooled", "patches") or preprocess not in ("released", "open_clip"):
            raise ValueError(f"tokens={tokens} and preprocess={preprocess} are not what an image encoder can do")
        if tokens == "patches" and self.token_width is None:
            raise ValueError(f"tokens=patches: a {type(self.visual).__name__} of this kind gives no patch tokens")

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (N, 3, S, S), normalised -> (N, T, D)."""
        if self.config.tokens == "pooled":
            return self.visual(pixels)[:, None]
        found = self.visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        return found["image_intermediates"][-1]

    @property
    def image_size(self) -> int:
        size = self.config.vision_cfg.get("image_size", 224)
        return size if isinstance(size, int) else size[0]

    @property
    def token_width(self) -> int | None:
        """Width of the patch tokens; None where the tower has none (ResNets, attentional pooling)."""
        if hasattr(self.visual, "trunk"):
            blocks = getattr(self.visual.trunk, "blocks", None)
            return self.visual.trunk.num_features if blocks is not None else None
        if getattr(self.visual, "attn_pool", True) is not None:
            return None
        return int(self.visual.ln_post.normalized_shape[0])

    @property
    def width(self) -> int:
        """D, the width of what `forward` returns."""
        width = self.config.embed_dim if self.config.tokens == "pooled" else self.token_width
        assert width is not None
        return width

    @property
    def preprocess_cfg(self) -> PreprocessCfg:
        return PreprocessCfg(**merge_preprocess_dict(PreprocessCfg(), self.config.preprocess_cfg or {}))


def preprocess(images: Tensor, size: int, cfg: PreprocessCfg | None = None) -> Tensor:
    """images (N, 3, H, W) in [0, 1] -> (N, 3, size, size), normalised, as the released code does it.

    Bicubic with aligned corners, after a Gaussian blur where the picture shrinks (kornia.geometry.resize with
    antialias); no crop, no clamp.  Of `cfg` only mean and standard deviation are used.
    """
    shrink = [max(side / size, 1.0) for side in images.shape[-2:]]
    for dim, factor in zip((2, 3), shrink, strict=True):
        if max(shrink) > 1:
            images = _blur(images, dim, sigma=max((factor - 1) / 2, 0.001))
    resized = F.interpolate(images, size=(size, size), mode="bicubic", align_corners=True)
    return _normalise(resized, cfg or PreprocessCfg())


def preprocess_open_clip(images: Tensor, size: int, cfg: PreprocessCfg) -> Tensor:
    """images (N, 3, H, W) in [0, 1] -> (N, 3, size, size), normalised, as open_clip.transform.image_transform does it.

    resize_mode: "shortest" side to `size` and the centre cropped, "longest" side and the rest filled, or "squash".
    """
    height, width = images.shape[-2:]
    sides = [size]  # torchvision's word for the shorter side
    if cfg.resize_mode != "shortest":
        ratio = max(height, width) / size
        sides = [size, size] if cfg.resize_mode == "squash" else [round(height / ratio), round(width / ratio)]
    resized = TF.resize(images, sides, InterpolationMode(cfg.interpolation), antialias=True).clamp(0, 1)
    return _normalise(center_crop_or_pad(resized, size, fill=cfg.fill_color / 255), cfg)


def _normalise(images: Tensor, cfg: PreprocessCfg) -> Tensor:
    mean, std = (torch.tensor(v, dtype=images.dtype, device=images.device) for v in (cfg.mean, cfg.std))
    return (images - mean[:, None, None]) / std[:, None, None]


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
    """images (N, 3, H, W) in [0, 1] -> context (N, T, D) in fp32; T = 1 for the pooled embedding."""
    weight = next(encoder.parameters())
    if weight.device.type == "meta":
        raise ValueError("the image encoder's weights are offloaded past its own attention; keep it on one device")
    prepare = preprocess if encoder.config.preprocess == "released" else preprocess_open_clip
    pixels = prepare(images.to(weight.device), encoder.image_size, encoder.preprocess_cfg)
    return encoder(pixels.to(weight.dtype)).float()


def count_tokens(encoder: ClipImageEncoder) -> int:
    """T of an encoder that has weights."""
    return embed_image(encoder, torch.zeros(1, 3, encoder.image_size, encoder.image_size)).shape[1]


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
    features = tower(preprocess(images, size))[:, 0].double()
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
    tag = open_clip.get_pretrained_cfg(config.arch, config.pretrained)  # empty for an unknown tag
    own = merge_preprocess_dict({}, tag)
    try:
        return ClipImageEncoder(
            known["embed_dim"],
            copy.deepcopy(known["vision_cfg"]),
            bool(known.get("quick_gelu", False) or tag.get("quick_gelu", False)),
            config.tokens or "pooled",
            config.preprocess or "released",
            {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()} or None,
        )
    except ValueError as error:
        raise UserError(f"model.image_encoder.arch={config.arch}: {error}") from None


def cached_weights(config: ImageEncoderConfig) -> Path | None:
    """open_clip's weights, where they have been fetched from the hub before."""
    from huggingface_hub import try_to_load_from_cache

    repository = open_clip.get_pretrained_cfg(config.arch, config.pretrained).get("hf_hub", "").rstrip("/")
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    found = [try_to_load_from_cache(repository, name) for name in names] if repository else []
    return next((Path(path) for path in found if isinstance(path, str)), None)


def in_cache(config: ImageEncoderConfig) -> bool:
    return cached_weights(config) is not None


def load_image_encoder(config: ImageEncoderConfig, seed: int = 0) -> ClipImageEncoder:
    """Frozen, in fp32: from `config.weights`, random by `seed`, or open_clip's `arch` with the hub's `pretrained`."""
    if config.weights is not None and Path(config.weights).is_file():
        return load_image_encoder_file(config)
    if config.weights is not None:
        return with_choices(load_image_encoder_folder(config.weights), config)
    if config.from_scratch:
        torch.manual_seed(seed)
        return build_image_encoder(config).requires_grad_(False).eval()
    encoder = build_image_encoder(config)
    try:
        donor = open_clip.create_model(config.arch, pretrained=config.pretrained)
    except Exception as error:  # open_clip and the hub raise many kinds; all mean the same to the user
        raise UserError(
            f"model.image_encoder: open_clip {config.arch}/{config.pretrained} cannot be had: {error}; "
            "connect to the hub once, or set model.image_encoder.weights to a local folder or file"
        ) from error
    encoder.visual.load_state_dict(donor.visual.state_dict())
    return encoder.requires_grad_(False).eval()


def load_image_encoder_file(config: ImageEncoderConfig) -> ClipImageEncoder:
    """From open_clip's own checkpoint of `config.arch`, whole (`visual.*` is taken) or of the image tower alone."""
    from models.weights_file import read_weights

    path = Path(str(config.weights))
    tags = open_clip.list_pretrained_tags_by_model(config.arch)
    tag = config.pretrained.lower().replace("-", "_")  # as open_clip reads it
    if (
        tag not in (*(t.lower().replace("-", "_") for t in tags), "none")
        and open_clip.get_model_config(config.arch) is not None
    ):
        raise UserError(
            f"model.image_encoder.pretrained={config.pretrained} is not one of {config.arch}'s ({', '.join(tags)}): it "
            f"tells how the tower in {path} was trained (activation, mean and deviation of colours); give the tag that "
            "was trained alike, or none for open_clip's defaults"
        )
    weights = {name.removeprefix("module."): tensor for name, tensor in read_weights(path).items()}
    if any(name.startswith("visual.") for name in weights):
        weights = {n.removeprefix("visual."): t for n, t in weights.items() if n.startswith("visual.")}
    encoder = build_image_encoder(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.visual.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if differing := sorted(set(wanted.items()) ^ set(found.items())):
        raise UserError(
            f"model.image_encoder.weights={path} is not of model.image_encoder.arch={config.arch}; first difference: "
            f"{differing[0][0]}, which that architecture has as {wanted.get(differing[0][0])} and the file as "
            f"{found.get(differing[0][0])}"
        )
    encoder.visual.load_state_dict(weights)
    return encoder.requires_grad_(False).eval()


def load_image_encoder_folder(folder: str | Path, variant: str | None = None) -> ClipImageEncoder:
    require_image_encoder(folder)
    return load_network(ClipImageEncoder, folder, "image encoder", variant).requires_grad_(False).eval()


def with_choices(encoder: ClipImageEncoder, config: ImageEncoderConfig) -> ClipImageEncoder:
    """`encoder` with what `config` chooses in place of what its folder says."""
    tokens, preprocess = config.tokens or encoder.config.tokens, config.preprocess or encoder.config.preprocess
    try:
        encoder.require_choices(tokens, preprocess)
    except ValueError as error:
        raise UserError(f"model.image_encoder.weights={config.weights}: {error}") from None
    encoder.register_to_config(tokens=tokens, preprocess=preprocess)
    return encoder


def require_image_encoder(folder: str | Path) -> None:
    name = class_name(folder, "image encoder")
    if name != "ClipImageEncoder":
        raise UserError(f"image encoder: {folder} holds {name!r}, not a ClipImageEncoder")
