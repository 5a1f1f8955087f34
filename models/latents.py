"""What the frozen encoders make of an object's pictures, ahead of training, and which encoders those were."""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from models.image_encoder import ClipImageEncoder, embed_image
from models.weights_file import to_bytes

MEMBER = "latents.safetensors"


def encoders_mark(vae: Any, image_encoder: ClipImageEncoder) -> str:
    """32 hexadecimal digits of the SHA-256 of both networks' configurations and weights: stale latents differ in it."""
    digest = hashlib.sha256()
    for network in (vae, image_encoder):
        config = {key: value for key, value in dict(network.config).items() if not key.startswith("_")}
        digest.update(json.dumps(config, sort_keys=True, default=list).encode())
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(to_bytes(tensor.detach().to("cpu", torch.float32)))
    return digest.hexdigest()[:32]


@torch.no_grad()
def encode_object(
    vae: Any, image_encoder: ClipImageEncoder, views: Tensor, references: Tensor, batch: int
) -> tuple[Tensor, Tensor]:
    """views (N, 3, H, W), references (R, 3, H, W) in [0, 1] -> moments (N, 2C, h, w), embeddings (R, T, D).

    moments: unscaled mean and log variance of the autoencoder's posterior, so that training still draws from it.
    """
    weight = next(vae.parameters())
    moments = []
    for part in views.split(batch):
        posterior = vae.encode((part * 2 - 1).to(weight.device, weight.dtype)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu())
    embeddings = [embed_image(image_encoder, part).cpu() for part in references.split(batch)]
    return torch.cat(moments), torch.cat(embeddings)


def described(meta: dict[str, Any], told: dict[str, Any], embedded: list[str]) -> bytes:
    """The object's .json beside its latents.

    embedded: the files whose embeddings there are.  Of the views only what tells them apart, and the cameras are among
    the tensors: reading numbers is most of what reading such a .json would cost.
    """
    views = [{key: view[key] for key in ("file", "role", "ring", "index") if key in view} for view in meta["views"]]
    content = meta | {"views": views, "latents": {**told, "embedded": embedded}}
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def pack_latents(moments: Tensor, embeddings: Tensor, c2w: Tensor, dtype: str) -> tuple[bytes, dict[str, Any]]:
    """The safetensors member, and what the object's .json says of it: where each row lies, and its CRC-32.

    moments (N, 2C, h, w) and c2w (N, 4, 4) of all views, embeddings (R, T, D).  dtype: float16 or float32, as moments
    and embeddings are stored; cameras are float32 always.
    """
    arrays = {"moments": moments.numpy().astype(dtype), "embeddings": embeddings.numpy().astype(dtype),
              "c2w": c2w.numpy().astype("float32")}  # fmt: skip
    content = save(arrays)
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    told = {
        name: {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "offset": begin + header[name]["data_offsets"][0],
            "crc32": [zlib.crc32(np.ascontiguousarray(row).tobytes()) for row in array],
        }
        for name, array in arrays.items()
    }
    return content, told
