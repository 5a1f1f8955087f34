"""Shards to batches, in an order that any rank can compute and resume.

Sample number `position` of the endless stream is object `order(seed, epoch)[position % N]` with epoch = position // N;
global batch s holds positions s * B .. (s + 1) * B - 1, and rank r of R decodes its contiguous share.  So the batches
do not depend on the number of ranks or workers, and resuming needs one integer: the number of samples consumed.
An object whose bytes are damaged is replaced by another one, drawn from (seed, position), and named in the batch.
Shapes: B objects, V views, R references, H W pixels, C latent channels, h w latent size, T tokens of width D.
"""

from __future__ import annotations

import contextlib
import signal
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.files import UserError
from data.processes import die_with_parent
from data.shards import (
    DamagedSample,
    Manifest,
    Members,
    decode_image,
    open_sample,
    read_manifest,
    read_meta,
    read_rows,
)
from data.sources import ShardFolder

TRIES = 16  # other objects in place of a damaged one, before the shards are given up


def keyed_generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Independent random numbers for each (seed, purpose, number); Philox, so the same on every machine."""
    key = np.array([seed % 2**64, zlib.crc32(purpose.encode())], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))


@dataclass
class Batch:
    """Pictures, or, from shards of latents, what the frozen encoders had made of them."""

    c2w: Tensor  # (B, V, 4, 4)
    reference_c2w: Tensor  # (B, R, 4, 4)
    positions: list[int]  # in the stream
    keys: list[str]  # object uids
    images: Tensor | None = None  # (B, V, 3, H, W) in [-1, 1], on white
    # (B, R, 3, H, W) in [0, 1], on white: front views of the same object; the first is embedded
    references: Tensor | None = None
    moments: Tensor | None = None  # (B, V + R, 2C, h, w): the posterior's mean and log variance, unscaled
    embeddings: Tensor | None = None  # (B, T, D) of the first reference
    damaged: dict[str, str] = field(default_factory=dict)  # uid: what was wrong with it, so that another came
    drawn: Any = None  # what the `draw` given to micro_batches made of `positions`

    @property
    def views(self) -> int:
        return self.c2w.shape[1]


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The objects of one epoch: a permutation of range(count)."""
    return keyed_generator(seed, "epoch", epoch).permutation(count)


def composite(rgba: np.ndarray) -> Tensor:
    """uint8 RGBA (H, W, 4) -> float (3, H, W) in [0, 1] on white."""
    planes = np.ascontiguousarray(rgba.transpose(2, 0, 1)).astype(np.float32)  # planes first: five times faster
    planes /= 255
    rgb, alpha = planes[:3], planes[3]
    rgb *= alpha
    rgb += 1 - alpha
    return torch.from_numpy(rgb)


