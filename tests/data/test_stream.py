"""The stream: one order for every number of ranks, everything once an epoch, going on anywhere."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.files import UserError
from data.packing import pack, verify, write_manifest, write_tar
from data.shards import Cameras, Manifest, Shard, open_sample, read_manifest
from data.sources import CacheConfig, ShardFolder
from data.stream import RankPositions, Span, ViewDataset, choose_views, epoch_order, keyed_generator, micro_batches
from train.shard_history import SavedSpan, with_new_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    for number in range(7):
        uid = f"o{number}"
        (folder / "views" / uid).mkdir(parents=True)
        views = []
        for index in range(10):
            role, ring = ("ring", index // 4) if index < 8 else ("reference", None)
            Image.fromarray(np.full((8, 8, 4), (30 * number, 20 * index, 0, 255), dtype=np.uint8)).save(
                folder / "views" / uid / f"{index:03d}.png"
            )
            c2w = torch.eye(4).tolist()
            views.append({"file": f"{index:03d}.png", "role": role, "ring": ring, "index": index % 4, "c2w": c2w,
                          "elevation_deg": 10.0, "fov_deg": 40.0, "distance": 2.0})  # fmt: skip
        meta = {"uid": uid, "resolution": 8, "views": views}
        (folder / "views" / uid / "meta.json").write_text(json.dumps(meta))
    pack(folder / "views", folder / "shards", shard_mb=0.038, processes=1)
    return folder / "shards"


@given(st.integers(0, 2**63), st.integers(0, 1000), st.integers(1, 500))
@settings(deadline=None, max_examples=50)
def test_an_epoch_is_a_permutation(seed: int, epoch: int, count: int) -> None:
    order = epoch_order(seed, epoch, count)
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(seed, epoch, count))


def test_generators_are_independent() -> None:
    first = {
        (seed, purpose, number): keyed_generator(seed, purpose, number).integers(2**62)
        for seed, purpose, number in itertools.product((0, 1), ("a", "b"), (0, 1, 10**12))
    }
    assert len(set(first.values())) == len(first)
    assert keyed_generator(0, "a", 1).integers(2**62) == first[0, "a", 1]


@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_global_batches_do_not_depend_on_ranks(
    world: int, micro: int, accumulation: int, step: int, steps: int
) -> None:
    batch = 4 * micro * accumulation
    drawn: list[list[int]] = [[] for _ in range(steps)]
    for rank in range(world):
        per_step = batch // world // micro
        ours = itertools.islice(iter(RankPositions(batch, micro, rank, world, step)), steps * per_step)
        for number, positions in enumerate(ours):
            assert len(positions) == micro
            drawn[number // per_step] += positions
    assert [sorted(d) for d in drawn] == [list(range((step + s) * batch, (step + s + 1) * batch)) for s in range(steps)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_from_any_step(shards: Path, workers: int) -> None:
    dataset = ViewDataset(str(shards), image_size=8, num_views=4, seed=3)
    quiet = list(itertools.islice(micro_batches(dataset, 4, 2, 1, 2, 0, 0), 6))
    resumed = list(itertools.islice(micro_batches(dataset, 4, 2, 1, 2, 2, workers), 4))
    for a, b in zip(quiet[2:], resumed, strict=True):
        assert a.keys == b.keys and a.positions == b.positions
        assert torch.equal(a.images, b.images) and torch.equal(a.references, b.references)


def test_every_object_once_an_epoch(shards: Path) -> None:
    dataset = ViewDataset(str(shards), image_size=8, num_views=4, seed=0)
    keys = [dataset[position]["key"] for position in range(21)]
    for epoch in range(3):
        assert sorted(keys[7 * epoch : 7 * epoch + 7]) == [f"o{n}" for n in range(7)]
    assert keys[:7] != keys[7:14] or keys[7:14] != keys[14:], "epochs have orders of their own"


def test_what_a_sample_holds(shards: Path) -> None:
    dataset = ViewDataset(str(shards), image_size=8, num_views=2, seed=0)
    sample = dataset[5]
    assert sample["images"].shape == (2, 3, 8, 8) and sample["c2w"].shape == (2, 4, 4)
    number = int(sample["key"][1:])
    assert torch.allclose(sample["images"][:, 0], torch.tensor(30 * number / 255 * 2 - 1))
    assert sample["references"].shape == (1, 3, 8, 8) and float(sample["references"][0, 1, 0, 0] * 255) >= 160
    both = ViewDataset(str(shards), image_size=8, num_views=2, seed=0, num_references=2)[5]
    assert torch.equal(both["references"][0], sample["references"][0]), "more references leave the first one alone"
    assert not torch.equal(both["references"][0], both["references"][1]) and both["reference_c2w"].shape == (2, 4, 4)
    with pytest.raises(UserError, match=r"has 2 reference views and model\.ema\.references=3"):
        _ = ViewDataset(str(shards), image_size=8, num_views=2, seed=0, num_references=3)[5]


def test_views_are_equally_spaced_and_of_one_ring() -> None:
    views = [{"role": "ring", "ring": r, "index": i} for r in range(3) for i in range(12)]
    seen = set()
    for number in range(200):
        chosen = choose_views({"uid": "a", "views": views}, 4, keyed_generator(0, "t", number))
        assert len({view["ring"] for view in chosen}) == 1
        steps = np.diff([view["index"] for view in chosen]) % 12
        assert steps.tolist() == [3, 3, 3]
        seen.add((chosen[0]["ring"], chosen[0]["index"]))
    assert len(seen) > 30, "every ring and start is drawn"
    with pytest.raises(UserError, match="no 5 equally spaced"):
        choose_views({"uid": "a", "views": views}, 5, keyed_generator(0, "t", 0))


def flip(shards: Path, target: Path, uid: str, change: Callable[[bytes], bytes]) -> None:
    """A copy of the shards in which `change` was done to the bytes of one object."""
    shutil.copytree(shards, target, dirs_exist_ok=True)
    for shard in read_manifest(shards).shards:
        if uid in shard.keys:
            row = shard.keys.index(uid)
            begin, end = shard.offsets[row], shard.offsets[row] + shard.sizes[row]
            content = (target / shard.name).read_bytes()
            changed = change(content[begin:end])
            assert changed != content[begin:end]
            (target / shard.name).write_bytes(content[:begin] + changed + content[end:])


DAMAGE = [
    (lambda b: b.replace(b"IDAT", b"IDAX"), "is not what was packed (CRC-32)"),
    (lambda b: b.replace(b'"c2w"', b'"c2v"'), ".json is not what was packed"),
    (lambda b: b[:100] + b"\xff" + b[101:], "no tar header at byte 0"),
    (lambda b: b[: len(b) // 2], ""),
    (lambda b: bytes(len(b)), "no tar header at byte 0"),
]


@pytest.mark.parametrize(("change", "words"), DAMAGE)
def test_a_damaged_object_is_named_and_another_takes_its_place(shards: Path, tmp_path: Path, change, words) -> None:
    quiet = ViewDataset(str(shards), image_size=8, num_views=4, seed=0)
    victim = quiet[5]["key"]
    flip(shards, tmp_path / "shards", victim, change)
    dataset = ViewDataset(str(tmp_path / "shards"), image_size=8, num_views=4, seed=0)
    items = [dataset[position] for position in range(14)]
    assert items[5]["key"] != victim and set(items[5]["damaged"]) == {victim}
    reason = items[5]["damaged"][victim]
    assert words in reason and re.search(rf"shard-00000\d\.tar, object {victim}: ", reason)
    for position, item in enumerate(items):
        if not item["damaged"]:
            assert item["key"] == quiet[position]["key"]
            assert torch.equal(item["images"], quiet[position]["images"])
    again = ViewDataset(str(tmp_path / "shards"), image_size=8, num_views=4, seed=0)
    assert again[5]["key"] == items[5]["key"], "the same one on every rank and when the run goes on"


def test_nothing_whole_is_an_error(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    for path in (tmp_path / "shards").glob("*.tar"):
        path.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"objects tried for one place of a batch are all damaged; the first: .*shard-0"
    ):
        _ = ViewDataset(str(tmp_path / "shards"), image_size=8, num_views=4, seed=0)[0]


HOSTILE = {
    "NaN camera": lambda meta, files: meta["views"][0]["c2w"][0].__setitem__(0, float("nan")),
    "a number as file": lambda meta, files: meta["views"][0].update(file=7),
    "no ring": lambda meta, files: [view.update(role="eval") for view in meta["views"] if view["role"] == "ring"],
    "another size": lambda meta, files: files.update({"000.png": picture(9)}),
    "a bomb": lambda meta, files: files.update({"000.png": bomb()}),
    "another kind": lambda meta, files: files.update({"000.png": b"GIF89a" + bytes(50)}),
    "a list": lambda meta, files: meta.update(views={"a": 1}),
    "a lacking picture": lambda meta, files: files.pop("000.png"),
    "no CRC": lambda meta, files: meta["views"][0].pop("crc32"),
}


def picture(size: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", (size, size)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few bytes of header."""
    content = bytearray(picture(8))
    content[16:24] = (30000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize("kind", HOSTILE)
def test_shards_made_with_ill_intent(shards: Path, tmp_path: Path, kind: str) -> None:
    """Marks and CRCs are right, since whoever made the shards made them too."""
    folder, samples = ShardFolder(str(shards)), []
    manifest = read_manifest(shards)
    for row, uid in enumerate(manifest.shards[0].keys):
        with open_sample(folder, manifest.shards[0], row) as members:
            files = {suffix: members[suffix] for suffix in members.places}
        meta = json.loads(files.pop("json"))
        if row == 0:
            HOSTILE[kind](meta, files)
            for view in meta["views"] if isinstance(meta["views"], list) else ():
                if "crc32" in view:
                    view["crc32"] = {name: zlib.crc32(files.get(name, b"")) for name in view["crc32"]}
        samples.append(({"__key__": uid, **files, "json": json.dumps(meta).encode()}, "x"))
    (tmp_path / "evil").mkdir()
    shard = write_tar(tmp_path / "evil" / "shard-000000.tar", samples)
    write_manifest(tmp_path / "evil", Manifest(8, manifest.cameras, [shard]))
    dataset = ViewDataset(str(tmp_path / "evil"), image_size=8, num_views=4, seed=0)
    damaged = {uid: why for position in range(40) for uid, why in dataset[position]["damaged"].items()}
    assert set(damaged) == {shard.keys[0]}, damaged


@given(st.sampled_from([(1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (4, 1)]), st.integers(0, 5), st.integers(1, 3))
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_same_global_batches_for_any_ranks_and_workers(shards: Path, layout, step: int, more: int) -> None:
    """Killed at any step and gone on: the positions and pictures that one process without workers gives."""
    world, workers = layout
    batch = 4
    expected = ViewDataset(str(shards), image_size=8, num_views=2, seed=5)
    for rank in range(world):
        dataset = ViewDataset(str(shards), image_size=8, num_views=2, seed=5)
        stream = micro_batches(dataset, batch, 1, rank, world, step, workers)
        for number, got in enumerate(itertools.islice(stream, more * batch // world)):
            done, place = divmod(number, batch // world)
            position = (step + done) * batch + rank * (batch // world) + place
            assert got.positions == [position] and got.keys == [expected[position]["key"]]
            assert torch.equal(got.images[0], expected[position]["images"])


def test_shards_added_during_a_run_come_with_the_next_epoch(shards: Path) -> None:
    grown = read_manifest(shards)
    former = replace(grown, shards=grown.shards[:3])
    assert former.count == 6 and grown.count == 7
    spans = [Span(0, 0, former), Span(12, 2, grown)]
    dataset = ViewDataset(str(shards), image_size=8, num_views=2, seed=1, spans=spans)
    alone = ViewDataset(str(shards), image_size=8, num_views=2, seed=1, spans=spans[:1])
    keys = [dataset[position]["key"] for position in range(26)]
    assert keys[:12] == [alone[position]["key"] for position in range(12)]
    for epoch in (keys[12:19], keys[19:26]):
        assert sorted(epoch) == [f"o{n}" for n in range(7)]


@pytest.mark.parametrize(
    ("saved", "current", "consumed", "expected"),
    [
        ([], "a", 0, [(0, 0, "a")]),
        ([(0, 0, "a")], "a", 99, [(0, 0, "a")]),
        ([(0, 0, "a")], "b", 25, [(0, 0, "a"), (30, 3, "b")]),
        ([(0, 0, "a")], "b", 30, [(0, 0, "a"), (30, 3, "b")]),
        ([(0, 0, "a"), (30, 3, "b")], "c", 28, [(0, 0, "a"), (30, 3, "c")]),
        ([(0, 0, "a"), (30, 3, "b")], "c", 31, [(0, 0, "a"), (30, 3, "b"), (40, 4, "c")]),
    ],
)
def test_where_changed_shards_begin(saved, current: str, consumed: int, expected) -> None:
    spans = with_new_shards([SavedSpan(*span) for span in saved], current, 10, consumed)
    assert [(s.first, s.epoch, s.manifest) for s in spans] == expected


def test_a_million_samples_in_are_found_at_once(tmp_path: Path) -> None:
    """No time is asserted: reading on from there must not pass over what came before, so no shard need be there."""
    shard = Shard("shard-000000.tar", 10**10, "", [f"o{n}" for n in range(10**5)], list(range(0, 10**10, 10**5)),
                  [10**5] * 10**5, ["0" * 16] * 10**5, [""] * 10**5)  # fmt: skip
    manifest = Manifest(8, Cameras((0, 1), (1, 2), (1, 2)), [shard])
    write_manifest(tmp_path, manifest)
    dataset = ViewDataset(str(tmp_path), image_size=8, num_views=4, seed=0)
    span, number = dataset.object_at(10**6 + 1)
    assert (span, number) == (0, int(epoch_order(0, 10, 10**5)[1]))


def test_shuffling_is_that_of_a_random_permutation() -> None:
    """Neighbours in the shards are no nearer to each other in the stream than chance has it (1/3 of the epoch)."""
    order = epoch_order(0, 0, 10000)
    places = np.empty(10000)
    places[order] = np.arange(10000)
    assert abs(np.abs(np.diff(places)).mean() / 10000 - 1 / 3) < 0.02
    assert abs(np.corrcoef(np.arange(10000), order)[0, 1]) < 0.05


@pytest.fixture(scope="module")
def server(shards: Path):
    command = [sys.executable, str(Path(__file__).parent / "range_server.py"), str(shards), "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{process.stdout.readline().strip()}/plain"
    process.kill()
    process.wait()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_on_a_server_give_the_same_batches(shards: Path, server: str, tmp_path: Path, workers: int) -> None:
    remote = ShardFolder(server, CacheConfig(str(tmp_path / "cache"), 0.1))
    given = {"image_size": 8, "num_views": 4, "seed": 2}
    streams = [
        micro_batches(dataset, 4, 2, 0, 1, 3, workers)
        for dataset in (ViewDataset(str(shards), **given), ViewDataset(remote, **given))
    ]
    for ours, theirs in itertools.islice(zip(*streams, strict=False), 6):
        assert ours.keys == theirs.keys and torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.references, theirs.references) and not theirs.damaged
    assert verify(server, processes=1) == []
