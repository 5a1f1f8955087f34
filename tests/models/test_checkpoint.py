"""The finished checkpoint: what is written is what is read, and foreign folders are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.cameras import orbit_camera
from data.files import UserError
from models.autoencoder import fit_patch_codec
from models.checkpoint import ExportInfo, MultiViewModel, load_export, make_scheduler, save_export
from models.config import UNetConfig
from models.image_encoder import ClipImageEncoder, embed_image
from models.multiview import build_unet
from models.sampling import guide, sample_views


def small_model() -> MultiViewModel:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "head_width": 48}
    return MultiViewModel(
        unet=build_unet(UNetConfig(None, [32, 64], [1, 2], 1, 24, True), 6, 4).eval(),
        vae=fit_patch_codec(torch.rand(20, 3, 32, 32) * 2 - 1, 8, 6).eval(),
        image_encoder=ClipImageEncoder(24, vision).eval(),
        scheduler=make_scheduler("v_prediction", zero_terminal_snr=True),
        info=ExportInfo(32, 4, (0.0, 30.0), (40.0, 40.0), (0.58, 0.6), "mvdream", stage=2, step=7),
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "export"
    save_export(folder, small_model())
    return folder


def cameras() -> torch.Tensor:
    return orbit_camera(torch.arange(4) * 90.0, torch.tensor(15.0), torch.tensor(1.6))


def test_round_trip(exported) -> None:
    model, loaded = small_model(), load_export(exported)
    assert loaded.info == model.info
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    context = torch.randn(2, 1, 24, generator=torch.Generator().manual_seed(0))
    pictures = [
        sample_views(m, context, cameras().expand(2, 4, 4, 4), 3.0, 4, generator=torch.Generator().manual_seed(5))
        for m in (model, loaded)
    ]
    assert pictures[0].shape == (2, 4, 3, 32, 32)
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)


def test_guidance_one_is_the_conditional_network(exported) -> None:
    model = load_export(exported)
    context = embed_image(model.image_encoder, torch.rand(1, 3, 32, 32))
    one, explicit = (
        sample_views(model, context, cameras()[None], g, 3, generator=torch.Generator().manual_seed(0))
        for g in (1.0, 1.0 + 1e-6)
    )
    torch.testing.assert_close(one, explicit, atol=1e-3, rtol=1e-3)


def test_rescaled_guidance_keeps_the_conditional_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 3, 4, 4, 8, 8, generator=generator)
    full = guide(c, u, 7.0, 1.0)
    torch.testing.assert_close(full.flatten(1).std(dim=1), c.flatten(1).std(dim=1))
    torch.testing.assert_close(guide(c, u, 1.0, 0.0), c)


def drop_tensor(folder: Path, name: str, renamed: str | None = None) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    taken = tensors.pop(name)
    if renamed is not None:
        tensors[renamed] = taken
    save_file(tensors, path, metadata={"format": "pt"})


def set_info(folder: Path, key: str, value: object) -> None:
    path = folder / "isotropic3d.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def fetching_encoder(folder: Path) -> None:
    path = folder / "image_encoder" / "config.json"
    config = json.loads(path.read_text())
    config["vision_cfg"] |= {"timm_model_name": "hf-hub:someone/something", "timm_model_pretrained": True}
    path.write_text(json.dumps(config))


def swap_autoencoder(folder: Path) -> None:
    fit_patch_codec(torch.rand(20, 3, 32, 32) * 2 - 1, 8, 5).save_pretrained(folder / "vae")


def set_value(folder: Path, key: str, value: object) -> None:
    path = folder / ("scheduler_config.json" if folder.name == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "is not a folder"),
        (lambda f: (f / "isotropic3d.json").unlink(), "not an export of this project"),
        (lambda f: (f / "isotropic3d.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "isotropic3d.json").write_text('{"format": "other"}'), "not of format"),
        (lambda f: (f / "unet" / "config.json").write_text('{"_class_name": "X"}'), "UNet2DConditionModel"),
        (
            lambda f: (f / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(
                (f / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()[:5000]
            ),
            "cannot be loaded",
        ),
        (lambda f: drop_tensor(f / "unet", "conv_out.bias"), r"unet lacks conv_out.bias \(1 tensors\)"),
        (lambda f: drop_tensor(f / "vae", "encoder.bias"), r"vae lacks encoder.bias"),
        (lambda f: drop_tensor(f / "image_encoder", "visual.proj"), r"image_encoder lacks visual.proj"),
        (lambda f: drop_tensor(f / "unet", "conv_out.bias", "conv_out.offset"), "lacks conv_out.bias"),
        (lambda f: set_info(f, "fov_deg", None), "fov_deg in isotropic3d.json is None"),
        (lambda f: set_info(f, "camera", "other"), "camera in isotropic3d.json is 'other'; it must be one of mvdream"),
        (lambda f: set_info(f, "num_views", "four"), "num_views in isotropic3d.json is 'four'"),
        (lambda f: set_info(f, "num_views", 0), "must be positive"),
        (fetching_encoder, "would be fetched from elsewhere"),
        (lambda f: shutil.rmtree(f / "image_encoder"), "has no image encoder"),
        (lambda f: set_value(f / "unet", "act_fn", 3), "unet cannot be loaded"),
        (lambda f: set_value(f / "unet", "norm_num_groups", 0), "unet cannot be loaded"),
        (lambda f: set_value(f / "unet", "sample_size", None), "sample_size"),
        (lambda f: set_value(f / "image_encoder", "vision_cfg", 3), "image_encoder cannot be loaded"),
        (lambda f: set_value(f / "vae", "scaling_factor", 0), "scaling_factor"),
        (lambda f: set_value(f / "scheduler", "beta_start", "x"), "the scheduler in .* cannot be loaded"),
        (lambda f: set_value(f / "scheduler", "beta_schedule", "no"), "the scheduler in .* cannot be loaded"),
        (lambda f: set_value(f / "scheduler", "prediction_type", "sample"), "prediction_type=sample"),
        (swap_autoencoder, "the vae's latent channels are 5 and its UNet wants 6"),
    ],
)
def test_foreign_and_damaged_folders(exported, tmp_path, spoil, words) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    spoil(folder)
    with pytest.raises(UserError, match=words):
        load_export(folder)


def test_a_single_view_model_is_refused(exported, tmp_path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["projection_class_embeddings_input_dim"] = 7
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="not a multi-view model"):
        load_export(folder)
