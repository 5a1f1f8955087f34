"""The study in its smallest form, and what its tables rest on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from conf.cli import ConfigError
from data.files import UserError
from data.selection import split_of
from demo.proof import Truth
from demo.run import Step
from study import figure, meshes, results, run, subset
from study.config import Distillation, StudyConfig
from study.held_out import parted
from study.samples import judged, resized
from study.variants import BASE, BASELINES, VARIANTS, Variant, chosen


def truth(objects: int = 3) -> Truth:
    views = torch.rand(objects, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    uids = [f"object{n}" for n in range(objects)]
    return Truth(uids, views[:, 0], views, torch.eye(4).expand(4, 4, 4), torch.full((4,), 40.0))


def test_samples_are_judged_against_all_objects_and_what_needs_no_model() -> None:
    real = truth()
    sampled = real.views.clone()
    sampled[0] = real.views[0] + 0.1
    sampled[1] = real.views[2]  # another object
    found = judged(sampled, real, nearest=real.views.roll(1, dims=0))
    assert found["object0"]["psnr"] == pytest.approx(20, abs=1e-3)
    assert found["object0"]["identified"] and found["object0"]["rank"] == 1
    assert not found["object1"]["identified"] and found["object1"]["rank"] >= 2
    assert found["object1"]["psnr"] == pytest.approx(found["object2"]["nearest_trained"])  # the same two, both ways
    white = -10 * torch.log10((1 - real.views[0]).square().mean(dim=(1, 2, 3))).mean()
    assert found["object0"]["white"] == pytest.approx(float(white), abs=1e-4)
    assert len(found["object0"]["by_view"]) == 4


def test_distilled_objects_are_judged_by_name() -> None:
    real = truth()
    found = judged(real.views[[2, 0]] * 0.9, real, nearest=real.views, uids=["object2", "object0"])
    assert list(found) == ["object2", "object0"] and all(one["identified"] for one in found.values())
    whole = judged(real.views * 0.9, real, nearest=real.views)
    assert found["object0"] == whole["object0"] and found["object2"] == whole["object2"]
    swapped = judged(real.views[[2, 0]], real, nearest=real.views, uids=["object0", "object2"])
    assert not any(one["identified"] for one in swapped.values())


def test_rows_have_the_reference_at_the_left() -> None:
    reference, first, second = torch.zeros(3, 8, 8), torch.full((4, 3, 8, 8), 0.2), torch.full((4, 3, 8, 8), 0.6)
    picture = meshes.rows_of(reference, first, second)
    assert picture.shape == (16, 40, 3)
    assert (picture[:8, :8] == 0).all() and (picture[8:, :8] == 255).all()
    assert (picture[:8, 8:] == 51).all() and (picture[8:, 8:] == 153).all()


def test_the_figure_has_words_beside_each_row(tmp_path: Path) -> None:
    Image.new("RGB", (90, 80), (0, 0, 200)).save(tmp_path / "first.png")
    Image.new("RGB", (50, 40), (0, 0, 100)).save(tmp_path / "second.png")
    whole = np.asarray(figure.figure([("best", tmp_path / "first.png"), ("worst", tmp_path / "second.png")]))
    assert whole.shape == (80 + 40 + 2 * figure.TITLE, 90 + figure.MARGIN, 3)
    first = whole[figure.TITLE : figure.TITLE + 80]
    assert (first[:, figure.MARGIN :] == (0, 0, 200)).all()
    assert all((first[row * 20 : row * 20 + 20, : figure.MARGIN] < 128).any() for row in range(4))  # truth to mesh
    assert (whole[-40:, figure.MARGIN : -40] == (0, 0, 100)).all() and (whole[-40:, -40:] == 255).all()


def test_differences_lie_right_of_zero_when_positive() -> None:
    drawn = np.asarray(figure.differences([("better", 1.0, 0.5, 2.0), ("worse", -1.0, -1.5, -0.5)], "dB"))
    zero = np.flatnonzero((drawn[1, 300:] == 128).all(axis=-1))
    assert len(zero) == 1
    ink = (drawn[:, 300:660] == 0).all(axis=-1)
    better, worse = np.flatnonzero(ink[12]), np.flatnonzero(ink[36])
    assert better.min() > zero[0] > worse.max()
    assert better.max() == pytest.approx(360, abs=2) and worse.min() <= 2  # the ends of the widest intervals


def meshes_judged(out: Path, name: str, psnr: list[float]) -> None:
    same = {"white": 10.0, "mean_object": 12.0, "nearest_trained": 15.0, "identified": True}
    told = {f"object{n}": same | {"psnr": value} for n, value in enumerate(psnr)}
    (out / "judged" / name).mkdir(parents=True)
    (out / "judged" / name / "meshes.json").write_text(json.dumps({"mesh": told, "field": told}))
    (out / "evaluations" / name).mkdir(parents=True)
    means = {"janus": {"mean": 0.9, "low": 0.8, "high": 1.0, "objects": 2}}
    (out / "evaluations" / name / "evaluation.json").write_text(json.dumps({"means": means}))


def test_meshes_are_compared_on_the_same_objects(tmp_path: Path) -> None:
    samples(tmp_path, BASE, [20.0, 22.0, 30.0])
    samples(tmp_path, "longer", [21.0, 23.0, 31.0])
    for name, psnr in (("stage1-0-1.5", [14.0, 18.0]), ("stage2-0-1.5", [15.0, 19.5]), ("stage2-0-3", [13.0, 17.0]),
                       ("longer-stage2-0-1.5", [16.0, 20.5, 25.0]), ("of-another-call", [1.0])):  # fmt: skip
        meshes_judged(tmp_path, name, psnr)
    (tmp_path / "distilled.json").write_text(json.dumps(["object0", "object1", "object2"]))  # `both` lacks the last
    config = StudyConfig(guidance=1.5, guidance_scales=[1.5, 3.0], variants=["longer"])
    distilled = [one for one in config.distillations(0) if one.name != "longer-stage1-0-1.5"]  # which failed
    assert [one.name for one in distilled] == ["stage2-0-1.5", "stage2-0-3", "stage1-0-1.5", "longer-stage2-0-1.5"]
    words = results.of_meshes(tmp_path, distilled, [0])
    assert words is not None and "| the usual steps | both stages | 1.5 | 2 of 3 | 17.25 [-11.34, 45.84] |" in words
    assert "| the usual steps | stage 1 alone | 1.5 | 2 of 3 | 16.00" in words
    assert "| five times the steps | both stages | 1.5 | 3 of 3 | 20.50" in words
    both, longer = ('"the usual steps, distilled from both stages with guidance 1.5"',
                    '"five times the steps, distilled from both stages with guidance 1.5"')  # fmt: skip
    alone = '"the usual steps, distilled from stage 1 alone with guidance 1.5"'
    assert f"Meshes of {both} are better than those of {alone} by +1.25 [-1.93, +4.43] dB, on 2 objects." in words
    assert f"Meshes of {longer} are better than those of {both} by +1.00 [+1.00, +1.00] dB, on 2 objects." in words
    assert words.count("are better than") == 2  # guidance 3 has no counterpart
    assert "| 2D samples, both stages | 21.00 [8.29, 33.71] | -3.75" in words  # of the two that were distilled
    assert "| 2D samples, five times the steps | 25.00 [11.86, 38.14] | -4.50" in words  # each model's own
    assert "| nearest object trained on | 15.00 [15.00, 15.00] | +2.25" in words
    assert "0.90 [0.80, 1.00]" in words and "not measured" in words


def test_the_command_that_makes_it_again() -> None:
    assert results.command_of(StudyConfig(out="elsewhere")) == "python study/run.py"
    config = StudyConfig(variants=["stage1"], cpu=False, distil=3, stage1=["steps=4"])
    said = results.command_of(config)
    assert said == """python study/run.py 'variants=[stage1]' distil=3 cpu=false 'stage1=["steps=4"]'"""


def test_smaller_shares_are_parts_of_larger_ones(tmp_path: Path) -> None:
    chosen = [uid for uid in map("uid{}".format, range(500)) if split_of(uid, 0.13, 0) == "train"]
    for uid in chosen:
        (tmp_path / "views" / uid).mkdir(parents=True)
        (tmp_path / "views" / uid / "meta.json").write_text("{}")
    names = []
    for share in (0.25, 0.5, 1.0):  # of what was itself chosen by the hash of the uid
        subset.main(tmp_path / "views", tmp_path / f"{share}", share)
        names.append({path.name for path in (tmp_path / f"{share}").iterdir()})
    assert names[0] < names[1] < names[2] and len(names[2]) == len(chosen)
    assert [len(some) for some in names[:2]] == [round(len(chosen) / 4), round(len(chosen) / 2)]
    assert all((tmp_path / "0.25" / name / "meta.json").is_file() for name in names[0])
    with pytest.raises(UserError, match="holds no object"):
        subset.main(tmp_path / "views", tmp_path / "none", 1e-9)


def test_unknown_variants_are_named() -> None:
    with pytest.raises(ConfigError, match=r"variants=\['nothing'\] are none of both"):
        StudyConfig(variants=["nothing"])
    assert [variant.name for variant in chosen(["own_camera"])] == [BASE, "own_camera"]
    assert chosen([]) == list(VARIANTS) and len({variant.name for variant in VARIANTS}) == len(VARIANTS)


def samples(out: Path, name: str, psnr: list[float], seed: str = "-0") -> None:
    folder = out / "samples" / f"{name}{seed}"
    folder.mkdir(parents=True)
    same = {"ssim": 0.5, "white": 10.0, "mean_object": 12.0, "nearest_trained": 15.0, "azimuth_deg": [0.0, 180.0]}
    same |= {f"{name}_identified": False for name in BASELINES}
    same |= {f"{name}_by_view": [10.0, 14.0] for name in BASELINES}
    told = {
        f"object{n}": same | {"psnr": value, "identified": n > 0, "by_view": [value - 1, value + 1]}
        for n, value in enumerate(psnr)
    }
    (folder / "samples.json").write_text(json.dumps({"objects": told, "parameters": 9_600_000}))


def held_out(out: Path) -> None:
    for uid in ("object0", "object1"):
        (out / "views_val" / uid).mkdir(parents=True)
        (out / "views_val" / uid / "meta.json").write_text(json.dumps({"faces": 10, "category": "chairs"}))


def test_tables_compare_the_same_objects(tmp_path: Path) -> None:
    base, other = (Variant(name, "Which?", name, stage1=()) for name in (BASE, "always"))
    samples(tmp_path, BASE, [20.0, 22.0, 30.0])
    samples(tmp_path, "always", [21.0, 23.0, 31.0])
    found = {one.name: results.objects_of(tmp_path, [f"{one.name}-0"], 0) for one in (base, other)}
    (rows,) = results.of_variants(found, [base, other], StudyConfig(sample_steps=7)).values()
    assert "| always | 25.00 [11.86, 38.14] | +1.00 [+1.00, +1.00] |" in rows  # every object by one
    assert "0.67 [0.21, 0.94]" in rows  # two of three identified
    assert "`python study/run.py 'variants=[always]' sample_steps=7 distil=0`" in rows
    assert "+9.00" in results.of_baselines(found[BASE])
    sides = results.azimuths(tmp_path, [base], StudyConfig())
    assert sides[BASE][2] == [(0.0, 29.0), (180.0, 31.0)] and sides["white picture"][0] == [(0.0, 10.0), (180.0, 14.0)]
    assert results.of_sides(sides).count("\n") == 1, "two sides of three objects tell nothing"


def test_other_samplings_of_the_same_model(tmp_path: Path) -> None:
    config = StudyConfig(other_guidances=[3.0], other_sample_steps=[50])
    for name, worse in ((BASE, 0.0), ("stage1", 0.5)):
        samples(tmp_path, name, [20.0 - worse, 22.0])
        samples(tmp_path, f"{name}-0-guidance3", [19.0 - worse, 21.0], seed="")
        samples(tmp_path, f"{name}-0-steps50", [18.0 - worse, 21.0 - worse], seed="")
    rows = results.of_samplings(tmp_path, config, chosen(["stage1", "always"]))  # not drawn otherwise: `always`
    assert "| 3 | 2 | both stages | 20.00 [7.29, 32.71] |  |" in rows
    assert "| 1 | 50 | stage 1 alone | 19.00 [-0.06, 38.06] | -0.50 [-0.50, -0.50] |" in rows
    assert rows.count("stage 1 alone") == 3 and "always" not in rows


def test_settings_are_chosen_on_objects_that_are_not_judged(tmp_path: Path) -> None:
    """Ten objects, two of which are for choosing; drawn with guidance 3, these are better and the others worse."""
    same = {f"object{n}": {"nearest_trained": 15.0} for n in range(10)}
    same["twin"] = {"nearest_trained": 40.0}
    judged_ones, choosing = parted(same, 0.2)
    assert (
        len(judged_ones) == 8 and len(choosing) == 2 and judged_ones.keys() | choosing.keys() == same.keys() - {"twin"}
    )
    assert parted(dict(reversed(same.items())), 0.2)[1].keys() == choosing.keys(), "whatever their order"
    assert parted({uid: same[uid] for uid in list(same)[:4]}, 0.2)[1] == {}, "of four, all are judged"
    config = StudyConfig(other_guidances=[3.0], other_sample_steps=[])
    samples(tmp_path, BASE, [20.0] * 10)
    samples(tmp_path, f"{BASE}-0-guidance3", [25.0 if f"object{n}" in choosing else 18.0 for n in range(10)], seed="")
    told = results.of_samplings(tmp_path, config, chosen([BASE]))
    assert "| 1 | 2 | both stages | 20.00 [20.00, 20.00] | 20.00 [20.00, 20.00] |" in told
    assert "| 3 | 2 | both stages | 25.00 [25.00, 25.00] | 18.00 [18.00, 18.00] |" in told
    assert "drawn best with: both stages: guidance 3 and 2 steps. The other tables have guidance 1 and 2 steps." in told
    assert results.objects_of(tmp_path, [f"{BASE}-0"], 0.2).keys() == judged_ones.keys()
    views = results.azimuths(tmp_path, [chosen([BASE])[0]], config)["both stages"]
    assert len(views) == 8


def test_more_training_is_told_against_both_and_against_its_own_kind(tmp_path: Path) -> None:
    variants = chosen(["longer_stage1"])
    assert [one.name for one in variants] == [BASE, "longer", "longer_stage1"], "what it is compared with comes along"
    for name, psnr in ((BASE, [20.0, 22.0]), ("longer", [23.0, 25.0]), ("longer_stage1", [22.0, 24.0])):
        samples(tmp_path, name, psnr)
    found = {one.name: results.objects_of(tmp_path, [f"{one.name}-0"], 0) for one in variants}
    rows = results.of_variants(found, variants, StudyConfig())["How much training?"]
    assert "| five times the steps | 24.00 [11.29, 36.71] | +3.00 [+3.00, +3.00] |" in rows
    assert "| -1.00 [-1.00, -1.00] (against five times the steps) |" in rows


def test_what_a_variant_is_compared_with_may_have_failed(tmp_path: Path) -> None:
    """Then its row stands without a difference."""
    samples(tmp_path, BASE, [20.0, 22.0])
    samples(tmp_path, "longer_stage1", [22.0, 24.0])
    held_out(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / f"{BASE}-0" / "samples.png")
    made = [one for one in chosen(["longer_stage1"]) if one.name != "longer"]
    config = StudyConfig(variants=["longer_stage1"], distil=0, other_guidances=[], other_sample_steps=[])
    results.write_results(tmp_path, config, made, {"longer": "step longer-0-stage2 ended with status 1"}, [], [])
    told = (tmp_path / "RESULTS.md").read_text()
    assert "| five times the steps, stage 1 alone | 23.00 [10.29, 35.71] |  | 0.500" in told
    assert "Not made: longer: step" in told and not (tmp_path / "differences.png").exists()


def test_steps_are_multiplied_from_where_they_are_given() -> None:
    assert run.more_steps("stage1", [], 1) == []
    usual = int(OmegaConf.load(run.ROOT / "conf/train/experiment/stage1/small_world.yaml").steps)
    assert run.more_steps("stage1", ["optim.lr=1e-3"], 5) == [f"steps={5 * usual}"]
    assert run.more_steps("stage2", ["steps=4", "steps=6"], 5) == ["steps=30"], "the last one counts"


def test_objects_that_were_trained_on_under_another_name_are_left_out(tmp_path: Path) -> None:
    base = Variant(BASE, "Which?", "both", stage1=())
    samples(tmp_path, BASE, [20.0, 22.0, 30.0])
    path = tmp_path / "samples" / f"{BASE}-0" / "samples.json"
    told = json.loads(path.read_text())
    told["objects"]["object2"]["nearest_trained"] = 43.0
    path.write_text(json.dumps(told))
    found = results.objects_of(tmp_path, [f"{BASE}-0"], 0)
    assert list(found) == ["object0", "object1"] and results.twins_of(tmp_path, [0]) == ["object2"]
    views = results.azimuths(tmp_path, [base], StudyConfig())[base.what]
    assert views == [[(0.0, 19.0), (180.0, 21.0)], [(0.0, 21.0), (180.0, 23.0)]]


def test_a_variant_that_fails_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_and_judge(plan: run.Plan, variant: Variant, seed: int) -> None:
        if variant.name == "always":
            raise UserError("step always-0-stage2 ended with status 1")
        samples(tmp_path, variant.name, [20.0, 22.0])

    held_out(tmp_path)
    monkeypatch.chdir(tmp_path)  # main goes to the repository, and back it comes
    monkeypatch.setattr(run, "train_and_judge", train_and_judge)
    monkeypatch.setattr(run, "fetched", lambda config: [])
    monkeypatch.setattr(run, "render", lambda plan, sources: None)
    monkeypatch.setattr(run, "prepare", lambda plan, sources: None)
    monkeypatch.setattr(results, "write_page", lambda *given: None)
    config = StudyConfig(out=str(tmp_path), variants=["stage1", "always"], distil=0, other_guidances=[],
                         other_sample_steps=[])  # fmt: skip
    with pytest.raises(UserError, match="the tables lack always"):
        run.main(config)
    assert "error: always: step always-0-stage2 ended" in capsys.readouterr().err
    told = (tmp_path / "RESULTS.md").read_text()
    assert "Not made: always: step always-0-stage2 ended with status 1" in told and "| stage 1 alone |" in told


def test_meshes_that_fail_cost_themselves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def distil_and_judge(plan: run.Plan, seed: int, uids: list[str], one: Distillation, export: str) -> None:
        if one.scale == 3:
            raise UserError("step evaluate_stage2-0-3 ended with status 2")
        plan.marks[f"judge_{one.name}"] = "made"

    samples(tmp_path, BASE, [20.0, 22.0])
    monkeypatch.setattr(run, "distil_and_judge", distil_and_judge)
    plan = run.Plan(StudyConfig(out=str(tmp_path), guidance_scales=[1.0, 3.0]))
    done = ("both-0-stage1", "both-0-stage2", "samples_both-0", "longer-0-stage1", "samples_longer-0")
    trained = dict.fromkeys(done, "made")
    plan.marks |= trained
    failed = run.distil(plan, 0)
    assert failed == {"meshes of stage2-0-3": "step evaluate_stage2-0-3 ended with status 2"}
    assert "error: meshes of stage2-0-3" in capsys.readouterr().err
    made = [name for name in plan.marks if name not in trained]
    assert made == ["judge_stage2-0-1", "judge_stage1-0-1", "judge_longer-stage1-0-1"], (
        "the comparison of stages is still made"
    )


def test_without_its_samples_a_model_is_not_distilled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_step(step: Step, *_: object) -> str:
        if step.name.startswith("samples_longer"):
            raise UserError("step samples_longer-0 ended with status 1")
        return step.name

    samples(tmp_path, BASE, [20.0, 22.0])
    monkeypatch.setattr(run, "run_step", run_step)
    config = StudyConfig(out=str(tmp_path), variants=["longer"], guidance_scales=[1.0], other_guidances=[],
                         other_sample_steps=[])  # fmt: skip
    plan = run.Plan(config)
    plan.marks |= dict.fromkeys(["pack_train", "render_nearest"], "made")
    run.train_and_judge(plan, chosen([BASE])[0], 0)
    for _ in range(2):  # what failed is told again, and not run again
        with pytest.raises(UserError, match="samples_longer-0 ended with status 1"):
            run.train_and_judge(plan, chosen(["longer"])[1], 0)
    assert run.distil(plan, 0) == {}
    assert {"longer-0-stage2", "judge_stage2-0-1", "judge_stage1-0-1"} <= plan.marks.keys()
    assert not any("longer-stage" in name for name in plan.marks)


def test_one_variant_alone_has_tables(tmp_path: Path) -> None:
    samples(tmp_path, BASE, [20.0, 22.0])
    held_out(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / f"{BASE}-0" / "samples.png")
    (tmp_path / "differences.png").write_text("of a call before")
    config = StudyConfig(variants=[BASE], distil=0, other_guidances=[], other_sample_steps=[])
    results.write_results(tmp_path, config, chosen([BASE]), {}, ["both-0-stage1"], ["A note."])
    assert "| both stages |" in (tmp_path / "RESULTS.md").read_text() and (tmp_path / "results.html").is_file()
    assert not (tmp_path / "differences.png").exists()


def test_pictures_of_other_sizes_are_compared_at_one() -> None:
    views = torch.rand(2, 3, 3, 8, 8)
    assert torch.allclose(resized(views, 4), torch.nn.functional.avg_pool2d(views.flatten(0, 1), 2).view(2, 3, 3, 4, 4))
    larger = resized(views, 16)
    assert larger.shape == (2, 3, 3, 16, 16) and larger.min() >= 0 and larger.max() <= 1
    ramp = torch.linspace(0.2, 0.8, 8).expand(1, 1, 3, 8, 8)
    assert len(resized(ramp, 16)[0, 0, 0, 0].unique()) == 16, "no pixel is repeated"
