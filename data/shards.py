"""WebDataset shards with a manifest: one tar sample an object, of which only the members that are asked for are read.

    shards/  manifest.json  shard-000000.tar  shard-000001.tar ...

A sample's members are `<uid>.json` (the object's meta.json) and one `<uid>.<view>` a picture, in the WebDataset format
(https://github.com/webdataset/webdataset: files that share the name up to the first dot are one sample).
manifest.json: {"format": "isotropic3d-shards/2", "kind": "views" or "latents", "resolution": pixels, "cameras":
{"elevation_deg", "fov_deg", "framing": [low, high]}, "encoders": null or a mark, "shards": [{"name", "bytes", "sha256",
"keys", "offsets", "sizes", "marks", "sources"}]}: a shard's samples as columns, so that a million of them load in a
second.  A sample's mark is of its `.json`, which holds the CRC of each picture: so every byte that is used is checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from data.files import UserError
from data.sources import ShardFolder, UnreadableShard

FORMAT = "isotropic3d-shards/2"
KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")  # with the longest member behind it, what a plain tar header has room for
KEYS = re.compile(r"(?:[A-Za-z0-9_-]{1,80}\n)*")
SHARD = re.compile(r"[A-Za-z0-9_-]+\.tar")
MEMBERS = re.compile(r"json|\d{3}(_normal|_depth)?\.(png|webp)|latents\.safetensors")
MAX_SIDE = 4096  # pixels; a larger picture is refused before it is decoded
MAX_SAMPLE_BYTES = 2**30
FAR = 1e6  # object units, of which the whole object is one: no camera is there
MAX_MANIFEST_BYTES = 2**31
BLOCK = tarfile.BLOCKSIZE


class DamagedSample(UserError):
    """A sample whose bytes are not what was packed; training may go on without it."""


@dataclass
class Cameras:
    """The ranges that the cameras were drawn from."""

    elevation_deg: tuple[float, float]
    fov_deg: tuple[float, float]
    framing: tuple[float, float]


@dataclass
class Shard:
    """A tar, and of each of its samples, in columns:"""

    name: str
    bytes: int
    sha256: str
    keys: list[str]
    offsets: list[int]  # of the first member's header in the tar
    sizes: list[int]  # bytes up to the end of the last member's padding
    marks: list[str]  # of the packed .json, see `mark`
    sources: list[str]  # of the views folder that it was made of


@dataclass
class Manifest:
    resolution: int  # pixels a side of the pictures, or of the pictures that the latents are of
    cameras: Cameras
    shards: list[Shard]
    kind: str = "views"
    encoders: str | None = None  # of latents: which networks made them (data.latents.encoders_mark)

    @property
    def count(self) -> int:
        return sum(len(shard.keys) for shard in self.shards)


def mark(content: bytes) -> str:
    """16 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def read_manifest(location: str | os.PathLike[str] | ShardFolder) -> Manifest:
    """UserError naming the file and the remedy.  The shards themselves are not looked at; see `damaged_shards`."""
    folder = location if isinstance(location, ShardFolder) else ShardFolder(str(location))
    return parse_text(manifest_bytes(folder), folder.describe("manifest.json"))


