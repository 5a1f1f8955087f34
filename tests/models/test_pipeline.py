"""MultiViewPipeline as a user of diffusers meets it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image
from safetensors.torch import load_file, save_file
from test_checkpoint import small_model

from data.cameras import orbit_camera
from models import MultiViewPipeline
from models.checkpoint import load_export, save_export
from models.image_encoder import embed_image
from models.sampling import sample_views


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "export"
    save_export(folder, small_model())
    return folder


@pytest.fixture
def pipe(folder: Path) -> MultiViewPipeline:
    pipe = MultiViewPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed: int = 0, mode: str = "RGBA") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (40, 40, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_an_export_is_a_pipeline_and_draws_what_sampling_draws(folder: Path, pipe: MultiViewPipeline) -> None:
    assert isinstance(pipe, DiffusionPipeline)
    model = load_export(folder)
    image = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    c2w = orbit_camera(torch.arange(4) * 90.0, torch.tensor(15.0), 1.0)[None].expand(2, 4, 4, 4)
    expected = sample_views(model, embed_image(model.image_encoder, image), c2w, 3.0, 4, generator=seeded())
    result = pipe(image, guidance_scale=3.0, num_inference_steps=4, generator=seeded(), output_type="pt")
    torch.testing.assert_close(result.images, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unet": ["evil", "Evil"]}, "names ('evil', 'Evil') as unet"),
        ({"extra": ["os", "system"]}, "as extra"),
        ({"scheduler": ["diffusers", "DiffusionPipeline"]}, "as scheduler"),
        ({"_class_name": "Other"}, "is not of a MultiViewPipeline"),
        ({"camera": "isotropic3d_released_sds"}, "has camera=isotropic3d_released_sds, isotropic3d.json mvdream"),
        ({"unet": "aB"}, "names ('aB',) as unet"),
        ({"unet": {"a": 1, "B": 2}}, "as unet"),
    ],
)
def test_classes_come_from_a_fixed_list(folder: Path, tmp_path: Path, change, words: str) -> None:
    shutil.copytree(folder, tmp_path / "export")
    path = tmp_path / "export" / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=re.escape(words)):
        MultiViewPipeline.from_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match="is not a folder with a model_index"):
        MultiViewPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["unet/diffusers.py", "vae/models.autoencoder.py", "pipeline.py"])
def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path, place: str) -> None:
    shutil.copytree(folder, tmp_path / "export")
    (tmp_path / "export" / place).write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    with pytest.raises(ValueError, match="holds code"):
        MultiViewPipeline.from_pretrained(tmp_path / "export")
    assert not (tmp_path / "executed").exists()


def test_damaged_weights_are_not_drawn_with(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "export")
    weights = tmp_path / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("conv_out.weight")
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"lacks conv_out\.weight"):
        MultiViewPipeline.from_pretrained(tmp_path / "export")


def test_without_an_image_encoder(folder: Path, pipe: MultiViewPipeline, tmp_path: Path) -> None:
    """As MVDream's conversion is: given one, or drawing from embeddings."""
    shutil.copytree(folder, tmp_path / "export")
    shutil.rmtree(tmp_path / "export" / "image_encoder")
    path = tmp_path / "export" / "model_index.json"
    index = json.loads(path.read_text())
    del index["image_encoder"]
    path.write_text(json.dumps(index))
    arguments = {"num_inference_steps": 1, "output_type": "pt"}
    expected = pipe(picture(), generator=seeded(), **arguments).images
    given = MultiViewPipeline.from_pretrained(tmp_path / "export", image_encoder=pipe.image_encoder)
    assert torch.equal(given(picture(), generator=seeded(), **arguments).images, expected)
    alone = MultiViewPipeline.from_pretrained(tmp_path / "export")
    with pytest.raises(ValueError, match=r"has no image encoder.*give image_embeds"):
        alone(picture())
    embeds = pipe.encode_image(picture())
    assert torch.equal(alone(image_embeds=embeds, generator=seeded(), **arguments).images, expected)


