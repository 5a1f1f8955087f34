"""Real DeepSpeed processes: a killed run equals one that was not, stage 2 follows stage 1, errors come before work."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from safetensors.torch import load, load_file
from wandb.proto import wandb_internal_pb2

from data.files import UserError
from data.packing import pack, write_manifest, write_tar
from data.shards import Manifest, open_sample, read_manifest
from data.sources import ShardFolder
from models.checkpoint import load_export
from models.image_encoder import load_image_encoder_folder
from models.latents import MEMBER, pack_latents
from train.config import TrainConfig
from train.loop import set_up
from train.networks import initial_unet

ROOT = Path(__file__).resolve().parents[2]


def tiny_overrides(folder: Path) -> list[str]:
    """The demo's configuration, smaller still."""
    return [
        "experiment=demo", f"data.shards={folder}/shards", "data.image_size=32",
        f"model.autoencoder.weights={folder}/parts/vae", "model.autoencoder.latent_channels=8",
        f"model.image_encoder.weights={folder}/parts/image_encoder", "model.unet.cross_attention_dim=8",
        "model.unet.block_out_channels=[32,64]", "model.unet.heads=[1,2]",
        "batch_size=4", "micro_batch_size=2", "log_every=1", "checkpoint_every=2", "sample_objects=1",
        "sample_steps=2", "steps=6",
    ]  # fmt: skip


def launch(stage: int, processes: int) -> list[str]:
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_machines", "1",
        "--num_processes", str(processes), "--mixed_precision", "no", "--dynamo_backend", "no",
        f"train/stage{stage}.py",
    ]  # fmt: skip


def train(tiny: Path, out: Path, *more: str, stage: int = 1, processes: int = 2) -> subprocess.CompletedProcess[str]:
    launcher = launch(stage, processes) if processes > 1 else [sys.executable, f"train/stage{stage}.py"]
    return subprocess.run(
        [*launcher, *tiny_overrides(tiny), f"out={out}", *more],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def composed(stage: int, tiny: Path, out: Path, *more: str) -> TrainConfig:
    """The configuration that the command would run with."""
    ConfigStore.instance().store(name=f"stage{stage}_schema", node=TrainConfig)
    with initialize_config_dir(str(ROOT / "conf" / "train"), version_base="1.3"):
        config = OmegaConf.to_object(compose(f"stage{stage}", [*tiny_overrides(tiny), f"out={out}", *more]))
    assert isinstance(config, TrainConfig)
    return config


def losses(out: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["global_step"], row["loss"]) for row in rows if "loss" in row]


