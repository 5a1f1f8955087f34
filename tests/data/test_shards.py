"""Shards: other readers agree, packing is deterministic, and damage is named."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.files import UserError
from data.packing import locate_samples, pack, verify
from data.range_cache import CacheConfig
from data.shards import (
    DamagedSample,
    Shard,
    damaged_shards,
    decode_image,
    open_sample,
    read_manifest,
    read_meta,
    regular_file,
)
from data.sources import ShardFolder
from data.stream import ViewDataset

ROOT = Path(__file__).resolve().parents[2]
SHARD_MB = 0.0235  # two objects of 8 px, and the end of a tar


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
                          "elevation_deg": 5.0 * index, "distance": 2.0, "c2w": np.eye(4).tolist()})  # fmt: skip
        (folder / uid / "meta.json").write_text(
            json.dumps({"uid": uid, "resolution": resolution, "fingerprint": f"{count}", "views": views})
        )


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_views(tmp_path / "views", 5)
    pack(tmp_path / "views", tmp_path / "shards", SHARD_MB, processes=1)
    return tmp_path / "shards"


def members_of(folder: Path, shard: Shard, number: int) -> dict[str, bytes]:
    with open_sample(ShardFolder(str(folder)), shard, number) as members:
        return {suffix: members[suffix] for suffix in members.places}


@given(st.integers(1, 7), st.sampled_from([0.001, SHARD_MB, 1.0]), st.sampled_from(["png", "webp"]))
@settings(deadline=None, max_examples=8)
def test_every_reader_sees_the_same(tmp_path_factory, count: int, shard_mb: float, image_format: str) -> None:
    folder = tmp_path_factory.mktemp("pack")
    write_views(folder / "views", count)
    pack(folder / "views", folder / "shards", shard_mb, image_format, processes=1)
    manifest = read_manifest(folder / "shards")
    assert manifest.count == count and manifest.cameras.elevation_deg == (0.0, 20.0)
    assert len(manifest.shards) == {0.001: count, SHARD_MB: -(-count // 2), 1.0: 1}[shard_mb]
    for shard in manifest.shards:
        path = folder / "shards" / shard.name
        theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
        assert [s["__key__"] for s in theirs] == shard.keys
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
        for number, other in enumerate(theirs):
            members = members_of(folder / "shards", shard, number)
            assert members == {k: v for k, v in other.items() if not k.startswith("__")}
            for suffix in members.keys() - {"json"}:
                before = Image.open(folder / "views" / shard.keys[number] / f"{suffix[:3]}.png")
                assert np.array_equal(np.asarray(before), np.asarray(Image.open(io.BytesIO(members[suffix]))))
        with tarfile.open(path) as tar:
            assert len(tar.getnames()) == 6 * len(shard.keys)
        assert list(locate_samples(path.read_bytes())) == list(zip(shard.keys, shard.offsets, shard.sizes, strict=True))


def state(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.name != ".lock"}


def test_packing_again_changes_nothing(packed: Path, tmp_path: Path) -> None:
    before = state(packed)
    assert sorted(before) == ["manifest.json", *(f"shard-{n:06d}.tar" for n in range(3))]
    pack(packed.parent / "views", packed, SHARD_MB)
    assert state(packed) == before
    pack(packed.parent / "views", tmp_path / "other", SHARD_MB, processes=1)
    assert {k: v[0] for k, v in state(tmp_path / "other").items()} == {k: v[0] for k, v in before.items()}


def test_new_objects_get_new_shards_and_old_ones_stay(packed: Path, tmp_path: Path) -> None:
    before = state(packed)
    write_views(tmp_path / "more", 8)
    shutil.rmtree(tmp_path / "more" / "object-0_x")  # what is not there is kept
    for number in range(2, 5):  # the same as before; object 1 is rendered otherwise
        shutil.rmtree(tmp_path / "more" / f"object-{number}_x")
        shutil.copytree(packed.parent / "views" / f"object-{number}_x", tmp_path / "more" / f"object-{number}_x")
    (packed / "shard-000007.tar").write_bytes(b"somebody's")
    manifest = pack(tmp_path / "more", packed, 1, processes=1)
    after = state(packed)
    assert {k: v for k, v in before.items() if k != "manifest.json"}.items() <= after.items()
    assert after["shard-000007.tar"][0] == b"somebody's"
    assert manifest.count == 8 and manifest.shards[-1].keys == [f"object-{n}_x" for n in (1, 5, 6, 7)]
    assert manifest.shards[-1].name == "shard-000008.tar"
    assert manifest.shards[0].keys == ["object-0_x"], "object 1 was rendered again, and is read from the new shard"
    assert verify(str(packed), processes=1) == []


@pytest.mark.slow
def test_a_killed_packer_goes_on_and_ends_as_if_undisturbed(tmp_path: Path) -> None:
    write_views(tmp_path / "views", 40, resolution=32)
    pack(tmp_path / "views", tmp_path / "quiet", 0.05)
    command = [sys.executable, "data/pack.py", f"views={tmp_path}/views", f"out={tmp_path}/killed", "shard_mb=0.05"]
    rng = np.random.default_rng(1)
    for _ in range(5):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(1, 6)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "killed" / "manifest.json").exists():  # whole, or not there
            assert read_manifest(tmp_path / "killed").count == 40
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    assert {k: v[0] for k, v in state(tmp_path / "killed").items()} == {
        k: v[0] for k, v in state(tmp_path / "quiet").items()
    }


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "manifest.json").unlink(), "has no manifest.json"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "manifest.json").write_text('{"format": "x"}'), "not of format"),
        (lambda f: edit(f, "shards", []), "holds no objects"),
        (lambda f: edit_shard(f, "name", "../x.tar"), "no plain .tar"),
        (lambda f: edit_shard(f, "keys", ["a"]), "columns of different lengths"),
        (lambda f: edit_shard(f, "offsets", [0, 10**9]), "samples outside of it"),
        (lambda f: edit_shard(f, "offsets", [0, "x"]), "is damaged"),
        (lambda f: edit_shard(f, "keys", ["object-0_x", "object-0_x"]), "has object-0_x twice"),
        (lambda f: edit(f, "cameras", {}), "is damaged"),
    ],
)
def test_spoiled_manifests_are_named(packed: Path, spoil, words: str) -> None:
    spoil(packed)
    with pytest.raises(UserError, match=words):
        read_manifest(packed)


def edit(folder: Path, key: str, value: object) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(content | {key: value}))


def edit_shard(folder: Path, key: str, value: object) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    content["shards"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps(content))


def test_missing_and_truncated_shards_are_named(packed: Path) -> None:
    manifest, folder = read_manifest(packed), ShardFolder(str(packed))
    assert damaged_shards(folder, manifest) == {}
    (packed / "shard-000000.tar").unlink()
    (packed / "shard-000001.tar").write_bytes(b"x" * 99)
    assert damaged_shards(folder, manifest) == {
        "shard-000000.tar": "is missing",
        "shard-000001.tar": f"has 99 bytes and the manifest says {manifest.shards[1].bytes}: it is truncated "
        "or changed",
    }
    problems = verify(str(packed), processes=1)
    assert len(problems) == 2 and "shard-000000.tar: is missing" in problems[0]


@given(st.data())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_noticed(packed: Path, data) -> None:
    """Whatever byte of a sample is changed: reading its members gives what was packed, or says what is wrong."""
    manifest = read_manifest(packed)
    shard = manifest.shards[0]
    good = [members_of(packed, shard, n) for n in range(2)]
    content = bytearray((packed / shard.name).read_bytes())
    place = data.draw(st.integers(0, shard.offsets[1] + shard.sizes[1] - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    spoilt = packed.parent / "spoilt"
    spoilt.mkdir(exist_ok=True)
    (spoilt / shard.name).write_bytes(bytes(content))
    number = int(place >= shard.offsets[1])
    try:
        with open_sample(ShardFolder(str(spoilt)), shard, number) as members:
            meta = read_meta(members, shard.marks[number], "views")
            found = {view["file"]: members.checked(view["file"], view["crc32"][view["file"]]) for view in meta["views"]}
        assert found | {"json": good[number]["json"]} == good[number]
    except DamagedSample as error:
        assert shard.name in str(error) and shard.keys[number] in str(error)


def test_verify_names_the_object(packed: Path) -> None:
    shard = read_manifest(packed).shards[1]
    content = bytearray((packed / shard.name).read_bytes())
    content[shard.offsets[1] + 600] ^= 1
    (packed / shard.name).write_bytes(bytes(content))
    problems = verify(str(packed), decode=True, processes=1)
    assert any("SHA-256" in p for p in problems) and any(shard.keys[1] in p for p in problems), problems


def test_foreign_members_are_refused(packed: Path) -> None:
    shard = read_manifest(packed).shards[0]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("object-0_x.json", "object-0_x.pyd"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"{}"))
    (packed / shard.name).write_bytes(buffer.getvalue())
    ((_, offset, size),) = locate_samples(buffer.getvalue())
    shard.offsets[0], shard.sizes[0] = offset, size
    with pytest.raises(DamagedSample, match=r"object-0_x\.pyd"):
        members_of(packed, shard, 0)


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


def test_views_that_cannot_be_packed(tmp_path: Path) -> None:
    (tmp_path / "views").mkdir()
    out = tmp_path / "shards"
    with pytest.raises(UserError, match="render first"):
        pack(tmp_path / "views", out, processes=1)
    write_views(tmp_path / "views", 2)
    good = (tmp_path / "views" / "object-0_x" / "001.png").read_bytes()
    (tmp_path / "views" / "object-0_x" / "001.png").unlink()
    with pytest.raises(UserError, match=r"lacks '001\.png'"):
        pack(tmp_path / "views", out, processes=1)
    for content, words in ((good[:60], "is not a PNG"), (png(np.zeros((9, 9, 4), dtype=np.uint8)), "where 8 were")):
        (tmp_path / "views" / "object-0_x" / "001.png").write_bytes(content)
        with pytest.raises(UserError, match=words):
            pack(tmp_path / "views", out, processes=1)
    assert not list(out.glob("*.tar")) and not (out / "manifest.json").exists()
    (tmp_path / "views" / "object-0_x" / "001.png").write_bytes(good)
    objects = {f"object-{n}_x": {"clip_score": 0.1 + 0.2 * n, "of": "x"} for n in range(2)}
    scores = {"format": "isotropic3d-scores/1", "encoder": "x", "pictures": 1, "objects": objects}
    (tmp_path / "views" / "scores.json").write_text(json.dumps(scores))
    assert pack(tmp_path / "views", out, processes=1, min_clip_score=0.2).shards[0].keys == ["object-1_x"]
    with pytest.raises(UserError, match=r"no object scores so high; the highest is 0\.300"):
        pack(tmp_path / "views", out, processes=1, min_clip_score=0.5)


def test_the_command(tmp_path: Path) -> None:
    write_views(tmp_path / "views", 3)
    done = [
        subprocess.run(
            [sys.executable, "data/pack.py", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        for arguments in (
            [f"views={tmp_path}/views", f"out={tmp_path}/shards", "image_format=webp"],
            ["--verify", f"out={tmp_path}/shards", "decode=true"], [f"out={tmp_path}/shards"],
        )
    ]  # fmt: skip
    assert "packed: 3 objects in 1 shards" in done[0].stdout and "verified: 3 objects" in done[1].stdout, done
    assert done[2].returncode == 2 and "views is not set" in done[2].stderr


NAMES = st.text(st.characters(codec="ascii", min_codepoint=33, exclude_characters="/"), min_size=1, max_size=99)


@given(NAMES, st.integers(0, 8**11 - 1), st.integers(0, 2**31), st.sampled_from("01235"))
@settings(deadline=None, max_examples=300)
def test_headers_are_read_as_tarfile_reads_them(name: str, size: int, mtime: int, kind: str) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.type = size, mtime, kind.encode()
    header = member.tobuf(tarfile.USTAR_FORMAT)
    if kind == "0":
        assert regular_file(header) == (name, size)
    else:
        with pytest.raises(ValueError, match="regular file"):
            regular_file(header)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_headers_that_tarfile_refuses_are_refused(data) -> None:
    header = bytearray(tarfile.TarInfo("a.json").tobuf(tarfile.USTAR_FORMAT))
    for _ in range(data.draw(st.integers(1, 3))):
        header[data.draw(st.integers(0, 511))] ^= data.draw(st.integers(1, 255))
    try:
        member = tarfile.TarInfo.frombuf(bytes(header), "ascii", "strict")
        theirs = (member.name, member.size) if member.isreg() and bytes(header[257:262]) == b"ustar" else None
    except (tarfile.TarError, ValueError):
        theirs = None
    try:
        ours = regular_file(bytes(header))
    except ValueError:
        ours = None
    assert ours is None or ours == theirs, "never more than tarfile reads"


ODD = [None, True, -1, 0, 10**30, -(10**20), 1.5, float("nan"), float("inf"), "", "../x", "pipe:ls", "\x00", [], {},
       [None], [[[]]], {"a": 1}]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of a JSON document, every place; of a list's elements the first."""
    if place:
        yield place
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*place, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*place, 0))


