"""One W&B run over several lives, offline, read back from its files."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import wandb
from PIL import Image

from conf.cli import ConfigError
from data.files import UserError
from monitor.config import WandbConfig
from monitor.facts import git_state, name_of_weights, require_key, slurm_facts
from monitor.monitor import Monitor, drop_after
from monitor.wandb_file import history, last_step, pieces, records


def live(folder: Path, first: int, last: int, killed: bool) -> None:
    """Logs steps, with a picture every hundredth; then ends, or is killed."""
    monitor = Monitor(folder, WandbConfig(tags=["mine"]), "chair", "stage1", {"lr": 0.1}, first)
    for step in range(first + 1, last + 1):
        monitor.log(step, {"loss": 1 / step, "mfu": 0.5})
        if step % 100 == 0:
            path = folder / "samples" / f"step_{step}.png"
            monitor.log(step, {"samples/psnr": 20.0})
            monitor.picture(step, "samples", path, Image.new("RGB", (8, 8), (step % 256, 0, 0)))
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    monitor.alert("finished", "all is well")
    monitor.artifact("chair-stage1", "checkpoint", str(folder), made=True, about={"step": last})
    monitor.close()


@pytest.mark.parametrize("lost", [False, True])
def test_every_step_once_over_kills(tmp_path, lost, monkeypatch) -> None:
    """Goes on from checkpoints before what was logged; also where W&B had not written all that metrics.jsonl has."""
    monkeypatch.setenv("SLURM_JWT", "topsecret")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    spawn = multiprocessing.get_context("spawn")
    for first, last, killed in ((0, 260, True), (200, 440, True), (400, 600, False)):
        process = spawn.Process(target=live, args=(tmp_path, first, last, killed))
        process.start()
        process.join(120)
        assert process.exitcode == (-signal.SIGKILL if killed else 0)
        time.sleep(1.1)  # W&B names its folders by the second
        if lost and killed:
            (newest,) = sorted(tmp_path.glob("wandb/offline-run-*"))[-1].glob("*.wandb")
            content = newest.read_bytes()
            newest.write_bytes(content[: len(content) * 2 // 3])
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3 and all(list(history(path)) for path in files), "W&B writes blocks of 32 KiB"
    rows = [row for path in files for row in history(path)]
    assert [row["global_step"] for row in rows] == list(range(1, 601))
    assert all(row["loss"] == pytest.approx(1 / row["global_step"]) for row in rows)
    assert all(row["throughput/mfu"] == 0.5 and "mfu" not in row for row in rows)
    pictured = [row["global_step"] for row in rows if "samples/path" in row or "samples/_type" in row]
    assert pictured == list(range(100, 601, 100)) and all("samples/psnr" in rows[step - 1] for step in pictured)
    runs = [r.run for path in files for r in records(path) if r.WhichOneof("record_type") == "run"]
    (run_id,) = {run.run_id for run in runs}
    assert run_id == (tmp_path / "wandb_id").read_text().strip() and last_step(tmp_path, run_id) == 600
    own = ("_wandb", "git")  # a commit may come between two starts
    settings = [{item.key: item.value_json for item in run.config.update if item.key not in own} for run in runs]
    assert settings[0] == settings[1] == settings[2] and json.loads(settings[0]["lr"]) == 0.1
    assert {(run.run_group, run.job_type, run.display_name) for run in runs} == {("chair", "stage1", "chair-stage1")}
    assert set(runs[0].tags) == {"stage1", "mine"}
    kinds = [record.WhichOneof("record_type") for record in records(files[-1])]
    assert kinds.count("artifact") == 1
    alerts = [[r.alert for r in records(path) if r.WhichOneof("record_type") == "alert"] for path in files]
    assert [[alert.title for alert in some] for some in alerts][1:] == [
        ["started again"],
        ["started again", "finished"],
    ]
    assert alerts[2][0].text == "chair-stage1: goes on from step 400; nodes node[1-2]"
    summaries = [r.summary.update for r in records(files[-1]) if r.WhichOneof("record_type") == "summary"]
    assert any("node[1-2]" in item.value_json for some in summaries for item in some)
    secret = [path for path in tmp_path.rglob("*") if path.is_file() and b"topsecret" in path.read_bytes()]
    assert not secret, "W&B writes SLURM's variables into its files"
    logged = [json.loads(line)["global_step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(logged)) == list(range(1, 601)) and logged == sorted(logged)


def test_metrics_after_the_checkpoint_are_dropped_with_half_lines(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"global_step": 1, "loss": 1.0}, {"global_step": 1, "psnr": 2.0}, {"global_step": 2, "loss": 3.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"global_st')
    assert drop_after(path, 1) == [{"global_step": 1, "loss": 1.0, "psnr": 2.0}]
    assert path.read_text().splitlines() == [json.dumps(row) for row in rows[:2]]
    assert drop_after(tmp_path / "none", 1) == []


def test_files_that_are_not_wandbs(tmp_path) -> None:
    with pytest.raises(ValueError, match="not a W&B file"):
        list(pieces(b"something else"))
    folder = tmp_path / "wandb" / "offline-run-1-abc"
    folder.mkdir(parents=True)
    (folder / "run-abc.wandb").write_bytes(b"\0" * 100)
    assert last_step(tmp_path, "abc") == -1
    (folder / "run-abc.wandb").write_bytes(b":W&B" + b"\xff" * 100)
    assert last_step(tmp_path, "abc") == -1


def test_facts(monkeypatch) -> None:
    assert len(str(git_state()["commit"])) == 40
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JWT", "secret")
    assert slurm_facts()["job_id"] == "7" and "secret" not in slurm_facts().values()
    with pytest.raises(ConfigError, match=r"wandb\.mode=on must be one of online"):
        WandbConfig(mode="on")


def outlive(folder: Path) -> None:
    monitor = Monitor(folder, WandbConfig(), "chair", "stage1", {})
    monitor.log(1, {"loss": 1.0})
    for child in psutil.Process().children(recursive=True):
        if "wandb" in " ".join(child.cmdline()):
            child.kill()
            child.wait()
    for step in range(2, 6):
        monitor.log(step, {"loss": 1.0})
        time.sleep(0.1)
    monitor.alert("finished", "all is well")
    monitor.close()


def test_a_run_outlives_wandb(tmp_path, capfd) -> None:
    """Its process is killed: that is said once, and metrics.jsonl has everything."""
    process = multiprocessing.get_context("spawn").Process(target=outlive, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    words = capfd.readouterr().err
    assert words.count("warning: W&B failed") == 1 and "Traceback" not in words
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_wandb_that_cannot_begin(tmp_path, capfd, monkeypatch) -> None:
    """The run goes on without it, and the next start sends all that it missed."""

    def refuse(**given: object) -> None:
        raise wandb.errors.CommError("the server does not answer")

    with monkeypatch.context() as outage:
        outage.setattr(wandb, "init", refuse)
        live(tmp_path, 0, 5, killed=False)
    assert capfd.readouterr().err.count("warning: W&B failed (CommError: the server does not answer)") == 1
    process = multiprocessing.get_context("spawn").Process(target=live, args=(tmp_path, 5, 8, False))
    process.start()
    process.join(120)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [row["global_step"] for row in history(file)] == list(range(1, 9))


def show(folder: Path) -> None:
    """Steps, the last of them with a mesh; and what was made, before and after it changes."""
    monitor = Monitor(folder, WandbConfig(), "chair", "distill", {})
    for step in (1, 2):
        monitor.log(step, {"loss": 1.0})
    for name in ("turntable.mp4", "mesh.glb"):
        (folder / name).write_bytes(b"0" * 100)
    monitor.media(3, folder / "turntable.mp4", folder / "mesh.glb")
    for content in (b"0" * 100, b"1" * 100, b"1" * 100):
        (folder / "mesh.glb").write_bytes(content)
        monitor.artifact("chair-mesh", "mesh", str(folder / "mesh.glb"), made=True, about={})
    monitor.close()


def test_media_artifacts_and_files_that_were_cleaned(tmp_path) -> None:
    """`wandb clean` after a sync: what was sent is not sent again."""
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=show, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [row["global_step"] for row in history(file)] == [1, 2, 3]
    versions = [r.artifact.digest for r in records(file) if r.WhichOneof("record_type") == "artifact"]
    assert versions[0] != versions[1] == versions[2], "another content at the same place is another version"
    shutil.rmtree(tmp_path / "wandb")
    process = spawn.Process(target=live, args=(tmp_path, 2, 4, False))
    process.start()
    process.join(120)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [row["global_step"] for row in history(file)] == [3, 4]


def test_names_of_weights(tmp_path) -> None:
    """The name under which a run has noted its export, wherever it is."""
    run = tmp_path / "me" / "run7"
    (run / "export").mkdir(parents=True)
    (run / "config.yaml").write_text("name: chair\nstage: 1\n")
    assert name_of_weights(run / "export") == "chair-stage1"
    assert name_of_weights(run / "export_00000400") == "chair-stage1_00000400"
    assert name_of_weights("weights/mvdream") == name_of_weights("/data/weights/mvdream/") == "mvdream"


def test_online_without_a_key_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "https://wb.example")
    with pytest.raises(UserError, match=r"wandb\.mode=online needs a key, and there is none; wandb login"):
        require_key(WandbConfig(mode="online"))
    require_key(WandbConfig(mode="offline"))
    (tmp_path / "netrc").write_text("machine wb.example login user password x")
    require_key(WandbConfig(mode="online"))


def test_the_mode_is_taken_from_the_environment(monkeypatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert WandbConfig().mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert WandbConfig().mode == "disabled"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with pytest.raises(ConfigError, match=r"wandb\.mode=dryrun must be one of"):
        WandbConfig()