def parse_text(text: bytes, where: str) -> Manifest:
    """As `parse_manifest`, of what is perhaps no JSON."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read: {error}; pack the views again") from None
    return parse_manifest(content, where)


def manifest_bytes(folder: ShardFolder) -> bytes:
    """UserError when the folder is not there or has no manifest.json."""
    remedy = f"make one with python data/pack.py views=... out={folder.location}"
    if folder.local is not None and not folder.local.is_dir():
        raise UserError(f"shards: {folder.local} is not a folder; {remedy}")
    if not folder.exists("manifest.json"):
        raise UserError(f"{folder.describe()} has no manifest.json; {remedy}")
    return folder.read_whole("manifest.json", MAX_MANIFEST_BYTES)


def parse_manifest(content: Any, where: str) -> Manifest:
    """UserError for what is not a manifest, names files elsewhere, or has no objects or one twice."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{where} is not of format {FORMAT}; pack the views again")
    try:
        manifest = Manifest(
            resolution=content["resolution"],
            cameras=Cameras(**{key: (float(low), float(high)) for key, (low, high) in content["cameras"].items()}),
            shards=[Shard(**shard) for shard in content["shards"]],
            kind=content["kind"],
            encoders=content["encoders"],
        )
        require_types(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{where} is damaged ({error!r}); pack the views again") from None
    for shard in manifest.shards:
        if not SHARD.fullmatch(shard.name):
            raise UserError(f"{where} names {shard.name!r}, which is no plain .tar name")
    if len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        raise UserError(f"{where} names a shard twice; pack the views again into an empty folder")
    if manifest.count == 0:
        raise UserError(f"{where} holds no objects; pack some views")
    if len({key for shard in manifest.shards for key in shard.keys}) < manifest.count:
        seen: set[str] = set()
        twice = next(k for shard in manifest.shards for k in shard.keys if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise UserError(f"{where} has {twice} twice; pack the views again into an empty folder")
    return manifest


def require_types(manifest: Manifest) -> None:
    """ValueError for values that no manifest of ours has; JSON may hold anything in any place."""
    ranges = vars(manifest.cameras).values()
    if not all(math.isfinite(low) and math.isfinite(high) and low <= high for low, high in ranges):
        raise ValueError(f"cameras are no ranges: {manifest.cameras}")
    if type(manifest.resolution) is not int or not 1 <= manifest.resolution <= MAX_SIDE:
        raise ValueError(f"resolution={manifest.resolution!r}")
    if manifest.kind not in ("views", "latents"):
        raise ValueError(f"kind={manifest.kind!r}")
    if not isinstance(manifest.encoders, str | None):
        raise ValueError(f"encoders={manifest.encoders!r}")
    for shard in manifest.shards:
        texts, numbers = (shard.keys, shard.marks, shard.sources), (shard.offsets, shard.sizes)
        if not (isinstance(shard.name, str) and isinstance(shard.sha256, str) and type(shard.bytes) is int):
            raise ValueError(f"a shard has name={shard.name!r}, sha256={shard.sha256!r} and bytes={shard.bytes!r}")
        if len({len(column) for column in (*texts, *numbers)}) != 1:
            raise ValueError(f"{shard.name} has columns of different lengths")
        for kind, columns in ((str, texts), (int, numbers)):
            if not all(type(column) is list and set(map(type, column)) <= {kind} for column in columns):
                raise ValueError(f"{shard.name} has columns of other types")
        if not KEYS.fullmatch("".join(f"{key}\n" for key in shard.keys)):
            raise ValueError(f"{shard.name} has keys that are none")
        offsets, sizes = (np.asarray(column, dtype=np.int64) for column in numbers)
        if ((offsets < 0) | (sizes < 0) | (offsets > shard.bytes - sizes)).any():
            raise ValueError(f"{shard.name} has samples outside of it")


def damaged_shards(folder: ShardFolder, manifest: Manifest) -> dict[str, str]:
    """{name: what is wrong} of the shards of a local folder that are missing or not of their size."""
    found = {}
    for shard in manifest.shards if folder.local is not None else ():
        size = folder.size(shard.name)
        if size is None:
            found[shard.name] = "is missing"
        elif size != shard.bytes:
            found[shard.name] = f"has {size} bytes and the manifest says {shard.bytes}: it is truncated or changed"
    return found


class Members:
    """The members of one sample by suffix ("json", "000.png"); each is read when it is asked for."""

    def __init__(self, where: str, places: dict[str, tuple[int, int]], read: Callable[[int, int], bytes]):
        self.where, self.places, self._read = where, places, read

    def __contains__(self, suffix: str) -> bool:
        return suffix in self.places

    def __getitem__(self, suffix: str) -> bytes:
        if suffix not in self.places:
            raise DamagedSample(f"{self.where}: lacks {suffix}; pack the views again")
        offset, size = self.places[suffix]
        content = self._read(offset, size)
        if len(content) != size:
            raise DamagedSample(f"{self.where}: the file ends inside {suffix}; copy the shard again")
        return content

    def part(self, offset: int, size: int, crc: int) -> bytes:
        """Bytes of the sample, which must have this CRC-32."""
        content = self._read(offset, size)
        if zlib.crc32(content) != crc or len(content) != size:
            raise DamagedSample(f"{self.where}: bytes {offset} to {offset + size} are not what was packed (CRC-32)")
        return content

    def checked(self, suffix: str, crc: Any) -> bytes:
        """The member, which must have this CRC-32."""
        content = self[suffix]
        if zlib.crc32(content) != crc:
            raise DamagedSample(f"{self.where}: {suffix} is not what was packed (CRC-32); copy the shard again")
        return content


@contextlib.contextmanager
def open_sample(folder: ShardFolder, shard: Shard, number: int) -> Iterator[Members]:
    """Sample `number` of a shard.  DamagedSample naming shard and key when it is not whole."""
    key, offset, size = shard.keys[number], shard.offsets[number], shard.sizes[number]
    where = f"{folder.describe(shard.name)}, object {key}"
    if not BLOCK < size <= MAX_SAMPLE_BYTES or not KEY.fullmatch(key):
        raise DamagedSample(f"{where}: a sample of {size} bytes; pack the views again")
    if folder.local is None:  # a request costs more than the bytes that are not asked for
        try:
            content = folder.read(shard.name, offset, size, shard.sha256)
            yield Members(where, walk(content_reader(content), size, key, where), content_reader(content))
        except UnreadableShard as error:
            raise DamagedSample(f"{where}: {error}") from None
        except DamagedSample:
            folder.forget(shard.name, offset, size, shard.sha256)
            raise
        return
    try:
        handle = os.open(folder.local / shard.name, os.O_RDONLY | os.O_NONBLOCK)  # which a FIFO would wait at
    except OSError as error:
        raise DamagedSample(f"{where}: cannot be opened ({error.strerror}); copy the shard again") from None
    try:
        read = lambda start, count: os.pread(handle, count, offset + start)  # noqa: E731
        yield Members(where, walk(read, size, key, where), read)
    except OSError as error:
        raise DamagedSample(f"{where}: cannot be read ({error}); copy the shard again") from None
    finally:
        os.close(handle)


def content_reader(content: bytes) -> Callable[[int, int], bytes]:
    return lambda start, count: content[start : start + count]


def walk(read: Callable[[int, int], bytes], size: int, key: str, where: str) -> dict[str, tuple[int, int]]:
    """suffix -> (offset, size) of its content, from the headers alone.  read(offset, count) gives its bytes."""
    places: dict[str, tuple[int, int]] = {}
    position = 0
    while position < size:
        try:
            name, length = regular_file(read(position, BLOCK))
        except ValueError as error:
            raise DamagedSample(f"{where}: no tar header at byte {position} ({error}); copy the shard again") from None
        owner, _, suffix = name.partition(".")
        begin = position + BLOCK
        position = begin + -(-length // BLOCK) * BLOCK
        if owner != key or not MEMBERS.fullmatch(suffix) or suffix in places:
            raise DamagedSample(f"{where}: holds {name!r}, which does not belong there; pack the views again")
        if position > size:
            raise DamagedSample(f"{where}: {suffix} reaches beyond the sample; copy the shard again")
        places[suffix] = begin, length
    return places


def regular_file(header: bytes) -> tuple[str, int]:
    """(name, bytes) of a regular file's header in a tar (POSIX.1-2001, ustar).  ValueError for anything else.

    tarfile reads the fields that are of no use here too, and takes a tenth of a sample's time for it.
    """
    if len(header) != BLOCK:
        raise ValueError("the file ends there")
    name, prefix = (field.partition(b"\0")[0] for field in (header[:100], header[345:500]))
    if int(header[148:156].strip(b" \0") or b"0", 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
        raise ValueError("its checksum is wrong")
    if header[156:157] not in (b"0", b"\0") or header[257:262] != b"ustar":
        raise ValueError("it is not of a regular file")
    size = int(header[124:136].strip(b" \0") or b"0", 8)
    if size < 0:
        raise ValueError(f"a size of {size}")
    return (prefix + b"/" + name if prefix else name).decode("ascii"), size


def read_meta(members: Members, expected_mark: str, kind: str) -> dict[str, Any]:
    """The object's meta.json.  DamagedSample when it is not the packed one, or lacks what is read of it."""
    content = members["json"]
    if mark(content) != expected_mark:
        raise DamagedSample(f"{members.where}: its .json is not what was packed; copy the shard again")
    try:
        meta: dict[str, Any] = json.loads(content)
        require_views(meta, kind)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedSample(f"{members.where}: its metadata is damaged ({error!r}); pack the views again") from None
    return meta


def require_views(meta: dict[str, Any], kind: str = "views") -> None:
    """ValueError, KeyError or TypeError when meta.json lacks what training reads of it, or holds it wrongly.

    kind: "views", or "latents", whose cameras are among the tensors.
    """
    if not isinstance(meta["uid"], str) or not isinstance(meta["views"], list):
        raise ValueError("uid must be a string and views a list")
    if kind == "latents" and not isinstance(meta["latents"]["embedded"], list):
        raise ValueError("latents.embedded must be a list")
    if kind == "views":
        c2w = np.asarray([view["c2w"] for view in meta["views"]], dtype=np.float64).reshape(len(meta["views"]), -1)
        if c2w.shape[1:] != (16,) or not (np.abs(c2w) < FAR).all():  # which NaN is not either
            good = [row.shape == (16,) and bool((np.abs(row) < FAR).all()) for row in c2w]
            raise ValueError(f"c2w of {meta['views'][good.index(False)]['file']} is not a finite 4 x 4 matrix")
    for view in meta["views"]:
        if not isinstance(view["file"], str) or not isinstance(view["role"], str):
            raise ValueError(f"file={view['file']!r} and role={view['role']!r} of a view must be strings")
        if view["role"] == "ring" and not (isinstance(view["ring"], int) and isinstance(view["index"], int)):
            raise ValueError(f"ring={view['ring']!r} and index={view['index']!r} of a view must be integers")


def read_rows(members: Members, told: dict[str, Any], numbers: Iterable[int]) -> np.ndarray:
    """Rows of a tensor of `latents.safetensors`, (N, ...) as they are stored.  DamagedSample when they are not whole.

    told: {"shape", "dtype", "offset", "crc32": one a row}, as data/precompute.py leaves it in the .json, so that only
    the rows asked for are read, and each is checked.
    """
    try:
        shape, dtype = tuple(told["shape"][1:]), {"float16": np.float16, "float32": np.float32}[told["dtype"]]
        begin, whole = members.places["latents.safetensors"]
        size = math.prod(shape) * np.dtype(dtype).itemsize
        offsets = [told["offset"] + n * size for n in numbers]
        if not all(0 <= offset <= whole - size for offset in offsets):
            raise ValueError(f"rows of {size} bytes at {offsets} are outside of it")
        rows = [
            members.part(begin + offset, size, told["crc32"][n]) for n, offset in zip(numbers, offsets, strict=True)
        ]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise DamagedSample(f"{members.where}: its latents are damaged ({error!r}); precompute again") from None
    return np.frombuffer(b"".join(rows), dtype).reshape(len(rows), *shape)


def decode_image(content: bytes, size: int, expected: int | None = None) -> np.ndarray:
    """PNG or WebP bytes -> uint8 (size, size, 4), straight alpha; resized with premultiplied alpha.

    UserError for anything else, for pictures of more than MAX_SIDE pixels a side, or of other than `expected` ones.
    """
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as picture:
            if max(picture.size) > MAX_SIDE or picture.width != picture.height:
                raise UserError(
                    f"a view of {picture.width} x {picture.height} pixels; views are square, up to {MAX_SIDE}"
                )
            if expected is not None and picture.width != expected:
                raise UserError(f"a view of {picture.width} x {picture.height} pixels, where {expected} were packed")
            image = picture.convert("RGBA")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        what = str(error).partition(" <")[0]  # not the address of the buffer
        raise UserError(f"a view is not a PNG or WebP picture that can be read ({what})") from None
    if image.width != size:  # "RGBa" is premultiplied, so that the colour behind transparent pixels does not bleed
        image = (
            image.convert("RGBa")
            .resize((size, size), Image.Resampling.BOX if image.width % size == 0 else Image.Resampling.LANCZOS)
            .convert("RGBA")
        )
    return np.asarray(image)
