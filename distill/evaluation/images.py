"""How alike pictures are, beyond models/image_metrics.py: within a mask, by LPIPS, by an image encoder.

Shapes: V views, S pixels a side; pictures (V, 3, S, S) in [0, 1] over white.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor

from data.files import UserError
from models.image_encoder import ClipImageEncoder, embed_image
from models.image_metrics import PERFECT_DB

Perceptual = Callable[[Tensor, Tensor], Tensor]
BACKBONES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}  # as torchvision's hub names them


def masked_psnr(images: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB over the pixels of `mask` (V, S, S) bool alone -> (V,); NaN if it is empty."""
    share = mask.float()[:, None]
    error = ((images - truth).square() * share).sum(dim=(1, 2, 3)) / (3 * share.sum(dim=(1, 2, 3)))
    return (-10 * torch.log10(error.clamp(min=1e-30))).clamp(max=PERFECT_DB)


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """(V, S, S) bool each -> (V,): pixels in both / in either; 1 where neither covers any."""
    both, either = (a & b).sum(dim=(1, 2)), (a | b).sum(dim=(1, 2))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def load_lpips(kind: str, backbone: str | None) -> Perceptual:
    """LPIPS 0.1 (Zhang et al. 2018) of `kind` alex or vgg, as torchmetrics has it: pictures, truth -> (V,).

    backbone: torchvision's ImageNet weights of that network as a file; None fetches them, or takes the hub's cache.
    UserError where they cannot be had or are another network's.
    """
    from torchmetrics.functional.image.lpips import _NoTrainLpips

    kept = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        if backbone is not None:
            if not Path(backbone).is_file():
                raise UserError(
                    f"lpips_backbone={backbone} is not a file; it is what torchvision calls {BACKBONES[kind]}"
                )
            Path(folder, "checkpoints").mkdir()
            Path(folder, "checkpoints", BACKBONES[kind]).symlink_to(Path(backbone).resolve())
            torch.hub.set_dir(folder)
        try:
            network = _NoTrainLpips(net=kind)  # type: ignore[arg-type]
        except (URLError, OSError) as error:
            raise UserError(
                f"LPIPS: the weights of {kind} cannot be fetched ({getattr(error, 'reason', error)}); give a file as "
                f"lpips_backbone=.../{BACKBONES[kind]}"
            ) from None
        except Exception as error:  # torch raises many kinds for a file that is not what it should be
            raise UserError(
                f"lpips_backbone={backbone} is not {kind}'s weights: {str(error).splitlines()[0]}"
            ) from None
        finally:
            torch.hub.set_dir(kept)

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
