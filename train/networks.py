"""The networks that a run starts from: which and from where, and whether they fit each other and the configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from open_clip.model import CLIPVisionCfg

from data.files import UserError, read_json
from models.autoencoder import downscale_of, load_autoencoder
from models.checkpoint import load_scheduler, load_unet, make_scheduler, read_info
from models.config import ModelConfig
from models.folders import empty_network
from models.image_encoder import ClipImageEncoder, load_image_encoder
from models.multiview import build_unet, embedding_layer
from models.weights_file import read_weights
from train.config import TrainConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"
READING = ("tokens", "preprocess", "quick_gelu", "embed_dim", "scaling_factor", "shift_factor")


def scheduler_of(model: ModelConfig) -> DDIMScheduler:
    return make_scheduler(model.prediction_type, model.zero_terminal_snr, model.beta_start, model.beta_end)


def frozen_parts(config: TrainConfig) -> tuple[Any, ClipImageEncoder]:
    """Autoencoder and image encoder.  UserError when they are not there, or do not fit."""
    if config.model.autoencoder.weights is None:
        raise UserError("model.autoencoder.weights is not set; give the vae folder of a diffusers model")
    vae = load_autoencoder(config.model.autoencoder.weights)
    image_encoder = load_image_encoder(config.model.image_encoder, config.seed)
    require_fitting_parts(config, vae, image_encoder)
    if config.init_from is not None:
        require_same_parts(config, vae, image_encoder)
    return vae, image_encoder


def require_fitting_parts(config: TrainConfig, vae: Any, image_encoder: Any) -> None:
    """UserError when the frozen networks do not fit what `model` says of them."""
    described, codec = config.model.autoencoder, vae.config
    for key, said, found in (
        ("model.autoencoder.latent_channels", described.latent_channels, codec["latent_channels"]),
        ("model.autoencoder.downscale", described.downscale, downscale_of(vae)),
    ):
        if said != found:
            raise UserError(f"{key}={said}, but the autoencoder's is {found}; set {key}={found}, or give another")
    unet, width = config.model.unet, image_encoder.width
    if (unet.embedding_dim or unet.cross_attention_dim) != width:
        key = "cross_attention_dim" if unet.embedding_dim is None else "embedding_dim"
        raise UserError(
            f"model.unet.{key}={getattr(unet, key)}, but the image encoder's embedding has width {width}; set "
            f"model.unet.embedding_dim={width}, or load another encoder"
        )


def require_same_parts(config: TrainConfig, vae: Any, image_encoder: Any) -> None:
    """UserError when `init_from` was trained behind another autoencoder or image encoder than these."""
    start = Path(str(config.init_from))
    for part, key, network in (
        ("vae", "autoencoder", vae),
        ("image_encoder", "image_encoder", image_encoder),
    ):
        weights = getattr(config.model, key).weights
        if not (start / part).is_dir():  # MVDream has no image encoder
            continue
        # Its own folder can still be read in another way than it was: tokens, preprocess.
        same_folder = weights is not None and Path(weights).resolve() == (start / part).resolve()
        difference = reading_difference(start / part, network)
        if difference is None and not same_folder:
            difference = weights_difference(start / part / WEIGHTS, network)
        if difference is not None:
            raise UserError(
                f"init_from={start} was trained with another {part}: {difference}; set model.{key}.weights="
                f"{start / part} and no other model.{key} key. To change it on purpose, start from "
                f"model.unet.weights={start / 'unet'} instead of init_from"
            )


def reading_difference(folder: Path, network: Any) -> str | None:
    """The first difference of what the weights do not show, in words."""
    try:
        other = empty_network(type(network), folder, "checkpoint")
        pairs = [(key, other.config.get(key), network.config.get(key)) for key in READING if key in network.config]
        if isinstance(network, ClipImageEncoder):
            pairs += tower_pairs(other, network)
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"checkpoint: {folder}/config.json is damaged ({error})") from None
    for key, theirs, ours in pairs:
        if theirs != ours:
            return f"{key}={theirs} there and {ours} here"
    return None


def tower_pairs(theirs: ClipImageEncoder, ours: ClipImageEncoder) -> list[tuple[str, Any, Any]]:
    """(what, theirs, ours) of two towers' architecture and preprocessing, as far as it is used."""
    used = ("mean", "std") if ours.config.preprocess == "released" else tuple(vars(ours.preprocess_cfg))
    pairs = [
        (f"preprocess_cfg.{key}", *(list_of(getattr(tower.preprocess_cfg, key)) for tower in (theirs, ours)))
        for key in used
    ]
    configs = [vars(CLIPVisionCfg(**tower.config.vision_cfg)) for tower in (theirs, ours)]
    fetched = ("timm_model_pretrained", "output_tokens")  # replaced when the tower is built
    return pairs + [(f"vision_cfg.{key}", *(c[key] for c in configs)) for key in configs[0] if key not in fetched]


