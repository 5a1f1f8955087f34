"""How alike pictures are, beyond models/image_metrics.py: within a mask, by LPIPS, by an image encoder.

Shapes: V views, S pixels a side; pictures (V, 3, S, S) in [0, 1] over white.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from data.files import UserError
from models.image_encoder import ClipImageEncoder, embed_image
from models.image_metrics import PERFECT_DB

Perceptual = Callable[[Tensor, Tensor], Tensor]
BACKBONES = {"alex": ("alexnet", "IMAGENET1K_V1"), "vgg": ("vgg16", "IMAGENET1K_V1")}  # as torchvision names them


def masked_psnr(images: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over the pixels of `mask` (V, S, S) bool alone -> (V,); NaN if it is empty."""
    share = mask.float()[:, None]
    error = ((images - truth).square() * share).sum(dim=(1, 2, 3)) / (3 * share.sum(dim=(1, 2, 3)))
    return (-10 * torch.log10(error.clamp(min=1e-30))).clamp(max=PERFECT_DB)


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """(V, S, S) bool each -> (V,): pixels in both / in either; 1 where neither covers any."""
    both, either = (a & b).sum(dim=(1, 2)), (a | b).sum(dim=(1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def backbone_weights(kind: str, path: str | None) -> dict[str, Tensor]:
    """ImageNet weights of torchvision's network by its names.  UserError where they cannot be had."""
    import torchvision

    if path is None:
        network, weights = BACKBONES[kind]
        try:
            return dict(torchvision.models.get_model_weights(network)[weights].get_state_dict(progress=False))
        except (URLError, OSError) as error:
            raise UserError(
                f"LPIPS: the weights of {kind} cannot be fetched ({getattr(error, 'reason', error)}); give a file as "
                f"lpips_backbone=, torchvision's own or what python -m distill.evaluation.backbone writes"
            ) from None
    if not Path(path).is_file():
        raise UserError(f"lpips_backbone={path} is not a file; it holds torchvision's weights of {BACKBONES[kind][0]}")
    try:
        return load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not what it should be
        raise UserError(f"lpips_backbone={path} is not {kind}'s weights: {str(error).splitlines()[0]}") from None


def load_lpips(kind: str, backbone: str | None) -> Perceptual:
    """LPIPS 0.1 (Zhang et al. 2018) of `kind` alex or vgg, as torchmetrics has it: pictures, truth -> (V,).

    backbone: torchvision's ImageNet weights of that network as a file, of which the convolutions are needed; None
    fetches them, or takes the hub's cache.  UserError where they cannot be had or are another network's.
    """
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    weights = backbone_weights(kind, backbone)
    network = _NoTrainLpips(net=kind, pnet_rand=True)  # type: ignore[arg-type]
    for name, tensor in network.net.named_parameters():  # slice2.3.weight is features.3.weight
        key = f"features.{name.partition('.')[2]}"
        given = weights.get(key) if isinstance(weights, dict) else None
        if not isinstance(given, Tensor) or given.shape != tensor.shape:
            wrong = f"{tuple(given.shape)}, not {tuple(tensor.shape)}" if isinstance(given, Tensor) else "absent"
            raise UserError(f"lpips_backbone={backbone} is not {kind}'s weights: {key} is {wrong}")
        tensor.data.copy_(given)

    @torch.no_grad()
    def measure(images: Tensor, truth: Tensor) -> Tensor:
        return network(images.clamp(0, 1), truth.clamp(0, 1), normalize=True).flatten()

    return measure


@torch.no_grad()
def embeddings(encoder: ClipImageEncoder, images: Tensor) -> Tensor:
    """(V, 3, S, S) -> (V, D) of length 1: the mean over tokens where the encoder gives several."""
    return F.normalize(embed_image(encoder, images).mean(dim=1), dim=-1)


def plain_features(images: Tensor, size: int = 16) -> Tensor:
    """(V, 3, S, S) -> (V, D) of length 1, without an encoder: how much darker than white, in size x size cells."""
    cells = F.adaptive_avg_pool2d(1 - images, size).flatten(1)
    return F.normalize(cells, dim=-1)


def janus_index(features: Tensor, azimuth_deg: Tensor) -> float | None:
    """How alike the front and the sides that should differ are: mean cosine between the view nearest to azimuth 0 and
    those from 90 to 270 degrees.  features (V, D) of length 1.  None without such views.

    An object with two faces has a high one; so has a ball.  It means something beside the ground truth's.
    """
    away = (azimuth_deg + 180) % 360 - 180
    front = away.abs().argmin()
    behind = (away.abs() >= 90) & (torch.arange(len(away)) != front)
    if not bool(behind.any()) or float(away[front].abs()) > 45:
        return None
    return float((features[behind] @ features[front]).mean())
