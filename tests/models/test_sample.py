"""models/sample.py as a user starts it, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import small_model

from conf.cli import ConfigError
from data.cameras import camera_conditioning, orbit_camera
from data.files import UserError
from models.checkpoint import save_export
from models.config import ReferenceConfig
from models.sample import SampleConfig, main, pictures

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A folder with export/ and two pictures."""
    folder = tmp_path_factory.mktemp("sample")
    save_export(folder / "export", small_model())
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 255, (40, 60, 4), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"picture{number}.png")
    return folder


def test_the_command(given: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "models/sample.py", f"checkpoint={given}/export", f"image={given}", f"out={tmp_path}/views",
         "num_views=3", "steps=2", "elevations_deg=[20]"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sampling: 4/4 step" in done.stderr
    for number in range(2):
        names = sorted(p.name for p in (tmp_path / "views" / f"picture{number}").iterdir())
        assert names == ["view_000.png", "view_001.png", "view_002.png"]
    grid = Image.open(tmp_path / "views" / "grid.png")
    assert grid.size == (4 * 32, 10 + 2 * 32)
    assert min(grid.crop((32, 0, 64, 10)).convert("L").getdata()) < 128, "the azimuth is written above"
    written = json.loads((tmp_path / "views" / "cameras.json").read_text())
    c2w = orbit_camera(torch.tensor([0.0, 120, 240]), torch.tensor(20.0), 1.0)
    torch.testing.assert_close(torch.tensor(written["c2w"]), c2w)
    torch.testing.assert_close(torch.tensor(written["conditioning"]), camera_conditioning(c2w))
    assert written["convention"] == "mvdream" and written["pictures"]["picture1"]["seed"] == 1


def test_a_batch_draws_what_single_pictures_draw(given: Path, tmp_path: Path) -> None:
    for batch in (1, 2):
        main(SampleConfig(f"{given}/export", str(given), str(tmp_path / str(batch)), steps=2, batch=batch))
    for path in sorted((tmp_path / "1").rglob("view_*.png")):
        ours, other = (
            np.asarray(Image.open(p), dtype=int) for p in (path, tmp_path / "2" / path.relative_to(tmp_path / "1"))
        )
        assert np.abs(ours - other).max() <= 1
    with pytest.raises(UserError, match="holds views already"):
        main(SampleConfig(f"{given}/export", str(given), str(tmp_path / "1")))


def test_pictures_that_cannot_be_told_apart_or_are_none(given: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two pictures are called picture0"):
        pictures([str(given), str(given / "picture0.png")])
    with pytest.raises(UserError, match="holds no pictures"):
        pictures(str(tmp_path))
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(UserError, match="is not a picture"):
        main(SampleConfig(f"{given}/export", str(tmp_path / "bad.png"), str(tmp_path / "out")))
    with pytest.raises(UserError, match="is not a folder"):
        main(SampleConfig("/nowhere", str(given / "picture0.png"), str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_views": 0}, "num_views=0"),
        ({"elevations_deg": [1.0, 2.0]}, "must be one number, or 4"),
        ({"elevations_deg": [90.0]}, "between -90 and 90"),
        ({"azimuths_deg": []}, "names no view"),
        ({"steps": 1000}, "steps=1000"),
        ({"azimuths_deg": [float("nan")]}, "must be finite"),
        ({"eta": 2.0}, "eta=2.0"),
        ({"dtype": "int8"}, "dtype=int8"),
    ],
)
def test_values_that_cannot_work(values, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SampleConfig("a", "b", "c", **values)


@pytest.mark.parametrize("convention", ["isotropic3d_released_2d", "isotropic3d_released_sds"])
def test_the_released_codes_cameras_reach_the_network(given: Path, tmp_path: Path, convention: str) -> None:
    """The checkpoint names its convention; another one draws other pictures from the same noise."""
    model = small_model()
    model.info.camera = convention
    save_export(tmp_path / "export", model)
    image = str(given / "picture0.png")
    main(SampleConfig(f"{given}/export", image, str(tmp_path / "ours"), steps=2))
    main(SampleConfig(str(tmp_path / "export"), image, str(tmp_path / "theirs"), steps=2))
    written = json.loads((tmp_path / "theirs" / "cameras.json").read_text())
    c2w = torch.tensor(written["c2w"])
    assert written["convention"] == convention
    torch.testing.assert_close(torch.tensor(written["conditioning"]), camera_conditioning(c2w, convention))
    ours, theirs = (
        np.asarray(Image.open(tmp_path / name / "picture0" / "view_001.png"), dtype=int) for name in ("ours", "theirs")
    )
    assert np.abs(ours - theirs).max() > 3


def test_cutting_out_and_centring_are_reached_from_the_command(given: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    with pytest.raises(UserError, match="shows nothing but background"):
        main(
            SampleConfig("none", str(tmp_path / "white.png"), str(tmp_path / "a"), reference=ReferenceConfig(fill=0.8))
        )


@pytest.mark.parametrize(("size", "views"), [(256, 2), (1024, 1), (32, 24)])
def test_other_sizes_and_numbers_of_views(given: Path, tmp_path: Path, size: int, views: int) -> None:
    """Nothing in the network depends on a position: 8 and 32 times the size it was made for, 6 times the views."""
    image = str(given / "picture0.png")
    config = SampleConfig(
        f"{given}/export", image, str(tmp_path / "out"), views, image_size=size, steps=1, guidance_scale=1
    )
    main(config)
    written = sorted((tmp_path / "out" / "picture0").iterdir())
    assert len(written) == views and Image.open(written[-1]).size == (size, size)
