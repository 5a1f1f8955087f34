"""Images to views: `python models/sample.py checkpoint=runs/mine/stage2/export image=chair.png out=views`.

Several at once: image=[a.png,b.png], or image=folder.  Writes for each picture `<name>/view_000.png` ..., and for all
`grid.png` (a row each: the picture, then its views by azimuth) and `cameras.json`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf.cli import check, run
from data.files import UserError, atomic_file, require_writable, write_json
from models.config import ReferenceConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


@dataclass
class SampleConfig:
    checkpoint: str = MISSING  # export/ folder of a training run, or a converted checkpoint
    image: Any = MISSING  # a picture, a list of pictures, or a folder of them
    out: str = MISSING  # folder for the views; must not hold views yet
    num_views: int = 4  # equally spaced in azimuth, the first from the front
    azimuths_deg: list[float] | None = None  # instead of num_views: 0 the front, counter-clockwise as seen from above
    image_size: int | None = None  # pixels a side of the views; null: as trained
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    elevations_deg: list[float] = field(default_factory=lambda: [15.0])  # one for all views, or one each
    guidance_scale: float = 5.0  # 1 runs without guidance, in half the time
    guidance_rescale: float = 0.0  # arXiv 2305.08891, eq. 15-16
    steps: int = 50  # of the checkpoint's scheduler
    eta: float = 0.0  # DDIM's share of fresh noise; the released code uses 1
    seed: int = 0  # of the first picture; the next one has the next
    batch: int = 1  # pictures at once
    device: str = "auto"  # auto takes a CUDA device where there is one
    dtype: str = "auto"  # float32, bfloat16; auto is bfloat16 on CUDA, float32 elsewhere

    def __post_init__(self) -> None:
        for name in ("num_views", "steps", "batch"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.dtype in ("auto", "float32", "bfloat16"), f"dtype={self.dtype} must be auto, float32 or bfloat16")
        views = len(self.azimuths_deg) if self.azimuths_deg is not None else self.num_views
        check(views >= 1, "azimuths_deg=[] names no view; leave it out, or name some")
        check(
            len(self.elevations_deg) in (1, views),
            f"elevations_deg={self.elevations_deg} must be one number, or {views}: one for each view",
        )
        check(
            all(-90 < e < 90 for e in self.elevations_deg),
            f"elevations_deg={self.elevations_deg} must lie between -90 and 90",
        )
        check(
            self.image_size is None or self.image_size >= 1,
            f"image_size={self.image_size} must be positive, or null for the size that the model was trained at",
        )
        check(self.steps < 1000, f"steps={self.steps} must be below the schedule's 1000")
        check(
            all(math.isfinite(a) for a in self.azimuths_deg or []), f"azimuths_deg={self.azimuths_deg} must be finite"
        )
        check(self.guidance_scale >= 0, f"guidance_scale={self.guidance_scale} must not be negative")
        for name in ("guidance_rescale", "eta"):
            check(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must lie between 0 and 1")


def pictures(image: Any) -> list[Path]:
    """The files that `image` names.  UserError when there are none, or two of one name."""
    given = [Path(str(one)) for one in (image if isinstance(image, list) else [image])]
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise UserError(f"image={path} holds no pictures ({', '.join(SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    if not found:
        raise UserError("image=[] names no picture")
    names = [path.stem for path in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two pictures are called {twice[0]}; their views would share a folder, so rename one")
    for path in found:
        if not re.fullmatch(r"[^/\0]+", path.stem) or path.stem in ("grid", ".", ".."):
            raise UserError(f"{path}: rename it; its views would be in the way of others")
    return found


def main(config: SampleConfig) -> None:
    paths, out = pictures(config.image), Path(config.out)
    if (out / "cameras.json").exists():
        raise UserError(f"{out} holds views already; choose another out=")
    require_writable(out, needed_mb=16)
    # Imported here, so that --help and wrong values do not wait for them.
    from models.device import choose_device
    from models.reference_image import load_reference_image

    images = [load_reference_image(path, config.reference) for path in paths]
    device, dtype = choose_device(config.device, config.dtype)
    draw(config, paths, images, device, dtype)


def draw(config: SampleConfig, paths: list[Path], images: list[Any], device: Any, dtype: Any) -> None:
    """images: (3, H, W) in [0, 1] for each path."""
    import torch

    from data.cameras import camera_conditioning
    from data.progress import Progress
    from models.checkpoint import load_export
    from models.pipeline import MultiViewPipeline, cameras, require_size

    model = load_export(config.checkpoint, device, dtype)
    try:
        require_size(config.image_size, model.unet, model.vae)
    except ValueError as error:
        raise UserError(f"{config.checkpoint}: {error}") from None
    pipe = MultiViewPipeline(model.unet, model.vae, model.image_encoder, model.scheduler, model.info.camera)
    pipe.set_progress_bar_config(disable=True)
    c2w = cameras(config.azimuths_deg, config.elevations_deg, config.num_views)
    rows = []
    batches = range(0, len(paths), config.batch)
    with Progress("sampling", config.steps * len(batches), "step") as progress:

        def on_step(*_: Any) -> dict[str, Any]:
            progress.update()
            return {}

        for first in batches:
            chosen = range(first, min(first + config.batch, len(paths)))
            context = torch.cat([pipe.encode_image(images[number]) for number in chosen])
            (drawn,) = pipe(
                image_embeds=context,
                azimuths_deg=config.azimuths_deg,
                elevations_deg=config.elevations_deg,
                num_views=config.num_views,
                image_size=config.image_size,
                guidance_scale=config.guidance_scale,
                guidance_rescale=config.guidance_rescale,
                num_inference_steps=config.steps,
                eta=config.eta,
                generator=[torch.Generator().manual_seed(config.seed + number) for number in chosen],
                callback_on_step_end=on_step,
                return_dict=False,
            )
            for number, views in zip(chosen, drawn, strict=True):
                for old in Path(config.out, paths[number].stem).glob("view_*.png"):
                    old.unlink()  # of a run that did not come to its end
                for index, view in enumerate(views):
                    with atomic_file(Path(config.out, paths[number].stem, f"view_{index:03d}.png")) as temporary:
                        view.save(temporary)
                rows.append((images[number], views))
    azimuths = config.azimuths_deg or [360 / config.num_views * number for number in range(config.num_views)]
    save_grid(Path(config.out, "grid.png"), rows, [f"{azimuth:g}°" for azimuth in azimuths])
    described = {
        "convention": model.info.camera,
        "conditioning": camera_conditioning(c2w, model.info.camera).tolist(),
        "c2w": c2w.tolist(),
        "pictures": {path.stem: {"file": str(path), "seed": config.seed + i} for i, path in enumerate(paths)},
    }
    write_json(Path(config.out, "cameras.json"), described)  # last: its presence says that all views are there
    print(f"{config.out}: {len(c2w)} views of {len(paths)} pictures; see {config.out}/grid.png")


def save_grid(path: Path, rows: list[tuple[Any, list[Any]]], titles: list[str]) -> None:
    """rows: a reference (3, H, W) in [0, 1] and its PIL views, whose columns `titles` name."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    side = rows[0][1][0].width
    head = max(side // 8, 10)
    grid = Image.new("RGB", (side * (1 + len(titles)), head + side * len(rows)), "white")
    writing, font = ImageDraw.Draw(grid), ImageFont.load_default(0.7 * head)
    for column, title in enumerate(["reference", *titles]):
        writing.text((column * side + side / 2, head / 2), title, "black", font, anchor="mm")
    for number, (reference, views) in enumerate(rows):
        shown = Image.fromarray((reference.permute(1, 2, 0).numpy() * 255).round().astype("uint8"))
        for column, picture in enumerate([ImageOps.pad(shown, (side, side), color="white"), *views]):
            grid.paste(picture, (column * side, head + number * side))
    with atomic_file(path) as temporary:
        grid.save(temporary)


if __name__ == "__main__":
    run(SampleConfig, "models/sample", main)