def test_a_hubs_name(folder: Path, tmp_path: Path) -> None:
    """From the hub's own cache, as it lies there after a download."""
    cache = tmp_path / "models--someone--chairs"
    shutil.copytree(folder, cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    pipe = MultiViewPipeline.from_pretrained("someone/chairs", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(pipe.unet.conv_in.weight, load_export(folder).unet.conv_in.weight)
    for name in ("someone/tables", "no such folder/anywhere/at all"):
        with pytest.raises(ValueError, match=f"{name} is neither a folder nor a model"):
            MultiViewPipeline.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


def test_saved_and_loaded_it_draws_the_same(folder: Path, pipe: MultiViewPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    again = MultiViewPipeline.from_pretrained(tmp_path / "saved", torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    assert (tmp_path / "saved" / "README.md").is_file() and again.config.camera == "mvdream"
    first, second = (
        p(picture(), num_inference_steps=2, generator=seeded(), output_type="np").images for p in (pipe, again)
    )
    assert first.shape == (1, 4, 32, 32, 3) and np.array_equal(first, second)
    assert load_export(tmp_path / "saved").info == load_export(folder).info


def test_saved_otherwise(folder: Path, pipe: MultiViewPipeline, tmp_path: Path) -> None:
    """Other cameras, half precision's own files, and a pipeline made of another's parts."""
    other = MultiViewPipeline.from_pretrained(folder, camera="isotropic3d_released_sds")
    other.save_pretrained(tmp_path / "saved", variant="fp16")
    again = MultiViewPipeline.from_pretrained(tmp_path / "saved", variant="fp16", torch_dtype={"unet": torch.float16})
    assert again.config.camera == "isotropic3d_released_sds" and again.unet.dtype == torch.float16
    assert again.vae.dtype == torch.float32
    assert MultiViewPipeline.from_pipe(pipe).unet is pipe.unet
    with pytest.raises(ValueError, match="camera='nonsense' must be one of"):
        MultiViewPipeline.from_pretrained(folder, camera="nonsense")
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "euler")
    scheduler = load_export(tmp_path / "euler").scheduler  # ours has no use for other classes but their noise
    assert not scheduler.config.clip_sample and scheduler.config.rescale_betas_zero_snr
    assert torch.equal(scheduler.alphas_cumprod, load_export(folder).scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("unet", "sample_size", None, "sample_size"), ("vae", "scaling_factor", 0, "scaling_factor"),
        ("scheduler", "prediction_type", "sample", "prediction_type=sample"),
        ("image_encoder", "preprocess_cfg", {"mean": [0.5, 0.5]}, "embeds no picture"),
    ],
)  # fmt: skip
def test_damaged_configurations(folder: Path, tmp_path: Path, part: str, key: str, value, words: str) -> None:
    shutil.copytree(folder, tmp_path / "export")
    path = tmp_path / "export" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=words):
        MultiViewPipeline.from_pretrained(tmp_path / "export")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_inputs_and_outputs(pipe: MultiViewPipeline, mode: str) -> None:
    pictures = [picture(0, mode), picture(1, mode)]
    result = pipe(pictures, num_views=3, num_inference_steps=1, guidance_scale=1.0)
    assert len(result.images) == 2 and len(result.images[0]) == 3 and result.images[0][0].size == (32, 32)
    (latents,) = pipe(pictures, num_inference_steps=1, output_type="latent", return_dict=False)
    assert latents.shape == (2, 4, 6, 4, 4)
    embedding = pipe.encode_image(pictures)
    a, b = (
        pipe(num_inference_steps=2, generator=seeded(), output_type="pt", **given).images
        for given in ({"image": pictures}, {"image_embeds": embedding[:, 0]})
    )
    assert torch.equal(a, b)


def test_generators_one_for_each_image(pipe: MultiViewPipeline) -> None:
    pictures = [picture(0), picture(1)]
    generators = [torch.Generator().manual_seed(n) for n in (5, 6)]
    both = pipe(pictures, num_inference_steps=2, generator=generators, output_type="pt").images
    alone = pipe(
        pictures[1], num_inference_steps=2, generator=[torch.Generator().manual_seed(6)], output_type="pt"
    ).images
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=0)


def test_poses(pipe: MultiViewPipeline) -> None:
    """A full turn of azimuth changes nothing; another elevation does."""
    options = {"num_inference_steps": 2, "output_type": "pt"}
    first = pipe(picture(), azimuths_deg=[0, 120], generator=seeded(), **options).images
    turned = pipe(picture(), azimuths_deg=[360, 480], generator=seeded(), **options).images
    higher = pipe(picture(), azimuths_deg=[0, 120], elevations_deg=[15.0, 60.0], generator=seeded(), **options).images
    torch.testing.assert_close(first, turned, atol=1e-4, rtol=0)
    assert float((first - higher).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "scheduler",
    [EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler],
    ids=lambda s: s.__name__,
)
def test_any_scheduler(pipe: MultiViewPipeline, scheduler) -> None:
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    images = pipe(picture(), num_inference_steps=3, generator=seeded(), output_type="pt").images
    assert images.shape == (1, 4, 3, 32, 32) and bool(torch.isfinite(images).all()) and float(images.std()) > 0