def list_of(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def weights_difference(path: Path, network: Any) -> str | None:
    theirs, ours = read_weights(path), network.state_dict()
    if names := sorted(theirs.keys() ^ ours.keys()):
        return f"only one of them has {names[0]}"
    for name, tensor in theirs.items():
        if tensor.shape != ours[name].shape or not torch.equal(tensor.to(ours[name].dtype), ours[name]):
            return f"{name} differs"
    return None


def empty_unet(config: TrainConfig) -> Any:
    """The architecture without memory; filled when averaged weights are gathered."""
    size = config.data.image_size // config.model.autoencoder.downscale
    with torch.device("meta"):
        return build_unet(config.model.unet, config.model.autoencoder.latent_channels, size)


def initial_unet(config: TrainConfig) -> Any:
    """From `init_from`'s export, from `model.unet.weights`, or random, keyed by the seed; in that order."""
    if config.init_from is None and config.model.unet.weights is None:
        say("initial weights of the UNet: random")
        torch.manual_seed(config.seed)
        size = config.data.image_size // config.model.autoencoder.downscale
        unet = build_unet(config.model.unet, config.model.autoencoder.latent_channels, size)
    else:
        unet = unet_to_start_from(config)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet.train()


def unet_to_start_from(config: TrainConfig) -> Any:
    """UserError when it is another network than `model` describes, or `init_from` was trained otherwise than it says.

    A UNet of `model.unet.weights` may go on with other cameras or noise than it was trained with; that is said.
    """
    if config.init_from is not None:
        source, folder = f"init_from={config.init_from}", Path(config.init_from) / "unet"
        if differing := differences_of_training(config.model, Path(config.init_from)):
            key, theirs, ours = differing[0]
            raise UserError(f"{source} was trained with {key}={theirs} and not {ours}; set {key}={theirs}")
    else:
        source, folder = f"model.unet.weights={config.model.unet.weights}", Path(str(config.model.unet.weights))
        if (folder.parent / "isotropic3d.json").is_file():
            for key, theirs, ours in differences_of_training(config.model, folder.parent):
                say(f"note: {source} was trained with {key}={theirs} and goes on with {ours}")
    unet = load_unet(folder)
    width = config.model.unet.embedding_dim
    if width is not None and unet.encoder_hid_proj is None:  # new here, and random by the seed
        torch.manual_seed(config.seed)
        unet.encoder_hid_proj = embedding_layer(width, unet.config.cross_attention_dim)
        unet.register_to_config(encoder_hid_dim=width, encoder_hid_dim_type="text_proj")
    expected = {name: p.shape for name, p in empty_unet(config).named_parameters()}
    differing_names = sorted(set(expected.items()) ^ {(name, p.shape) for name, p in unet.named_parameters()})
    # The number of heads does not show in the shapes.
    heads = unet.config.attention_head_dim
    heads = list(heads) if isinstance(heads, list | tuple) else [heads] * len(config.model.unet.heads)
    if not differing_names and heads != config.model.unet.heads:
        raise UserError(
            f"{source} has {heads} attention heads and model.unet.heads={config.model.unet.heads}; "
            f"set model.unet.heads={heads}"
        )
    if differing_names:
        raise UserError(
            f"{source} is another network than model.unet describes (first difference: {differing_names[0][0]}); "
            "choose the model configuration that it was trained with"
        )
    return unet


def differences_of_training(model: ModelConfig, folder: Path) -> list[tuple[str, Any, Any]]:
    """(key, the checkpoint's value, the configuration's) where its UNet was trained with other cameras or noise."""
    info, schedule = read_info(folder), read_json(folder / "scheduler" / "scheduler_config.json", "checkpoint")
    rows = [
        ("model.camera", info.camera, model.camera),
        ("model.prediction_type", schedule.get("prediction_type", "epsilon"), model.prediction_type),
        ("model.zero_terminal_snr", bool(schedule.get("rescale_betas_zero_snr")), model.zero_terminal_snr),
        ("model.beta_start", schedule.get("beta_start"), model.beta_start),
        ("model.beta_end", schedule.get("beta_end"), model.beta_end),
    ]
    load_scheduler(folder / "scheduler")
    for key, only in (("beta_schedule", "scaled_linear"), ("num_train_timesteps", 1000)):
        if schedule.get(key) != only:
            raise UserError(f"checkpoint {folder}: its scheduler has {key}={schedule.get(key)}; training knows {only}")
    return [row for row in rows if row[1] != row[2]]


def say(words: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(words, flush=True)
