"""WebDataset shards with a manifest: one tar sample an object, read by seeking to its byte range.

    shards/  manifest.json  shard-000000.tar  shard-000001.tar ...

A sample's members are `<uid>.json` (the object's meta.json) and one `<uid>.<view>` a picture, in the WebDataset format
(https://github.com/webdataset/webdataset: files that share the name up to the first dot are one sample).
manifest.json: {"format": "isotropic3d-shards/1", "resolution": pixels, "cameras": {"elevation_deg", "fov_deg",
"framing": [low, high]}, "shards": [{"name", "bytes", "sha256", "samples": [{"key", "offset", "bytes"}]}]}.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from webdataset import TarWriter

from data.files import UserError, atomic_file, read_json, require_writable, write_json
from data.progress import Progress

FORMAT = "isotropic3d-shards/1"
KEY = re.compile(r"[A-Za-z0-9_-]+")
MEMBERS = re.compile(r"json|\d{3}\.(png|webp)")
MAX_SIDE = 4096  # pixels; a larger picture is refused before it is decoded
MAX_SAMPLE_BYTES = 2**30


@dataclass
class Cameras:
    """The ranges that the cameras were drawn from."""

    elevation_deg: tuple[float, float]
    fov_deg: tuple[float, float]
    framing: tuple[float, float]


@dataclass
class Sample:
    key: str
    offset: int  # of the first member's header in the tar
    bytes: int  # up to the end of the last member's padding


@dataclass
class Shard:
    name: str
    bytes: int
    sha256: str
    samples: list[Sample]


@dataclass
class Manifest:
    resolution: int
    cameras: Cameras
    shards: list[Shard]


def read_manifest(folder: str | Path) -> Manifest:
    """Checks that every shard is there with its size.  UserError naming the file and the remedy."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"shards: {folder} is not a folder; make it with python data/pack.py views=... out={folder}")
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"shards: {folder} has no manifest.json; make one with python data/pack.py views=... out={folder}"
        )
    content = read_json(folder / "manifest.json", "shards")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"shards: {folder}/manifest.json is not of format {FORMAT}; pack the views again")
    try:
        manifest = Manifest(
            resolution=int(content["resolution"]),
            cameras=Cameras(**{key: (float(low), float(high)) for key, (low, high) in content["cameras"].items()}),
            shards=[
                Shard(s["name"], s["bytes"], s["sha256"], [Sample(**sample) for sample in s["samples"]])
                for s in content["shards"]
            ],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"shards: {folder}/manifest.json is damaged ({error!r}); pack the views again") from None
    for shard in manifest.shards:
        if not re.fullmatch(r"[A-Za-z0-9_-]+\.tar", shard.name):
            raise UserError(f"shards: {folder}/manifest.json names {shard.name!r}, which is no plain .tar name")
        path = folder / shard.name
        if not path.is_file():
            raise UserError(f"shards: {path} is missing; pack the views again")
        if path.stat().st_size != shard.bytes:
            raise UserError(
                f"shards: {path} has {path.stat().st_size} bytes and the manifest says {shard.bytes}: it is truncated "
                "or changed; copy it again, or pack the views again"
            )
    if not any(shard.samples for shard in manifest.shards):
        raise UserError(f"shards: {folder} holds no objects; pack some views")
    return manifest


