"""Shards to batches, in an order that any rank can compute and resume.

Sample number `position` of the endless stream is object `order(seed, epoch)[position % N]` with epoch = position // N;
global batch s holds positions s * B .. (s + 1) * B - 1, and rank r of R decodes its contiguous share.  So the batches
do not depend on the number of ranks or workers, and resuming needs one integer: the number of samples consumed.
Shapes: B objects, V views, H W pixels.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.files import UserError
from data.shards import Manifest, decode_image, read_manifest, read_sample


def keyed_generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Independent random numbers for each (seed, purpose, number); Philox, so the same on every machine."""
    key = np.array([seed % 2**64, zlib.crc32(purpose.encode())], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))


@dataclass
class Batch:
    images: Tensor  # (B, V, 3, H, W) in [-1, 1], on white
    references: Tensor  # (B, R, 3, H, W) in [0, 1], on white: front views of the same object; the first is embedded
    c2w: Tensor  # (B, V, 4, 4)
    reference_c2w: Tensor  # (B, R, 4, 4)
    positions: list[int]  # in the stream
    keys: list[str]  # object uids


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The objects of one epoch: a permutation of range(count)."""
    return keyed_generator(seed, "epoch", epoch).permutation(count)


def composite(rgba: np.ndarray) -> Tensor:
    """uint8 RGBA (H, W, 4) -> float (3, H, W) in [0, 1] on white."""
    value = rgba.astype(np.float32) / 255
    rgb = value[..., :3] * value[..., 3:] + 1 - value[..., 3:]
    return torch.from_numpy(rgb).permute(2, 0, 1).contiguous()


def views_of(meta: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [view for view in meta["views"] if view["role"] == role]


def choose_views(meta: dict[str, Any], num_views: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    """`num_views` equally spaced views of one ring, at a random ring and start."""
    rings: dict[int, list[dict[str, Any]]] = {}
    for view in views_of(meta, "ring"):
        rings.setdefault(view["ring"], []).append(view)
    ring = sorted(rings[sorted(rings)[generator.integers(len(rings))]], key=lambda view: view["index"])
    if len(ring) % num_views:
        raise UserError(
            f"object {meta['uid']}: a ring of {len(ring)} views has no {num_views} equally spaced ones; "
            "set data.num_views to a divisor"
        )
    stride = len(ring) // num_views
    start = int(generator.integers(len(ring)))
    return [ring[(start + i * stride) % len(ring)] for i in range(num_views)]


def require_views(meta: dict[str, Any]) -> None:
    """ValueError, KeyError or TypeError when meta.json lacks what the stream reads of it, or holds it wrongly."""
    if not isinstance(meta["uid"], str) or not isinstance(meta["views"], list):
        raise ValueError("uid must be a string and views a list")
    for view in meta["views"]:
        camera = np.asarray(view["c2w"], dtype=np.float64)
        if camera.shape != (4, 4) or not np.isfinite(camera).all():
            raise ValueError(f"c2w of {view['file']} is not a finite 4 x 4 matrix")
        wanted = {"file": str, "role": str} | ({"ring": int, "index": int} if view["role"] == "ring" else {})
        for key, kind in wanted.items():
            if not isinstance(view[key], kind):
                raise ValueError(f"{key}={view[key]!r} of a view is no {kind.__name__}")


class ViewDataset(Dataset[dict[str, Any]]):
    """Random access by stream position; opens nothing until asked, so workers can be forked or spawned."""

    def __init__(self, shards: str | Path, image_size: int, num_views: int, seed: int, num_references: int = 1):
        self.folder, self.image_size, self.num_views, self.seed = Path(shards), image_size, num_views, seed
        self.num_references = num_references
        self.manifest: Manifest = read_manifest(self.folder)
        self.index = [(shard, sample) for shard in self.manifest.shards for sample in shard.samples]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, position: int) -> dict[str, Any]:
        epoch, offset = divmod(position, len(self.index))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.seed, epoch, len(self.index)))
        generator = keyed_generator(self.seed, "views", position)
        number = int(self._order[1][offset])
        members, meta = self.read(number)
        views = choose_views(meta, self.num_views, generator)
        references = self.choose_references(number, meta, generator)
        try:
            return {
                "images": torch.stack([self.image(members, view) for view in views]) * 2 - 1,
                "references": torch.stack([self.image(members, view) for view in references]),
                "c2w": torch.tensor([view["c2w"] for view in views], dtype=torch.float32),
                "reference_c2w": torch.tensor([view["c2w"] for view in references], dtype=torch.float32),
                "position": position,
                "key": meta["uid"],
            }
        except UserError as error:
            raise UserError(f"{self.where(number)}: {error}; copy the shard again, or pack the views again") from None

    def choose_references(
        self, number: int, meta: dict[str, Any], generator: np.random.Generator
    ) -> list[dict[str, Any]]:
        """Different ones, at random."""
        there = views_of(meta, "reference")
        if len(there) < self.num_references:
            raise UserError(
                f"{self.where(number)}: has {len(there)} reference views and model.ema.references="
                f"{self.num_references}; render with more references, or use fewer"
            )
        first = int(generator.integers(len(there)))
        others = [i for i in range(len(there)) if i != first]
        if self.num_references > 1:
            others = generator.choice(others, self.num_references - 1, replace=False).tolist()
            return [there[first], *(there[i] for i in others)]
        return [there[first]]

    def where(self, number: int) -> str:
        shard, sample = self.index[number]
        return f"shards: {self.folder / shard.name}, object {sample.key}"

    def read(self, number: int) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Object `number` of the manifest: its members by suffix, and its meta.json."""
        members = read_sample(self.folder, *self.index[number])
        try:
            meta: dict[str, Any] = json.loads(members["json"])
            require_views(meta)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.where(number)}: its metadata is damaged ({error!r}); pack the views again"
            ) from None
        absent = [view["file"] for view in meta["views"] if view["file"] not in members]
        roles = {view["role"] for view in meta["views"]}
        if absent or not {"ring", "reference"} <= roles:
            raise UserError(
                f"{self.where(number)}: lacks {', '.join(absent) or 'ring or reference views'}; "
                "render and pack it again"
            )
        return members, meta

    def image(self, members: dict[str, bytes], view: dict[str, Any]) -> Tensor:
        """(3, H, W) in [0, 1], on white."""
        return composite(decode_image(members[view["file"]], self.image_size))


class RankPositions(Sampler[list[int]]):
    """The stream positions of one rank, a micro-batch at a time, from a step on, without end."""

    def __init__(self, batch_size: int, micro_batch_size: int, rank: int, world: int, first_step: int):
        self.batch_size, self.micro, self.rank, self.world, self.step = (
            batch_size, micro_batch_size, rank, world, first_step,
        )  # fmt: skip

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world
        step = self.step
        while True:
            start = step * self.batch_size + self.rank * share
            for first in range(start, start + share, self.micro):
                yield list(range(first, first + self.micro))
            step += 1


def collate(items: list[dict[str, Any]]) -> Batch:
    return Batch(
        images=torch.stack([item["images"] for item in items]),
        references=torch.stack([item["references"] for item in items]),
        c2w=torch.stack([item["c2w"] for item in items]),
        reference_c2w=torch.stack([item["reference_c2w"] for item in items]),
        positions=[item["position"] for item in items],
        keys=[item["key"] for item in items],
    )


def micro_batches(
    dataset: ViewDataset, batch_size: int, micro_batch_size: int, rank: int, world: int, first_step: int, workers: int
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, starting with optimizer step `first_step`."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=RankPositions(batch_size, micro_batch_size, rank, world, first_step),
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
