"""Runs that are killed, asked to end, starved of disk, given NaN or damaged objects."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from tiny_runs import begin, begun, composed, losses, set_up, train, weights_hash
from warm import Run

from data.files import UserError
from data.packing import write_manifest, write_tar
from data.shards import Manifest, open_sample, read_manifest
from data.sources import ShardFolder
from models.checkpoint import load_export
from models.latents import MEMBER, pack_latents
from train.checkpoints import checkpoint_folders, damaged_files, step_of


def test_killed_and_resumed_equals_undisturbed(quiet, tiny, tmp_path) -> None:
    """SIGKILL of a random rank after a random step; the same command goes on to the very same weights."""
    out = tmp_path / "stage1"
    run = begun(tiny, out, steps=random.randint(2, 5))
    os.kill(random.choice(run.ranks), signal.SIGKILL)
    assert run.wait().returncode != 0
    again = train(tiny, out)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on from" in again.stdout
    assert losses(out) == losses(quiet)
    assert weights_hash(out) == weights_hash(quiet)
    assert set_up(composed(1, tiny, out)) is None, "a finished run has nothing to do"
    with pytest.raises(UserError, match=r"was trained with another optim\.lr \(0\.0015 then, 0\.0005 now\)"):
        set_up(composed(1, tiny, out, "optim.lr=5e-4"))
    with pytest.raises(UserError, match="is beyond steps=5"):
        set_up(composed(1, tiny, out, "steps=5"))


def test_a_stopped_rank_is_named_and_the_job_ends(quiet, tiny, tmp_path) -> None:
    out = tmp_path / "stage1"
    run = begun(tiny, out, "limits.step_s=8", "limits.checkpoint_s=8", "steps=5000")
    os.kill(run.ranks[1], signal.SIGSTOP)
    assert run.wait(200).returncode == 75, run.stderr[-3000:]
    assert re.search(rf"no sign of life from rank 1 \(host .*, process {run.ranks[1]}, in .*\): stopped", run.stderr)
    shutil.rmtree(out / "heartbeats")
    assert losses(out)[:6] == losses(quiet)[: len(losses(out))][:6]


def test_a_rank_that_cannot_write_ends_the_save_and_not_the_run(quiet, tiny, tmp_path) -> None:
    """As on a full disk that only one rank meets, in the middle of DeepSpeed's own save."""
    out = tmp_path / "stage1"
    run = begun(tiny, out)
    resource.prlimit(run.ranks[1], resource.RLIMIT_FSIZE, (100_000, 100_000))
    run.wait()
    words = run.stdout + run.stderr
    assert re.search(r"warning: checkpoint .*step_0000000[46] could not be written \(rank 1: .*training goes on", words)
    assert run.returncode == 2 and "but the last checkpoint could not be written" in words
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names <= {"step_00000002", "step_00000004"} and names, "nothing half-written stays"
    assert losses(out) == losses(quiet) and weights_hash(out) == weights_hash(quiet)