def replaced(document: Any, place: tuple[Any, ...], value: Any) -> str:
    changed = copy.deepcopy(document)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(changed)


def test_odd_values_in_a_manifest_are_refused_or_do_no_harm(packed: Path, tmp_path) -> None:
    document = json.loads((packed / "manifest.json").read_text())
    refused = []
    for place in places(document):
        for value in ODD:
            (packed / "manifest.json").write_text(replaced(document, place, value))
            try:
                dataset = ViewDataset(str(packed), 8, 4, 0)
                dataset[0]
            except UserError:  # another error fails the test
                refused.append(place)
            except DamagedSample:
                refused.append(place)
    assert set(refused) == set(places(document)) - {()}, "no place takes everything"


def test_odd_values_in_a_rendered_object_are_refused_or_do_no_harm(tmp_path) -> None:
    write_views(tmp_path / "views", 1)
    (meta,) = (tmp_path / "views").glob("*/meta.json")
    document = json.loads(meta.read_text())
    for place in places(document):
        for value in ODD:
            meta.write_text(replaced(document, place, value))
            try:
                pack(tmp_path / "views", tmp_path / "shards", SHARD_MB, processes=1)
                assert verify(str(tmp_path / "shards"), processes=1) == []
                ViewDataset(str(tmp_path / "shards"), 8, 1, 0)[0]
            except UserError:
                pass
            shutil.rmtree(tmp_path / "shards", ignore_errors=True)


