"""The finished checkpoint: a folder of safetensors that training writes and sampling and distillation read.

    export/  isotropic3d.json  unet/  vae/  image_encoder/  scheduler/  (lora/)

Each part is in diffusers' own format (`config.json` + `*.safetensors`); `isotropic3d.json` is `ExportInfo`.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from data.cameras import CONVENTIONS
from data.files import UserError, atomic_folder, read_json, write_json
from models.autoencoder import load_autoencoder
from models.folders import load_network
from models.image_encoder import embed_image, load_image_encoder_folder
from models.lora import has_adapter, merge_adapter, save_adapter
from models.multiview import CAMERA_FLOATS, MultiViewAttention, embedding_width

FORMAT = "isotropic3d-export/2"


@dataclass
class ExportInfo:
    """What a user of the weights must know and cannot read off their shapes."""

    image_size: int  # pixels
    num_views: int  # views folded together in training
    elevation_deg: tuple[float, float]  # the cameras seen in training: lowest and highest
    fov_deg: tuple[float, float]
    framing: tuple[float, float]  # distance * tan(fov / 2), object units
    camera: str  # how the UNet reads cameras: one of data.cameras.CONVENTIONS
    stage: int
    step: int


@dataclass
class MultiViewModel:
    """Everything that inference needs; frozen."""

    unet: UNet2DConditionModel
    vae: Any  # AutoencoderKL or PatchCodec
    image_encoder: Any  # ClipImageEncoder, or None where embeddings are given
    scheduler: DDIMScheduler
    info: ExportInfo

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size

    def to(self, device: str | torch.device, dtype: torch.dtype) -> MultiViewModel:
        """UNet and autoencoder in `dtype`; the image encoder stays in fp32."""
        # nn.Module's own `to`: diffusers' warns about modules to keep in fp32, of which these networks have none.
        for part, kind in ((self.unet, dtype), (self.vae, dtype), (self.image_encoder, torch.float32)):
            if part is not None:
                torch.nn.Module.to(part, device=device, dtype=kind)
        return self


def make_scheduler(
    prediction_type: str, zero_terminal_snr: bool, beta_start: float = 0.00085, beta_end: float = 0.012
) -> DDIMScheduler:
    """SD 2.1's noise schedule; with zero terminal SNR, rescaled betas and trailing steps (arXiv 2305.08891)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=beta_start,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
    )


def save_export(folder: str | Path, model: MultiViewModel) -> None:
    """Writes the whole folder or nothing.  A LoRA adapter is merged into `unet/`, and stands by itself in `lora/`."""
    with atomic_folder(folder) as temporary:
        unet = model.unet
        if has_adapter(unet):
            save_adapter(unet, temporary / "lora")
            unet = copy.deepcopy(unet)
            merge_adapter(unet)
        unet.save_pretrained(temporary / "unet")
        model.vae.save_pretrained(temporary / "vae")
        model.scheduler.save_pretrained(temporary / "scheduler")
        parts = {"unet": model.unet, "vae": model.vae}
        if model.image_encoder is not None:
            model.image_encoder.save_pretrained(temporary / "image_encoder")
            parts["image_encoder"] = model.image_encoder
        write_index(temporary, {name: type(part).__name__ for name, part in parts.items()}, model.info)


def write_index(folder: Path, kinds: dict[str, str], info: ExportInfo) -> None:
    """What diffusers reads first (which class stands in which folder), what we read first, and a card for people."""
    ours = {"ClipImageEncoder": "models.image_encoder", "PatchCodec": "models.autoencoder"}
    index: dict[str, Any] = {part: [ours.get(kind, "diffusers"), kind] for part, kind in kinds.items()}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    head = {"_class_name": "MultiViewPipeline", "_diffusers_version": diffusers.__version__, "camera": info.camera}
    write_json(folder / "model_index.json", head | index)
    write_info(folder, info)
    (folder / "README.md").write_text(model_card(info, "image_encoder" in kinds))