def read_sample(folder: str | Path, shard: Shard, sample: Sample) -> dict[str, bytes]:
    """Members by suffix: {"json": ..., "000.png": ...}.  UserError naming shard and key when they are not whole."""
    path = Path(folder) / shard.name
    where = f"shards: {path}, object {sample.key}"
    if not 0 < sample.bytes <= MAX_SAMPLE_BYTES:
        raise UserError(f"{where}: a sample of {sample.bytes} bytes; pack the views again")
    try:
        with open(path, "rb") as file:
            file.seek(sample.offset)
            content = file.read(sample.bytes)
        if len(content) != sample.bytes:
            raise UserError(f"{where}: the file ends inside it; copy the shard again")
        members: dict[str, bytes] = {}
        # Two blocks of zeros end a tar, so that the slice is one.
        with tarfile.open(fileobj=io.BytesIO(content + bytes(1024)), mode="r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if key != sample.key or not member.isfile() or not MEMBERS.fullmatch(suffix):
                    raise UserError(
                        f"{where}: holds {member.name!r}, which does not belong there; pack the views again"
                    )
                opened = tar.extractfile(member)
                assert opened is not None
                members[suffix] = opened.read()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{where}: cannot be read ({error}); copy the shard again, or pack the views again") from None
    if "json" not in members:
        raise UserError(f"{where}: has no .json member; pack the views again")
    return members


def decode_image(content: bytes, size: int) -> np.ndarray:
    """PNG or WebP bytes -> uint8 (size, size, 4), straight alpha; resized with premultiplied alpha.

    UserError for anything else, and for pictures of more than MAX_SIDE pixels a side.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as picture:
            if max(picture.size) > MAX_SIDE or picture.width != picture.height:
                raise UserError(
                    f"a view of {picture.width} x {picture.height} pixels; views are square, up to {MAX_SIDE}"
                )
            image = picture.convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UserError(f"a view is not a PNG or WebP picture that can be read ({error})") from None
    if image.width != size:  # "RGBa" is premultiplied, so that the colour behind transparent pixels does not bleed
        image = (
            image.convert("RGBa")
            .resize((size, size), Image.Resampling.BOX if image.width % size == 0 else Image.Resampling.LANCZOS)
            .convert("RGBA")
        )
    return np.asarray(image)


def pack(views: Path, out: Path, objects_per_shard: int) -> Manifest:
    """Packs every `views/<uid>/` into shards in `out`; the same views give the same bytes.

    A shard whose content is there already is left alone.  The manifest is written last, so a killed pack leaves the
    former set of shards valid or none.
    """
    folders = sorted(path.parent for path in views.glob("[!.]*/meta.json"))  # not what a killed render left half done
    if not folders:
        raise UserError(f"views={views} holds no <uid>/meta.json; render first with python data/render.py out={views}")
    require_writable(out)
    metas = [check_meta(folder) for folder in folders]
    resolutions = {meta["resolution"] for meta in metas}
    if len(resolutions) > 1:
        raise UserError(f"views={views} mixes resolutions {sorted(resolutions)}; render them with one setting")
    shards = []
    with Progress("packing", len(folders), "object") as progress:
        for first in range(0, len(folders), objects_per_shard):
            name = f"shard-{first // objects_per_shard:06d}.tar"
            chosen = slice(first, first + objects_per_shard)
            shards.append(write_shard(out / name, folders[chosen], metas[chosen]))
            progress.update(len(folders[chosen]))
    manifest = Manifest(resolutions.pop(), camera_ranges(metas), shards)
    write_json(out / "manifest.json", {"format": FORMAT, **asdict(manifest)})
    for stale in out.glob("shard-*.tar"):
        if stale.name not in {shard.name for shard in shards}:
            stale.unlink()
    return manifest


def check_meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = read_json(folder / "meta.json", "views")
    if meta.get("uid") != folder.name or not KEY.fullmatch(folder.name):
        raise UserError(f"views: {folder}/meta.json is of object {meta.get('uid')!r}; a folder bears its object's uid")
    for view in meta["views"]:
        if not MEMBERS.fullmatch(view["file"]) or not (folder / view["file"]).is_file():
            raise UserError(f"views: {folder} lacks {view['file']!r}; delete the folder and render again")
    return meta


def camera_ranges(metas: list[dict[str, Any]]) -> Cameras:
    """Lowest and highest value among the views trained on."""
    ring = [view for meta in metas for view in meta["views"] if view["role"] == "ring"]
    if not ring:
        raise UserError("views: no object has a view of role ring; render them again")
    framing = [view["distance"] * float(np.tan(np.radians(view["fov_deg"]) / 2)) for view in ring]

    def span(values: list[float]) -> tuple[float, float]:
        return round(min(values), 4), round(max(values), 4)

    return Cameras(span([v["elevation_deg"] for v in ring]), span([v["fov_deg"] for v in ring]), span(framing))


def write_shard(path: Path, folders: list[Path], metas: list[dict[str, Any]]) -> Shard:
    """Times, owners and order are fixed, so that equal views give equal bytes."""
    buffer = io.BytesIO()
    with TarWriter(buffer, user="isotropic3d", group="isotropic3d", mode=0o644, mtime=0, encoder=False) as writer:
        for folder, meta in zip(folders, metas, strict=True):
            content = {"__key__": meta["uid"], "json": json.dumps(meta, sort_keys=True).encode()}
            content |= {view["file"]: (folder / view["file"]).read_bytes() for view in meta["views"]}
            writer.write(content)
    content_bytes = buffer.getvalue()
    if not path.is_file() or path.stat().st_size != len(content_bytes) or path.read_bytes() != content_bytes:
        with atomic_file(path) as temporary:
            temporary.write_bytes(content_bytes)
    return Shard(
        path.name, len(content_bytes), hashlib.sha256(content_bytes).hexdigest(), locate_samples(content_bytes)
    )


def locate_samples(content: bytes) -> list[Sample]:
    """The byte range of each sample's members in a tar."""
    samples: list[Sample] = []
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            key = member.name.partition(".")[0]
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            if not samples or samples[-1].key != key:
                samples.append(Sample(key, member.offset, 0))
            samples[-1].bytes = end - samples[-1].offset
    return samples