def test_a_pack_killed_while_it_cleaned_leaves_its_numbers_taken(tmp_path) -> None:
    """The manifest was there; what said which numbers the pack may write was there still."""
    write_views(tmp_path / "views", 4)
    pack(tmp_path / "views", tmp_path / "shards", SHARD_MB, processes=1)
    (tmp_path / "shards" / ".packing.json").write_text('{"first": 0}')
    (tmp_path / "shards" / ".shard-000001.json").write_text("{}")
    before = read_manifest(tmp_path / "shards")
    pack(tmp_path / "views", tmp_path / "shards", SHARD_MB, processes=1)
    assert not (tmp_path / "shards" / ".packing.json").exists() and read_manifest(tmp_path / "shards") == before
    (tmp_path / "shards" / ".packing.json").write_text('{"first": 0}')
    write_views(tmp_path / "more", 6)
    for number in (4, 5):
        (tmp_path / "more" / f"object-{number}_x").rename(tmp_path / "views" / f"object-{number}_x")
    manifest = pack(tmp_path / "views", tmp_path / "shards", SHARD_MB, processes=1)
    assert manifest.count == 6 and manifest.shards[: len(before.shards)] == before.shards
    assert verify(str(tmp_path / "shards"), processes=1) == []


def test_a_bound_holds_for_the_whole_tar(tmp_path) -> None:
    write_views(tmp_path / "views", 12)
    for shard in pack(tmp_path / "views", tmp_path / "shards", 0.04, processes=1).shards:
        assert len(shard.keys) > 1 and shard.bytes <= 0.04 * 2**20