def write_info(folder: Path, info: ExportInfo) -> None:
    write_json(folder / "isotropic3d.json", {"format": FORMAT, **dataclasses.asdict(info)})


def model_card(info: ExportInfo, has_image_encoder: bool) -> str:
    if has_image_encoder:
        call = "pipe(image"
        origin = f"as in Isotropic3D (arXiv 2403.10395); stage {info.stage}, {info.step} steps"
    else:
        call = "pipe(image_embeds=embeddings"
        origin = (
            "as in MVDream (arXiv 2308.16512).  It has no image encoder: training starts from it (`init_from=` or "
            "`model.unet.weights=`), and by itself it draws from embeddings"
        )
    return f"""---
library_name: diffusers
tags: [image-to-3d, multi-view, isotropic3d]
---
# A multi-view diffusion model

Draws {info.num_views} views of {info.image_size} x {info.image_size} pixels of an object from one embedding,
{origin}.

    from models import MultiViewPipeline

    pipe = MultiViewPipeline.from_pretrained("this folder")
    views = {call}, num_views={info.num_views}, elevations_deg={sum(info.elevation_deg) / 2:g}).images[0]

Trained on elevations of {" to ".join(f"{end:g}" for end in info.elevation_deg)} degrees and fields of view of
{" to ".join(f"{end:g}" for end in info.fov_deg)}; cameras in the convention "{info.camera}".
"""


