"""Real DeepSpeed processes: what a run leaves, stage 2 follows stage 1, errors come before work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROOT, composed, losses, set_up, train, weights_hash

from data.files import UserError
from data.packing import pack
from models.checkpoint import load_export
from models.image_encoder import load_image_encoder_folder
from monitor.wandb_file import history, records
from train.exporting import ExportConfig, export_checkpoint
from train.networks import initial_unet


def test_a_run_leaves_what_it_promises(quiet, tiny) -> None:
    assert [step for step, _ in losses(quiet)] == [1, 2, 3, 4, 5, 6]
    assert sorted(p.name for p in (quiet / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert (quiet / "samples" / "step_00000006.png").is_file() and (quiet / "config.yaml").is_file()
    model = load_export(quiet / "export")
    assert model.info.stage == 1 and model.info.step == 6 and model.info.num_views == 4
    assert model.info.fov_deg == (40.0, 40.0) and model.info.framing == (0.58, 0.58)
    parts = {name: load_file(next((tiny / "parts" / name).glob("*.safetensors"))) for name in ("vae", "image_encoder")}
    for name, before in parts.items():
        after = getattr(model, name).state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[k], t) for k, t in before.items()), "frozen"
    state = json.loads((quiet / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert state["world_size"] == 2 and state["zero_stage"] == 2


def test_wandb_holds_every_step_once(quiet) -> None:
    """Read back from the offline file, with W&B's own message types."""
    (path,) = (quiet / "wandb").glob("offline-run-*/run-*.wandb")
    kinds = [record.WhichOneof("record_type") for record in records(path)]
    (run,) = (record.run for record in records(path) if record.WhichOneof("record_type") == "run")
    assert run.run_id == (quiet / "wandb_id").read_text().strip()
    assert run.run_group == "demo" and run.job_type == "stage1"
    configured = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert configured["optim"]["lr"] == 0.0015 and "commit" in configured["git"]
    rows = list(history(path))
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "optimizer/lr", "throughput/images_per_s", "throughput/data_wait_share", "memory/memory_gib"}
    assert names <= set(rows[0]) and {"samples/psnr", "samples/_type"} & set(rows[-1])
    assert list((path.parent / "files" / "media" / "images").glob("samples_*.png"))
    assert kinds.count("artifact") == 1 and kinds.count("alert") == 1, "the export; that the run is finished"


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
    for name, weight in theirs.items():
        assert ((ours[name] - weight).abs() <= 1e-6).all(), f"{name} did not start from the export"


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
    export_checkpoint(ExportConfig(str(whole), out=str(tmp_path / "again" / "export")))
    assert weights_hash(tmp_path / "again") == weights_hash(whole)
    before, after = (load_file(f / "export/unet/diffusion_pytorch_model.safetensors") for f in (quiet, whole))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(re.search(r"\.attn[12]\.to_(q|k|v|out\.0)\.weight$", name) for name in changed)
    adapter_size = sum(t.numel() for t in load_file(whole / "export/lora/pytorch_lora_weights.safetensors").values())
    saved = sum(f.stat().st_size for f in (whole / "checkpoints" / "step_00000004").rglob("*") if f.is_file())
    assert saved < 30 * adapter_size + 500_000 < sum(t.numel() for t in before.values()), "frozen weights are not saved"


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
               "--main_process_port", "0",
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
