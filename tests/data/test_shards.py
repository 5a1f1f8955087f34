"""Shards: other readers agree, packing is deterministic, and damage is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.files import UserError
from data.shards import decode_image, locate_samples, pack, read_manifest, read_sample


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def write_views(folder: Path, count: int, resolution: int = 8) -> None:
    rng = np.random.default_rng(count)
    for number in range(count):
        uid = f"object-{number}_x"
        (folder / uid).mkdir(parents=True)
        views = []
        for index in range(5):
            picture = rng.integers(0, 256, (resolution, resolution, 4), dtype=np.uint8)
            (folder / uid / f"{index:03d}.png").write_bytes(png(picture))
            views.append({"file": f"{index:03d}.png", "role": "ring", "ring": 0, "index": index, "fov_deg": 40.0,
                          "elevation_deg": 5.0 * index, "distance": 2.0})  # fmt: skip
        (folder / uid / "meta.json").write_text(json.dumps({"uid": uid, "resolution": resolution, "views": views}))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_views(tmp_path / "views", 5)
    pack(tmp_path / "views", tmp_path / "shards", objects_per_shard=2)
    return tmp_path / "shards"


@given(st.integers(1, 7), st.integers(1, 4))
@settings(deadline=None, max_examples=8)
def test_every_reader_sees_the_same(tmp_path_factory, count: int, per_shard: int) -> None:
    folder = tmp_path_factory.mktemp("pack")
    write_views(folder / "views", count)
    pack(folder / "views", folder / "shards", per_shard)
    manifest = read_manifest(folder / "shards")
    assert len(manifest.shards) == -(-count // per_shard)
    assert manifest.cameras.elevation_deg == (0.0, 20.0)
    for shard in manifest.shards:
        path = folder / "shards" / shard.name
        theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
        assert [s["__key__"] for s in theirs] == [s.key for s in shard.samples]
        for ours, other in zip(shard.samples, theirs, strict=True):
            members = read_sample(folder / "shards", shard, ours)
            assert members == {k: v for k, v in other.items() if not k.startswith("__")}
            for suffix in members.keys() - {"json"}:
                assert members[suffix] == (folder / "views" / ours.key / suffix).read_bytes()
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 6 * len(shard.samples)


def test_packing_again_changes_nothing(packed: Path) -> None:
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in packed.glob("*.tar")}
    manifest = (packed / "manifest.json").read_bytes()
    pack(packed.parent / "views", packed, 2)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in packed.glob("*.tar")} == before
    assert (packed / "manifest.json").read_bytes() == manifest
    pack(packed.parent / "views", packed, 5)
    assert [p.name for p in packed.glob("*.tar")] == ["shard-000000.tar"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"format": "x"}'), "not of format"),
        (lambda f: (f / "shard-000001.tar").unlink(), r"shard-000001\.tar is missing"),
        (lambda f: (f / "shard-000001.tar").write_bytes(b"x" * 99), "has 99 bytes and the manifest says"),
        (lambda f: edit(f, "shards", []), "holds no objects"),
        (lambda f: edit(f, "shards", [{"name": "../x.tar", "bytes": 1, "sha256": "", "samples": []}]), "no plain .tar"),
        (lambda f: edit(f, "cameras", {}), "is damaged"),
    ],
)
def test_spoiled_folders_are_named(packed: Path, spoil, words: str) -> None:
    spoil(packed)
    with pytest.raises(UserError, match=words):
        read_manifest(packed)


def edit(folder: Path, key: str, value: object) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | {key: value}))


def test_a_flipped_header_is_named(packed: Path) -> None:
    manifest = read_manifest(packed)
    shard = manifest.shards[0]
    content = bytearray((packed / shard.name).read_bytes())
    content[shard.samples[1].offset + 3] ^= 0xFF
    (packed / shard.name).write_bytes(bytes(content))
    read_sample(packed, shard, shard.samples[0])
    with pytest.raises(UserError, match=rf"{shard.name}, object {shard.samples[1].key}"):
        read_sample(packed, shard, shard.samples[1])


def test_foreign_members_are_refused(packed: Path) -> None:
    manifest = read_manifest(packed)
    shard = manifest.shards[0]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("object-0_x.json", "object-0_x.pyd"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    (packed / shard.name).write_bytes(buffer.getvalue())
    (sample,) = locate_samples(buffer.getvalue())
    with pytest.raises(UserError, match=r"object-0_x\.pyd"):
        read_sample(packed, shard, sample)


def test_views_are_decoded_with_limits() -> None:
    with pytest.raises(UserError, match="not a PNG or WebP"):
        decode_image(b"GIF89a", 8)
    with pytest.raises(UserError, match="8192"):
        decode_image(png(np.zeros((8192, 8192), dtype=np.uint8)), 8)
    with pytest.raises(UserError, match="not a PNG or WebP"):
        decode_image(png(np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8))[:900], 8)
    half = np.zeros((8, 8, 4), dtype=np.uint8)
    half[:, ::2] = (200, 100, 50, 255)  # beside transparent black
    small = decode_image(png(half), 4)
    assert small.shape == (4, 4, 4)
    assert np.abs(small[..., :3].astype(int) - (200, 100, 50)).max() <= 2, "transparent colour bled into the picture"
    assert np.abs(small[..., 3].astype(int) - 128).max() <= 1


def test_views_without_objects(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    with pytest.raises(UserError, match="render first"):
        pack(tmp_path / "views", tmp_path / "shards", 2)
    write_views(tmp_path / "views", 2)
    (tmp_path / "views" / "object-0_x" / "001.png").unlink()
    with pytest.raises(UserError, match=r"lacks '001\.png'"):
        pack(tmp_path / "views", tmp_path / "shards", 2)
    assert not list((tmp_path / "shards").glob("*.tar"))
