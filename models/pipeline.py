"""`MultiViewPipeline`: an image, or its embedding, to views, in diffusers' own terms.

    from models import MultiViewPipeline
    pipe = MultiViewPipeline.from_pretrained("runs/mine/stage2/export").to("cuda")
    views = pipe(image, num_views=4).images[0]

Shapes: B images, V views, T tokens of width D of the embedding, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from torch import Tensor

from data.cameras import CONVENTIONS, orbit_camera
from data.files import UserError, atomic_file, read_json
from models.autoencoder import PatchCodec, decode_latents, downscale_of, load_autoencoder
from models.checkpoint import (
    ExportInfo,
    load_unet,
    model_card,
    read_info,
    require_one_model,
    require_scheduler,
    write_info,
)
from models.image_encoder import ClipImageEncoder, embed_image, load_image_encoder_folder
from models.multiview import MultiViewAttention, embedding_width
from models.reference_image import picture_to_tensor
from models.sampling import sample_latents

logger = logging.get_logger(__name__)
KINDS = {
    "unet": [("diffusers", "UNet2DConditionModel")],
    "vae": [("diffusers", "AutoencoderKL"), ("models.autoencoder", "PatchCodec")],
    "image_encoder": [("models.image_encoder", "ClipImageEncoder")],
}
HUB_ARGUMENTS = ("cache_dir", "revision", "token", "local_files_only", "force_download")
CARD = """---
library_name: diffusers
tags: [image-to-3d, multi-view, isotropic3d]
---
Draws views of an object from one image's CLIP embedding, as in Isotropic3D (arXiv 2403.10395):
`MultiViewPipeline.from_pretrained("this folder")(image, num_views=4)`, with `from models import MultiViewPipeline`.
"""


@dataclass
class MultiViewOutput(BaseOutput):
    """images: for each input its V views; PIL, (B, V, H, W, 3) numpy, (B, V, 3, H, W) torch, or latents."""

    images: Any


class MultiViewPipeline(DiffusionPipeline):
    """The UNet, autoencoder, image encoder and schedule of one checkpoint; any scheduler of diffusers fits.

    camera: which convention the UNet's cameras follow (data.cameras.CONVENTIONS).
    """

    _exclude_from_cpu_offload = ["image_encoder"]  # noqa: RUF012  torch's attention reads weights past the hooks
    model_cpu_offload_seq = "image_encoder->unet->vae"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012  the name and form that diffusers looks for

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL | PatchCodec,
        image_encoder: ClipImageEncoder | None,
        scheduler: SchedulerMixin,
        camera: str = "mvdream",
    ):
        super().__init__()
        if camera not in CONVENTIONS:
            raise ValueError(f"camera={camera!r} must be one of {', '.join(CONVENTIONS)}")
        self.register_modules(unet=unet, vae=vae, image_encoder=image_encoder, scheduler=scheduler)
        self.register_to_config(camera=camera)
        unet.set_attn_processor(MultiViewAttention())
        self.info: ExportInfo | None = None  # what else the checkpoint's folder says, to be saved with it again

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> MultiViewPipeline:
        """As diffusers', from a folder or a hub's name; classes come from a fixed list, weights from safetensors only.

        ValueError for a folder whose model_index.json names anything else: diffusers would import it.
        """
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        folder = Path(pretrained_model_name_or_path)
        if not folder.exists():
            folder = fetched(str(pretrained_model_name_or_path), hub)
        absent, info = read_index(folder, cls.__name__, kwargs)
        kwargs |= dict.fromkeys(absent)
        dtype = kwargs.get("torch_dtype") or kwargs.get("dtype")
        loaders = {"unet": load_unet, "vae": load_autoencoder, "image_encoder": load_image_encoder_folder}
        for part, load in loaders.items():
            if part not in kwargs:
                try:
                    network = load(folder / part, kwargs.get("variant"))
                except UserError as error:  # also for weights that are missing, which diffusers leaves random
                    raise ValueError(str(error)) from None
                wanted = dtype.get(part, dtype.get("default")) if isinstance(dtype, dict) else dtype
                kwargs[part] = network if wanted is None else torch.nn.Module.to(network, wanted)
        pipe: MultiViewPipeline = super().from_pretrained(folder, **(kwargs | {"use_safetensors": True}))
        try:
            if pipe.unet is not None and pipe.vae is not None:
                require_one_model(folder, pipe.unet, pipe.vae, pipe.image_encoder)
            if hasattr(pipe.scheduler, "alphas_cumprod"):  # flow matching has none, and is refused when it draws
                require_scheduler(pipe.scheduler)
        except UserError as error:
            raise ValueError(str(error)) from None
        if info is not None:
            pipe.info = info
            if "camera" not in kwargs:
                pipe.register_to_config(camera=info.camera)
        return pipe

    def enable_group_offload(self, *args: Any, exclude_modules: str | list[str] | None = None, **kwargs: Any) -> None:
        """As diffusers', but for the image encoder, which goes to the device whole, for the reason above."""
        excluded = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        super().enable_group_offload(*args, exclude_modules=[*excluded, "image_encoder"], **kwargs)

    def enable_attention_slicing(self, slice_size: str | int = "auto") -> None:
        """Does nothing: torch's attention needs no slices, and diffusers' sliced one would part the views."""
        logger.warning("attention is not sliced: torch's needs little memory, and a sliced one would not see all views")

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Does nothing, for the same reason."""
        self.enable_attention_slicing()

    def encode_image(self, image: Any) -> Tensor:
        """A picture or several -> context (B, T, D).

        PIL pictures (alpha composited on white), (H, W, 3) numpy or (3, H, W) torch in [0, 1], uint8 to 255; or a list
        or a batch of them.  ValueError for what is none of these.
        """
        several = isinstance(image, list | tuple) or (isinstance(image, Tensor | np.ndarray) and image.ndim == 4)
        images = [as_picture(one) for one in (image if several else [image])]
        if not images:
            raise ValueError("image is empty; give at least one picture")
        if self.image_encoder is None:
            raise ValueError("this model has no image encoder, as MVDream's weights have none; give image_embeds")
        device = self._execution_device
        return torch.cat([embed_image(self.image_encoder, picture[None].to(device)) for picture in images])

    @torch.no_grad()
    def __call__(
        self,
        image: Any = None,
        image_embeds: Tensor | None = None,
        azimuths_deg: Sequence[float] | Tensor | None = None,
        elevations_deg: float | Sequence[float] | Tensor = 15.0,
        num_views: int = 4,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MultiViewOutput | tuple[Any]:
        """image or image_embeds (B, D) or (B, T, D): exactly one of the two.

        azimuths_deg: V numbers, 0 the front, growing counter-clockwise as seen from above; None: `num_views` equally
        spaced ones from the front.  elevations_deg: one number or V.  guidance_scale 1 runs without guidance, in half
        the time.  guidance_rescale: arXiv 2305.08891, eq. 15-16.  latents (B, V, C, h, w): the noise to start from.
        image_size: pixels a side of the views; None: as trained.
        output_type: pil, np, pt or latent.  callback_on_step_end(pipe, step, timestep, {"latents": ...}): diffusers'.
        ValueError for arguments that do not fit together.
        """
        if (image is None) == (image_embeds is None):
            raise ValueError("give either image or image_embeds")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} must be pil, np, pt or latent")
        most = self.scheduler.config.num_train_timesteps - 1
        if not 1 <= num_inference_steps <= most:
            raise ValueError(f"num_inference_steps={num_inference_steps} must be 1 to {most}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            known = self._callback_tensor_inputs
            raise ValueError(f"callback_on_step_end_tensor_inputs: {sorted(unknown)} are not among {known}")
        require_size(image_size, self.unet, self.vae)
        if not hasattr(self.scheduler, "init_noise_sigma"):
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} is for flow matching; this network predicts noise or velocity")
        if others := {type(p).__name__ for p in self.unet.attn_processors.values()} - {MultiViewAttention.__name__}:
            raise ValueError(
                f"the UNet's attention was replaced by {', '.join(others)}, which does not see all views; "
                "pipe.unet.set_attn_processor(models.multiview.MultiViewAttention())"
            )
        c2w = cameras(azimuths_deg, elevations_deg, num_views)
        context = self.encode_image(image) if image_embeds is None else image_embeds
        context = context[:, None] if context.ndim == 2 else context
        width = embedding_width(self.unet)
        if context.ndim != 3 or context.shape[-1] != width:
            raise ValueError(f"image_embeds of shape {tuple(context.shape)} must be (B, {width}) or (B, T, {width})")
        context = context.to(self._execution_device)

        self.scheduler.set_timesteps(num_inference_steps)  # some schedulers take more than one evaluation a step
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress:

            def on_step(step: int, timestep: int, current: Tensor) -> Tensor:
                progress.update()
                if callback_on_step_end is None:
                    return current
                chosen = {"latents": current} if "latents" in callback_on_step_end_tensor_inputs else {}
                return (callback_on_step_end(self, step, timestep, chosen) or {}).get("latents", current)

            result = sample_latents(
                self.unet,
                self.scheduler,
                context,
                c2w.expand(len(context), -1, -1, -1),
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                steps=num_inference_steps,
                eta=eta,
                generator=generator,
                latents=latents,
                latent_size=None if image_size is None else image_size // downscale_of(self.vae),
                convention=self.config.camera,
                device=self._execution_device,
                on_step=on_step,
            )
        images: Any = result
        if output_type != "latent":
            images = decode_latents(self.vae, result.flatten(0, 1)).unflatten(0, result.shape[:2]).float().cpu()
        if output_type in ("np", "pil"):
            images = images.movedim(-3, -1).numpy()
        if output_type == "pil":
            images = [self.numpy_to_pil(views) for views in images]
        self.maybe_free_model_hooks()
        return MultiViewOutput(images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As diffusers', with what the rest of this project reads, and a model card where there is none."""
        folder = Path(save_directory)
        card = CARD
        if self.info is not None:
            self.info.camera = self.config.camera
            write_info(folder, self.info)
            card = model_card(self.info, self.image_encoder is not None)
        if not (folder / "README.md").exists():
            with atomic_file(folder / "README.md") as temporary:
                temporary.write_text(card)
        super().save_pretrained(str(save_directory), *args, **kwargs)  # last, since it may upload the folder


