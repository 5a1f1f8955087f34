"""Shards to training samples: `python tests/benchmarks/bench_stream.py [--objects 64] [--seconds 6]`.

One process and core, files in the page cache, in one run and taking turns:
  ours        ViewDataset: four views and a reference of an object, in the stream's random order
  webdataset  webdataset reading the same tars in order, decoding the same five pictures with the same function
  tar bytes   reading the samples' bytes alone, in the tars' order
  latents     ViewDataset on shards of latents (256 px: moments of 8 x 32 x 32 a view, an embedding of 1024)
and how long it takes to open a manifest of a million objects and find what comes at position 1,000,000.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image

from data.cameras import orbit_camera
from data.packing import pack, write_manifest, write_tar
from data.shards import Cameras, Manifest, Shard, decode_image, read_manifest
from data.stream import ViewDataset, choose_references, choose_views, composite, keyed_generator
from models.latents import MEMBER, described, pack_latents

SIZE, RINGS, PER_RING, REFERENCES = 256, 4, 16, 8


def view_plan() -> list[dict]:
    """One object's views, as the renderer's defaults have them."""
    views = []
    for index in range(RINGS * PER_RING + REFERENCES):
        ring = index // PER_RING if index < RINGS * PER_RING else None
        c2w = orbit_camera(torch.tensor(360.0 * index / PER_RING), torch.tensor(15.0), 2.0)
        views.append({"file": f"{index:03d}.png", "role": "reference" if ring is None else "ring", "ring": ring,
                      "index": index % PER_RING, "azimuth_deg": 0.0, "elevation_deg": 15.0, "fov_deg": 40.0,
                      "distance": 2.0, "c2w": c2w.tolist()})  # fmt: skip
    return views


def make_views(folder: Path, objects: int) -> None:
    """Shaded discs with texture: PNGs of about 55 kB, as renders of objects have."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    inside = (x**2 + y**2 < 0.1) * 255.0
    pictures = []
    for _ in range(16):
        colour = (
            rng.uniform(40, 215, 3) + 20 * rng.standard_normal((SIZE, SIZE, 3)) + 60 * np.cos(9 * x + 7 * y)[..., None]
        )
        rgba = np.concatenate([colour * (inside > 0)[..., None], inside[..., None]], axis=-1)
        pictures.append(Image.fromarray(rgba.clip(0, 255).astype(np.uint8)))
    for number in range(objects):
        uid = f"object{number:04d}"
        (folder / uid).mkdir(parents=True)
        for index, view in enumerate(views := view_plan()):
            pictures[(number + index) % 16].save(folder / uid / view["file"], compress_level=1)
        (folder / uid / "meta.json").write_text(json.dumps({"uid": uid, "resolution": SIZE, "views": views}))


def make_latents(folder: Path, objects: int) -> None:
    folder.mkdir()
    views = view_plan()
    moments = torch.randn(len(views), 8, SIZE // 8, SIZE // 8)
    c2w = torch.tensor([view["c2w"] for view in views])
    content, told = pack_latents(moments, torch.randn(REFERENCES, 1, 1024), c2w, "float16")
    embedded = [view["file"] for view in views if view["role"] == "reference"]
    samples = [
        ({"__key__": f"o{n}", MEMBER: content,
          "json": described({"uid": f"o{n}", "resolution": SIZE, "views": views}, told, embedded)}, "")
        for n in range(objects)
    ]  # fmt: skip
    shard = write_tar(folder / "shard-000000.tar", samples)
    write_manifest(folder, Manifest(SIZE, Cameras((15, 15), (40, 40), (0.7, 0.7)), [shard], "latents", "none"))


def ours(folder: Path) -> Iterator[int]:
    dataset = ViewDataset(str(folder), SIZE, 4, seed=0)
    position = 0
    while True:
        dataset[position]
        position += 1
        yield 1


def plain_webdataset(folder: Path) -> Iterator[int]:
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    while True:
        for position, sample in enumerate(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False)):
            meta = json.loads(sample["json"])
            generator = keyed_generator(0, "views", position)
            views = choose_views(meta, 4, generator) + choose_references(meta, 1, generator)
            torch.stack([composite(decode_image(sample[view["file"]], SIZE)) for view in views])
            yield 1


def tar_bytes(folder: Path) -> Iterator[int]:
    manifest = read_manifest(folder)
    while True:
        for shard in manifest.shards:
            with open(folder / shard.name, "rb") as file:
                for offset, size in zip(shard.offsets, shard.sizes, strict=True):
                    file.seek(offset)
                    file.read(size)
                    yield 1


def rate(stream: Iterator[int], seconds: float) -> float:
    next(stream)  # opens the files
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += next(stream)
    return count / (time.perf_counter() - began)


def resume(folder: Path) -> float:
    """Seconds from nothing to the object at position 1,000,000 of a manifest of as many."""
    count, per_shard = 10**6, 128
    shards = []
    for first in range(0, count, per_shard):
        numbers = range(first, min(first + per_shard, count))
        size = 4 * 2**20
        shards.append(Shard(f"shard-{first // per_shard:06d}.tar", size * len(numbers), "0" * 64,
                            [f"{zlib.crc32(str(n).encode()):08x}{n:024x}" for n in numbers],
                            [size * i for i in range(len(numbers))], [size] * len(numbers), ["0" * 16] * len(numbers),
                            ["0" * 16] * len(numbers)))  # fmt: skip
    folder.mkdir()
    write_manifest(folder, Manifest(SIZE, Cameras((0, 1), (1, 2), (1, 2)), shards))
    began = time.perf_counter()
    dataset = ViewDataset(str(folder), SIZE, 4, seed=0)
    dataset.locate(dataset.object_at(10**6)[1])
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5, help="for each measurement")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{datetime.date.today()}, {platform.machine()}, one process, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_views(folder / "views", options.objects)
        manifest = pack(folder / "views", folder / "shards", processes=1)
        size = manifest.shards[0].sizes[0]
        print(f"{options.objects} objects of {len(view_plan())} views of {SIZE} px, {size / 2**20:.1f} MiB each")
        make_latents(folder / "latents", options.objects)
        variants: dict[str, Callable[[], Iterator[int]]] = {
            "webdataset": lambda: plain_webdataset(folder / "shards"),
            "ours": lambda: ours(folder / "shards"),
            "tar bytes": lambda: tar_bytes(folder / "shards"),
            "latents": lambda: ours(folder / "latents"),
        }
        rates: dict[str, list[float]] = {kind: [] for kind in variants}
        for _ in range(options.repeat):
            for kind, stream in variants.items():
                rates[kind].append(rate(stream(), options.seconds))
        base = statistics.median(rates["webdataset"])
        for kind, values in rates.items():
            middle = statistics.median(values)
            print(f"{kind:<12}{middle:10.1f} samples/s a core   {middle / base:8.2f} x webdataset", flush=True)
        print(f"position 1,000,000 of a manifest of 1,000,000 objects: {resume(folder / 'million'):.2f} s")


if __name__ == "__main__":
    main()