def test_other_sizes_and_numbers_of_views(pipe: MultiViewPipeline) -> None:
    images = pipe(picture(), num_views=7, image_size=64, num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 7, 3, 64, 64)


def test_callback_sees_and_changes_the_latents(pipe: MultiViewPipeline) -> None:
    seen = []

    def callback(_, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append((step, timestep))
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = pipe(picture(), num_inference_steps=3, callback_on_step_end=callback, output_type="latent")
    assert [step for step, _ in seen] == [0, 1, 2] and seen[0][1] > seen[2][1]
    assert float(result.images.abs().max()) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either image or image_embeds"),
        ({"image": picture(), "output_type": "jpg"}, "output_type='jpg'"),
        ({"image": picture(), "num_views": 0}, "num_views=0"),
        ({"image": picture(), "elevations_deg": 90}, "between -90 and 90"),
        ({"image": picture(), "azimuths_deg": [0, 90], "elevations_deg": [0.0, 1.0, 2.0]}, "do not make views"),
        ({"image": picture(), "azimuths_deg": [0, float("nan")]}, "must be finite"),
        ({"image_embeds": torch.zeros(1, 7)}, "must be (B, 24) or (B, T, 24)"),
        ({"image": picture(), "latents": torch.zeros(1, 4, 6, 8, 8)}, "latents of shape"),
        ({"image": picture(), "num_inference_steps": 0}, "num_inference_steps=0"),
        ({"image": picture(), "num_inference_steps": 1000}, "must be 1 to 999"),
        ({"image": picture(), "callback_on_step_end_tensor_inputs": ["x"]}, "are not among"),
        ({"image": []}, "image is empty"),
        ({"image": picture(), "image_size": 40}, "image_size=40 must be a multiple of 16"),
    ],
)
def test_arguments_that_do_not_fit(pipe: MultiViewPipeline, arguments, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        pipe(**arguments)


def test_pictures_of_any_kind(pipe: MultiViewPipeline) -> None:
    rgba = picture()
    array = np.asarray(rgba)
    tensor = torch.from_numpy(array.copy()).movedim(-1, 0)
    expected = pipe.encode_image(rgba)
    for image in (array, array / 255, [array], tensor, [tensor, tensor][:1], (tensor / 255)[None], np.stack([array])):
        torch.testing.assert_close(pipe.encode_image(image), expected, atol=1e-5, rtol=1e-5)
    for image, words in (
        (array * 1.0, "must lie in"), (torch.zeros(2, 8, 8), "is no picture"), ("a.png", "str is no picture"),
        ([], "is empty"), (torch.full((3, 8, 8), torch.nan), "must lie in"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            pipe.encode_image(image)


def test_a_scheduler_for_flow_matching(pipe: MultiViewPipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler is for flow matching"):
        pipe(picture())


def test_weights_left_behind_layer_by_layer(pipe: MultiViewPipeline) -> None:
    """What enable_sequential_cpu_offload does, without the GPU: all but the image encoder, whose weights must stay."""
    assert MultiViewPipeline._exclude_from_cpu_offload == ["image_encoder"]
    arguments = {"num_inference_steps": 1, "output_type": "pt"}
    before = pipe(picture(), generator=seeded(), **arguments).images
    for part in (pipe.unet, pipe.vae):
        cpu_offload(part, torch.device("cpu"))
    assert torch.equal(pipe(picture(), generator=seeded(), **arguments).images, before)


def test_attention_that_would_part_the_views(pipe: MultiViewPipeline) -> None:
    def draw() -> torch.Tensor:
        return pipe(picture(), num_inference_steps=1, guidance_scale=1, generator=seeded(), output_type="pt").images

    before = draw()
    pipe.enable_attention_slicing()
    pipe.enable_xformers_memory_efficient_attention()
    assert torch.equal(draw(), before)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(ValueError, match="AttnProcessor2_0, which does not see all views"):
        draw()


def test_offloading_in_groups(pipe: MultiViewPipeline) -> None:
    """As on a GPU, but to the CPU from the CPU: the hooks must find what the views' attention is given."""
    arguments = {"num_inference_steps": 1, "guidance_scale": 3, "output_type": "pt"}
    before = pipe(picture(), generator=seeded(), **arguments).images
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    hooked = {name for name, part in modules.items() if any(hasattr(m, "_diffusers_hook") for m in part.modules())}
    assert hooked == {"unet", "vae"}, "torch's attention in the image encoder reads weights past the hooks"
    assert torch.equal(pipe(picture(), generator=seeded(), **arguments).images, before)
