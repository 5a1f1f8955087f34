"""The small autoencoder and image encoder for machines without pretrained weights, fitted to shards in seconds.

python models/small.py shards=runs/demo/shards out=runs/demo/parts
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from conf.cli import check, run
from data.files import UserError, atomic_folder, require_writable
from data.progress import Progress


@dataclass
class SmallConfig:
    shards: str = "shards"  # folder with manifest.json
    out: str = "parts"  # gets vae/ and image_encoder/
    image_size: int = 64  # pixels a side
    patch_size: int = 16  # pixels per latent cell and side
    latent_channels: int = 64
    embed_dim: int = 64  # width of the image embedding
    max_objects: int = 256  # more add nothing to a fit this small
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "latent_channels", "embed_dim", "max_objects"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.embed_dim <= 192, f"embed_dim={self.embed_dim} must be at most 192, the width of the small encoder")
        check(
            self.image_size % self.patch_size == 0,
            f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}",
        )


def main(config: SmallConfig) -> None:
    # Imported here, so that --help and a wrong configuration do not wait for them.
    import torch

    from data.stream import ViewDataset, views_of
    from models.autoencoder import decode_latents, encode_images, fit_patch_codec
    from models.image_encoder import fit_random_tower

    out = Path(config.out)
    require_writable(out)
    dataset = ViewDataset(config.shards, config.image_size, 1, config.seed)
    views, references, objects = [], [], []
    count = min(config.max_objects, len(dataset))
    with Progress("reading", count, "object") as progress:
        for number in range(count):
            with dataset.open(number) as stored:
                ring = [(view, stored.image(view)) for view in views_of(stored.meta, "ring")]
                # References are front views, and so is half of each ring.
                shown = [stored.image(view) for view in views_of(stored.meta, "reference")]
            views += [image for _, image in ring]
            shown += [image for view, image in ring if torch.deg2rad(torch.tensor(view["azimuth_deg"])).cos() >= 0]
            references += shown
            objects += [number] * len(shown)
            progress.update()
    if not views or not references:
        raise UserError(f"{config.shards}: its objects have no ring views or no reference views; render them again")
    images = torch.stack(views) * 2 - 1
    torch.manual_seed(config.seed)
    vae = fit_patch_codec(images, config.patch_size, config.latent_channels)
    with torch.no_grad():
        error = (decode_latents(vae, encode_images(vae, images)) - torch.stack(views)).square().mean()
    image_encoder = fit_random_tower(torch.stack(references), torch.tensor(objects), embed_dim=config.embed_dim)
    for name, part in (("vae", vae), ("image_encoder", image_encoder)):
        with atomic_folder(out / name) as temporary:
            part.save_pretrained(temporary)
    print(
        f"codec: {-10 * math.log10(float(error)):.1f} dB on {len(views)} views; wrote {out}/vae and {out}/image_encoder"
    )


if __name__ == "__main__":
    run(SmallConfig, "models/small", main)
