"""The command: objects found, compared and written down; bad input answered in a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from conf.cli import ConfigError
from data.cameras import orbit_camera
from data.files import UserError
from distill.evaluation import shapes
from distill.evaluation.config import EvaluateConfig
from distill.evaluation.evaluation import evaluate

ROOT = Path(__file__).resolve().parents[3]
FOV_DEG, SIZE = 40.0, 48


def coloured_ball(colour: tuple[int, int, int], radius: float = 0.4) -> trimesh.Trimesh:
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=radius)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=np.tile((*colour, 255), (len(mesh.vertices), 1)))


def rendered(folder: Path, colours: list[tuple[int, int, int]], azimuths_deg: list[float] | None = None) -> None:
    """A folder as data/render.py leaves it, of a disc of one colour a view."""
    folder.mkdir(parents=True)
    azimuths_deg = azimuths_deg or [i * 360 / len(colours) for i in range(len(colours))]
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5 - SIZE / 2
    disc = x**2 + y**2 < (SIZE / 3) ** 2
    views = []
    for number, (colour, azimuth) in enumerate(zip(colours, azimuths_deg, strict=True)):
        picture = np.zeros((SIZE, SIZE, 4), dtype=np.uint8)
        picture[disc] = (*colour, 255)
        Image.fromarray(picture).save(folder / f"{number:03d}.png")
        pose = orbit_camera(torch.tensor(azimuth), torch.tensor(20.0), torch.tensor(2.0))
        views.append(
            {
                "file": f"{number:03d}.png",
                "role": "eval",
                "ring": 0,
                "index": number,
                "c2w": pose.tolist(),
                "fov_deg": FOV_DEG,
            }
        )
    (folder / "meta.json").write_text(json.dumps({"uid": folder.name, "views": views}))


def config(tmp_path: Path, **given: object) -> EvaluateConfig:
    return EvaluateConfig(
        **{"pred": str(tmp_path / "pred"), "truth": str(tmp_path / "truth"), "out": str(tmp_path / "out"),
           "lpips": "none", "points": 5000, "device": "cpu", **given}  # type: ignore[arg-type]
    )  # fmt: skip


def test_views_of_several_objects(tmp_path: Path) -> None:
    for name, off in (("chair", 0), ("lamp", 51)):
        rendered(tmp_path / "truth" / name, [(100, 50, 20)] * 8)
        rendered(tmp_path / "pred" / name, [(100 + off, 50 + off, 20 + off)] * 8)
    told = evaluate(config(tmp_path))
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["objects"] == told["objects"]
    assert saved["protocol"] == "isotropic3d-ours/3"
    assert told["objects"]["lamp"]["psnr_masked"] == pytest.approx(-20 * np.log10(0.2), abs=0.02)
    assert told["objects"]["lamp"]["psnr"] > told["objects"]["lamp"]["psnr_masked"]
    assert told["objects"]["chair"]["psnr"] >= 60
    assert told["objects"]["chair"]["ssim_masked"] == pytest.approx(1)
    assert told["objects"]["lamp"]["ssim_masked"] == pytest.approx(told["objects"]["lamp"]["ssim"])  # all off is within
    assert told["means"]["psnr"]["objects"] == 2
    assert told["objects"]["chair"]["janus"] == pytest.approx(told["objects"]["chair"]["janus_truth"])
    assert "clip_similarity" in told["not_measured"]
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.index(">lamp<") < page.index(">chair<")  # the worst first
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_azimuth_is_counted_from_the_reference(tmp_path: Path) -> None:
    colours = [(100, 50, 20)] * 8
    rendered(tmp_path / "truth" / "chair", colours)
    rendered(tmp_path / "pred" / "chair", [(151, 101, 71), *colours[1:]])  # at the front it is wrong
    assert evaluate(config(tmp_path))["by_azimuth"]["psnr"].index(min_of(tmp_path / "out")) == 0
    path = tmp_path / "truth" / "chair" / "meta.json"
    meta = json.loads(path.read_text())
    pose = orbit_camera(torch.tensor(-90.0), torch.tensor(5.0), torch.tensor(2.0)).tolist()
    meta["views"].append(meta["views"][0] | {"role": "eval_reference", "c2w": pose})
    path.write_text(json.dumps(meta))
    told = evaluate(config(tmp_path, out=str(tmp_path / "out2")))["by_azimuth"]
    assert told["azimuth_deg"][told["psnr"].index(min_of(tmp_path / "out2"))] == 90


def min_of(out: Path) -> float:
    return min(json.loads((out / "evaluation.json").read_text())["by_azimuth"]["psnr"])


def test_views_are_paired_by_camera_where_both_have_one(tmp_path: Path) -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)]
    rendered(tmp_path / "truth" / "chair", colours, [0, 90, 180, 270])
    rendered(tmp_path / "pred" / "chair", colours[::-1], [270, 180, 90, 0])
    rendered(tmp_path / "numbers" / "chair", colours[::-1], [0, 90, 180, 270])
    assert evaluate(config(tmp_path))["means"]["psnr"]["mean"] >= 60
    wrong = evaluate(config(tmp_path, pred=str(tmp_path / "numbers"), out=str(tmp_path / "wrong")))
    assert wrong["means"]["psnr"]["mean"] < 20


def test_a_mesh_against_views_and_against_a_mesh(tmp_path: Path) -> None:
    for side, radius in (("truth", 0.4), ("pred", 0.4)):
        (tmp_path / side).mkdir()
        coloured_ball((200, 60, 30), radius).export(tmp_path / side / "ball.ply")
    told = evaluate(config(tmp_path))
    values = told["objects"]["ball"]
    assert values["chamfer_l1"] < 1e-3 and values["f_score_0.02"] == 1.0 and values["volume_iou"] > 0.99
    rendered(tmp_path / "views" / "ball", [(200, 60, 30)] * 4)
    told = evaluate(config(tmp_path, truth=str(tmp_path / "views"), out=str(tmp_path / "out2")))
    assert 0.3 < told["objects"]["ball"]["mask_iou"] <= 1


def test_scale_and_units(tmp_path: Path) -> None:
    """Both ten times as large: the same figures, normalised or not."""
    one, other = trimesh.creation.box((1, 0.5, 0.4)), trimesh.creation.box((1.2, 0.5, 0.4))
    figures = []
    for scale in (1.0, 10.0):
        for side, mesh in (("pred", one), ("truth", other)):
            (tmp_path / f"{side}{scale}").mkdir()
            mesh.copy().apply_scale(scale).export(tmp_path / f"{side}{scale}" / "box.ply")
        for normalise in ("box", "none"):
            told = evaluate(config(
                tmp_path, pred=str(tmp_path / f"pred{scale}"), truth=str(tmp_path / f"truth{scale}"),
                out=str(tmp_path / f"{normalise}{scale}"), normalise=normalise, surface="all",
            ))  # fmt: skip
            figures.append(told["objects"]["box"])
    for a, b in ((figures[0], figures[2]), (figures[1], figures[3])):
        for name, value in a.items():
            assert b[name] == pytest.approx(value, abs=2e-3), name
    assert figures[0]["chamfer_l1"] != pytest.approx(figures[1]["chamfer_l1"], abs=1e-3)


@pytest.mark.parametrize("normalise", ["none", "box"])
def test_alignment_mends_a_turn(tmp_path: Path, normalise: str) -> None:
    """Scaled by its box, a turned object has another size; an exact copy is found whatever its angle."""
    bar = trimesh.util.concatenate(
        [trimesh.creation.box((1, 0.3, 0.3)), trimesh.creation.box((0.3, 0.3, 0.6)).apply_translation((0.35, 0, 0.15))]
    )
    for side, angle in (("truth", 0.0), ("pred", 40.0)):
        (tmp_path / side).mkdir()
        turn = trimesh.transformations.rotation_matrix(np.radians(angle), (0, 0, 1))
        bar.copy().apply_transform(turn).export(tmp_path / side / "bar.ply")
    figures = {}
    for align in ("none", "yaw", "icp"):
        told = evaluate(config(tmp_path, align=align, normalise=normalise, points=3000, out=str(tmp_path / align)))
        figures[align] = told["objects"]["bar"]
    assert figures["none"]["chamfer_l1"] > 0.02
    for align in ("yaw", "icp"):
        assert figures[align]["chamfer_l1"] < 0.006 and figures[align]["volume_iou"] > 0.97, align
    assert figures["yaw"]["yaw_deg"] == pytest.approx(-40, abs=1)


def test_icp_in_boxes_mends_a_turn_about_any_axis(tmp_path: Path) -> None:
    bar = trimesh.util.concatenate(
        [trimesh.creation.box((1, 0.3, 0.3)), trimesh.creation.box((0.3, 0.3, 0.6)).apply_translation((0.35, 0, 0.15))]
    )
    turn = trimesh.transformations.rotation_matrix(np.radians(15), (1, 0.5, 0.2))
    for side, mesh in (("truth", bar), ("pred", bar.copy().apply_transform(turn))):
        (tmp_path / side).mkdir()
        mesh.export(tmp_path / side / "bar.ply")
    told = evaluate(config(tmp_path, align="icp", points=3000))["objects"]["bar"]
    assert told["chamfer_l1"] < 0.006 and told["volume_iou"] > 0.95


def test_icp_keeps_the_shift_that_it_finds(tmp_path: Path) -> None:
    """The prediction has a bar more, which moves the middle of its box; its body comes to lie right all the same."""
    body = trimesh.util.concatenate(
        [trimesh.creation.box((1, 0.6, 0.5)), trimesh.creation.icosphere(radius=0.2).apply_translation((0.4, 0.3, 0.3))]
    )
    bar = trimesh.creation.box((0.02, 0.3, 0.02)).apply_translation((0, -0.45, 0))  # the longest side is x all the same
    for side, mesh in (("truth", body), ("pred", trimesh.util.concatenate([body, bar]))):
        (tmp_path / side).mkdir()
        mesh.export(tmp_path / side / "body.ply")
    found = {align: evaluate(config(tmp_path, align=align, out=str(tmp_path / align)))["objects"]["body"]["chamfer_l1"]
             for align in ("none", "icp")}  # fmt: skip
    assert found["icp"] < 0.85 * found["none"]


def test_presets_name_what_they_measured(tmp_path: Path) -> None:
    for side in ("pred", "truth"):
        (tmp_path / side).mkdir()
        trimesh.creation.icosphere(subdivisions=3, radius=0.5).export(tmp_path / side / "ball.ply")
    for preset in ("syncdreamer_gso", "eschernet_gso"):
        told = evaluate(config(tmp_path, preset=preset, out=str(tmp_path / preset)))
        assert told["protocol"] == f"isotropic3d-{preset}/3"
        assert told["objects"]["ball"]["chamfer"] < 2e-3 and told["objects"]["ball"]["volume_iou"] > 0.99


def test_consistency_tells_one_object_from_many(tmp_path: Path) -> None:
    rendered(tmp_path / "truth" / "one", [(200, 100, 50)] * 8)
    rendered(tmp_path / "pred" / "one", [((i % 2) * 220, 100, 200 - (i % 2) * 200) for i in range(8)])
    told = evaluate(config(tmp_path, consistency_steps=30))
    values = told["objects"]["one"]
    assert values["consistency_psnr_truth"] > values["consistency_psnr"] + 3
    alone = evaluate(config(tmp_path, truth=None, consistency_steps=30, out=str(tmp_path / "alone")))
    assert alone["objects"]["one"]["consistency_psnr"] == pytest.approx(values["consistency_psnr"], abs=1e-3)
    assert "psnr" not in alone["means"] and "truth_without_prediction" in alone


def spoiled_mesh(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "mesh.glb").write_bytes(b"glTF")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t: None, "does not exist"),
        (lambda t: (t / "pred").mkdir(), "holds no object"),
        (lambda t: rendered(t / "pred" / "stool", [(1, 2, 3)] * 4), "nothing called stool"),
        (lambda t: spoiled_mesh(t / "pred" / "chair"), "cannot be read as a mesh"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, make: object, words: str) -> None:
    for name in ("chair", "table"):
        rendered(tmp_path / "truth" / name, [(1, 2, 3)] * 4)
        coloured_ball((1, 2, 3)).export(tmp_path / "truth" / name / "mesh.ply")
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(UserError, match=words):
        evaluate(config(tmp_path))
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_the_command_answers_in_a_line(tmp_path: Path) -> None:
    rendered(tmp_path / "truth" / "chair", [(9, 9, 9)] * 4)
    command = [sys.executable, str(ROOT / "distill" / "evaluate.py"), f"truth={tmp_path}/truth", f"out={tmp_path}/out"]
    environment = {**os.environ, "HYDRA_FULL_ERROR": "0"}
    for words, told in (
        ([f"pred={tmp_path}/none"], "does not exist"),
        ([f"pred={tmp_path}/truth", "presett=ours"], "preset"),
    ):
        found = subprocess.run(
            [*command, *words], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
        )
        assert found.returncode != 0
        assert told in found.stderr and "Traceback" not in found.stderr


def sampled(folder: Path, views: int = 6) -> None:
    """As models/sample.py leaves them: cameras without a field of view, pictures without alpha."""
    rendered(folder / "one", [(200, 100, 50)] * views)
    meta = json.loads((folder / "one" / "meta.json").read_text())
    (folder / "one" / "meta.json").unlink()
    (folder / "cameras.json").write_text(json.dumps({"c2w": [view["c2w"] for view in meta["views"]]}))
    for path in (folder / "one").glob("*.png"):
        picture = Image.open(path)
        whole = Image.new("RGBA", picture.size, "white")
        whole.alpha_composite(picture)
        whole.convert("RGB").save(path)


def test_samples_alone_are_judged_by_their_consistency(tmp_path: Path) -> None:
    sampled(tmp_path / "pred")
    unknown = evaluate(config(tmp_path, truth=None, consistency_steps=20, out=str(tmp_path / "unknown")))
    assert "consistency_psnr" not in unknown["means"] and "give fov_deg=" in unknown["not_measured"]["consistency_psnr"]
    told = evaluate(config(tmp_path, truth=None, consistency_steps=20, fov_deg=FOV_DEG))
    assert told["objects"]["one"]["consistency_psnr"] > 10 and told["objects"]["one"]["janus"] > 0.9
    assert (tmp_path / "out" / "evaluation.html").is_file()
    with pytest.raises(ConfigError, match="truth= is missing"):
        config(tmp_path, truth=None)


def test_what_is_not_measured_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampled(tmp_path / "truth")
    rendered(tmp_path / "truth" / "two", [(200, 100, 50)] * 6)
    for name in ("three", "four"):
        rendered(tmp_path / "truth" / name, [(0, 0, 0)] * 4)
    sampled(tmp_path / "pred")
    rendered(tmp_path / "pred" / "two", [(200, 100, 50)] * 6)
    coloured_ball((1, 2, 3)).export(tmp_path / "pred" / "two" / "mesh.glb")
    told = evaluate(config(tmp_path, consistency_steps=20))
    why = told["not_measured"]
    assert "psnr_masked" not in told["objects"]["one"] and told["objects"]["two"]["psnr_masked"] > 40
    assert why["psnr_masked, ssim_masked, lpips_masked, mask_iou"].startswith("one (1 of 2 objects): the ground truth")
    assert why["consistency_psnr"] == "one (1 of 2 objects): the cameras do not say their field of view; give fov_deg="
    assert why["shapes"] == "two (1 of 2 objects): only the prediction has a mesh"
    assert why["objects"] == "the ground truth has 2 more, which pred= lacks: four, three"
    said = capsys.readouterr().out
    assert all(f"{what}: not measured: {words}" in said for what, words in why.items())
    assert told["objects"]["two"]["views"] == 6


def test_eschernets_pictures_are_those_behind_its_input(tmp_path: Path) -> None:
    """A prediction is one strip of 25 views, the ground truth as its authors publish it; the script begins at 10."""
    draw = np.random.default_rng(0)
    strip = draw.integers(0, 255, size=(256, 25 * 256, 3), dtype=np.uint8)
    (tmp_path / "pred" / "one").mkdir(parents=True)
    Image.fromarray(strip).save(tmp_path / "pred" / "one" / "0.png")
    inner = tmp_path / "truth" / "one" / "render_mvs_25" / "model"
    inner.mkdir(parents=True)
    for number in range(25):
        own = strip[:, number * 256 : (number + 1) * 256]
        Image.fromarray(own if number >= 10 else 255 - own).save(inner / f"{number:03d}.png")
    told = evaluate(config(tmp_path, preset="eschernet_gso"))["objects"]["one"]
    assert told["views"] == 15 and told["ssim"] == pytest.approx(1) and told["psnr"] > 300


def test_syncdreamers_turns_are_by_name(tmp_path: Path) -> None:
    bar = trimesh.creation.box((1, 0.3, 0.2)).apply_translation((0.1, 0.05, 0))
    for name in ("sofa", "other"):
        for side, angle in (("truth", 0.0), ("pred", 90.0)):
            (tmp_path / side).mkdir(exist_ok=True)
            turned = bar.copy()
            turned.vertices = shapes.unit_box(np.asarray(bar.vertices))
            turned.apply_transform(trimesh.transformations.rotation_matrix(np.radians(angle), (0, 0, 1)))
            turned.export(tmp_path / side / f"{name}.ply")
    told = evaluate(config(tmp_path, preset="syncdreamer_gso"))["objects"]
    assert told["sofa"]["chamfer"] < 3e-3 and told["other"]["chamfer"] > 0.05
    given = evaluate(config(tmp_path, preset="syncdreamer_gso", truth_yaw_deg=-90, out=str(tmp_path / "given")))
    assert given["objects"]["other"]["chamfer"] < 3e-3


def test_what_cannot_be_read_or_measured_without_a_truth_is_said(tmp_path: Path) -> None:
    sampled(tmp_path / "pred")
    alone = config(tmp_path, truth=None, consistency_steps=20, fov_deg=FOV_DEG)
    for path in (tmp_path / "pred" / "one").glob("*.png"):
        Image.open(path).resize((SIZE, SIZE // 2)).save(path)
    why = evaluate(alone)["not_measured"]
    assert why["consistency_psnr"] == "the pictures are not square"
    for text, words in (("[1]", "has no list c2w"), ('{"c2w": [[[1, 2], [3]]]}', "a 4 x 4 matrix of numbers")):
        (tmp_path / "pred" / "cameras.json").write_text(text)
        with pytest.raises(UserError, match=words):
            evaluate(config(tmp_path, truth=None, consistency_steps=20, out=str(tmp_path / "other")))


def test_one_prediction_of_many_truths(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rendered(tmp_path / "truth" / name, [(0, 0, 200)] * 4)
    rendered(tmp_path / "pred" / "one", [(0, 0, 200)] * 4)
    told = evaluate(config(tmp_path))
    assert told["truth_without_prediction"] == ["two"] and "pred= lacks: two" in told["not_measured"]["objects"]
