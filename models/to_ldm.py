"""From a folder of this project to the flat ldm checkpoint that threestudio and the released code read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import UserError, read_json
from models.ldm_parts import PARTS, WEIGHTS, Part, empty, ldm_names_of, part_of

# What describes a plain ViT, the only tower that the released code builds, in open_clip's vision_cfg.
PLAIN_VIT = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio")


def to_ldm(arguments: argparse.Namespace) -> None:
    """The folder's networks under ldm's names, the noise schedule's buffers, and what `--base` adds."""
    from models.released import PREFIXES, is_vae_projection
    from models.weights_file import read_weights, write_safetensors, write_torch

    source: Path = arguments.source
    if not (source / "unet" / "config.json").is_file():
        raise UserError(f"{source} is not a checkpoint folder of this project: it has no unet/config.json")
    scheduler = ldm_schedule(source)
    notes = needed_settings(source, scheduler)
    tensors: dict[str, Any] = schedule_buffers(scheduler)
    rows = [("scheduler", len(tensors), "noise schedule")]
    for name, prefix in PREFIXES.items():
        config = part_config(source, name)
        if config.get("_class_name") != PARTS[name]:
            if name in arguments.allow_missing:
                continue
            raise UserError(
                f"{source / name} holds {config.get('_class_name', 'nothing')}, and an ldm checkpoint has an "
                f"{PARTS[name]} there; leave it out with --allow-missing {name}"
            )
        if choice := unknown_to_ldm(config):
            raise UserError(f"{source / name} has {choice}, which the released code does not know")
        held = read_weights(source / name / WEIGHTS)
        require_whole(source / name, config, held, name)
        for key, ldm_name in ldm_names_of(name, config, held).items():
            projection = name == "vae" and is_vae_projection(key)
            tensors[prefix + ldm_name] = held[key][:, :, None, None] if projection else held[key]
        rows.append((name, len(held), f"{prefix}*"))
    if arguments.base is not None:
        base = read_weights(arguments.base)
        # Not its averaged weights: they are of another training, and ldm would sample from them.
        added = {n: tensor for n, tensor in base.items() if n not in tensors and not n.startswith("model_ema.")}
        if foreign := [name for name in added if part_of(name) not in (None, *arguments.allow_missing)]:
            raise UserError(f"--base {arguments.base} is of another architecture: {source} has no {foreign[0]}")
        tensors |= added
        rows.append((str(arguments.base), len(added), "as they are"))
    for name, count, where in rows:
        print(f"mapped    {name} -> {where}: {count} tensors")
    if arguments.out.suffix == ".safetensors":
        write_safetensors(arguments.out, tensors, {"format": "pt"})
    else:
        write_torch(arguments.out, tensors)
    print(f"wrote {arguments.out}")
    for note in notes:
        print(f"note: {note}")


def part_config(folder: Path, name: str) -> dict[str, Any]:
    """The config.json of a network; empty where the folder has none of that name."""
    config = read_json(folder / name / "config.json", name) if (folder / name).is_dir() else {}
    if not isinstance(config, dict):
        raise UserError(f"{folder / name}/config.json is not a network's")
    return config


def ldm_schedule(folder: Path) -> dict[str, Any]:
    """The folder's scheduler_config.json.  UserError when ldm has no such schedule."""
    from models.checkpoint import load_scheduler

    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "scheduler")
    load_scheduler(folder / "scheduler")
    for key, only in (
        ("rescale_betas_zero_snr", False), ("beta_schedule", "scaled_linear"), ("num_train_timesteps", 1000),
        ("trained_betas", None),
    ):  # fmt: skip
        if scheduler.get(key, only) != only:
            raise UserError(
                f"{folder}: its noise schedule has {key}={scheduler[key]}, which the released code does not know"
            )
    return scheduler