def views_of(meta: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [view for view in meta["views"] if view["role"] == role]


def choose_views(meta: dict[str, Any], num_views: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    """`num_views` equally spaced views of one ring, at a random ring and start."""
    rings: dict[int, list[dict[str, Any]]] = {}
    for view in views_of(meta, "ring"):
        rings.setdefault(view["ring"], []).append(view)
    if not rings:
        raise DamagedSample(f"object {meta['uid']} has no views of role ring; render it again")
    ring = sorted(rings[sorted(rings)[generator.integers(len(rings))]], key=lambda view: view["index"])
    if len(ring) % num_views:
        raise UserError(
            f"object {meta['uid']}: a ring of {len(ring)} views has no {num_views} equally spaced ones; "
            "set data.num_views to a divisor"
        )
    stride = len(ring) // num_views
    start = int(generator.integers(len(ring)))
    return [ring[(start + i * stride) % len(ring)] for i in range(num_views)]


def choose_references(meta: dict[str, Any], count: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Different ones, at random.  UserError when the object has fewer than `count`."""
    there = views_of(meta, "reference")
    if len(there) < count:
        raise UserError(
            f"object {meta['uid']} has {len(there)} reference views and model.ema.references={count}; render with more "
            "references, or use fewer"
        )
    first = int(generator.integers(len(there)))
    others = [i for i in range(len(there)) if i != first]
    if count > 1:
        others = generator.choice(others, count - 1, replace=False).tolist()
        return [there[first], *(there[i] for i in others)]
    return [there[first]]


class UnfitSample(DamagedSample):
    """An object that is whole, and has not the views that are asked for; if it is alone in that, others stand in."""


@dataclass
class StoredObject:
    """One object of the shards, open for reading."""

    meta: dict[str, Any]
    members: Members
    kind: str  # "views" or "latents"
    resolution: int  # that its pictures were packed with
    size: int  # that they are wanted in

    def image(self, view: dict[str, Any]) -> Tensor:
        """(3, H, W) in [0, 1], on white."""
        try:
            content = self.members.checked(view["file"], view["crc32"][view["file"]])
            return composite(decode_image(content, self.size, self.resolution))
        except (KeyError, TypeError) as error:
            raise DamagedSample(f"{self.members.where}: {view['file']} has no CRC ({error!r})") from None
        except DamagedSample:
            raise
        except UserError as error:
            raise DamagedSample(f"{self.members.where}: {error}; pack the views again") from None

    def cameras(self, views: list[dict[str, Any]]) -> Tensor:
        """Camera to world, (N, 4, 4) in float32."""
        if self.kind == "views":
            return torch.tensor([view["c2w"] for view in views], dtype=torch.float32)
        c2w = self._rows("c2w", [self._number[view["file"]] for view in views])
        if c2w.shape[1:] != (4, 4) or not c2w.isfinite().all():
            raise DamagedSample(f"{self.members.where}: its c2w are not finite 4 x 4 matrices; precompute again")
        return c2w

    def moments(self, views: list[dict[str, Any]]) -> Tensor:
        """(N, 2C, h, w) in float32 of those views."""
        return self._rows("moments", [self._number[view["file"]] for view in views])

    def embedding(self, view: dict[str, Any]) -> Tensor:
        """(T, D) in float32 of a reference view."""
        embedded = self.meta["latents"]["embedded"]
        return self._rows("embeddings", [embedded.index(view["file"]) if view["file"] in embedded else len(embedded)])[
            0
        ]

    @cached_property
    def _number(self) -> dict[str, int]:
        return {view["file"]: number for number, view in enumerate(self.meta["views"])}

    def _rows(self, name: str, numbers: list[int]) -> Tensor:
        """Rows of a tensor of latents.safetensors, in float32."""
        return torch.from_numpy(read_rows(self.members, self.meta["latents"].get(name), numbers).astype(np.float32))


@dataclass
class Span:
    """From which position of the stream on the objects are those of `manifest`."""

    first: int
    epoch: int  # the number of its first epoch
    manifest: Manifest


class ViewDataset(Dataset[dict[str, Any]]):
    """Random access by stream position; opens nothing until asked, so workers can be forked or spawned.

    spans: where shards were added during a run; None: those of the folder's manifest, from the start.
    """

    def __init__(
        self,
        shards: str | ShardFolder,
        image_size: int,
        num_views: int,
        seed: int,
        num_references: int = 1,
        spans: list[Span] | None = None,
    ):
        self.folder = shards if isinstance(shards, ShardFolder) else ShardFolder(str(shards))
        self.image_size, self.num_views, self.seed, self.num_references = image_size, num_views, seed, num_references
        self.spans = spans or [Span(0, 0, read_manifest(self.folder))]
        self.starts = [np.cumsum([0, *(len(shard.keys) for shard in s.manifest.shards)]) for s in self.spans]
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def manifest(self) -> Manifest:
        """The one that holds from now on."""
        return self.spans[-1].manifest

    def __len__(self) -> int:
        """Objects of an epoch."""
        return self.manifest.count

    def __getitem__(self, position: int) -> dict[str, Any]:
        damaged: dict[str, str] = {}
        unfit = True
        for attempt in range(TRIES):
            span, number = self.object_at(position, attempt)
            try:
                with self.open(number, span) as stored:
                    return self.sample(stored, position) | {"position": position, "damaged": damaged}
            except DamagedSample as error:
                shard, row = self.locate(number, span)
                damaged[self.spans[span].manifest.shards[shard].keys[row]] = str(error)
                unfit = unfit and isinstance(error, UnfitSample)
        first = next(iter(damaged.values()))
        if unfit:
            raise UserError(first)
        raise UserError(f"{len(damaged)} objects tried for one place of a batch are all damaged; the first: {first}")

    def object_at(self, position: int, attempt: int = 0) -> tuple[int, int]:
        """(span, object number) at `position`; with `attempt` > 0 the one in place of a damaged object there."""
        index = max(i for i, span in enumerate(self.spans) if span.first <= position)
        span = self.spans[index]
        if attempt:
            return index, int(keyed_generator(self.seed, f"instead {attempt}", position).integers(span.manifest.count))
        epoch, offset = divmod(position - span.first, span.manifest.count)
        if self._order[0] != span.epoch + epoch:
            self._order = (span.epoch + epoch, epoch_order(self.seed, span.epoch + epoch, span.manifest.count))
        return index, int(self._order[1][offset])

    def locate(self, number: int, span: int = -1) -> tuple[int, int]:
        """(shard, row in it) of an object."""
        shard = int(np.searchsorted(self.starts[span], number, side="right")) - 1
        return shard, number - int(self.starts[span][shard])

    @contextlib.contextmanager
    def open(self, number: int, span: int = -1) -> Iterator[StoredObject]:
        """Object `number` of the manifest.  DamagedSample naming shard and object when its bytes are not whole."""
        index, row = self.locate(number, span)
        manifest = self.spans[span].manifest
        shard = manifest.shards[index]
        with open_sample(self.folder, shard, row) as members:
            meta = read_meta(members, shard.marks[row], manifest.kind)
            yield StoredObject(meta, members, manifest.kind, manifest.resolution, self.image_size)

    def sample(self, stored: StoredObject, position: int) -> dict[str, Any]:
        """What one place of a batch holds, without batch dimension."""
        generator = keyed_generator(self.seed, "views", position)
        try:
            views = choose_views(stored.meta, self.num_views, generator)
            references = choose_references(stored.meta, self.num_references, generator)
        except UserError as error:
            raise UnfitSample(f"{stored.members.where}: {error}") from None
        item = {
            "c2w": stored.cameras(views),
            "reference_c2w": stored.cameras(references),
            "key": stored.meta["uid"],
        }
        if stored.kind == "latents":
            return item | {"moments": stored.moments(views + references), "embeddings": stored.embedding(references[0])}
        return item | {
            "images": torch.stack([stored.image(view) for view in views]) * 2 - 1,
            "references": torch.stack([stored.image(view) for view in references]),
        }


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


def collate(items: list[dict[str, Any]], draw: Callable[[list[int]], Any] | None = None) -> Batch:
    tensors = {
        key: torch.stack([item[key] for item in items]) for key, value in items[0].items() if isinstance(value, Tensor)
    }
    positions = [item["position"] for item in items]
    return Batch(
        **tensors,
        positions=positions,
        drawn=draw(positions) if draw is not None else None,
        keys=[item["key"] for item in items],
        damaged={uid: reason for item in items for uid, reason in item["damaged"].items()},
    )


def leave_signals(worker: int) -> None:
    """In a data worker: a signal to the whole job is the main process's, which ends the workers; so does its death."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


def micro_batches(
    dataset: ViewDataset,
    batch_size: int,
    micro_batch_size: int,
    rank: int,
    world: int,
    first_step: int,
    workers: int,
    draw: Callable[[list[int]], Any] | None = None,
) -> Iterator[Batch]:
    """Endless micro-batches of this rank, starting with optimizer step `first_step`.

    draw: random numbers for a list of positions, which the workers draw beside their decoding.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=RankPositions(batch_size, micro_batch_size, rank, world, first_step),
        collate_fn=partial(collate, draw=draw),
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leave_signals,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)