def weights_hash(out: Path) -> str:
    tensors = load_file(out / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def quiet(tiny, tmp_path_factory) -> Path:
    """Stage 1, two processes, ZeRO-2, never disturbed."""
    out = tmp_path_factory.mktemp("quiet") / "stage1"
    done = train(tiny, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def test_a_run_leaves_what_it_promises(quiet) -> None:
    assert [step for step, _ in losses(quiet)] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (quiet / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert (quiet / "samples" / "step_00000006.png").is_file() and (quiet / "config.yaml").is_file()
    model = load_export(quiet / "export")
    assert model.info.stage == 1 and model.info.step == 6 and model.info.num_views == 4
    assert model.info.fov_deg == (40.0, 40.0) and model.info.framing == (0.58, 0.58)
    state = json.loads((quiet / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert state["world_size"] == 2 and state["zero_stage"] == 2


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind 7 bytes of header.

    Blocks of 32 KiB hold pieces (checksum 4, length 2, kind 1: whole, first, middle, last) and no piece spans two.
    """
    assert content[:4] == b":W&B"
    position, parts = 7, []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_wandb_holds_every_step_once(quiet) -> None:
    """Read back from the offline file, with W&B's own message types."""
    (path,) = (quiet / "wandb").glob("offline-run-*/run-*.wandb")
    steps, keys, configured = [], set(), False
    for data in wandb_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            assert record.run.run_id == (quiet / "wandb_id").read_text().strip()
            configured = any(item.key == "optim" for item in record.run.config.update)
        if record.WhichOneof("record_type") == "history":
            row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            keys |= set(row)
            if "loss" in row:
                steps.append(row["global_step"])
    assert steps == [1, 2, 3, 4, 5, 6] and configured
    assert {"loss", "lr", "images_per_s", "samples/psnr"} <= keys
    assert list((path.parent / "files" / "media" / "images").glob("samples_*.png"))


def start(tiny: Path, out: Path, log: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """The launcher and its two ranks, as soon as the first checkpoint is there."""
    process = subprocess.Popen(
        [*launch(1, 2), *tiny_overrides(tiny), f"out={out}"],
        cwd=ROOT, stdout=log.open("w"), stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not (out / "checkpoints" / "step_00000002").is_dir():
        assert time.monotonic() < deadline and process.poll() is None, f"no checkpoint appeared\n{log.read_text()}"
        time.sleep(0.05)
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "train/stage1.py"], capture_output=True, text=True, check=True
    )
    ranks = [int(pid) for pid in found.stdout.split()]
    assert len(ranks) == 2
    return process, ranks


def test_killed_and_resumed_equals_undisturbed(quiet, tiny, tmp_path) -> None:
    """SIGKILL of a random rank after the first checkpoint; the same command goes on to the very same weights."""
    out = tmp_path / "stage1"
    process, ranks = start(tiny, out, tmp_path / "log")
    os.kill(random.choice(ranks), signal.SIGKILL)
    process.wait(timeout=120)
    assert process.returncode != 0
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
    # A checkpoint is tied to its number of processes until it can be converted; that must be said, not crash.
    (out / "export" / "isotropic3d.json").unlink()
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    alone = train(tiny, out, processes=1)
    assert alone.returncode == 2 and "saved with world_size=2 and this run has 1" in alone.stderr


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(entry[5:]) for entry in environment if entry.startswith(b"RANK="))


def test_a_rank_that_cannot_write_ends_the_save_and_not_the_run(quiet, tiny, tmp_path) -> None:
    """As on a full disk that only one rank meets, in the middle of DeepSpeed's own save."""
    out = tmp_path / "stage1"
    process, ranks = start(tiny, out, tmp_path / "log")
    (other,) = (pid for pid in ranks if rank_of(pid) == 1)
    resource.prlimit(other, resource.RLIMIT_FSIZE, (100_000, 100_000))
    process.wait(timeout=120)
    words = (tmp_path / "log").read_text()
    assert re.search(r"warning: checkpoint .*step_0000000[46] could not be written \(rank 1: .*training goes on", words)
    assert process.returncode != 0 and "but the last checkpoint could not be written" in words
    names = {p.name for p in (out / "checkpoints").iterdir()}
    assert names <= {"step_00000002", "step_00000004"} and names, "nothing half-written stays"
    assert losses(out) == losses(quiet) and weights_hash(out) == weights_hash(quiet)


def test_asked_to_end_saves_and_goes_on(quiet, tiny, tmp_path) -> None:
    """SIGUSR1 to one rank, as a scheduler sends it; then a damaged checkpoint is passed over."""
    out = tmp_path / "stage1"
    process, ranks = start(tiny, out, tmp_path / "log")
    os.kill(random.choice(ranks), random.choice([signal.SIGUSR1, signal.SIGTERM]))
    process.wait(timeout=120)
    words = (tmp_path / "log").read_text()
    found = re.search(r"asked to end; saved at step (\d)", words)
    assert found and words.count("exitcode  : 75") + words.count("exitcode: 75") >= 1, words[-3000:]
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
    command = [sys.executable, "data/precompute.py", *given, f"shards={tiny}/shards", f"out={latents}", "image_size=32"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
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
    assert done.returncode == 2 and "the 3th in a row, and max_skipped=2" in done.stderr, done.stderr[-3000:]
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


def test_stage_2_starts_from_stage_1(quiet, tiny, tmp_path) -> None:
    out = tmp_path / "stage2"
    done = train(
        tiny, out, f"init_from={quiet}/export", "steps=2", "objective.reference_probability=1",
        "objective.single_view_probability=0", "optim.lr=1e-9", "model.autoencoder.weights=null",
        "model.image_encoder.weights=null", stage=2, processes=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all("loss/reference" in row for row in rows if "loss" in row)
    ours, theirs = (load_file(p / "export/unet/diffusion_pytorch_model.safetensors") for p in (out, quiet))
    # The fp32 masters of a bf16 run begin as bf16: 8 bits of mantissa.
    for name, weight in theirs.items():
        assert ((ours[name] - weight).abs() <= weight.abs() / 2**8 + 1e-6).all(), (
            f"{name} did not start from the export"
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.unet.block_out_channels=[64,64]"], "is another network than model.unet describes"),
        (["init_from=null", "model.unet.from_scratch=false"], "model.unet.weights is not set"),
        (["model.unet.heads=[2,4]"], "has [1, 2] attention heads and model.unet.heads=[2, 4]"),
        (["init_from=/nowhere"], "checkpoint /nowhere is not a folder"),
        (["init_from={tiny}/..", "model.autoencoder.weights=null"], "has no isotropic3d.json"),
        (["model.autoencoder.weights={tiny}/parts/image_encoder"], "it must be one of AutoencoderKL, PatchCodec"),
        (["data.shards={tiny}/views"], "has no manifest.json"),
        (["data.num_views=3"], "no 3 equally spaced"),
        (["model.unet.embedding_dim=7"], "model.unet.embedding_dim=7, but the image encoder's embedding has width 8"),
        (["model.image_encoder.tokens=patches"], "set model.unet.embedding_dim=192"),
        (["trainable=lora", "lora.targets=[nowhere]"], "lora.targets=['nowhere']"),
        (["model.autoencoder.latent_channels=4"], "set model.autoencoder.latent_channels=8"),
        (
            ["model.prediction_type=epsilon", "model.zero_terminal_snr=false"],
            "trained with model.prediction_type=v_pred",
        ),
        (["model.camera=isotropic3d_released_sds"], "with model.camera=mvdream and not isotropic3d_released_sds"),
        (["model.beta_end=0.02"], "with model.beta_end=0.012 and not 0.02"),
        (
            ["model.image_encoder.preprocess=open_clip"],
            "another image_encoder: preprocess=released there and open_clip",
        ),
        (["model.image_encoder.weights={tiny}/other_encoder"], "another image_encoder: visual."),
    ],
)
def test_errors_come_before_work(quiet, tiny, tmp_path, overrides, words) -> None:
    other = tiny / "other_encoder"
    if not other.exists():
        encoder = load_image_encoder_folder(tiny / "parts" / "image_encoder")
        encoder.visual.proj.data.mul_(1.001)
        encoder.save_pretrained(other)
    with pytest.raises(UserError, match=re.escape(words)):
        set_up(
            composed(2, tiny, tmp_path / "run", f"init_from={quiet}/export", *(o.format(tiny=tiny) for o in overrides))
        )
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "export").exists()


def test_another_embedding_from_weights_without_one(quiet, tiny, tmp_path) -> None:
    """Patch tokens of the tower's width: the layer that takes them is new, all else is the export's."""
    start = ["init_from=null", "model.unet.from_scratch=false", f"model.unet.weights={quiet}/export/unet"]
    choices = [*start, "model.image_encoder.tokens=patches", "model.unet.embedding_dim=192"]
    first, second = (initial_unet(composed(2, tiny, tmp_path / "run", *choices)) for _ in range(2))
    before = load_file(quiet / "export/unet/diffusion_pytorch_model.safetensors")
    after = first.state_dict()
    assert set(after) - set(before) == {"encoder_hid_proj.weight", "encoder_hid_proj.bias"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    weight = first.encoder_hid_proj.weight.detach()
    assert torch.equal(weight, second.encoder_hid_proj.weight)
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), atol=1e-5, rtol=0)
    done = train(
        tiny, tmp_path / "run", *choices, "steps=1", "trainable=cross_attention",
        stage=2, processes=1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    exported = load_export(tmp_path / "run" / "export")
    assert exported.image_encoder.width == 192 and exported.image_encoder.config.tokens == "patches"
    moved = {n for n, t in exported.unet.state_dict().items() if not torch.equal(t, after[n])}
    assert moved and all(".attn2." in name or name.startswith("encoder_hid_proj") for name in moved)


@pytest.mark.slow
def test_an_adapter_trains_alone_and_resumes(quiet, tiny, tmp_path) -> None:
    """From stage 1's export: what is not an adapter's keeps its bits, and going on equals not having stopped."""
    adapter = [f"init_from={quiet}/export", "trainable=lora", "lora.rank=2", "objective.reference_probability=0.5"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for out in (whole, parted):
        done = train(tiny, out, *adapter, "steps=4", stage=2)
        assert done.returncode == 0, done.stderr[-3000:]
        if out == whole:  # as if it had been stopped after two steps
            shutil.copytree(whole / "checkpoints" / "step_00000002", parted / "checkpoints" / "step_00000002")
    assert "going on from" in done.stdout
    assert losses(whole)[2:] == losses(parted) and len(losses(parted)) == 2
    assert weights_hash(whole) == weights_hash(parted)
    before, after = (load_file(f / "export/unet/diffusion_pytorch_model.safetensors") for f in (quiet, whole))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(re.search(r"\.attn[12]\.to_(q|k|v|out\.0)\.weight$", name) for name in changed)
    adapter_size = sum(t.numel() for t in load_file(whole / "export/lora/pytorch_lora_weights.safetensors").values())
    saved = sum(f.stat().st_size for f in (whole / "checkpoints" / "step_00000004").rglob("*") if f.is_file())
    assert saved < 30 * adapter_size + 500_000 < sum(t.numel() for t in before.values()), "frozen weights are not saved"


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
    assert rows[-2]["damaged_objects"] == 1 and "damaged: object2: shards: " in done.stdout
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


def test_changed_shards_are_refused_or_adopted_at_the_next_epoch(tiny, tmp_path) -> None:
    shutil.copytree(tiny / "shards", tmp_path / "shards")
    given = [f"data.shards={tmp_path}/shards", "model.unet.from_scratch=true"]
    done = train(tiny, tmp_path / "run", *given, "steps=2", processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    more = tmp_path / "views" / "object9"
    shutil.copytree(tiny / "views" / "object0", more)
    meta = json.loads((more / "meta.json").read_text()) | {"uid": "object9"}
    (more / "meta.json").write_text(json.dumps(meta))
    pack(tmp_path / "views", tmp_path / "shards", processes=1)
    with pytest.raises(UserError, match=r"another data\.shards .*; data\.on_change=adopt takes changed shards"):
        set_up(composed(1, tiny, tmp_path / "run", *given, "steps=4"))
    done = train(tiny, tmp_path / "run", *given, "steps=4", "data.on_change=adopt", processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert [(span["first"], span["epoch"]) for span in state["spans"]] == [(0, 0), (8, 2)]
    done = train(tiny, tmp_path / "run", *given, "steps=5", processes=1)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr[-3000:]


def test_latents_computed_ahead_train_as_pictures_do(tiny, quiet, tmp_path) -> None:
    parts = [f"autoencoder.weights={tiny}/parts/vae", f"image_encoder.weights={tiny}/parts/image_encoder"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
               "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu", "data/precompute.py", *parts,
               f"shards={tiny}/shards", f"out={tmp_path}/latents", "image_size=32", "dtype=float32"]  # fmt: skip
    for _ in range(2):  # the second time there is nothing left to do
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0 and "latents of 4 objects" in done.stdout, done.stderr[-3000:]
    done = train(tiny, tmp_path / "run", f"data.shards={tmp_path}/latents")
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (dict(losses(out)) for out in (tmp_path / "run", quiet))
    assert ours == pytest.approx(theirs, rel=1e-3)
    encoder = load_image_encoder_folder(tiny / "parts" / "image_encoder")
    encoder.visual.proj.data.mul_(1.001)
    encoder.save_pretrained(tmp_path / "other")
    stale = [f"data.shards={tmp_path}/latents", f"model.image_encoder.weights={tmp_path}/other"]
    with pytest.raises(UserError, match="holds latents of other encoders than"):
        set_up(composed(1, tiny, tmp_path / "stale", *stale))
    with pytest.raises(UserError, match=r"holds latents of 32 px and data\.image_size=64"):
        set_up(composed(1, tiny, tmp_path / "stale", stale[0], "data.image_size=64"))
