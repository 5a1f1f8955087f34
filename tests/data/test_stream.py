"""The stream: one order for every number of ranks, everything once an epoch, going on anywhere."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.files import UserError
from data.packing import pack
from data.stream import RankPositions, ViewDataset, choose_views, epoch_order, keyed_generator, micro_batches


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
    pack(folder / "views", folder / "shards", shard_mb=0.02)
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
    dataset = ViewDataset(shards, image_size=8, num_views=4, seed=3)
    quiet = list(itertools.islice(micro_batches(dataset, 4, 2, 1, 2, 0, 0), 6))
    resumed = list(itertools.islice(micro_batches(dataset, 4, 2, 1, 2, 2, workers), 4))
    for a, b in zip(quiet[2:], resumed, strict=True):
        assert a.keys == b.keys and a.positions == b.positions
        assert torch.equal(a.images, b.images) and torch.equal(a.references, b.references)


def test_every_object_once_an_epoch(shards: Path) -> None:
    dataset = ViewDataset(shards, image_size=8, num_views=4, seed=0)
    keys = [dataset[position]["key"] for position in range(21)]
    for epoch in range(3):
        assert sorted(keys[7 * epoch : 7 * epoch + 7]) == [f"o{n}" for n in range(7)]
    assert keys[:7] != keys[7:14] or keys[7:14] != keys[14:], "epochs have orders of their own"


def test_what_a_sample_holds(shards: Path) -> None:
    dataset = ViewDataset(shards, image_size=8, num_views=2, seed=0)
    sample = dataset[5]
    assert sample["images"].shape == (2, 3, 8, 8) and sample["c2w"].shape == (2, 4, 4)
    number = int(sample["key"][1:])
    assert torch.allclose(sample["images"][:, 0], torch.tensor(30 * number / 255 * 2 - 1))
    assert sample["references"].shape == (1, 3, 8, 8) and float(sample["references"][0, 1, 0, 0] * 255) >= 160
    both = ViewDataset(shards, image_size=8, num_views=2, seed=0, num_references=2)[5]
    assert torch.equal(both["references"][0], sample["references"][0]), "more references leave the first one alone"
    assert not torch.equal(both["references"][0], both["references"][1]) and both["reference_c2w"].shape == (2, 4, 4)
    with pytest.raises(UserError, match=r"has 2 reference views and model\.ema\.references=3"):
        _ = ViewDataset(shards, image_size=8, num_views=2, seed=0, num_references=3)[5]


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


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda b: b.replace(b"IDAT", b"IDAX"), "is not a PNG or WebP picture"),
        (lambda b: b.replace(b'"c2w"', b'"c2v"'), "its metadata is damaged"),
        (lambda b: b.replace(b"[1.0, 0.0, 0.0, 0.0]", b"[ NaN,0.0, 0.0, 0.0]"), "is not a finite 4 x 4 matrix"),
        (lambda b: b.replace(b'"role": "ring"', b'"role": 123456'), "is no str"),
        (lambda b: b.replace(b'{"resolution"', b'["resolution"'), "its metadata is damaged"),
    ],
)
def test_damage_inside_a_sample_names_shard_and_object(shards: Path, tmp_path: Path, spoil, words: str) -> None:
    """The same sizes, so that only reading finds it."""
    shutil.copytree(shards, tmp_path / "shards")
    for path in (tmp_path / "shards").glob("*.tar"):
        content = path.read_bytes()
        spoilt = spoil(content)
        assert spoilt != content and len(spoilt) == len(content)
        path.write_bytes(spoilt)
    dataset = ViewDataset(tmp_path / "shards", image_size=8, num_views=4, seed=0)
    with pytest.raises(UserError, match=rf"shards: .*shard-00000\d\.tar, object o\d: .*{re.escape(words)}"):
        _ = dataset[0]
