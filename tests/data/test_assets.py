"""Listing of folders and libraries, hostile ones included."""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import sweethome
from data.assets import IDENTITY, list_assets, safe_uids
from data.files import UserError
from data.sweethome import parse_properties

CATALOG = r"""# a comment
id=Lib
license=Public domain
name#1=Caf\u00e9 chair
category#1=Seats
creator#1=Somebody, \
   and another
model#1=/lib/chair/chair.obj
name#2=Lamp
model#2=/lib/lamp/lamp.obj
license#2=CC-BY 3.0
modelRotation#2=1 0 0 0 0 1 0 -1 0
"""


def make_library(path: Path, members: dict[str, bytes] | None = None, catalog: str | None = CATALOG) -> Path:
    members = (
        {
            "lib/chair/chair.obj": b"v 0 0 0\n",
            "lib/chair/wood.jpg": b"jpg",
            "lib/chair.png": b"icon",
            "lib/lamp/lamp.obj": b"v 1 1 1\n",
        }
        if members is None
        else members
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        if catalog is not None:
            archive.writestr(sweethome.CATALOG, catalog)
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_library_names_licences_and_unpacks_only_what_is_chosen(tmp_path: Path) -> None:
    library = make_library(tmp_path / "lib.sh3f")
    (chair,) = list_assets(library, tmp_path / "cache", ["chair"])
    assert (chair.uid, chair.caption, chair.category) == ("chair", "Café chair", "Seats")
    assert (chair.license, chair.creator, chair.source) == ("Public domain", "Somebody, and another", "Lib")
    assert chair.rotation == IDENTITY
    found = sorted(p.relative_to(tmp_path / "cache").as_posix() for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert found == ["chair/chair.obj", "chair/wood.jpg"]
    lamp = list_assets(library, tmp_path / "cache")[1]
    assert (lamp.license, lamp.rotation) == ("CC-BY 3.0", (1, 0, 0, 0, 0, 1, 0, -1, 0))


def test_library_is_unpacked_once(tmp_path: Path) -> None:
    library = make_library(tmp_path / "lib.sh3f")
    first = list_assets(library, tmp_path / "cache")[0].path.stat().st_mtime_ns
    assert list_assets(library, tmp_path / "cache")[0].path.stat().st_mtime_ns == first
    list_assets(library, tmp_path / "cache")[0].path.unlink()
    assert list_assets(library, tmp_path / "cache")[0].path.read_bytes() == b"v 0 0 0\n"


@pytest.mark.parametrize("name", ["lib/chair/..", "lib/chair/..\\..\\evil.obj", "lib/chair/a\\b"])
def test_unsafe_member_names_are_refused(tmp_path: Path, name: str) -> None:
    library = make_library(tmp_path / "lib.sh3f", {"lib/chair/chair.obj": b"v", name: b"x", "lib/lamp/lamp.obj": b"v"})
    with pytest.raises(UserError, match="unsafe name"):
        list_assets(library, tmp_path / "a" / "cache")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("model", ["../../evil.obj", "/../evil.obj", "//etc/evil.obj"])
def test_models_cannot_be_written_outside_the_cache(tmp_path: Path, model: str) -> None:
    catalog = f"name#1=Evil\nmodel#1={model}\n"
    library = make_library(tmp_path / "lib.sh3f", {model.lstrip("/"): b"v 0 0 0"}, catalog)
    (asset,) = list_assets(library, tmp_path / "a" / "b" / "cache")
    assert asset.path == tmp_path / "a" / "b" / "cache" / "evil" / "evil.obj"
    assert [p for p in tmp_path.rglob("evil.obj")] == [asset.path]


def test_size_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = make_library(tmp_path / "lib.sh3f", {"lib/chair/chair.obj": b"0" * 5000, "lib/lamp/lamp.obj": b"v"})
    monkeypatch.setattr(sweethome, "MEMBER_LIMIT", 4000)
    with pytest.raises(UserError, match=r"chair\.obj unpacks to 5000 bytes"):
        list_assets(library, tmp_path / "cache")
    monkeypatch.setattr(sweethome, "MEMBER_LIMIT", 6000)
    monkeypatch.setattr(sweethome, "OBJECT_LIMIT", 4000)
    with pytest.raises(UserError, match="more than 4000 bytes"):
        list_assets(library, tmp_path / "cache")
    monkeypatch.setattr(sweethome, "CATALOG_LIMIT", 10)
    with pytest.raises(UserError, match=sweethome.CATALOG):
        list_assets(library, tmp_path / "cache")


def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    """The directory says 10 bytes, the data unpack to 5000: a zip bomb's trick."""
    library = make_library(tmp_path / "lib.sh3f", {"lib/chair/chair.obj": b"0" * 5000, "lib/lamp/lamp.obj": b"v"})
    content = library.read_bytes().replace((5000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    library.write_bytes(content)
    with pytest.raises(UserError, match="not a readable"):
        list_assets(library, tmp_path / "cache")
    assert not (tmp_path / "cache" / "chair").exists()


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give a folder"):
        list_assets(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no \.glb"):
        list_assets(tmp_path / "empty")
    (tmp_path / "text.sh3f").write_text("not a zip")
    with pytest.raises(UserError, match="not a readable"):
        list_assets(tmp_path / "text.sh3f")
    (tmp_path / "a.stl").write_text("solid")
    with pytest.raises(UserError, match="neither a folder nor"):
        list_assets(tmp_path / "a.stl")
    with pytest.raises(UserError, match="not a Sweet Home 3D library"):
        list_assets(make_library(tmp_path / "other.sh3f", catalog=None))
    with pytest.raises(UserError, match="which it does not hold"):
        list_assets(make_library(tmp_path / "gone.sh3f", {"lib/lamp/lamp.obj": b"v"}), tmp_path / "cache", ["chair"])
    with pytest.raises(UserError, match=r"no object 'chairs'; near it: chair"):
        list_assets(make_library(tmp_path / "lib.sh3f"), tmp_path / "cache", ["chairs"])


def test_folder_with_facts(tmp_path: Path) -> None:
    for name in ("b.glb", "sub/red_car.OBJ", ".hidden/x.glb", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "assets.json").write_text(json.dumps({"b": {"caption": "A bee", "front_yaw_deg": 90}}))
    first, second = list_assets(tmp_path)
    assert (first.uid, first.caption, first.front_yaw_deg) == ("b", "A bee", 90)
    assert (second.uid, second.caption) == ("sub__red_car", "red car")
    assert list_assets(tmp_path, names=["red_car"]) == [second]
    (tmp_path / "assets.json").write_text(json.dumps({"b": {"front_yaw_deg": "left"}}))
    with pytest.raises(UserError, match="front_yaw_deg='left'"):
        list_assets(tmp_path)


def test_a_folder_is_searched_in_depth_and_links_are_not_a_way_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("a.FBX", "sub/deep/b.ply", "sub/c.gltf", "d.glb.txt", "folder.glb/e.obj"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.glb").write_bytes(b"")
    (source / "linked").symlink_to(tmp_path / "outside")
    (source / "loop").symlink_to(source)
    (source / "broken.glb").symlink_to(tmp_path / "nothing.glb")
    (source / "file.glb").symlink_to(source / "a.FBX")
    digest = hashlib.sha256(b"folder.glb/e.obj").hexdigest()[:10]  # since the dot alone would be ambiguous
    assert [asset.uid for asset in list_assets(source)] == [
        "a",
        "file",
        f"folder_glb__e-{digest}",
        "sub__c",
        "sub__deep__b",
    ]
    assert all(asset.path.is_file() and asset.faces is None for asset in list_assets(source))


def test_a_source_called_objaverse_is_the_dataset_unless_it_is_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "objaverse").mkdir()
    (tmp_path / "objaverse" / "a.obj").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OBJAVERSE_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [asset.uid for asset in list_assets("./objaverse")] == ["a"]
    with pytest.raises(UserError, match=r"object-paths\.json\.gz does not exist"):
        list_assets("objaverse")


@given(st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=30, unique=True))
def test_uids_are_safe_unique_and_independent_of_order(stems: list[str]) -> None:
    names = [stem.replace("\0", "0").strip("/") or "x" for stem in stems]
    paths = sorted({name + ".glb" for name in names} | {name + ".obj" for name in names[:3]})
    uids = safe_uids(paths)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,90}", uid) for uid in uids)
    assert len({uid.lower() for uid in uids}) == len(uids)
    assert dict(zip(paths, uids, strict=True)) == dict(zip(paths[::-1], safe_uids(paths[::-1]), strict=True))


def test_properties_format() -> None:
    assert parse_properties("a = b\\u00e9=c\n! x\n\nd=one, \\\n   two\r\n") == {"a": "bé=c", "d": "one, two"}