def test_names_too_long_for_a_tar_are_refused(tmp_path) -> None:
    write_views(tmp_path / "views", 1)
    (folder,) = (tmp_path / "views").iterdir()
    document = json.loads((folder / "meta.json").read_text())
    for length, fits in ((80, True), (81, False)):
        folder = folder.rename(folder.with_name("a" * length))
        (folder / "meta.json").write_text(json.dumps(document | {"uid": "a" * length}))
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match="of up to 80 letters"):
            manifest = pack(tmp_path / "views", tmp_path / "shards", SHARD_MB, processes=1)
    assert members_of(tmp_path / "shards", manifest.shards[0], 0).keys() >= {"json", "000.png"}


def test_verify_holds_the_manifest_against_the_tar(packed: Path) -> None:
    content = json.loads((packed / "manifest.json").read_text())
    shard = content["shards"][0]
    shard["marks"].reverse()
    (packed / "manifest.json").write_text(json.dumps(content))
    assert [line.split(":")[0] for line in verify(str(packed), processes=1)] == ["shards"] * len(shard["marks"])


def test_a_fifo_for_a_shard_is_damage(packed: Path) -> None:
    (name,) = {shard.name for shard in read_manifest(packed).shards[:1]}
    (packed / name).unlink()
    os.mkfifo(packed / name)
    with pytest.raises(DamagedSample):
        members_of(packed, read_manifest(packed).shards[0], 0)