def read_info(folder: str | Path) -> ExportInfo:
    """UserError when `folder` is not an export of this project."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint {folder} is not a folder; give the export/ folder of a training run")
    if not (folder / "isotropic3d.json").is_file():
        hint = f"; did you mean {folder / 'export'}?" if (folder / "export").is_dir() else ""
        raise UserError(f"checkpoint {folder} has no isotropic3d.json: it is not an export of this project{hint}")
    content = read_json(folder / "isotropic3d.json", "checkpoint")
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(f"checkpoint {folder}: isotropic3d.json is not of format {FORMAT}")
    names = {f.name for f in dataclasses.fields(ExportInfo)}
    if set(content) != names:
        raise UserError(f"checkpoint {folder}: isotropic3d.json must have exactly the keys {', '.join(sorted(names))}")
    try:
        for key in ("elevation_deg", "fov_deg", "framing"):
            low, high = content[key]
            content[key] = (float(low), float(high))
        if content["camera"] not in CONVENTIONS:
            raise UserError(
                f"checkpoint {folder}: camera in isotropic3d.json is {content['camera']!r}; it must be one of "
                f"{', '.join(CONVENTIONS)}"
            )
        for key in ("image_size", "num_views", "stage", "step"):
            content[key] = int(content[key])
        if min(content["image_size"], content["num_views"]) < 1:
            raise ValueError("image_size and num_views must be positive")
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"checkpoint {folder}: {key} in isotropic3d.json is {content[key]!r} ({error})") from None
    return ExportInfo(**content)


def load_unet(folder: str | Path, variant: str | None = None) -> UNet2DConditionModel:
    """A multi-view UNet from a diffusers folder, in fp32.  UserError for any other network."""
    config = read_json(Path(folder) / "config.json", "UNet")
    if not isinstance(config, dict) or config.get("_class_name") != "UNet2DConditionModel":
        raise UserError(f"UNet: {folder} does not hold a UNet2DConditionModel")
    if config.get("projection_class_embeddings_input_dim") != CAMERA_FLOATS:
        raise UserError(f"UNet: {folder} takes no camera of {CAMERA_FLOATS} floats: it is not a multi-view model")
    unet: UNet2DConditionModel = load_network(UNet2DConditionModel, folder, "UNet", variant)
    unet.set_attn_processor(MultiViewAttention())
    return unet


def load_export(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    decoder: bool = True,
    image_encoder: bool = True,
) -> MultiViewModel:
    """The finished checkpoint, frozen.  UserError naming what is wrong with `folder`.

    decoder: false leaves out the autoencoder's, where nothing is decoded; the device never holds it.
    image_encoder: false leaves it out, where embeddings are given; MVDream's weights have none.
    """
    folder = Path(folder)
    info = read_info(folder)
    scheduler = load_scheduler(folder / "scheduler")
    if image_encoder and not (folder / "image_encoder").is_dir():
        raise UserError(
            f"checkpoint {folder} has no image encoder, as MVDream's weights have none: train from it first "
            f"(train/stage1.py init_from={folder}) and give that run's export; or distil with embedding=..."
        )
    model = MultiViewModel(
        unet=load_unet(folder / "unet").requires_grad_(False).eval(),
        vae=load_autoencoder(folder / "vae"),
        image_encoder=load_image_encoder_folder(folder / "image_encoder") if image_encoder else None,
        scheduler=scheduler,
        info=info,
    )
    require_one_model(folder, model.unet, model.vae, model.image_encoder)
    if not decoder:
        model.vae.decoder = model.vae.post_quant_conv = None
    return model.to(device, dtype)


def load_scheduler(folder: Path) -> DDIMScheduler:
    """UserError when it is none, or none that the UNet's predictions can be read with.

    Of another class than DDIM's, the noise schedule and what is predicted are taken.
    """
    saved = read_json(folder / "scheduler_config.json", "checkpoint's scheduler")
    try:
        if saved["_class_name"] == "DDIMScheduler":
            scheduler = DDIMScheduler.from_pretrained(folder, local_files_only=True)
        elif (saved["beta_schedule"], saved["num_train_timesteps"]) != ("scaled_linear", 1000):
            raise ValueError(f"a {saved['_class_name']} with beta_schedule={saved['beta_schedule']}")
        else:
            zero = bool(saved.get("rescale_betas_zero_snr"))
            scheduler = make_scheduler(saved["prediction_type"], zero, saved["beta_start"], saved["beta_end"])
        require_scheduler(scheduler)
    except Exception as error:  # damaged values make diffusers fail in any way
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"checkpoint: the scheduler in {folder} cannot be loaded: {reason}") from None
    return scheduler


def require_scheduler(scheduler: Any) -> None:
    """ValueError when the UNet's predictions cannot be read with it."""
    config, alphas = scheduler.config, scheduler.alphas_cumprod
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type={config.prediction_type} must be epsilon or v_prediction")
    if config.get("clip_sample"):
        raise ValueError("clip_sample=True would cut the latents off at 1")
    if len(alphas) < 2 or not bool(torch.isfinite(alphas).all()) or not bool((alphas.diff() < 0).all()):
        raise ValueError("its betas make no schedule of growing noise")


def require_one_model(folder: Path, unet: Any, vae: Any, image_encoder: Any | None) -> None:
    """UserError when the parts are not of one model, or say what cannot be of themselves."""
    for part, key, value in (
        ("unet", "sample_size", unet.config.sample_size), ("vae", "scaling_factor", vae.config["scaling_factor"]),
    ):  # fmt: skip
        if not isinstance(value, int | float) or not 0 < value < 1e6 or (part == "unet" and value != int(value)):
            raise UserError(f"checkpoint {folder}: {key} in {part}/config.json is {value!r}; it must be positive")
    pairs = [("vae's latent channels", unet.config.in_channels, vae.config["latent_channels"])]
    if image_encoder is not None:
        pairs.append(("image_encoder's width", embedding_width(unet), image_encoder.width))
        try:
            embed_image(image_encoder, torch.zeros(1, 3, 16, 16))
        except Exception as error:  # preprocess_cfg is open_clip's, and damaged values fail in any way
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"checkpoint {folder}: its image_encoder embeds no picture: {reason}") from None
    for what, wanted, found in pairs:
        if wanted != found:
            raise UserError(f"checkpoint {folder}: the {what} are {found} and its UNet wants {wanted}; export it again")