def read_index(folder: Path, name: str, given: dict[str, Any]) -> tuple[list[str], ExportInfo | None]:
    """Which parts the folder does not have, and what its isotropic3d.json says, where it has one.

    ValueError for a model_index.json of another pipeline than `name`, or one that names anything beside it and `given`
    that diffusers would import.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a folder with a model_index.json; give an export or a converted checkpoint")
    try:
        index = read_json(folder / "model_index.json", "checkpoint")
        info = read_info(folder) if (folder / "isotropic3d.json").is_file() else None
    except UserError as error:
        raise ValueError(str(error)) from None
    if code := [*folder.glob("*.py"), *folder.glob("*/*.py")]:
        raise ValueError(f"{folder} holds code, {code[0].name}, which some versions of diffusers would run")
    if not isinstance(index, dict) or index.get("_class_name") != name:
        raise ValueError(f"{folder}/model_index.json is not of a {name}")
    if info is not None and index.get("camera", info.camera) != info.camera:
        raise ValueError(f"{folder}: model_index.json has camera={index['camera']}, isotropic3d.json {info.camera}")
    absent = []
    components = {key: index.get(key) for key in (*KINDS, "scheduler")}
    components |= {key: value for key, value in index.items() if isinstance(value, list | dict)}
    for part, found in components.items():
        if part in given:
            continue
        if part == "image_encoder" and found in (None, [None, None]):
            absent.append(part)  # MVDream's; it draws from embeddings
            continue
        kind = tuple(found) if isinstance(found, list) else (found,)
        library, class_name = kind if len(kind) == 2 else (None, None)
        known = part in KINDS and kind in KINDS[part]
        if not known and not (part == "scheduler" and library == "diffusers" and str(class_name).endswith("Scheduler")):
            raise ValueError(f"{folder}/model_index.json names {kind} as {part}, which is not loaded")
    return absent, info


def as_picture(image: Any) -> Tensor:
    """PIL, (H, W, C) numpy or (C, H, W) torch -> (3, H, W) in [0, 1], alpha composited on white."""
    if isinstance(image, PIL.Image.Image):
        return picture_to_tensor(PIL.ImageOps.exif_transpose(image))
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image).movedim(-1, 0) if image.ndim == 3 else image
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (3, 4):
        what = tuple(image.shape) if hasattr(image, "shape") else type(image).__name__
        raise ValueError(f"image: {what} is no picture; give PIL, (H, W, 3) numpy or (3, H, W) torch")
    picture = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    low, high = float(picture.min()), float(picture.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"image: values from {low:g} to {high:g} must lie in [0, 1]")
    return picture[:3] if len(picture) == 3 else picture[:3] * picture[3:] + 1 - picture[3:]


def fetched(name: str, hub: dict[str, Any]) -> Path:
    """The folder that the hub's model `name` comes to lie in; nothing but JSON, weights and the card is fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "README.md"], **hub))
    except (OSError, ValueError) as error:  # the hub's own errors are of these
        raise ValueError(f"{name} is neither a folder nor a model that the hub gives ({error})") from None