def test_an_object_without_the_views_asked_for_gives_its_place_to_others(tmp_path) -> None:
    write_views(tmp_path / "views", 4)
    for number in range(4):
        path = tmp_path / "views" / f"object-{number}_x" / "meta.json"
        document = json.loads(path.read_text())
        document["views"][0]["role"] = "reference"
        if number == 2:
            document["views"] = document["views"][:3]
        path.write_text(json.dumps(document))
    pack(tmp_path / "views", tmp_path / "shards", SHARD_MB, processes=1)
    dataset = ViewDataset(str(tmp_path / "shards"), 8, 4, 0)
    items = [dataset[position] for position in range(4)]
    assert [list(item["damaged"]) for item in items if item["damaged"]] == [["object-2_x"]]
    with pytest.raises(UserError, match=r"object object-\d_x: .*views"):
        ViewDataset(str(tmp_path / "shards"), 8, 5, 0)[0]


@pytest.mark.parametrize("cached", [False, True])
def test_damage_on_a_server_is_skipped_and_mended_bytes_are_seen(packed: Path, tmp_path, cached: bool) -> None:
    served = tmp_path / "served"
    shutil.copytree(packed, served)
    command = [sys.executable, str(Path(__file__).with_name("range_server.py")), str(served), "0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = f"http://127.0.0.1:{int(process.stdout.readline())}/plain"
            folder = ShardFolder(url, CacheConfig(str(tmp_path / "cache")) if cached else None)
            dataset = ViewDataset(folder, 8, 1, 0)
            shard = dataset.manifest.shards[0]
            content = (served / shard.name).read_bytes()
            for spoilt in (content[:100], content[:600] + b"!" + content[601:]):
                (served / shard.name).write_bytes(spoilt)
                with pytest.raises(DamagedSample, match=shard.name), dataset.open(0) as stored:
                    stored.image(stored.meta["views"][0])
            (served / shard.name).write_bytes(content)
            with dataset.open(0) as stored:
                assert stored.image(stored.meta["views"][0]).shape == (3, 8, 8)
        finally:
            process.kill()