def test_asked_to_end_saves_and_goes_on(quiet, tiny, tmp_path) -> None:
    """SIGUSR1 to one rank, as a scheduler sends it; then a damaged checkpoint is passed over."""
    out = tmp_path / "stage1"
    run = begun(tiny, out)
    os.kill(random.choice(run.ranks), random.choice([signal.SIGUSR1, signal.SIGTERM]))
    assert run.wait().returncode == 75, run.stderr[-3000:]
    found = re.search(r"asked to end; saved at step (\d)", run.stdout + run.stderr)
    assert found
    step = int(found[1])
    newest = out / "checkpoints" / f"step_{step:08d}"
    assert newest.is_dir() and not (out / "export").exists()
    assert [s for s, _ in losses(out)] == list(range(1, step + 1))
    file = next(newest.glob("engine/*rank_1*optim_states.pt"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = train(tiny, out)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"{newest} is damaged (engine/{file.name} is not what was written) and set aside" in again.stdout
    assert "going on from" in again.stdout and (out / "checkpoints" / f"damaged_step_{step:08d}").is_dir()
    assert losses(out) == losses(quiet) and weights_hash(out) == weights_hash(quiet)


def test_steps_that_are_not_finite_are_left_out(tiny, tmp_path) -> None:
    """An object whose latents hold NaN reaches one rank; then nothing but such objects."""
    latents, parts = tmp_path / "latents", {"autoencoder": "vae", "image_encoder": "image_encoder"}
    given = [f"{key}.weights={tiny}/parts/{name}" for key, name in parts.items()]
    words = ["data/precompute.py", *given, f"shards={tiny}/shards", f"out={latents}", "image_size=32"]
    made = Run(words, 1, tmp_path / "log-latents").wait()
    assert made.returncode == 0, made.stderr
    manifest = read_manifest(latents)
    spoil_latents(latents, manifest, ["object1"])
    out = tmp_path / "run"
    given = [f"data.shards={latents}", "batch_size=2", "micro_batch_size=1", "checkpoint_every=1", "keep_checkpoints=9"]
    done = train(tiny, out, *given, "steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((out / "checkpoints" / "step_00000003" / "state.json").read_text())
    assert state["skipped"] in (2, 3) and state["updates"] == 3, "every second batch has the object"
    assert "the loss of object1 is not finite" in done.stdout
    assert all(tensor.isfinite().all() for tensor in load_export(out / "export").unet.state_dict().values())
    # Going on from the middle gives the same batches, left-out ones included.
    resumed = tmp_path / "resumed"
    shutil.copytree(out / "checkpoints" / "step_00000002", resumed / "checkpoints" / "step_00000002")
    shutil.copytree(out / "shards", resumed / "shards")
    done = train(tiny, resumed, *given, "steps=3")
    assert done.returncode == 0 and losses(resumed) == losses(out)[2:], done.stderr[-3000:]
    assert weights_hash(resumed) == weights_hash(out)
    spoil_latents(latents, manifest, [f"object{n}" for n in range(4)])
    done = train(tiny, tmp_path / "stops", f"data.shards={latents}", "max_skipped=2", "batch_size=2", processes=1)
    assert done.returncode == 2 and "with it 3 in a row, and max_skipped=2" in done.stderr, done.stderr[-3000:]
    assert "after step 0: the loss of object" in done.stderr and not (tmp_path / "stops" / "export").exists()


def spoil_latents(folder: Path, manifest: Manifest, uids: list[str]) -> None:
    """Makes the moments of these objects NaN, with marks and CRCs that are right."""
    shards = []
    for shard in manifest.shards:
        samples = []
        for row, uid in enumerate(shard.keys):
            with open_sample(ShardFolder(str(folder)), shard, row) as members:
                meta, tensors = json.loads(members["json"]), load(members[MEMBER])
            moments = torch.full_like(tensors["moments"], torch.nan) if uid in uids else tensors["moments"]
            content, told = pack_latents(moments, tensors["embeddings"], tensors["c2w"], "float16")
            meta["latents"] |= told
            samples.append(({"__key__": uid, MEMBER: content, "json": json.dumps(meta).encode()}, shard.sources[row]))
        shards.append(write_tar(folder / shard.name, samples))
    write_manifest(folder, replace(manifest, shards=shards))


def spoil(tiny: Path, target: Path, uid: str) -> Path:
    """A copy of the shards with a bit of one object's pictures flipped."""
    shutil.copytree(tiny / "shards", target)
    shard = next(shard for shard in read_manifest(target).shards if uid in shard.keys)
    content = bytearray((target / shard.name).read_bytes())
    begin = shard.offsets[shard.keys.index(uid)]
    for place in range(begin, begin + shard.sizes[shard.keys.index(uid)]):
        if content[place : place + 4] == b"IDAT":
            content[place + 6] ^= 1
    (target / shard.name).write_bytes(bytes(content))
    return target


def test_damaged_objects_are_counted_and_too_many_stop_the_run(tiny, tmp_path) -> None:
    shards = spoil(tiny, tmp_path / "shards", "object2")
    done = train(tiny, tmp_path / "on", f"data.shards={shards}", "data.max_damaged=0.3", "steps=3")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    assert last["damaged_objects"] == 1 and "damaged: object2: shards: " in done.stdout
    (line,) = (tmp_path / "on" / "damaged.jsonl").read_text().splitlines()
    assert json.loads(line)["uid"] == "object2" and "CRC-32" in json.loads(line)["reason"]
    done = train(tiny, tmp_path / "off", f"data.shards={shards}", "steps=3")
    assert done.returncode != 0 and not (tmp_path / "off" / "export").exists()
    words = "1 of 4 objects are damaged, more than data.max_damaged=0.01"
    assert words in done.stderr and "shard-000000.tar, object object2" in done.stderr, done.stderr[-3000:]
    (shards / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"are damaged.*\n  shards: .*shard-000001\.tar is missing"):
        set_up(composed(1, tiny, tmp_path / "missing", f"data.shards={shards}"))
    lines = (tmp_path / "missing" / "damaged.jsonl").read_text().splitlines()
    lost = next(shard.keys for shard in read_manifest(shards).shards if shard.name == "shard-000001.tar")
    assert [json.loads(line)["uid"] for line in lines] == lost


def test_a_shard_cut_short_while_training_runs(quiet, tiny, tmp_path) -> None:
    """The rank whose turn it is meets it; its objects are named once, and both ranks go on to the end."""
    shards, out = tmp_path / "shards", tmp_path / "stage1"
    shutil.copytree(tiny / "shards", shards)
    run = begun(tiny, out, f"data.shards={shards}", "data.max_damaged=0.5", "steps=30")
    cut = read_manifest(shards).shards[-1]
    os.truncate(shards / cut.name, 512)
    assert run.wait().returncode == 0, run.stderr[-3000:]
    named = [json.loads(line) for line in (out / "damaged.jsonl").read_text().splitlines()]
    assert sorted(row["uid"] for row in named) == sorted(cut.keys) and cut.name in named[0]["reason"]
    assert [step for step, _ in losses(out)] == list(range(1, 31)) and losses(out)[:2] == losses(quiet)[:2]
    assert (out / "export" / "isotropic3d.json").is_file()


@pytest.mark.slow
def test_a_full_disk_ends_saves_and_not_the_run(quiet, tiny, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs")
    try:
        out = disk / "stage1"
        run = begun(tiny, out, "steps=60")
        fill(disk / "filler")
        wait_for(lambda: "could not be written" in run.stdout + run.stderr, run)
        kept = checkpoint_folders(out / "checkpoints")
        assert kept and not [wrong for path in kept for wrong in damaged_files(path, 0, 1)]
        (disk / "filler").unlink()
        assert run.wait().returncode == 0, run.stderr[-3000:]
        assert [step for step, _ in losses(out)] == list(range(1, 61)) and losses(out)[:6] == losses(quiet)
        assert (out / "export" / "isotropic3d.json").is_file()
        assert [step_of(path) for path in checkpoint_folders(out / "checkpoints")] == [58, 60]
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def fill(path: Path) -> None:
    with open(path, "wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()


def wait_for(happened: Callable[[], bool], run: Run) -> None:
    deadline = time.monotonic() + 400
    while not happened():
        assert time.monotonic() < deadline, run.stdout + run.stderr
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_job_saves_too(tiny, tmp_path, number) -> None:
    """Ctrl-C, or a scheduler's, reaches the data workers as well."""
    out = tmp_path / "stage1"
    run = begin(tiny, out, "data.workers=2", "steps=100000", "checkpoint_every=5", processes=1)
    wait_for(lambda: bool(checkpoint_folders(out / "checkpoints")), run)
    os.killpg(run.ranks[0], number)
    assert run.wait().returncode == 75, run.stderr[-3000:]
    step = step_of(checkpoint_folders(out / "checkpoints")[-1])
    assert f"asked to end; saved at step {step}" in run.stdout
    # Not only "worker": on one core torch advises fewer of them.
    assert not re.search(r"Traceback|worker \(pid|_worker_loop", run.stderr), run.stderr[-3000:]
    assert [s for s, _ in losses(out)] == list(range(1, step + 1))


def test_a_longer_run_is_not_finished_by_the_export_of_a_shorter_one(quiet, tiny, tmp_path) -> None:
    out = tmp_path / "stage1"
    shutil.copytree(quiet, out)
    done = train(tiny, out, "steps=8")
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.rmtree(out / "export")
    shutil.copytree(quiet / "export", out / "export")  # as where it was killed before its own
    (out / "samples" / "step_00000008.png").unlink()
    done = train(tiny, out, "steps=8")
    assert done.returncode == 0 and "exported" in done.stdout, done.stderr[-3000:]
    assert load_export(out / "export").info.step == 8 and (out / "samples" / "step_00000008.png").is_file()
    assert "nothing to do" in train(tiny, out, "steps=8").stdout


def test_damaged_checkpoints_are_not_touched_where_none_is_whole(quiet, tiny, tmp_path) -> None:
    out = tmp_path / "stage1"
    shutil.copytree(quiet, out)
    shutil.rmtree(out / "export")
    for path in (out / "checkpoints").glob("step_*"):
        next(path.glob("engine/*optim_states.pt")).write_bytes(b"")
    for _ in range(2):
        done = train(tiny, out)
        assert done.returncode == 2 and "none is whole" in done.stderr, done.stderr[-3000:]
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"step_00000004", "step_00000006"}
    assert losses(out) == losses(quiet)
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(quiet / "checkpoints", out / "checkpoints")
    state = out / "checkpoints" / "step_00000006" / "state.json"
    state.write_text(state.read_text().replace('"skipped": 0', '"skipped": 1'))
    done = train(tiny, out)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr[-3000:]
    assert "step_00000006 is damaged (state.json is not what was written) and set aside" in done.stdout
    assert losses(out) == losses(quiet) and weights_hash(out) == weights_hash(quiet)
