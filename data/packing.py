"""Views into shards: in parallel, the same bytes for the same views, and never a shard twice.

What is in the folder's manifest stays where it is: packing again adds what is new, in new shards.  A killed pack goes
on from the shards that it had finished.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from webdataset import TarWriter

from data.files import UserError, atomic_file, read_json, write_json
from data.processes import locked, parallel
from data.progress import Progress
from data.shards import (
    BLOCK,
    FAR,
    FORMAT,
    KEY,
    MEMBERS,
    Cameras,
    Manifest,
    Members,
    Shard,
    decode_image,
    mark,
    open_sample,
    parse_manifest,
    read_meta,
    read_rows,
    require_views,
)
from data.sources import ShardFolder

NUMBERED = re.compile(r"shard-(\d+)\.tar")
TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp(\.\w+)?$")


@dataclass
class Source:
    """A views folder of one object, to be packed."""

    folder: Path
    mark: str  # changes when the object is rendered again
    bytes: int  # in the tar, at most, where pictures are packed as they are
    resolution: int


@dataclass
class Packed:
    """A shard, and what of its objects the manifest tells."""

    shard: Shard
    cameras: Cameras


def pack(views: Path, out: Path, shard_mb: float = 512, image_format: str = "png", processes: int = 0,
         min_clip_score: float | None = None) -> Manifest:  # fmt: skip
    """Adds every object of `views` that `out` does not hold yet to it, and replaces those rendered again.

    shard_mb: a shard's size at most (a larger object has one of its own); image_format: "png" as rendered, or "webp",
    lossless; processes: 0 for one a core; min_clip_score: objects below it in `views/scores.json` are left out.
    The manifest is written last, so a killed pack leaves the former set of shards valid.
    """
    names = sorted(entry.name for entry in os.scandir(views) if not entry.name.startswith(".") and entry.is_dir())
    folders = [views / name for name in names if (views / name / "meta.json").is_file()]
    if not folders:
        raise UserError(f"views={views} holds no <uid>/meta.json; render first with python data/render.py out={views}")
    folders = above_score(views, folders, min_clip_score)
    with locked(out):
        former = former_manifest(out)
        finish_cleaning(out, former)
        held = (
            {}
            if former is None
            else {k: s for shard in former.shards for k, s in zip(shard.keys, shard.sources, strict=True)}
        )
        found = (check_meta(folder)[1] for folder in folders)
        sources = [source for source in found if held.get(source.folder.name) != f"{source.mark}.{image_format}"]
        resolutions = {source.resolution for source in sources} | ({former.resolution} if former else set())
        if len(resolutions) > 1:
            raise UserError(
                f"views={views} mixes resolutions {sorted(resolutions)}, or {out} has another; render with one "
                "setting, or pack into another folder"
            )
        if not sources:
            assert former is not None
            return former
        remove_temporary(out)
        first = first_number(out)
        plan = divided(sources, int(shard_mb * 2**20) - tarfile.RECORDSIZE)  # a tar ends in zeros
        packed = write_shards(out, plan, first, image_format, processes)
        manifest = merged(former, packed, resolutions.pop())
        write_manifest(out, manifest)
        clean(out, former, manifest, first)
    return manifest


def above_score(views: Path, folders: list[Path], least: float | None) -> list[Path]:
    if least is None:
        return folders
    from data.clip_score import read_scores  # here, since open_clip takes seconds to import

    scores = read_scores(views)
    kept = [folder for folder in folders if scores.get(folder.name, least - 1) >= least]
    without = sum(folder.name not in scores for folder in folders)
    print(f"packing {len(kept)} of {len(folders)} objects: {without} have no score, the others' is below {least}")
    if not kept:
        raise UserError(
            f"min_clip_score={least}: no object scores so high; the highest is {max(scores.values(), default=0):.3f}"
        )
    return kept


def former_manifest(out: Path) -> Manifest | None:
    if not (out / "manifest.json").is_file():
        return None
    manifest = parse_manifest(read_json(out / "manifest.json", "shards"), f"shards: {out}/manifest.json")
    if manifest.kind != "views":
        raise UserError(f"{out} holds {manifest.kind}, not views; pack into another folder")
    return manifest


def check_meta(folder: Path) -> tuple[dict[str, Any], Source]:
    """A rendered object's meta.json, and what packing must know of it.  UserError when the folder is not of one."""
    try:
        content = (folder / "meta.json").read_bytes()
        meta = json.loads(content)
        require_views(meta)
        require_angles(meta)
        resolution = int(meta["resolution"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"views: {folder}/meta.json is damaged ({error!r}); delete the folder and render again"
        ) from None
    if meta["uid"] != folder.name or not KEY.fullmatch(folder.name):
        raise UserError(
            f"views: {folder}/meta.json is of object {meta['uid']!r}; a folder bears its object's uid, of up to 80 "
            "letters, digits, - and _"
        )
    sizes = []
    for name in files_of(meta):
        if not MEMBERS.fullmatch(name) or not (folder / name).is_file():
            raise UserError(f"views: {folder} lacks {name!r}; delete the folder and render again")
        sizes.append((folder / name).stat().st_size)
    # In the tar each file has a header and is padded, and the .json gets a checksum a picture.
    packed = [*sizes, len(content) + 64 * len(sizes)]
    room = sum(BLOCK + -(-size // BLOCK) * BLOCK for size in packed)
    return meta, Source(folder, mark(content + json.dumps(sizes).encode()), room, resolution)


def require_angles(meta: dict[str, Any]) -> None:
    """ValueError, KeyError or TypeError when a view has no file, or a camera that there cannot be."""
    for view in meta["views"]:
        elevation, fov, distance = (float(view[key]) for key in ("elevation_deg", "fov_deg", "distance"))
        if not (view["file"] and -90 <= elevation <= 90 and 0 < fov < 180 and 0 < distance < FAR):
            raise ValueError(
                f"a view has file={view['file']!r}, elevation_deg={elevation}, fov_deg={fov}, distance={distance}"
            )


def files_of(meta: dict[str, Any]) -> list[str]:
    """The pictures of an object: its views, and their normals and depths where there are such."""
    return [view[key] for view in meta["views"] for key in ("file", "normal", "depth") if view.get(key)]


def divided(sources: list[Source], most: int) -> list[list[Source]]:
    """Consecutive objects up to `most` bytes a shard."""
    plan: list[list[Source]] = []
    size = 0
    for source in sources:
        if not plan or size + source.bytes > most:
            plan.append([])
            size = 0
        plan[-1].append(source)
        size += source.bytes
    return plan


def write_shards(out: Path, plan: list[list[Source]], first: int, image_format: str, processes: int) -> list[Packed]:
    """One task a shard.  A finished one leaves `.shard-NNNNNN.json` beside it until the manifest is there."""
    tasks = [(out / f"shard-{first + i:06d}.tar", sources, image_format) for i, sources in enumerate(plan)]
    done: dict[int, Packed] = {
        i: found for i, task in enumerate(tasks) if (found := finished_shard(task[0], task_mark(*task[1:]))) is not None
    }
    objects = sum(len(sources) for sources in plan)
    start = sum(len(plan[i]) for i in done)
    open_tasks = [i for i in range(len(tasks)) if i not in done]
    with Progress("packing", objects, "object", start) as progress:
        for number, packed in parallel(write_shard, {i: tasks[i] for i in open_tasks}, processes):
            done[number] = packed
            progress.update(len(plan[number]))
    return [done[i] for i in range(len(tasks))]


def task_mark(sources: list[Source], image_format: str) -> str:
    return mark(json.dumps([image_format, *((s.folder.name, s.mark) for s in sources)]).encode())


def sidecar(path: Path) -> Path:
    return path.with_name(f".{path.stem}.json")


def finished_shard(path: Path, task: str) -> Packed | None:
    """What a killed run had already written for exactly this task."""
    if not sidecar(path).is_file() or not path.is_file():
        return None
    try:
        left = read_json(sidecar(path), "shards")
        packed = Packed(Shard(**left["shard"]), Cameras(**left["cameras"]))
    except (UserError, KeyError, TypeError):
        return None
    same = left.get("task") == task and path.stat().st_size == packed.shard.bytes
    return packed if same else None


class HashingFile:
    """Writes on, and keeps the SHA-256 and the length of what was written."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.length = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.length += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.length


def write_shard(path: Path, sources: list[Source], image_format: str) -> Packed:
    """One task of the packer: the tar, and beside it what it holds."""
    metas: list[dict[str, Any]] = []

    def samples() -> Iterator[tuple[dict[str, Any], str]]:
        for source in sources:
            sample = sample_of(source, image_format)
            metas.append(json.loads(sample["json"]))
            yield sample, f"{source.mark}.{image_format}"

    packed = Packed(write_tar(path, samples()), camera_ranges(metas))
    write_json(sidecar(path), {"task": task_mark(sources, image_format), **asdict(packed)})
    return packed


def write_tar(path: Path, samples: Iterable[tuple[dict[str, Any], str]]) -> Shard:
    """samples: what webdataset writes, and the mark of what it was made of.

    Times, owners and order are fixed, so that equal samples give equal bytes.
    """
    shard = Shard(path.name, 0, "", [], [], [], [], [])
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        stream: Any = HashingFile(file)
        writer = TarWriter(stream, user="isotropic3d", group="isotropic3d", mode=0o644, mtime=0, encoder=False)
        for sample, source in samples:
            offset = writer.tarstream.offset  # the stream below it is written block by block
            writer.write(sample)
            shard.keys.append(sample["__key__"])
            shard.offsets.append(offset)
            shard.sizes.append(writer.tarstream.offset - offset)
            shard.marks.append(mark(sample["json"]))
            shard.sources.append(source)
        writer.close()
        shard.bytes, shard.sha256 = stream.length, stream.sha256.hexdigest()
    return shard


def sample_of(source: Source, image_format: str) -> dict[str, Any]:
    """What webdataset writes of one object.  Its .json gets the CRC-32 of every picture."""
    meta = json.loads((source.folder / "meta.json").read_bytes())
    sample: dict[str, Any] = {"__key__": meta["uid"]}
    for view in meta["views"]:
        crcs = {}
        for key in ("file", "normal", "depth"):
            if not view.get(key):
                continue
            content = (source.folder / view[key]).read_bytes()
            if key == "file":  # decoded before it is packed, so that what training meets has been read once
                content = checked_picture(source, view[key], content, image_format)
                view[key] = f"{view[key][:3]}.{image_format}"
            sample[view[key]] = content
            crcs[view[key]] = zlib.crc32(content)
        view["crc32"] = crcs
    sample["json"] = json.dumps(meta, sort_keys=True).encode()
    return sample


def checked_picture(source: Source, name: str, content: bytes, image_format: str) -> bytes:
    """The picture's bytes in `image_format`.  UserError when it is not one of the object's resolution."""
    try:
        pixels = decode_image(content, source.resolution, source.resolution)
    except UserError as error:
        raise UserError(f"views: {source.folder / name}: {error}; delete the folder and render again") from None
    if name.endswith(f".{image_format}"):
        return content
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, lossless=True, exact=True)
    return buffer.getvalue()


def camera_ranges(metas: list[dict[str, Any]]) -> Cameras:
    """Lowest and highest value among the views trained on."""
    ring = [view for meta in metas for view in meta["views"] if view["role"] == "ring"]
    if not ring:
        raise UserError(f"views: {metas[0]['uid']} and others have no view of role ring; render them again")
    framing = [view["distance"] * float(np.tan(np.radians(view["fov_deg"]) / 2)) for view in ring]

    def span(values: list[float]) -> tuple[float, float]:
        return round(min(values), 4), round(max(values), 4)

    return Cameras(span([v["elevation_deg"] for v in ring]), span([v["fov_deg"] for v in ring]), span(framing))


def merged(former: Manifest | None, packed: list[Packed], resolution: int) -> Manifest:
    """The former manifest with the new shards, and without the objects that these hold anew."""
    new = {key for p in packed for key in p.shard.keys}
    shards = []
    for shard in former.shards if former else []:
        rows = [
            row
            for row in zip(shard.keys, shard.offsets, shard.sizes, shard.marks, shard.sources, strict=True)
            if row[0] not in new
        ]
        if rows:
            shards.append(Shard(shard.name, shard.bytes, shard.sha256, *map(list, zip(*rows, strict=True))))  # type: ignore[arg-type]
    ranges = [p.cameras for p in packed] + ([former.cameras] if former else [])

    def span(name: str) -> tuple[float, float]:
        return min(getattr(c, name)[0] for c in ranges), max(getattr(c, name)[1] for c in ranges)

    cameras = Cameras(span("elevation_deg"), span("fov_deg"), span("framing"))
    return Manifest(resolution, cameras, shards + [p.shard for p in packed])


def write_manifest(out: Path, manifest: Manifest) -> None:
    """Compact JSON, a line a shard."""
    head = {key: value for key, value in asdict(manifest).items() if key != "shards"}
    lines = ",\n".join(json.dumps(asdict(shard)) for shard in manifest.shards)
    text = json.dumps({"format": FORMAT, **head})[:-1] + f', "shards": [\n{lines}\n]}}\n'
    with atomic_file(out / "manifest.json") as temporary:
        temporary.write_text(text)


def remove_temporary(out: Path) -> None:
    """What killed runs were writing; see `data.files.atomic_file`.  While nobody else writes there."""
    for pattern in ("..*", ".manifest.json.*", ".shard-*"):
        for left in out.glob(pattern):
            if TEMPORARY.search(left.name):
                left.unlink(missing_ok=True)


def first_number(out: Path) -> int:
    """Of the shards to write: beyond all that are there.  A killed pack's stays, and all from it on are its own."""
    marker = out / ".packing.json"
    if not marker.is_file():
        numbers = [int(match[1]) for p in out.glob("shard-*.tar") if (match := NUMBERED.fullmatch(p.name))]
        write_json(marker, {"first": max(numbers, default=-1) + 1})
    content = read_json(marker, "shards")
    if not isinstance(content, dict) or not isinstance(content.get("first"), int):
        raise UserError(f"{marker} is damaged; remove it and the shards that are not in {out}/manifest.json")
    return int(content["first"])


def finish_cleaning(out: Path, former: Manifest | None) -> None:
    """What a pack left that was killed after its manifest was there: its numbers are taken, and not to serve again."""
    if former is not None and (out / ".packing.json").is_file():
        first = first_number(out)
        if any(int(match[1]) >= first for s in former.shards if (match := NUMBERED.fullmatch(s.name))):
            clean(out, None, former, first)


def clean(out: Path, former: Manifest | None, manifest: Manifest, first: int) -> None:
    """Removes what no manifest needs any more, after the new one is on the disk; nothing that we have not written."""
    kept = {shard.name for shard in manifest.shards}
    ours = {shard.name for shard in former.shards} if former else set()
    ours |= {p.name for p in out.glob("shard-*.tar") if NUMBERED.fullmatch(p.name) and int(p.stem[6:]) >= first}
    for name in ours - kept:
        (out / name).unlink(missing_ok=True)
    for path in out.glob(".shard-*.json"):
        path.unlink()
    (out / ".packing.json").unlink()


# --- reading all of it again ---


def verify(location: str, decode: bool = False, processes: int = 0) -> list[str]:
    """Reads every byte of the shards again: what is wrong, a line each, naming shard and object.

    decode: also decodes every picture, which takes far longer than reading it.
    """
    from data.shards import read_manifest

    manifest = read_manifest(location)
    problems: list[str] = []
    tasks = {
        i: (location, shard, manifest.kind, manifest.resolution if decode else None)
        for i, shard in enumerate(manifest.shards)
    }
    with Progress("verifying", manifest.count, "object") as progress:
        for number, found in parallel(verify_shard, tasks, processes):
            problems += found
            progress.update(len(manifest.shards[number].keys), problems=str(len(problems)))
    return sorted(problems)


def verify_shard(location: str, shard: Shard, kind: str, resolution: int | None) -> list[str]:
    """resolution: of the pictures, to decode them too."""
    folder = ShardFolder(location)
    where = folder.describe(shard.name)
    size = folder.size(shard.name)
    if size != shard.bytes:
        return [f"{where}: is missing" if size is None else f"{where}: has {size} bytes, not {shard.bytes}"]
    digest = hashlib.sha256()
    for offset in range(0, shard.bytes, 2**24):
        digest.update(folder.read(shard.name, offset, min(2**24, shard.bytes - offset), shard.sha256))
    problems = [] if digest.hexdigest() == shard.sha256 else [f"{where}: SHA-256 is not the manifest's"]
    as_packed = not problems and resolution is None  # then each picture was decoded before it was packed
    for number, key in enumerate(shard.keys):
        try:
            with open_sample(folder, shard, number) as members:
                meta = read_meta(members, shard.marks[number], kind)
                if not as_packed:
                    check_members(members, meta, kind, resolution)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            text = str(error) if isinstance(error, UserError) else f"its metadata is damaged ({error!r})"
            problems.append(text if key in text else f"{where}, object {key}: {text}")
    return problems


def check_members(members: Members, meta: dict[str, Any], kind: str, resolution: int | None) -> None:
    """DamagedSample when a member is not what was packed.  resolution: of the pictures, which are decoded then."""
    if kind == "latents":
        for told in (meta["latents"][name] for name in ("moments", "embeddings", "c2w")):
            read_rows(members, told, range(len(told["crc32"])))
        return
    for view in meta["views"]:
        for name, crc in view["crc32"].items():
            content = members.checked(name, crc)
            if resolution is not None and name == view["file"]:
                decode_image(content, resolution, resolution)


def locate_samples(content: bytes) -> Iterable[tuple[str, int, int]]:
    """(key, offset, bytes) of each sample of a tar."""
    key, begin, end = "", 0, 0
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            owner = member.name.partition(".")[0]
            if owner != key and key:
                yield key, begin, end - begin
            if owner != key:
                key, begin = owner, member.offset
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if key:
        yield key, begin, end - begin
