"""Latents and embeddings ahead of training: `accelerate launch data/precompute.py shards=shards out=latents ...`.

Every process takes its share of the shards; a killed run goes on from the shards that it had finished.  Training takes
`data.shards=latents` like any shards, and refuses latents of other encoders than its own.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf.cli import check, run
from data.files import UserError, read_json, require_writable, write_json
from data.shards import Shard
from data.sources import CacheConfig, ShardFolder
from models.config import AutoencoderConfig, ImageEncoderConfig, autoencoder_of, image_encoder_of


@dataclass
class PrecomputeConfig:
    shards: str = MISSING  # folder that data/pack.py wrote, or one on a server
    out: str = MISSING  # folder for the shards of latents
    image_size: int = 256  # pixels a side that the pictures are scaled to before they are encoded: training's
    init_from: str | None = None  # checkpoint folder that gives the networks, as in training
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    dtype: str = "float16"  # of what is stored; float32 takes twice the room
    precision: str = "fp32"  # that the autoencoder computes in: fp32 or bf16
    batch: int = 16  # pictures at once
    device: str = "auto"  # auto: this process's CUDA device, where there is one
    cache: CacheConfig = field(default_factory=CacheConfig)

    def __post_init__(self) -> None:
        for name in ("image_size", "batch"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.dtype in ("float16", "float32"), f"dtype={self.dtype} must be float16 or float32")
        check(self.precision in ("fp32", "bf16"), f"precision={self.precision} must be fp32 or bf16")


@dataclass
class Task:
    """What one shard of latents is made with."""

    config: PrecomputeConfig
    dataset: Any
    vae: Any
    image_encoder: Any
    mark: str  # of everything that its content depends on but the shard


def main(config: PrecomputeConfig) -> None:
    out, folder = Path(config.out), ShardFolder(config.shards, config.cache)
    require_writable(out)
    # Imported here, so that --help and wrong values do not wait for them.
    import torch

    from data.packing import Manifest, Packed, finished_shard, remove_temporary, write_manifest
    from data.processes import die_with_parent
    from data.progress import Progress
    from data.shards import mark
    from data.stream import ViewDataset
    from models.autoencoder import downscale_of
    from models.latents import encoders_mark

    die_with_parent()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dataset = ViewDataset(folder, config.image_size, 1, seed=0)
    if dataset.manifest.kind != "views":
        raise UserError(f"shards={config.shards} are {dataset.manifest.kind} already; give shards of views")
    vae, image_encoder = networks(config)
    if config.image_size % downscale_of(vae):
        raise UserError(f"image_size={config.image_size} must be a multiple of the autoencoder's {downscale_of(vae)}")
    encoders = encoders_mark(vae, image_encoder)
    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    vae = vae.to(device_of(config), kind)
    task = Task(config, dataset, vae, image_encoder.to(device_of(config)), "")
    if rank == 0:
        require_same(out, encoders, config)
    shards = dataset.manifest.shards
    marks = [
        mark(f"{encoders} {config.image_size} {config.dtype} {config.precision} {s.sha256}".encode()) for s in shards
    ]
    mine = [i for i in range(rank, len(shards), world) if finished_shard(out / shards[i].name, marks[i]) is None]
    objects = sum(len(shards[i].keys) for i in mine)
    with Progress(f"precompute {rank + 1}/{world}", objects, "object") as progress:
        for index in mine:
            task.mark = marks[index]
            encode_shard(task, index, out / shards[index].name, progress)
    if rank != 0:
        return
    done: list[Packed | None] = [None]
    while None in done:  # the others'; a launcher ends this process when one of them fails
        done = [finished_shard(out / shard.name, marks[i]) for i, shard in enumerate(shards)]
        time.sleep(0.5 if None in done else 0)
    remove_temporary(out)  # what killed runs left; nobody is writing any more
    found = [present(one.shard, shard) for one, shard in zip(done, shards, strict=True) if one is not None]
    latents = [shard for shard in found if shard.keys]
    if not latents:
        raise UserError(f"shards={config.shards}: every object is damaged; copy the shards again")
    cameras = dataset.manifest.cameras
    manifest = Manifest(config.image_size, cameras, latents, "latents", encoders)
    write_manifest(out, manifest)
    lost = dataset.manifest.count - manifest.count
    print(f"{out}: latents of {manifest.count} objects" + (f"; {lost} damaged ones are left out" if lost else ""))


def present(latents: Shard, views: Shard) -> Shard:
    """The shard of latents without the objects that have left the shard of views since, being rendered again."""
    wanted = set(sources_of(views))
    rows = [n for n, source in enumerate(latents.sources) if source in wanted]
    columns = ("keys", "offsets", "sizes", "marks", "sources")
    kept: Any = {name: [getattr(latents, name)[n] for n in rows] for name in columns}
    return replace(latents, **kept)


def sources_of(views: Shard) -> list[str]:
    return [f"{mark}.{key}" for mark, key in zip(views.marks, views.keys, strict=True)]


def networks(config: PrecomputeConfig) -> tuple[Any, Any]:
    """Autoencoder and image encoder, frozen, in fp32 on the CPU."""
    from models.autoencoder import load_autoencoder
    from models.image_encoder import load_image_encoder

    autoencoder, image_encoder = config.autoencoder, config.image_encoder
    if config.init_from is not None:
        autoencoder = autoencoder_of(config.init_from, autoencoder)
        image_encoder = image_encoder_of(config.init_from, image_encoder)
    if autoencoder.weights is None:
        raise UserError("autoencoder.weights is not set; give a vae folder, or init_from=<checkpoint folder>")
    return load_autoencoder(autoencoder.weights), load_image_encoder(image_encoder)


def device_of(config: PrecomputeConfig) -> str:
    import torch

    if config.device != "auto":
        return config.device
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def require_same(out: Path, encoders: str, config: PrecomputeConfig) -> None:
    """UserError when `out` holds latents of other networks or another size."""
    if not (out / "manifest.json").is_file():
        return
    found = read_json(out / "manifest.json", "latents")
    for key, value in (("kind", "latents"), ("encoders", encoders), ("resolution", config.image_size)):
        if not isinstance(found, dict) or found.get(key) != value:
            raise UserError(f"{out} holds other latents ({key} is not {value}); choose another out=")


def encode_shard(task: Task, index: int, path: Path, progress: Any) -> None:
    """The shard's latents, under its name; damaged objects are named and left out."""
    from data.packing import Packed, sidecar, write_tar

    def samples() -> Any:
        shard = task.dataset.manifest.shards[index]
        first = int(task.dataset.starts[0][index])
        for row, source in enumerate(sources_of(shard)):
            sample = encoded_sample(task, first + row)
            progress.update()
            if sample is not None:
                yield sample, source

    written = write_tar(path, samples())
    write_json(sidecar(path), {"task": task.mark, **asdict(Packed(written, task.dataset.manifest.cameras))})


def encoded_sample(task: Task, number: int) -> dict[str, Any] | None:
    import torch

    from data.shards import DamagedSample
    from models.latents import MEMBER, described, encode_object, pack_latents

    try:
        with task.dataset.open(number) as stored:
            meta = stored.meta
            pictures = {view["file"]: stored.image(view) for view in meta["views"]}
    except DamagedSample as error:
        print(f"left out: {error}", flush=True)
        return None
    embedded = [view["file"] for view in meta["views"] if view["role"] in ("reference", "eval_reference")]
    moments, embeddings = encode_object(
        task.vae,
        task.image_encoder,
        torch.stack(list(pictures.values())),
        torch.stack([pictures[name] for name in embedded]),
        task.config.batch,
    )
    c2w = torch.tensor([view["c2w"] for view in meta["views"]])
    content, told = pack_latents(moments, embeddings, c2w, task.config.dtype)
    return {"__key__": meta["uid"], MEMBER: content, "json": described(meta, told, embedded)}


if __name__ == "__main__":
    run(PrecomputeConfig, "data/precompute", main)
