"""CLIP scores by a small open_clip model with random weights, read from local files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conf.cli import ConfigError
from data.clip_score import SCORES, ScoreConfig, clip_scores, front_views, load_clip, read_scores
from data.files import UserError

ROOT = Path(__file__).parents[2]
SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAMERA = {"c2w": np.eye(4).tolist(), "elevation_deg": 15.0, "fov_deg": 50.0, "distance": 2.0}
AZIMUTHS = [200.0, 350.0, 40.0, 5.0, 90.0]  # of the references; nearest to the front are 5, 350 and 40


def make_views(views: Path, count: int) -> None:
    """Objects of 5 reference pictures and a ring picture, as data/render.py leaves them."""
    random = np.random.default_rng(0)
    for i in range(count):
        folder = views / f"object{i}"
        folder.mkdir(parents=True)
        described = [
            {"file": f"{n:03d}.png", "role": "reference", "azimuth_deg": azimuth} | CAMERA
            for n, azimuth in enumerate(AZIMUTHS)
        ] + [{"file": "005.png", "role": "ring", "ring": 0, "index": 0, "azimuth_deg": 0.0} | CAMERA]
        for view in described:
            Image.fromarray(random.integers(0, 256, (48, 48, 4), dtype=np.uint8), "RGBA").save(folder / view["file"])
        meta = {"uid": folder.name, "caption": f"thing number {i}", "resolution": 48, "views": described}
        (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as open_clip writes one, with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALL)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    return folder


def config(views: Path, encoder: Path, **other: Any) -> ScoreConfig:
    return ScoreConfig(views=str(views), weights=str(encoder), device="cpu", **{"pictures": 3, "batch": 2, **other})


def test_scores_are_what_open_clip_itself_computes(tmp_path: Path, encoder: Path) -> None:
    make_views(tmp_path, 3)
    scores = clip_scores(tmp_path, config(tmp_path, encoder))
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{encoder}")
    model.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{encoder}")
    for i in range(3):
        with torch.no_grad():
            text = model.encode_text(tokens([f"thing number {i}"]), normalize=True)
            own = []
            for file in ("003.png", "001.png", "002.png"):
                rgba = Image.open(tmp_path / f"object{i}" / file)
                white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
                own.append(float(model.encode_image(prepare(white)[None], normalize=True) @ text.T))
        assert scores[f"object{i}"] == pytest.approx(sum(own) / 3, abs=2e-4)
    assert read_scores(tmp_path) == scores
    assert len({round(score, 6) for score in scores.values()}) == 3


def test_a_file_of_a_known_architecture_gives_the_same(tmp_path: Path, encoder: Path) -> None:
    make_views(tmp_path / "views", 1)
    expected = clip_scores(tmp_path / "views", config(tmp_path / "views", encoder))
    (tmp_path / "Tiny-Test.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path / "Tiny-Test.json")
    weights = encoder / "open_clip_model.safetensors"
    torch.save(open_clip.factory.load_state_dict(str(weights)), tmp_path / "tiny.pt")
    for file in (weights, tmp_path / "tiny.pt"):
        found = clip_scores(tmp_path / "views", config(tmp_path / "views", file, arch="Tiny-Test", pretrained="none"))
        assert found == pytest.approx(expected, abs=1e-6)
        assert load_clip(config(tmp_path, file, arch="Tiny-Test", pretrained="none")).mark.startswith("Tiny-Test none ")


def test_only_what_is_new_or_changed_is_scored_again(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_views(tmp_path, 4)
    first = clip_scores(tmp_path, config(tmp_path, encoder))
    content = json.loads((tmp_path / SCORES).read_text())
    for entry in content["objects"].values():
        entry["clip_score"] = 0.5  # would be seen if it were computed again
    del content["objects"]["object3"]
    (tmp_path / SCORES).write_text(json.dumps(content))
    meta = json.loads((tmp_path / "object1" / "meta.json").read_text())
    (tmp_path / "object1" / "meta.json").write_text(json.dumps(meta | {"caption": "something else"}))
    shutil.rmtree(tmp_path / "object2")
    second = clip_scores(tmp_path, config(tmp_path, encoder))
    assert second == {"object0": 0.5, "object1": second["object1"], "object3": first["object3"]}
    assert second["object1"] not in (0.5, first["object1"])
    other = clip_scores(tmp_path, config(tmp_path, encoder, pictures=2))
    assert other["object0"] not in (0.5, first["object0"])


def test_damaged_objects_are_named_and_have_no_score(
    tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_views(tmp_path, 7)
    (tmp_path / "object0" / "003.png").write_bytes(b"no picture")
    (tmp_path / "object1" / "003.png").unlink()
    view = {"file": "000.png", "role": "reference"} | CAMERA
    for name, change in (("object2", {"caption": ""}), ("object3", {"views": [view | {"file": "../x.png"}]}),
                         ("object4", {"views": [view]}),
                         ("object5", {"views": [{"file": "000.png", "role": "reference"}]})):  # fmt: skip
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        (tmp_path / name / "meta.json").write_text(json.dumps(meta | change))
    assert list(clip_scores(tmp_path, config(tmp_path, encoder))) == ["object6"]
    said = capsys.readouterr().err
    for name, reason in (("object0", "not a PNG"), ("object1", "lacks '003.png'"), ("object2", "no caption"),
                         ("object3", "lacks '../x.png'"), ("object4", "KeyError('azimuth_deg')"),
                         ("object5", "KeyError('c2w')")):  # fmt: skip
        assert any(name in line and reason in line for line in said.splitlines()), (name, said)
    shutil.rmtree(tmp_path / "object6")
    with pytest.raises(UserError, match="no object could be scored"):
        clip_scores(tmp_path, config(tmp_path, encoder))


def test_weights_that_are_not_read(tmp_path: Path, encoder: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    def refused(path: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_clip(config(tmp_path, path))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    refused(tmp_path / "evil.pt", "cannot be had")
    assert not (tmp_path / "pwned").exists()
    refused(tmp_path / "none.pt", "does not exist")
    (tmp_path / "a.npz").write_bytes(b"")
    refused(tmp_path / "a.npz", r"is not one of \.safetensors")
    refused(encoder / "open_clip_model.safetensors", "cannot be had")  # of another architecture than ViT-B-32
    folder = tmp_path / "folder"
    for change, message in (
        ({"vision_cfg": SMALL["vision_cfg"] | {"timm_model_name": "hf-hub:someone/net"}}, "fetched from elsewhere"),  # type: ignore[operator]
        ({"text_cfg": SMALL["text_cfg"] | {"hf_model_name": "someone/net"}}, "fetched from elsewhere"),  # type: ignore[operator]
        ({"text_cfg": SMALL["text_cfg"] | {"tokenizer_kwargs": {"trust_remote_code": True}}}, "run code"),  # type: ignore[operator]
        ({"text_cfg": None}, "has no model_cfg"),
    ):
        shutil.copytree(encoder, folder)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": SMALL | change}))
        refused(folder, message)
        shutil.rmtree(folder)
    shutil.copytree(encoder, folder)
    (folder / "open_clip_model.safetensors").unlink()
    refused(folder, "cannot be had")
    (folder / "open_clip_model.safetensors").write_bytes((encoder / "open_clip_model.safetensors").read_bytes()[:-99])
    refused(folder, "cannot be had")


def test_nan_weights_are_refused(tmp_path: Path, encoder: Path) -> None:
    shutil.copytree(encoder, tmp_path / "clip")
    model = open_clip.CLIP(**SMALL)
    model.visual.proj.data.fill_(float("nan"))
    save_file(model.state_dict(), tmp_path / "clip" / "open_clip_model.safetensors")
    make_views(tmp_path / "views", 1)
    with pytest.raises(UserError, match="no numbers; its weights are damaged"):
        clip_scores(tmp_path / "views", config(tmp_path / "views", tmp_path / "clip"))


@pytest.mark.parametrize(
    "content", ["{}", "[", '{"format": "isotropic3d-scores/1", "objects": {"a": {"clip_score": NaN, "of": ""}}}']
)
def test_a_foreign_scores_file_is_refused(tmp_path: Path, encoder: Path, content: str) -> None:
    make_views(tmp_path, 1)
    (tmp_path / SCORES).write_text(content)
    with pytest.raises(UserError, match=SCORES):
        read_scores(tmp_path)
    with pytest.raises(UserError, match=SCORES):
        clip_scores(tmp_path, config(tmp_path, encoder))


def test_other_errors_name_the_remedy(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(UserError, match="is not a folder; make it"):
        clip_scores(tmp_path / "nowhere", config(tmp_path, encoder))
    with pytest.raises(UserError, match="render first"):
        clip_scores(tmp_path, config(tmp_path, encoder))
    with pytest.raises(ConfigError, match="pictures=0"):
        ScoreConfig(views="v", pictures=0)
    ring = {"views": [{"file": "000.png", "role": "ring", "azimuth_deg": 359.0}]}
    assert front_views(ring, 4) == ["000.png"]


@pytest.mark.slow
def test_the_command_finishes_what_kills_interrupted(tmp_path: Path, encoder: Path) -> None:
    """Killed each time soon after it has saved something new; what was saved stays, and stays whole."""
    views = tmp_path / "views"
    make_views(views, 120)
    expected = clip_scores(views, config(views, encoder))
    (views / SCORES).unlink()
    arguments = [f"views={views}", f"weights={encoder}", "pictures=3", "batch=1", "device=cpu"]
    saving = (
        "import sys; sys.path.insert(0, 'data'); import data.clip_score as c, runpy; c.SAVE_EVERY_S = 0; "
        "sys.argv[0] = 'data/score.py'; runpy.run_path('data/score.py', run_name='__main__')"
    )
    known: dict[str, float] = {}
    for _ in range(3):
        running = subprocess.Popen([sys.executable, "-c", saving, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
        while running.poll() is None and (not (views / SCORES).exists() or len(read_scores(views)) <= len(known) + 5):
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.wait()
        found = read_scores(views)
        assert len(found) > len(known) and found.items() >= known.items()
        known = found
    command = [sys.executable, "data/score.py", *arguments]
    finished = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert "120 objects scored" in finished.stdout
    assert read_scores(views) == pytest.approx(expected, abs=1e-6)