def needed_settings(folder: Path, scheduler: Mapping[str, Any]) -> list[str]:
    """What a user of the ldm checkpoint must set by hand, since such a file cannot say it."""
    lines = []
    info = read_json(folder / "isotropic3d.json", "checkpoint") if (folder / "isotropic3d.json").is_file() else {}
    if isinstance(info, dict) and "camera" in info:
        lines.append(f"its UNet reads cameras in the convention {info['camera']} (models/README.md, Cameras)")
    if scheduler.get("prediction_type", "epsilon") == "v_prediction":
        lines.append("it predicts v: its ldm YAML needs `parameterization: v` beside `linear_start`")
    for part, key, name, usual in (
        ("unet", "attention_head_dim", "num_head_channels", 64), ("vae", "scaling_factor", "scale_factor", 0.18215),
    ):  # fmt: skip
        config = part_config(folder, part)
        value = head_size(folder, config) if part == "unet" else config.get(key, usual)
        if value != usual:
            lines.append(f"its ldm YAML needs `{name}: {value}`")
    for key, name, usual in (("beta_start", "linear_start", 0.00085), ("beta_end", "linear_end", 0.012)):
        if scheduler.get(key) != usual:
            lines.append(f"its ldm YAML needs `{name}: {scheduler.get(key)}`")
    return lines


def head_size(folder: Path, config: Mapping[str, Any]) -> int:
    """Channels of an attention head.  UserError when the levels that attend differ: ldm has one number for all."""
    channels, heads, kinds = (config.get(k) for k in ("block_out_channels", "attention_head_dim", "down_block_types"))
    heads = heads if isinstance(heads, list) else [heads] * len(channels or [])
    attends = [*(kind != "DownBlock2D" for kind in (kinds or [])[:-1]), True]  # the middle block has the last level's
    sizes = {c // h for c, h, attend in zip(channels or [], heads, attends, strict=True) if attend}
    if len(sizes) != 1:
        raise UserError(
            f"{folder}/unet has heads of {sorted(sizes)} channels, and the released code knows only one size"
        )
    return sizes.pop()


def unknown_to_ldm(config: Mapping[str, Any]) -> str | None:
    """What of a part's configuration has no counterpart in an ldm checkpoint."""
    plain_values = (
        ("encoder_hid_dim", None), ("tokens", "pooled"), ("preprocess", "released"), ("quick_gelu", False),
        ("preprocess_cfg", None),
    )  # fmt: skip
    for key, plain in plain_values:
        if config.get(key, plain) != plain and not is_clips_own(key, config[key]):
            return f"{key}={config[key]}"
    tower = config.get("vision_cfg", {})
    if not isinstance(tower, Mapping):
        return f"vision_cfg={tower}"
    if other := sorted(k for k, value in tower.items() if value and (k not in PLAIN_VIT or isinstance(value, list))):
        return f"an image tower with {other[0]}={tower[other[0]]}"
    return None


def is_clips_own(key: str, value: Any) -> bool:
    """Whether a preprocess_cfg says what the released code does anyway: of it, that uses mean and deviation only."""
    from open_clip.transform import PreprocessCfg

    if key != "preprocess_cfg" or not isinstance(value, Mapping):
        return False
    own = PreprocessCfg()
    return all(tuple_of(value.get(key, getattr(own, key))) == getattr(own, key) for key in ("mean", "std"))


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def require_whole(folder: Path, config: Mapping[str, Any], held: Mapping[str, Any], name: str) -> None:
    """UserError when the folder's tensors are not exactly its network's."""
    arguments = {key: value for key, value in config.items() if not key.startswith("_")}
    try:
        expected = {key: tuple(t.shape) for key, t in empty(Part(name, arguments)).state_dict().items()}
    except Exception as error:  # damaged values fail in any way
        raise UserError(f"{folder}/config.json does not describe a {PARTS[name]} ({error})") from None
    found = {key: tuple(tensor.shape) for key, tensor in held.items()}
    if differing := sorted(set(expected.items()) ^ set(found.items())):
        raise UserError(f"{folder} does not hold what its config.json describes; first difference: {differing[0][0]}")


def schedule_buffers(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The buffers that ldm's models register and want to find (ldm/models/diffusion/ddpm.py, register_schedule).

    DDPM (arXiv 2006.11239), eq. 4 to 7, in float64, kept in float32.
    """
    import numpy as np
    import torch

    steps = int(scheduler["num_train_timesteps"])
    roots = torch.linspace(scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5, steps, dtype=torch.float64)
    betas = (roots**2).numpy()
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    variance = betas * (1 - before) / (1 - bar)
    values = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
    }
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}
