"""Released checkpoints in and out: the same outputs, the same bits, nothing from files that are not what they say."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from ldm_oracle import Oracle, ddim
from released_values import FOLDER, draw, released_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.cameras import camera_conditioning, orbit_camera
from data.files import UserError
from models import MultiViewPipeline
from models.autoencoder import decode_latents, encode_images, load_autoencoder
from models.checkpoint import load_unet, make_scheduler, read_info
from models.convert import main
from models.image_encoder import ClipImageEncoder, load_image_encoder_folder
from models.multiview import predict_noise_output
from models.released import UNET, renamed, swapped, unet_config, unet_pairs, vae_config, vae_pairs
from models.sampling import sample_latents
from models.to_ldm import schedule_buffers
from models.weights_file import read_weights, write_safetensors

ROOT = Path(__file__).resolve().parents[2]
VISION = {"image_size": 28, "patch_size": 14, "width": 64, "layers": 2, "head_width": 32, "mlp_ratio": 4.0}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def convert(*arguments: object) -> Done:
    """The command, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            status = int(ended.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def test_the_command(tmp_path: Path) -> None:
    """As a user starts it; the other tests call it in their own process."""
    torch.save({"a": torch.zeros(1), "b": Hostile()}, tmp_path / "bad.ckpt")
    done = subprocess.run(
        [sys.executable, ROOT / "models" / "convert.py", "bad.ckpt", "out"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.startswith("error: bad.ckpt holds more than tensors")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def whole_checkpoint() -> dict[str, Tensor]:
    """With an image tower, the noise schedule and the released checkpoint's leftovers."""
    torch.manual_seed(0)
    visual = ClipImageEncoder(48, VISION).state_dict()
    schedule = schedule_buffers({"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012})
    leftovers = {"cond_stage_model.model.token_embedding.weight": torch.randn(7, 5)}
    tower = {f"cond_stage_model.model.{name}": tensor for name, tensor in visual.items()}
    return released_checkpoint() | tower | schedule | leftovers


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("released") / "isotropic3d.ckpt"
    torch.save({"state_dict": whole_checkpoint(), "global_step": 3}, path)
    return path


@pytest.fixture(scope="module")
def folder(source: Path) -> Path:
    out = source.parent / "converted"
    done = convert(source, out, "--head-dim", 32, "--clip-head-width", 32, "--image-size", 64, "--camera", "mvdream")
    assert done.returncode == 0, done.stderr
    assert "690 tensors" in done.stdout and "248 tensors" in done.stdout
    assert "dropped   cond_stage_model.model.token_embedding" in done.stdout
    return out


@torch.no_grad()
def test_outputs_are_the_released_networks(folder: Path) -> None:
    recorded = load_file(FOLDER / "released_w32.safetensors")
    unet = load_unet(folder / "unet").eval()
    x, camera, context = draw("x", (8, 4, 16, 16)), draw("camera", (8, 16)), draw("context", (2, 1, 48))
    times = torch.tensor([37] * 4 + [811] * 4)
    for views in (4, 2, 1):
        objects = 8 // views
        output = predict_noise_output(
            unet,
            x.unflatten(0, (objects, views)),
            times.view(objects, views),
            context.repeat_interleave(4, dim=0)[::views],
            camera.unflatten(0, (objects, views)),
        )
        difference = float((output.flatten(0, 1) - recorded[f"eps_views{views}"]).abs().max())
        assert difference < 1e-5, f"{views} views: {difference}"
    # The released network can also be asked without any camera: then nothing is added to the timestep's embedding.
    handle = unet.class_embedding.register_forward_hook(lambda module, given, output: torch.zeros_like(output))
    output = predict_noise_output(
        unet, x[:, None], times[:, None], context.repeat_interleave(4, dim=0), torch.zeros(8, 1, 16)
    )
    handle.remove()
    assert float((output[:, 0] - recorded["eps_no_camera_views1"]).abs().max()) < 1e-5
    vae = load_autoencoder(folder / "vae")
    image = draw("image", (1, 3, 32, 32)).tanh()
    latents = encode_images(vae, image, sample=False)
    assert float((latents - recorded["latent_mode_scaled"]).abs().max()) < 1e-5
    decoded = vae.decode(draw("latent", (1, 4, 4, 4)) / 0.18215).sample
    assert float((decoded - recorded["decoded"]).abs().max()) < 1e-5
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    bar = schedule_buffers(scheduler)["alphas_cumprod"]
    assert float((bar - recorded["alphas_cumprod"]).abs().max()) < 1e-6
    assert (
        float((decode_latents(vae, draw("latent", (1, 4, 4, 4))) - (decoded / 2 + 0.5).clamp(0, 1)).abs().max()) < 1e-5
    )


def unet_tensors(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(UNET): t for n, t in checkpoint.items() if n.startswith(UNET)}


def test_the_oracle_is_the_released_network_too() -> None:
    """So that it may stand in for it where nothing was recorded."""
    recorded = load_file(FOLDER / "released_w32.safetensors")
    oracle = Oracle(unet_tensors(released_checkpoint()), 32)
    x, camera, context = draw("x", (8, 4, 16, 16)), draw("camera", (8, 16)), draw("context", (2, 1, 48))
    times = torch.tensor([37] * 4 + [811] * 4)
    for views in (4, 2, 1):
        output = oracle(x, times, context.repeat_interleave(4, dim=0), camera, views)
        assert float((output - recorded[f"eps_views{views}"]).abs().max()) < 1e-5


def test_ddim_with_given_noise_is_the_papers(folder: Path) -> None:
    """Guidance and all, against the oracle's network and the formula."""
    oracle = Oracle(unet_tensors(released_checkpoint()), 32)
    unet, scheduler = load_unet(folder / "unet").eval(), make_scheduler("epsilon", False)
    noise, context = draw("noise", (1, 4, 4, 8, 8)), draw("context", (1, 1, 48))
    c2w = orbit_camera(torch.arange(4) * 90.0, torch.tensor(15.0), 1.0)[None]
    camera = camera_conditioning(c2w)[0]

    def guided(x: Tensor, t: int) -> Tensor:
        times = torch.full((4,), t)
        conditional = oracle(x, times, context.expand(4, -1, -1), camera, 4)
        unconditional = oracle(x, times, torch.zeros(4, 1, 48), camera, 4)
        return unconditional + 3 * (conditional - unconditional)

    expected = ddim(guided, noise[0], scheduler.alphas_cumprod, 5)
    ours = sample_latents(unet, scheduler, context, c2w, guidance_scale=3.0, steps=5, latents=noise)[0]
    assert float((ours - expected).abs().max()) < 1e-5 * max(float(expected.abs().max()), 1)


@torch.no_grad()
def test_the_image_encoder_is_the_same(folder: Path) -> None:
    ours = load_image_encoder_folder(folder / "image_encoder")
    theirs = ClipImageEncoder(48, VISION)
    prefix = "cond_stage_model.model."
    weights = {k.removeprefix(prefix): v for k, v in whole_checkpoint().items() if k.startswith(prefix + "visual.")}
    theirs.load_state_dict(weights)
    pixels = draw("pixels", (2, 3, 28, 28))
    assert torch.equal(ours(pixels), theirs.eval()(pixels))
    info = read_info(folder)
    assert info.camera == "mvdream" and info.stage == 2 and info.framing == (0.8, 1.0)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_there_and_back_is_the_same_bits(source: Path, folder: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"back.{suffix}"
    done = convert("--to-ldm", folder, out, "--base", source)
    assert done.returncode == 0, done.stderr
    before, after = whole_checkpoint(), read_weights(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    # Without the base: all but what is not part of the model here.
    assert convert("--to-ldm", folder, tmp_path / "alone.ckpt").returncode == 0
    alone = read_weights(tmp_path / "alone.ckpt")
    assert set(before) - set(alone) == {"cond_stage_model.model.token_embedding.weight"}


def test_names_are_those_of_diffusers_own_conversion() -> None:
    checkpoint = released_checkpoint()
    prefix = "model.diffusion_model."
    inside = {name.removeprefix(prefix): t for name, t in checkpoint.items() if name.startswith(prefix)}
    config = unet_config({name: tuple(t.shape) for name, t in inside.items()}, 32)
    known = {f"{prefix}{name.replace('camera_embed.', 'label_emb.0.')}": t for name, t in inside.items()}
    expected = convert_ldm_unet_checkpoint(known, config)
    pairs = unet_pairs(config["layers_per_block"], [b != "DownBlock2D" for b in config["down_block_types"]])
    names = renamed(inside, pairs)
    assert set(names) == set(inside) and {names[n]: id(t) for n, t in inside.items()} == {
        k: id(t) for k, t in expected.items()
    }
    assert renamed(names.values(), swapped(pairs)) == {new: old for old, new in names.items()}

    prefix = "first_stage_model."
    inside = {name.removeprefix(prefix): t for name, t in checkpoint.items() if name.startswith(prefix)}
    config = vae_config({name: tuple(t.shape) for name, t in inside.items()}, 0.18215)
    expected = convert_ldm_vae_checkpoint({prefix + n: t for n, t in inside.items()}, config)
    names = renamed(inside, vae_pairs(len(config["block_out_channels"]), config["layers_per_block"]))
    assert set(names.values()) == set(expected)
    for old, new in names.items():
        assert torch.equal(inside[old].flatten(), expected[new].flatten()), old


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def truncated(folder: Path) -> Path:
    torch.save(released_checkpoint(), folder / "whole.pt")
    (folder / "bad.pt").write_bytes((folder / "whole.pt").read_bytes()[:100_000])
    return folder / "bad.pt"


def hostile(folder: Path) -> Path:
    torch.save({"a": torch.zeros(1), "b": Hostile()}, folder / "bad.ckpt")
    return folder / "bad.ckpt"


def raw_pickle(folder: Path) -> Path:
    (folder / "bad.pt").write_bytes(pickle.dumps(Hostile()))
    return folder / "bad.pt"


def other_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "bad.ckpt", "w") as archive:
        archive.writestr("readme.txt", "no checkpoint")
    return folder / "bad.ckpt"


def text_encoder(folder: Path) -> Path:
    save_file({"cond_stage_model.model.ln_final.weight": torch.ones(4)}, folder / "bad.safetensors")
    return folder / "bad.safetensors"


def without_a_tensor(folder: Path) -> Path:
    checkpoint = released_checkpoint()
    del checkpoint["model.diffusion_model.middle_block.1.norm.bias"]
    torch.save(checkpoint, folder / "bad.pt")
    return folder / "bad.pt"


def with_a_stranger(folder: Path) -> Path:
    torch.save(released_checkpoint() | {"model.diffusion_model.extra.weight": torch.ones(2)}, folder / "bad.pt")
    return folder / "bad.pt"


def claims_too_much(folder: Path) -> Path:
    name = "model.diffusion_model.out.2.bias"
    torch.save(released_checkpoint() | {name: torch.zeros(1).expand(10**12)}, folder / "bad.pt")
    return folder / "bad.pt"


def sparse(folder: Path) -> Path:
    torch.save(
        released_checkpoint() | {"model.diffusion_model.out.2.bias": torch.zeros(4).to_sparse()}, folder / "bad.pt"
    )
    return folder / "bad.pt"


def misshapen(folder: Path) -> Path:
    torch.save(released_checkpoint() | {"model.diffusion_model.out.2.weight": torch.zeros(())}, folder / "bad.pt")
    return folder / "bad.pt"


def other_schedule(folder: Path) -> Path:
    torch.save(released_checkpoint() | {"alphas_cumprod": torch.linspace(1, 0, 1000)}, folder / "bad.pt")
    return folder / "bad.pt"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "not a checkpoint that can be read"),
        (hostile, "is not opened, since that could run code"),
        (raw_pickle, "is not opened, since that could run code"),
        (other_zip, "not a checkpoint that can be read"),
        (text_encoder, "holds no multi-view UNet"),
        (without_a_tensor, "lacks model.diffusion_model.middle_block.1.norm.bias"),
        (with_a_stranger, "holds unexpected model.diffusion_model.extra.weight"),
        (sparse, "not a plain tensor"),
        (misshapen, "the file is damaged"),
        (claims_too_much, "which it cannot hold"),
        (other_schedule, "its noise schedule is not SD 2.1's"),
        (lambda folder: folder / "nowhere.pt", "does not exist"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, make, words: str) -> None:
    done = convert(make(tmp_path), tmp_path / "out", "--head-dim", 32, "--allow-missing", "image_encoder")
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
    assert not (ROOT / "executed").exists() and not (tmp_path / "executed").exists()


def test_cameras_of_weights_with_an_image_encoder_are_asked_for(source: Path, tmp_path: Path) -> None:
    done = convert(source, tmp_path / "out", "--head-dim", 32, "--clip-head-width", 32, "--image-size", 64)
    assert done.returncode == 2 and "isotropic3d_released_sds" in done.stderr and not (tmp_path / "out").exists()


def test_a_converted_checkpoint_draws_views(folder: Path) -> None:
    pipe = MultiViewPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(torch.rand(1, 3, 50, 50), num_views=2, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 2, 3, 64, 64) and bool(torch.isfinite(images).all())


def test_what_may_be_missing_is_named(source: Path, folder: Path, tmp_path: Path) -> None:
    torch.save(released_checkpoint(), tmp_path / "mvdream.pt")
    done = convert(tmp_path / "mvdream.pt", tmp_path / "out", "--head-dim", 32)
    assert done.returncode == 2 and "--allow-missing image_encoder" in done.stderr
    done = convert(tmp_path / "mvdream.pt", tmp_path / "out", "--head-dim", 32, "--allow-missing", "image_encoder")
    assert done.returncode == 0 and not (tmp_path / "out" / "image_encoder").exists()
    assert load_unet(tmp_path / "out" / "unet").config.cross_attention_dim == 48
    assert read_info(tmp_path / "out").stage == 0
    again = convert(source, folder)
    assert again.returncode == 2 and "is there already and is not overwritten" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--camera", "typo"], "--camera typo must be one of mvdream"),
        (["--head-dim", "0"], "--head-dim 0 must be at least 1"),
        (["--image-size", "0"], "--image-size 0"),
        (["--head-dim", "32", "--allow-missing", "unet"], "without the UNet there is nothing to convert"),
        (["--head-dim", "24"], "head_dim=24 does not divide"),
    ],
)
def test_flags_that_cannot_work(tmp_path: Path, arguments: list[str], words: str) -> None:
    done = convert(without_a_tensor(tmp_path), tmp_path / "out", *arguments)
    assert done.returncode == 2 and words in done.stderr and not (tmp_path / "out").exists(), done.stderr


def test_another_latent_scale_and_an_impossible_size(tmp_path: Path) -> None:
    torch.save(released_checkpoint() | {"scale_factor": torch.tensor(0.5)}, tmp_path / "a.pt")
    torch.save(released_checkpoint(), tmp_path / "b.pt")
    common = ("--head-dim", "32", "--allow-missing", "image_encoder")
    done = convert(tmp_path / "a.pt", tmp_path / "out", *common)
    assert done.returncode == 2 and "scaled by 0.5 and not 0.18215" in done.stderr
    done = convert(tmp_path / "b.pt", tmp_path / "out", *common, "--image-size", "100")
    assert done.returncode == 2 and "--image-size 100 must be a multiple of 64" in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_absent_part_may_be_named_by_a_star(tmp_path: Path) -> None:
    torch.save(released_checkpoint(), tmp_path / "mvdream.pt")
    done = convert(tmp_path / "mvdream.pt", tmp_path / "out", "--head-dim", 32, "--allow-missing", "*")
    assert done.returncode == 0 and not (tmp_path / "out" / "image_encoder").exists(), done.stderr


def test_incomplete_and_foreign_folders_do_not_become_ldm_checkpoints(folder: Path, tmp_path: Path) -> None:
    for number, (spoil, words) in enumerate(
        [
            (lambda tensors: tensors.pop("conv_in.weight"), "first difference: conv_in.weight"),
            (lambda tensors: tensors.update(stranger=torch.ones(1)), "first difference: stranger"),
        ]
    ):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        tensors = load_file(copy / "unet" / "diffusion_pytorch_model.safetensors")
        spoil(tensors)
        save_file(tensors, copy / "unet" / "diffusion_pytorch_model.safetensors")
        done = convert("--to-ldm", copy, tmp_path / "out.ckpt")
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "out.ckpt").exists(), done.stderr
    for part, key, value in (("image_encoder", "tokens", "patches"), ("image_encoder", "preprocess", "open_clip"),
                             ("unet", "encoder_hid_dim", 7), ("image_encoder", "quick_gelu", True)):  # fmt: skip
        changed = tmp_path / key
        shutil.copytree(folder, changed)
        config = json.loads((changed / part / "config.json").read_text())
        (changed / part / "config.json").write_text(json.dumps(config | {key: value}))
        done = convert("--to-ldm", changed, tmp_path / "out.ckpt")
        assert done.returncode == 2 and f"has {key}={value}, which the released code" in done.stderr, done.stderr
    siglip = tmp_path / "siglip"
    shutil.copytree(folder, siglip)
    config = json.loads((siglip / "image_encoder" / "config.json").read_text())
    for change, words in (
        ({"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}, "preprocess_cfg="),
        ({"vision_cfg": config["vision_cfg"] | {"pool_type": "avg"}}, "an image tower with pool_type=avg"),
    ):
        (siglip / "image_encoder" / "config.json").write_text(json.dumps(config | change))
        done = convert("--to-ldm", siglip, tmp_path / "out.ckpt")
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "out.ckpt").exists(), done.stderr
    make_scheduler("v_prediction", True).save_pretrained(copy / "scheduler")
    done = convert("--to-ldm", copy, tmp_path / "out.ckpt")
    assert done.returncode == 2 and "which the released code does not know" in done.stderr


def test_heads_and_schedule_come_from_the_original_yaml(tmp_path: Path) -> None:
    torch.save(released_checkpoint(), tmp_path / "mvdream.pt")
    unet = "unet_config: {target: some.Class, params: {num_head_channels: 16}}"
    text = f"model:\n  params:\n    linear_start: 0.001\n    parameterization: v\n    {unet}\n"
    (tmp_path / "model.yaml").write_text(text)
    source, yaml = tmp_path / "mvdream.pt", tmp_path / "model.yaml"
    done = convert(source, tmp_path / "out", "--config", yaml, "--allow-missing", "image_encoder")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["attention_head_dim"] == [2, 4, 8, 8]
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert scheduler["beta_start"] == 0.001 and scheduler["prediction_type"] == "v_prediction"
    back = convert("--to-ldm", tmp_path / "out", tmp_path / "back.ckpt", "--allow-missing", "image_encoder")
    assert back.returncode == 0, back.stderr
    notes = ("the convention mvdream", "`parameterization: v`", "`linear_start: 0.001`", "`num_head_channels: 16`")
    for line in notes:
        assert line in back.stdout
    (tmp_path / "steps.yaml").write_text(text.replace("parameterization: v", "timesteps: 500"))
    done = convert(source, tmp_path / "new/deep/out", "--config", tmp_path / "steps.yaml")
    assert done.returncode == 2 and "timesteps=500 is not supported" in done.stderr and not (tmp_path / "new").exists()
    (tmp_path / "bad.yaml").write_text("model: [")
    done = convert(tmp_path / "mvdream.pt", tmp_path / "out2", "--config", tmp_path / "bad.yaml")
    assert done.returncode == 2 and "is not an ldm configuration" in done.stderr


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, kind: torch.dtype) -> None:
    """As many released files are; their noise schedule is rounded too, and still that of SD."""
    tensors = released_checkpoint() | schedule_buffers(
        {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    )
    torch.save({name: tensor.to(kind) for name, tensor in tensors.items()}, tmp_path / "half.pt")
    done = convert(tmp_path / "half.pt", tmp_path / "out", "--head-dim", 32, "--allow-missing", "image_encoder")
    assert done.returncode == 0, done.stderr
    assert load_unet(tmp_path / "out" / "unet").conv_in.weight.dtype == torch.float32
    tensors["alphas_cumprod"] = torch.full((1000,), torch.nan)
    torch.save(tensors, tmp_path / "nan.pt")
    done = convert(tmp_path / "nan.pt", tmp_path / "out2", "--head-dim", 32, "--allow-missing", "image_encoder")
    assert done.returncode == 2 and "its noise schedule is not SD 2.1's" in done.stderr


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("image_encoder", "vision_cfg", [1], "vision_cfg="), ("image_encoder", "vision_cfg", "x", "vision_cfg="),
        ("image_encoder", "preprocess_cfg", {"mean": 0.5}, "preprocess_cfg="),
        ("unet", "act_fn", 3, "does not describe"),
        ("unet", "attention_head_dim", [1, 1, 1, 1], "heads of [32, 64, 128] channels"),
        ("scheduler", "beta_start", "x", "cannot be loaded"), ("scheduler", "beta_start", -0.1, "cannot be loaded"),
        ("scheduler", "num_train_timesteps", 500, "num_train_timesteps=500"),
        ("scheduler", "prediction_type", "sample", "prediction_type=sample"),
    ],
)  # fmt: skip
def test_damaged_configurations_do_not_become_ldm(
    folder: Path, tmp_path: Path, capsys, part, key, value, words
) -> None:
    shutil.copytree(folder, tmp_path / "in")
    path = tmp_path / "in" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(SystemExit):
        main(["--to-ldm", str(tmp_path / "in"), str(tmp_path / "out.ckpt")])
    assert words in capsys.readouterr().err and not (tmp_path / "out.ckpt").exists()


def test_safetensors_are_written_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5).T, "a": torch.arange(7), "half": torch.randn(4).bfloat16(), "one": torch.tensor(2.5),
        "none": torch.empty(0, 3), "flag": torch.tensor([True, False]),
    }  # fmt: skip
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    for read in (load_file, read_weights):
        back = read(tmp_path / "x.safetensors")
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-3])
    with pytest.raises(UserError, match="not a safetensors file that can be read"):
        read_weights(tmp_path / "y.safetensors")
