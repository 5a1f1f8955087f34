"""Filters and splits, and the face counts that files tell."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.cli import ConfigError
from data.assets import Asset, list_assets
from data.faces import count_faces
from data.files import UserError
from data.selection import SelectConfig, matches, select_assets, split_of, with_faces

uids = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzABC0123456789_-"), min_size=1, max_size=40)
shares = st.floats(0, 0.5)


def make_asset(uid: str, license_: str = "", category: str = "", caption: str = "", faces: int | None = None) -> Asset:
    return Asset(uid, Path("/nowhere") / f"{uid}.fbx", "here", caption, category, license_, "", faces=faces)


ASSETS = [
    make_asset("a", "CC-BY-4.0", "chair; furniture-home", "A red chair", 10),
    make_asset("b", "CC0-1.0", "car_(automobile)", "A RED car", 1000),
    make_asset("c", "CC-BY-NC-4.0", "chair", "Old blue chair", 10**6),
    make_asset("d", "", "", "something", None),
]


def chosen(**config: object) -> str:
    return "".join(asset.uid for asset in select_assets(ASSETS, SelectConfig(**config)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "abcd"),
        ({"licenses": ["cc-by-4.0"]}, "a"),
        ({"licenses": ["CC-BY-*"]}, "ac"),
        ({"licenses": ["CC0-1.0", "CC-BY-4.0"]}, "ab"),
        ({"licenses": [""]}, "d"),
        ({"categories": ["Chair"]}, "ac"),
        ({"categories": ["furniture*", "car_*"]}, "ab"),
        ({"caption": "red"}, "ab"),
        ({"caption": "red*ch"}, "a"),
        ({"faces": [None, 1000]}, "abd"),
        ({"faces": [1000, None]}, "bcd"),
        ({"faces": [11, 10**6 - 1]}, "bd"),
        ({"categories": ["chair"], "caption": "old", "faces": [1, None]}, "c"),
    ],
)
def test_filters(config: dict[str, object], expected: str) -> None:
    assert chosen(**config) == expected


def test_what_cannot_be_is_said_with_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"licenses: no object has 'CC-BY-3\.0'; near it: CC-BY-.*\(unknown\) \(1\)"):
        chosen(licenses=["CC-BY-3.0"])
    with pytest.raises(UserError, match=r"categories: no object has 'chairs'; near it: chair; there are: chair \(2\)"):
        chosen(categories=["chair", "chairs"])
    with pytest.raises(UserError, match=r"none of 4 objects; removed by: licenses 3, caption 1; widen"):
        chosen(licenses=["CC0-1.0"], caption="chair")
    chosen(licenses=["CC*"], faces=[None, 1000])
    assert "listed 4, licenses 3, faces 2" in capsys.readouterr().err
    chosen(faces=[None, 1000])
    assert "faces (1 of unknown number kept) 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"faces": [1]}, "lowest, highest"),
        ({"faces": [-1, None]}, "lowest, highest"),
        ({"faces": [5, 4]}, "must ascend"),
        ({"split": "valid"}, "must be train, val, test"),
        ({"val_share": -0.1}, "must be shares"),
        ({"val_share": 0.6, "test_share": 0.5}, "must be shares"),
        ({"split": "val", "val_share": 0.0}, "has no objects"),
    ],
)
def test_configurations_that_cannot_work(config: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SelectConfig(**config)  # type: ignore[arg-type]


@given(st.lists(st.text("ab*", max_size=6), min_size=1, max_size=3), st.text("abAB", max_size=12))
def test_patterns_agree_with_fnmatch(patterns: list[str], text: str) -> None:
    from fnmatch import fnmatchcase

    for pattern in patterns:
        assert matches(pattern, text) == fnmatchcase(text.casefold(), pattern.casefold())


def test_a_hostile_pattern_takes_no_time() -> None:
    assert not matches("*a" * 5000 + "b", "a" * 100_000)


# --- splits ---


@given(st.lists(uids, min_size=1, max_size=40, unique=True), shares, shares, st.randoms())
def test_an_object_never_changes_sides(names: list[str], val: float, test: float, random: object) -> None:
    """Whatever else is in the list and in whatever order, the three splits part it."""
    assets = [make_asset(name) for name in names]
    alone = {name: split_of(name, val, test) for name in names}
    shuffled = assets[:]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    found = {}
    for split in set(alone.values()):
        config = SelectConfig(split=split, val_share=val, test_share=test)
        for asset in select_assets(shuffled, config):
            assert asset.uid not in found
            found[asset.uid] = split
    assert found == alone


@given(uids, shares, shares, shares)
def test_a_growing_share_takes_from_train_only(uid: str, val: float, more: float, test: float) -> None:
    low, high = sorted((val, more))
    before, after = split_of(uid, low, test), split_of(uid, high, test)
    assert before == after or (before, after) == ("train", "val")
    before, after = split_of(uid, test, low), split_of(uid, test, high)
    assert before == after or (before, after) == ("train", "test")


@given(st.integers(0, 10**9), st.floats(0.01, 0.4), st.floats(0.01, 0.4))
@settings(max_examples=20)
def test_shares_are_kept(first: int, val: float, test: float) -> None:
    """Within five standard deviations of the binomial distribution."""
    count = 4000
    splits = [split_of(f"object{first + i}", val, test) for i in range(count)]
    for name, share in (("val", val), ("test", test)):
        assert abs(splits.count(name) - count * share) < 5 * math.sqrt(count * share * (1 - share))


def test_the_split_is_the_hash_that_the_docstring_says() -> None:
    place = int(hashlib.sha256(b"teddy").hexdigest()[:12], 16) / 2**48
    assert split_of("teddy", place + 1e-9, 0) == "val" and split_of("teddy", place - 1e-9, 0) == "train"
    assert split_of("teddy", 0, 1 - place + 1e-9) == "test" and split_of("teddy", 0, 1 - place - 1e-9) == "train"


# --- face counts ---


@pytest.mark.parametrize("suffix", ["glb", "gltf", "obj", "ply"])
def test_faces_of_files_that_trimesh_wrote(tmp_path: Path, suffix: str) -> None:
    mesh = trimesh.creation.icosphere(subdivisions=3)
    path = tmp_path / f"ball.{suffix}"
    if suffix == "gltf":
        for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh)).items():
            (tmp_path / ("ball.gltf" if name.endswith(".gltf") else name)).write_bytes(content)
    else:
        mesh.export(path)
    assert count_faces(path) == len(mesh.faces) == 1280
    (asset,) = with_faces(list_assets(tmp_path))
    assert asset.faces == 1280


def test_a_mesh_shown_twice_counts_twice(tmp_path: Path) -> None:
    scene = trimesh.Scene()
    box = trimesh.creation.box()
    scene.add_geometry(box, geom_name="box")
    for x in (3.0, 6.0):
        scene.graph.update(frame_to=f"copy{x}", matrix=trimesh.transformations.translation_matrix([x, 0, 0]),
                           geometry="box")  # fmt: skip
    scene.export(tmp_path / "three.glb")
    assert count_faces(tmp_path / "three.glb") == 36


def test_faces_of_an_ascii_ply_and_an_odd_obj(tmp_path: Path) -> None:
    (tmp_path / "a.ply").write_text(trimesh.creation.box().export(file_type="ply", encoding="ascii").decode())
    assert count_faces(tmp_path / "a.ply") == 12
    (tmp_path / "a.obj").write_bytes(b"f 1 2 3\r\n  f\t1 2 3 4\r\nfoo\n# f 1 2 3\nvf 1\nf 1/1 2/2 3/3")
    assert count_faces(tmp_path / "a.obj") == 3
    trimesh.PointCloud(np.zeros((5, 3))).export(tmp_path / "points.ply")
    assert count_faces(tmp_path / "points.ply") == 0


@pytest.mark.parametrize("suffix", ["glb", "gltf", "obj", "ply", "fbx"])
def test_faces_of_damaged_files_are_unknown(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    assert count_faces(path) is None
    path.write_bytes(b"")
    assert count_faces(path) in (None, 0) and (suffix == "obj" or count_faces(path) is None)


@pytest.mark.parametrize(
    "gltf",
    [
        b"[]",
        b"{" * 10**5,
        b'{"meshes": [{"primitives": [{"attributes": {}}]}]}',
        b'{"meshes": [{"primitives": [{"indices": 5, "attributes": {}}]}], "accessors": []}',
        b'{"meshes": [{"primitives": [{"indices": 0, "attributes": {}}]}], "accessors": [{"count": -3}]}',
        b'{"meshes": [{"primitives": [{"indices": 0, "attributes": {}}]}], "accessors": [{"count": "9"}]}',
        b'{"nodes": [{"mesh": 1}], "meshes": []}',
        b'{"nodes": [{"mesh": -1}], "meshes": [{"primitives": []}]}',
        b'{"nodes": [5]}',
    ],
)
def test_faces_of_hostile_gltf_are_unknown(tmp_path: Path, gltf: bytes) -> None:
    (tmp_path / "a.gltf").write_bytes(gltf)
    head = b"glTF" + (2).to_bytes(4, "little") + (20 + len(gltf)).to_bytes(4, "little")
    (tmp_path / "a.glb").write_bytes(head + len(gltf).to_bytes(4, "little") + b"JSON" + gltf)
    assert count_faces(tmp_path / "a.gltf") is None and count_faces(tmp_path / "a.glb") is None
    (tmp_path / "a.glb").write_bytes(head + (2**32 - 1).to_bytes(4, "little") + b"JSON" + gltf)
    assert count_faces(tmp_path / "a.glb") is None
    (tmp_path / "a.ply").write_bytes(b"ply\nformat ascii 1.0\nelement face 999999999\nend_header\n3 0 1 2\n")
    assert count_faces(tmp_path / "a.ply") is None


def test_faces_of_a_folder_may_be_told(tmp_path: Path) -> None:
    (tmp_path / "a.fbx").write_bytes(b"")
    (tmp_path / "b.fbx").write_bytes(b"")
    (tmp_path / "assets.json").write_text(json.dumps({"a": {"faces": 7, "license": "CC0-1.0"}}))
    assert [asset.faces for asset in with_faces(list_assets(tmp_path))] == [7, None]
    (tmp_path / "assets.json").write_text(json.dumps({"a": {"faces": -7}}))
    with pytest.raises(UserError, match="faces=-7 is not a number of faces"):
        list_assets(tmp_path)
