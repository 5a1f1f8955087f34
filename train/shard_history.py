"""Which objects a run trains on: its shards when it began, those added later, and those that turned out damaged."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.files import UserError, atomic_file, read_json
from data.shards import Manifest, damaged_shards, manifest_bytes, mark, parse_manifest, parse_text
from data.sources import ShardFolder
from data.stream import Span, ViewDataset
from train.config import DataConfig, TrainConfig
from train.engine import OnEveryRank

SHOWN = 10  # damaged objects that an error lists; all are in the run folder's damaged.jsonl


@dataclass
class SavedSpan:
    """A `Span` as checkpoints keep it: the manifest by its mark, a copy of which lies in the run folder."""

    first: int
    epoch: int
    manifest: str


def with_new_shards(saved: list[SavedSpan], current: str, count: int, consumed: int) -> list[SavedSpan]:
    """`saved`, and from the next epoch on the objects of `current`, where that is another manifest.

    count: the objects of the last saved one; consumed: samples that the run has seen.
    """
    if not saved:
        return [SavedSpan(0, 0, current)]
    last = saved[-1]
    if last.manifest == current:
        return saved
    if last.first >= consumed:  # adopted before, but not reached yet
        return [*saved[:-1], SavedSpan(last.first, last.epoch, current)]
    epochs = -(-(consumed - last.first) // count)
    return [*saved, SavedSpan(last.first + epochs * count, last.epoch + epochs, current)]


def open_spans(
    run: Path, text: bytes, manifest: Manifest, saved: list[SavedSpan], consumed: int, write: bool
) -> list[SavedSpan]:
    """The spans of a run that goes on with `manifest`, of this text.  With `write` (rank 0) the run folder gets it."""
    current = mark(text)
    path = run / "shards" / f"{current}.json"
    if write and not path.is_file():
        with atomic_file(path) as temporary:
            temporary.write_bytes(text)
    count = 1
    if saved and saved[-1].manifest != current:
        last = read_saved(run, saved[-1].manifest)
        if last.kind != manifest.kind:
            raise UserError(
                f"{run} began on shards of {last.kind}, and data.shards are of {manifest.kind} now; give shards of "
                f"{last.kind}, or another name= or out="
            )
        count = last.count
    return with_new_shards(saved, current, count, consumed)


def read_saved(run: Path, manifest: str) -> Manifest:
    path = run / "shards" / f"{manifest}.json"
    return parse_manifest(read_json(path, "shards that the run began with"), str(path))


def as_spans(run: Path, folder: ShardFolder, manifest: Manifest, saved: list[SavedSpan], consumed: int) -> list[Span]:
    """With their manifests.  UserError when shards of the epoch that goes on were removed meanwhile."""
    former = [Span(span.first, span.epoch, read_saved(run, span.manifest)) for span in saved[:-1]]
    if former and consumed < saved[-1].first:
        for name, what in damaged_shards(folder, former[-1].manifest).items():
            raise UserError(
                f"{folder.describe(name)} {what}, and the epoch in which {run} stopped needs it: its objects were "
                "rendered and packed again; put the former shards back for that epoch, or give another name= or out="
            )
    return [*former, Span(saved[-1].first, saved[-1].epoch, manifest)]


def open_dataset(
    config: TrainConfig, run: Path, last_state: dict[str, Any], write: bool
) -> tuple[ViewDataset, list[SavedSpan]]:
    """The stream of a run that goes on after `last_state`, its checkpoint's state.json ({} for none)."""
    data = config.data
    folder = ShardFolder(data.shards, data.cache)
    batches = int(last_state.get("step", 0)) + int(last_state.get("skipped", 0))
    consumed = batches * config.batch_size
    text = manifest_bytes(folder)  # once, so that all that follows is of the same one
    manifest = parse_text(text, folder.describe("manifest.json"))
    spans = open_spans(run, text, manifest, saved_spans(last_state.get("spans", []), run), consumed, write)
    references = config.model.ema.references if config.objective.reference_probability > 0 else 1
    dataset = ViewDataset(
        folder,
        data.image_size,
        data.num_views,
        config.seed,
        references,
        as_spans(run, folder, manifest, spans, consumed),
    )
    if dataset.manifest.kind == "latents" and dataset.manifest.resolution != data.image_size:
        size = dataset.manifest.resolution
        raise UserError(
            f"{folder.describe()} holds latents of {size} px and data.image_size={data.image_size}; set it to {size}"
        )
    _ = dataset[consumed]  # so that views that do not fit are named before anything is built
    return dataset, spans


class Damage:
    """The objects found damaged since this start, over all ranks; more than `data.max_damaged` of all stop the run.

    damaged.jsonl keeps those of former starts too, but does not count them: they may have been mended.
    """

    def __init__(self, path: Path, config: DataConfig, folder: ShardFolder, manifest: Manifest, is_main: bool):
        self.path, self.share, self.where, self.total = path, config.max_damaged, folder.describe(), manifest.count
        self.found: dict[str, str] = {}
        self.new: dict[str, str] = {}
        broken = {name: f"{folder.describe(name)} {what}" for name, what in damaged_shards(folder, manifest).items()}
        for shard in manifest.shards:
            if shard.name in broken:
                self.found |= dict.fromkeys(shard.keys, broken[shard.name])
                if is_main:
                    print(f"damaged: {broken[shard.name]}; others take the places of its {len(shard.keys)} objects")
        if is_main:
            self.write(self.found)
        self.stop_beyond_share()

    def write(self, found: dict[str, str]) -> None:
        if not found:
            return
        try:
            with open(self.path, "a") as file:
                file.writelines(json.dumps({"uid": uid, "reason": reason}) + "\n" for uid, reason in found.items())
        except OSError as error:  # a full disk must not end the run
            print(f"warning: {self.path} cannot be written now: {error.strerror}", file=sys.stderr, flush=True)

    def note(self, damaged: dict[str, str]) -> None:
        """What this rank met."""
        self.new |= {uid: reason for uid, reason in damaged.items() if uid not in self.found}

    def gather(self, is_main: bool) -> int:
        """Number of damaged objects known to all ranks.  Collective; OnEveryRank beyond the set share."""
        everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, self.new)
        fresh = {uid: reason for one in everyone for uid, reason in one.items() if uid not in self.found}
        self.new = {}
        self.found |= fresh
        if is_main:
            self.write(fresh)
            for uid, reason in list(fresh.items())[:SHOWN]:
                print(f"damaged: {uid}: {reason}; another object took its place", flush=True)
        self.stop_beyond_share()
        return len(self.found)

    def stop_beyond_share(self) -> None:
        if len(self.found) > self.share * self.total:
            listed = "".join(f"\n  {reason}" for reason in sorted(set(self.found.values()))[:SHOWN])
            raise OnEveryRank(
                f"{self.where}: {len(self.found)} of {self.total} objects are damaged, more than data.max_damaged="
                f"{self.share:g} of them; copy those shards again, or raise data.max_damaged. The first:{listed}"
            )


def saved_spans(state: object, where: Path) -> list[SavedSpan]:
    """From a checkpoint's state.json."""
    try:
        assert isinstance(state, list)
        return [SavedSpan(int(span["first"]), int(span["epoch"]), str(span["manifest"])) for span in state]
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {where}: spans in state.json are damaged ({error!r})") from None


def as_json(spans: list[SavedSpan]) -> list[dict[str, object]]:
    return [asdict(span) for span in spans]
