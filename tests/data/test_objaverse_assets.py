"""Objaverse from a folder of the real layout, damaged ones included, and through its package from a real server."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trimesh

from data import objaverse_assets
from data.assets import Asset, list_assets
from data.faces import count_faces
from data.files import UserError
from data.objaverse_assets import SOURCE, Downloads, Fetched, read_uids
from data.rendering import RenderConfig, render_all

UIDS = [f"{i:032x}" for i in (7, 8, 9, 10)]
FACTS: dict[str, dict[str, Any]] = {
    UIDS[0]: {
        "uid": UIDS[0],
        "name": " A red\n chair ",
        "license": "by-nc-sa",
        "user": {"username": "ann", "displayName": "Ann B."},
        "categories": [{"name": "furniture-home"}, {"name": "art; abstract"}],
        "faceCount": 12,
    },
    UIDS[1]: {"name": "Car", "license": "cc0", "user": {"username": "bob"}, "categories": [], "faceCount": 99},
    UIDS[2]: {"name": None, "license": None, "user": None, "categories": None, "faceCount": None},
}


def write_gz(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(json.dumps(value).encode()))


def make_download(root: Path) -> Path:
    """The layout of hf-objaverse-v1: two folders of objects, of which the last object has no metadata."""
    places = {uid: f"glbs/000-00{i // 2}/{uid}.glb" for i, uid in enumerate(UIDS)}
    write_gz(root / "object-paths.json.gz", places)
    write_gz(root / "metadata" / "000-000.json.gz", {uid: FACTS[uid] for uid in UIDS[:2]})
    write_gz(root / "metadata" / "000-001.json.gz", {UIDS[2]: FACTS[UIDS[2]]})
    write_gz(root / "lvis-annotations.json.gz", {"chair": [UIDS[0]], "car_(automobile)": [UIDS[1]]})
    for place in places.values():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box().export(root / place)
    return root


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OBJAVERSE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return make_download(tmp_path / "hf-objaverse-v1")


def test_what_is_known_of_each_object(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assets = list_assets("objaverse")
    assert [asset.uid for asset in assets] == UIDS
    assert assets[0] == Asset(
        UIDS[0], root / f"glbs/000-000/{UIDS[0]}.glb", SOURCE, "A red chair",
        "chair; furniture-home; art, abstract", "CC-BY-NC-SA-4.0", "Ann B.", faces=12,
    )  # fmt: skip
    assert (assets[1].license, assets[1].creator, assets[1].category) == ("CC0-1.0", "bob", "car_(automobile)")
    for unknown in assets[2:]:
        assert (unknown.caption, unknown.license, unknown.creator, unknown.faces) == ("", "", "", None)
        assert count_faces(unknown.path) == 12
    assert "of 1 of 4 objects" in capsys.readouterr().err
    assert fetched(assets) == [Fetched(asset) for asset in assets]


@pytest.mark.parametrize("name", ["uids.txt", "uids.json"])
def test_a_list_of_uids(root: Path, tmp_path: Path, name: str) -> None:
    chosen = [UIDS[2], UIDS[0]]
    text = json.dumps(chosen) if name.endswith("json") else f"# two\n{chosen[0]}  # a note\n\n{chosen[1]}\n"
    (tmp_path / name).write_text(text)
    assert read_uids(tmp_path / name) == chosen
    assert [asset.uid for asset in list_assets(f"objaverse:{tmp_path / name}")] == sorted(chosen)
    (only,) = list_assets(f"objaverse:{tmp_path / name}", names=[UIDS[2]])
    assert only.uid == UIDS[2]
    with pytest.raises(UserError, match=f"names: '{UIDS[1]}'"):
        list_assets(f"objaverse:{tmp_path / name}", names=[UIDS[1]])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "deadbeef\n", "'deadbeef' is no UID"),
        ("a.txt", "# none\n", "must hold UIDs"),
        ("a.json", '{"uids": []}', "must hold UIDs"),
        ("a.json", "[1, 2]", "must hold UIDs"),
        ("a.json", "[", "cannot be read"),
        ("missing.txt", None, "cannot be read"),
    ],
)
def test_bad_lists_of_uids(root: Path, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        list_assets(f"objaverse:{tmp_path / name}")


def test_objects_that_are_not_in_the_folder_are_left_out_and_counted(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / f"glbs/000-000/{UIDS[1]}.glb").unlink()
    assert [asset.uid for asset in list_assets("objaverse")] == [UIDS[0], *UIDS[2:]]
    assert "1 of 4 objects are not in" in capsys.readouterr().err
    for path in root.glob("glbs/*/*.glb"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds none of the objects.*pip install '\.\[objaverse\]'"):
        list_assets("objaverse")
    (root / "object-paths.json.gz").unlink()
    with pytest.raises(UserError, match=r"object-paths\.json\.gz does not exist"):
        list_assets("objaverse")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("object-paths.json.gz", {UIDS[0]: f"glbs/../../{UIDS[0]}.glb"}, "is not glbs/NNN-NNN"),
        ("object-paths.json.gz", {UIDS[0]: f"/etc/{UIDS[0]}.glb"}, "is not glbs/NNN-NNN"),
        ("object-paths.json.gz", {"../x": "glbs/000-000/../x.glb"}, "is not glbs/NNN-NNN"),
        ("object-paths.json.gz", {UIDS[0]: f"glbs/000-000/{UIDS[1]}.glb"}, "is not glbs/NNN-NNN"),
        ("object-paths.json.gz", {UIDS[0]: 5}, "is not glbs/NNN-NNN"),
        ("object-paths.json.gz", [UIDS[0]], "holds a JSON list"),
        ("lvis-annotations.json.gz", {"chair": "all"}, "'chair' is no list of UIDs"),
        ("lvis-annotations.json.gz", {"chair": [1]}, "'chair' is no list of UIDs"),
        ("metadata/000-000.json.gz", {UIDS[0]: "a chair"}, f"{UIDS[0]}: entry='a chair' is no dict"),
        ("metadata/000-000.json.gz", {UIDS[0]: {"name": ["x"]}}, "name=.* is no str"),
        ("metadata/000-000.json.gz", {UIDS[0]: {"user": "ann"}}, "user='ann' is no dict"),
        ("metadata/000-000.json.gz", {UIDS[0]: {"categories": ["x"]}}, "categories='x' is no dict"),
        ("metadata/000-000.json.gz", {UIDS[0]: {"faceCount": "12"}}, "faceCount='12' is no int"),
        ("metadata/000-000.json.gz", {UIDS[0]: {"faceCount": True}}, "faceCount='True' is no int"),
        ("metadata/000-000.json.gz", {UIDS[0]: {"license": 3}}, "license='3' is no str"),
    ],
)
def test_wrong_types_and_unsafe_paths_are_refused(root: Path, file: str, content: Any, message: str) -> None:
    write_gz(root / file, content)
    with pytest.raises(UserError, match=message) as caught:
        list_assets("objaverse")
    assert str(root / file) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no gzip", "no json", "deep", "empty", "large"])
@pytest.mark.parametrize("file", ["object-paths.json.gz", "metadata/000-001.json.gz", "lvis-annotations.json.gz"])
def test_damaged_files_are_named(root: Path, file: str, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / file
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "truncated": content[:-9],
        "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
        "no gzip": b'{"a": 1}',
        "no json": gzip.compress(b"{"),
        "deep": gzip.compress(b"[" * 10**6),
        "empty": b"",
        "large": gzip.compress(b"{" + b" " * 10**5 + b"}"),
    }
    path.write_bytes(damaged[damage])
    if damage == "large":
        monkeypatch.setattr(objaverse_assets, "JSON_LIMIT", 10**4)
    with pytest.raises(UserError, match=r"cannot be read|unpacks to more") as caught:
        list_assets("objaverse")
    assert str(path) in str(caught.value)


# --- through the package, which is an extra: from a real server that stands where the package looks for the hub ---


class Hub(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix("/datasets/allenai/objaverse/resolve/main"))

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serves a dataset on loopback; requests of huggingface.co are led to it.  Yields the served folder."""

    monkeypatch.setenv("OBJAVERSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    served = make_download(tmp_path / "served")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=str(served))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        class ToLoopback(urllib.request.HTTPSHandler):
            def https_open(self, request: urllib.request.Request) -> Any:
                assert request.host == "huggingface.co"
                return opener.open(f"http://127.0.0.1:{server.server_port}{request.selector}")

        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        monkeypatch.setattr(
            urllib.request, "_opener", urllib.request.build_opener(urllib.request.ProxyHandler({}), ToLoopback)
        )
        yield served
        server.shutdown()


def fetched(assets: list[Asset]) -> list[Fetched]:
    with Downloads(assets) as downloads:
        return list(downloads)


def test_the_package_fetches_lists_first_and_only_missing_objects(hub: Path, tmp_path: Path) -> None:
    home = tmp_path / "home" / "hf-objaverse-v1"
    assets = list_assets("objaverse")
    assert [asset.uid for asset in assets] == UIDS and assets[0].license == "CC-BY-NC-SA-4.0"
    assert not list(home.rglob("*.glb"))
    assert fetched(assets[:2]) == [Fetched(asset, is_new=True) for asset in assets[:2]]
    assert {path.stem for path in home.rglob("*.glb")} == set(UIDS[:2])
    before = assets[0].path.stat().st_mtime_ns
    assert [item.is_new for item in fetched(assets)] == [False, False, True, True]
    assert assets[0].path.stat().st_mtime_ns == before
    assert all(count_faces(asset.path) == 12 for asset in assets)
    assert not list(home.rglob("*.tmp"))


def test_an_object_that_the_server_lacks_costs_that_object_alone(hub: Path) -> None:
    assets = list_assets("objaverse")
    next(hub.rglob(f"{UIDS[1]}.glb")).unlink()
    items = fetched(assets)
    assert [item.asset.uid for item in items if item.error is None] == [UIDS[0], *UIDS[2:]]
    assert "HTTP Error 404" in str(items[1].error)


def test_only_so_many_are_fetched_ahead(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objaverse_assets, "AHEAD", 2)
    with Downloads(list_assets("objaverse")) as downloads:
        for number, item in enumerate(downloads):
            assert item.asset.uid == UIDS[number] and item.asset.path.is_file()
            assert len(list((tmp_path / "home").rglob("*.glb"))) <= 2
            item.asset.path.unlink()
    assert number == 3


def test_no_network_is_told_from_what_is_not_there(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets = list_assets("objaverse")

    class Down(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(objaverse_assets, "TRIES", 1)
    monkeypatch.setattr(urllib.request, "_opener", urllib.request.build_opener(urllib.request.ProxyHandler({}), Down))
    with pytest.raises(UserError, match=r"network gives nothing.*HF_HUB_OFFLINE=1"):
        fetched(assets)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="and 3 more are not there"):
        fetched(assets)


def test_rendering_fetches_as_it_goes_and_leaves_no_downloads(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    next(hub.rglob(f"{UIDS[1]}.glb")).unlink()
    settings = RenderConfig(
        source="objaverse", out=str(tmp_path / "views"), resolution=32, samples=1, denoise=False, rings=1,
        views_per_ring=4, references=1, eval_views=0, keep_downloads=False, processes=2,
    )  # fmt: skip
    render_all(settings)
    assert sorted(path.parent.name for path in (tmp_path / "views").glob("[!.]*/meta.json")) == [UIDS[0], *UIDS[2:]]
    assert not list((tmp_path / "home").rglob("*.glb")), "what was fetched is gone again"
    said = capsys.readouterr().err
    assert "fetching 4 objects" in said and f"{UIDS[1]} failed: cannot be fetched: HTTP Error 404" in said
    render_all(settings)
    said = capsys.readouterr().err
    assert "4 objects, 3 already there, 0 to render" in said and "fetching" not in said