def require_size(image_size: int | None, unet: Any, vae: Any) -> None:
    """ValueError for pictures whose sides the networks cannot halve as often as they do."""
    step = downscale_of(vae) * 2 ** (len(unet.config.block_out_channels) - 1)
    if image_size is not None and (image_size < step or image_size % step):
        raise ValueError(f"image_size={image_size} must be a multiple of {step}")


def cameras(
    azimuths_deg: Sequence[float] | Tensor | None, elevations_deg: float | Sequence[float] | Tensor, num_views: int
) -> Tensor:
    """c2w (V, 4, 4) at distance 1: the conditioning tells no distance."""
    if azimuths_deg is None:
        if num_views < 1:
            raise ValueError(f"num_views={num_views} must be at least 1")
        azimuths = torch.arange(num_views) * (360.0 / num_views)
    else:
        azimuths = torch.as_tensor(azimuths_deg, dtype=torch.float32).cpu()
    elevations = torch.as_tensor(elevations_deg, dtype=torch.float32).cpu()
    if azimuths.ndim != 1 or not len(azimuths) or elevations.ndim > 1 or elevations.numel() not in (1, len(azimuths)):
        raise ValueError(f"{azimuths.numel()} azimuths_deg and {elevations.numel()} elevations_deg do not make views")
    if not bool(torch.isfinite(azimuths).all()) or not bool((elevations.abs() < 90).all()):
        raise ValueError("azimuths_deg must be finite, and elevations_deg lie between -90 and 90, both exclusive")
    return orbit_camera(azimuths, elevations.expand(len(azimuths)), torch.tensor(1.0))
