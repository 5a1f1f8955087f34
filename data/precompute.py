"""Latents and embeddings ahead of training: `accelerate launch data/precompute.py shards=shards out=latents ...`.

Every process takes its share of the shards; a killed run goes on from the shards that it had finished.  Training takes
`data.shards=latents` like any shards, and refuses latents of other encoders than its own.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf.cli import check, run
from data.files import UserError, read_json, require_writable, write_json
from data.packing import sidecar
from data.processes import die_with_parent
from data.shards import Manifest, Shard
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
    max_damaged: float = 0.01  # share of the objects that may be left out, being damaged; more is an error

    def __post_init__(self) -> None:
        check(0 <= self.max_damaged <= 1, f"max_damaged={self.max_damaged} must lie between 0 and 1")
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
    die_with_parent()
    out, folder = Path(config.out), ShardFolder(config.shards, config.cache)
    require_writable(out)
    # Imported here, so that --help and wrong values do not wait for them.
    import torch

    from data.packing import Packed, finished_shard, remove_temporary, write_manifest
    from data.processes import locked
    from data.progress import Progress
    from data.shards import mark
    from data.stream import ViewDataset
    from models.autoencoder import downscale_of
    from models.latents import encoders_mark

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
    require_same(out, folder, encoders, config)
    shards = dataset.manifest.shards
    marks = [
        mark(f"{encoders} {config.image_size} {config.dtype} {config.precision} {s.sha256}".encode()) for s in shards
    ]
    # Named by content, so that the shards that a manifest names are never written again.
    paths = [out / f"{Path(s.name).stem}-{m[:8]}.tar" for s, m in zip(shards, marks, strict=True)]
    there = [finished_shard(path, m) for path, m in zip(paths, marks, strict=True)]
    mine = [i for i in range(rank, len(shards), world) if there[i] is None]
    with locked(out) if rank == 0 else contextlib.nullcontext():
        if rank == 0:  # those from which objects had to be left out, which may have been mended since
            mine += [i for i, one in enumerate(there) if one and len(one.shard.keys) < len(shards[i].keys)]
        objects = sum(len(shards[i].keys) for i in mine)
        with Progress(f"precompute {rank + 1}/{world}", objects, "object") as progress:
            for index in mine:
                task.mark = marks[index]
                encode_shard(task, index, paths[index], progress)
        if rank != 0:
            return
        done: list[Packed | None] = [None]
        while None in done:  # the others'; a launcher ends this process when one of them fails
            done = [finished_shard(path, m) for path, m in zip(paths, marks, strict=True)]
            time.sleep(0.5 if None in done else 0)
        remove_temporary(out)  # what killed runs left; nobody is writing any more
        found = [present(one.shard, shard) for one, shard in zip(done, shards, strict=True) if one is not None]
        manifest = Manifest(
            config.image_size, dataset.manifest.cameras, [one for one in found if one.keys], "latents", encoders
        )
        lost = dataset.manifest.count - manifest.count
        if lost > config.max_damaged * dataset.manifest.count:
            raise UserError(
                f"shards={config.shards}: {lost} of {dataset.manifest.count} objects are damaged, more than "
                f"max_damaged={config.max_damaged:g} of them ({', '.join(left_out(shards, found))}); copy their shards "
                "again and give the same command, or raise max_damaged"
            )
        write_manifest(out, manifest)
        remove_former(out, {shard.name for shard in manifest.shards})
    print(f"{out}: latents of {manifest.count} objects" + (f"; {lost} damaged ones are left out" if lost else ""))


def left_out(views: list[Shard], latents: list[Shard]) -> list[str]:
    """The first objects that have no latents."""
    there = {key for shard in latents for key in shard.keys}
    return [key for shard in views for key in shard.keys if key not in there][:10]


def remove_former(out: Path, kept: set[str]) -> None:
    """Shards that the manifest names no more: of pictures packed anew, or made with other settings."""
    for path in out.glob("shard-*.tar"):
        if path.name not in kept and sidecar(path).is_file():  # which only what is written here has
            path.unlink()
            sidecar(path).unlink()


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


def require_same(out: Path, folder: ShardFolder, encoders: str, config: PrecomputeConfig) -> None:
    """UserError when `out` holds latents of other networks or another size, or the views themselves."""
    if folder.local is not None and folder.local.resolve() == out.resolve():
        raise UserError(f"out={out} is the folder of the shards; choose another out=")
    if not (out / "manifest.json").is_file():
        return
    found = read_json(out / "manifest.json", "latents")
    for key, value in (("kind", "latents"), ("encoders", encoders), ("resolution", config.image_size)):
        if not isinstance(found, dict) or found.get(key) != value:
            raise UserError(f"{out} holds other latents ({key} is not {value}); choose another out=")


def encode_shard(task: Task, index: int, path: Path, progress: Any) -> None:
    """The shard's latents, under its name; damaged objects are named and left out."""
    from data.packing import Packed, write_tar

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
    if not embedded:
        print(f"left out: {meta['uid']} has no reference view; render it with references", flush=True)
        return None
    moments, embeddings = encode_object(
        task.vae,
        task.image_encoder,
        torch.stack(list(pictures.values())),
        torch.stack([pictures[name] for name in embedded]),
        task.config.batch,
    )
    c2w = torch.tensor([view["c2w"] for view in meta["views"]])
    limit = torch.finfo(getattr(torch, task.config.dtype)).max
    if not all((tensor.abs() <= limit).all() for tensor in (moments, embeddings)):  # which NaN is not
        print(f"left out: the latents of {meta['uid']} are not finite in {task.config.dtype}", flush=True)
        return None
    content, told = pack_latents(moments, embeddings, c2w, task.config.dtype)
    return {"__key__": meta["uid"], MEMBER: content, "json": described(meta, told, embedded)}


if __name__ == "__main__":
    run(PrecomputeConfig, "data/precompute", main)
