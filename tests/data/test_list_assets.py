"""The command that looks at a source."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import trimesh

from data.assets import list_assets
from data.list_assets import ListConfig, main, table
from data.selection import SelectConfig, split_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """20 real objects, of which every fourth has a licence."""
    source = tmp_path / "objects"
    source.mkdir()
    facts = {}
    for i in range(20):
        trimesh.creation.icosphere(subdivisions=i % 3).export(source / f"ball{i}.glb")
        if i % 4 == 0:
            facts[f"ball{i}"] = {"license": "CC0-1.0", "category": "ball; toy", "caption": 'a "ball", =round\x1b[2J'}
    (source / "assets.json").write_text(json.dumps(facts))
    return source


def test_the_tables_and_the_csv(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ListConfig(source=str(folder), count_faces=True, out=str(tmp_path / "a.csv")))
    said = capsys.readouterr().out
    for line in ("20 objects", "       5  CC0-1.0", "      15  (unknown)", "       5  toy", "faces, known of 20",
                 "        0%  20", "       50%  80", "      100%  320"):  # fmt: skip
        assert line in said, (line, said)
    assets = {asset.uid: asset for asset in list_assets(folder)}
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["uid"] for row in rows] == sorted(assets)
    for row in rows:
        asset = assets[row["uid"]]
        assert (row["path"], row["caption"], row["license"]) == (str(asset.path), asset.caption, asset.license)
        assert row["split"] == split_of(asset.uid, 0.01, 0.01) and int(row["faces"]) in (20, 80, 320)


def test_what_is_selected_is_what_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(ListConfig(source=str(folder), select=SelectConfig(licenses=["CC0*"], faces=[21, None])))
    said = capsys.readouterr()
    assert said.out.startswith("3 objects") and "listed 20, licenses 5, faces 3" in said.err


def test_tables_show_the_most_frequent_and_obey_nothing() -> None:
    counts = Counter({"a": 5, "": 3, "red\x1b[2J": 2, "z": 1})
    assert table("x", counts, 3)[2:] == ["         5  a", "         2  'red\\x1b[2J'", "         3  (unknown)",
                                         "         1  (1 more)"]  # fmt: skip


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "data" / "list_assets.py"), f"source={folder}", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    found = command("select.licenses=[CC0-1.0,CC0*]", "select.faces=[null,80]", f"out={tmp_path / 'b.csv'}")
    assert found.returncode == 0 and "4 objects" in found.stdout and "\x1b" not in found.stdout, found
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 5
    wrong = command("select.licenses=[CC-BY-4.0]")
    assert wrong.returncode == 2 and "select.licenses: no object has 'CC-BY-4.0'" in wrong.stderr
    wrong = command("select.face=[1,2]")
    assert wrong.returncode == 2 and "unknown key select.face; the nearest known key is select.faces" in wrong.stderr
