"""Where the demo's objects come from, with apt and dpkg played by scripts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.assets import list_assets
from data.blender_pool import check_blender, find_blender
from demo import objects
from demo.objects import LIBRARY, MAKERS, PACKAGE, fetch_objects

UNPACK = (
    f'mkdir -p "$3/usr/share/sweethome3d/furniture" && echo library > "$3/usr/share/sweethome3d/furniture/{LIBRARY}"'
)
URI = f"\\'http://archive/{PACKAGE}_1_all.deb\\' {PACKAGE}_1_all.deb 2000000 SHA256:00"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("mkdir", "touch"):
        (folder / name).symlink_to(f"/bin/{name}")
    monkeypatch.setenv("PATH", str(folder))
    return folder


def program(folder: Path, name: str, words: str) -> None:
    (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/calls\n{words}\n')
    (folder / name).chmod(0o755)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def test_the_library_is_downloaded_once_and_nothing_is_installed(programs: Path, tmp_path: Path) -> None:
    program(programs, "apt-get", f'case "$*" in *--print-uris*) echo {URI};; *) touch {PACKAGE}_1.8-1_all.deb;; esac')
    program(programs, "dpkg-deb", UNPACK)
    source, words = fetch_objects(tmp_path / "cache")
    assert source == tmp_path / "cache" / LIBRARY and source.read_text() == "library\n" and "CC0" in words
    assert fetch_objects(tmp_path / "cache")[0] == source
    size, download, unpack = calls(programs)
    assert size == f"apt-get download --print-uris {PACKAGE}" and download == f"apt-get download {PACKAGE}"
    assert unpack.startswith("dpkg-deb -x ")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [LIBRARY]


def test_package_lists_are_fetched_beside_the_machine_s_own(programs: Path, tmp_path: Path) -> None:
    known = f"*State*--print-uris*) echo {URI};; *State*) touch {PACKAGE}_1_all.deb;;"
    program(programs, "apt-get", f'case "$*" in *update*) exit 0;; {known} *) exit 100;; esac')
    program(programs, "dpkg-deb", UNPACK)
    fetch_objects(tmp_path / "cache")
    first, update, size, again, _ = calls(programs)
    assert first == f"apt-get download --print-uris {PACKAGE}"
    assert "Dir::State::lists=" in update and update.endswith(" update")
    assert "Dir::State::lists=" in size and "Dir::State::lists=" in again and again.endswith(f" download {PACKAGE}")


@pytest.mark.parametrize("lacks", ["apt-get", "network", "library"])
def test_parametric_objects_where_there_is_no_package(
    programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks: str
) -> None:
    made: list[Path] = []
    monkeypatch.setattr(objects, "make_parametric", made.append)
    if lacks == "network":
        program(programs, "apt-get", "echo 'E: Temporary failure resolving deb.debian.org' >&2; exit 100")
    elif lacks == "library":
        program(programs, "apt-get", f"touch {PACKAGE}_1_all.deb")
    program(programs, "dpkg-deb", ":")
    source, words = fetch_objects(tmp_path / "cache")
    assert made == [source] == [tmp_path / "cache" / "parametric"]
    expected = {"apt-get": "no apt-get here", "network": "Temporary failure", "library": f"holds no {LIBRARY}"}
    assert expected[lacks] in words and "parametric" in words
    assert not list((tmp_path / "cache").glob(f".{PACKAGE}"))


def test_parametric_objects_are_whole_and_made_once(tmp_path: Path) -> None:
    check_blender(find_blender())
    objects.make_parametric(tmp_path / "parametric")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parametric").iterdir()}
    objects.make_parametric(tmp_path / "parametric")
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parametric").iterdir()} == before
    assets = list_assets(tmp_path / "parametric")
    assert {asset.uid for asset in assets} == set(MAKERS)
    assert {asset.license for asset in assets} == {"CC0-1.0"}
    assert json.loads((tmp_path / "parametric" / "assets.json").read_text())["mug"]["caption"] == "a mug"
