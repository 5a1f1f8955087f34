"""Released checkpoints in and out.

    python models/convert.py sd-v2.1-base-4view.pt weights/mvdream --allow-missing image_encoder
    python models/convert.py isotropic3d.ckpt weights/isotropic3d --camera isotropic3d_released_sds
    python models/convert.py --to-ldm runs/mine/stage2/export mine.ckpt [--base isotropic3d.ckpt]

The first two write a folder that training, sampling, distilling and diffusers read.  The last writes the flat ldm
checkpoint that threestudio and the released code read; `--base` gives the tensors that are not part of the model here
(the released image encoder's text tables).  Files are read and written a tensor at a time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from data.cameras import CONVENTIONS
from data.files import UserError, atomic_folder, read_json, require_writable

PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "image_encoder": "ClipImageEncoder"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What describes a plain ViT, the only tower that the released code builds, in open_clip's vision_cfg.
PLAIN_VIT = ("image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio")
# What an ldm checkpoint holds beside the model: schedules that are computed again, training's leftovers, text towers.
LEFTOVERS = (
    "betas", "alphas_cumprod*", "sqrt_*", "log_one_minus_alphas_cumprod", "posterior_*", "logvar", "lvlb_weights",
    "scale_factor", "model_ema.*", "first_stage_model.loss.*", "cond_stage_model.*",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="ldm checkpoint (.pt, .ckpt, .safetensors); with --to-ldm: a folder")
    parser.add_argument("out", type=Path, help="folder to make; with --to-ldm: the file to make")
    parser.add_argument("--to-ldm", action="store_true", help="from a folder of this project to an ldm checkpoint")
    parser.add_argument("--base", type=Path, help="with --to-ldm: ldm checkpoint that gives what the folder lacks")
    parser.add_argument("--config", type=Path, help="the original YAML: head size, noise schedule, latent scale")
    parser.add_argument("--head-dim", type=int, help="channels of an attention head (not in the shapes; default 64)")
    parser.add_argument("--clip-head-width", type=int, help="the same of the image encoder; default: open_clip's")
    parser.add_argument(
        "--allow-missing", nargs="*", default=[], metavar="NAME",
        help="what may be missing or unexpected: unet, vae, image_encoder, or names of tensors, * allowed",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, default=256, help="pixels a side the model was trained at (256)")
    parser.add_argument("--num-views", type=int, default=4, help="views it was trained with (4)")
    parser.add_argument(
        "--camera", default="mvdream", help="camera convention of the weights: mvdream (default), "
        "isotropic3d_released_2d or isotropic3d_released_sds",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


@dataclass
class Part:
    """One network of the checkpoint, and which of its tensors is which."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)  # by diffusers' names
    missing: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # ldm name: diffusers name, shape
    unexpected: list[str] = field(default_factory=list)  # ldm names


@dataclass
class Settings:
    """What the shapes do not say; SD 2.1's unless the original YAML or a flag says otherwise."""

    head_dim: int = 64
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: str = "epsilon"
    scaling_factor: float = 0.18215


def run(arguments: argparse.Namespace) -> None:
    for flag in ("head_dim", "clip_head_width", "image_size", "num_views"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    if arguments.camera not in CONVENTIONS:
        raise UserError(f"--camera {arguments.camera} must be one of {', '.join(CONVENTIONS)}")
    if arguments.out.exists():
        raise UserError(f"{arguments.out} is there already and is not overwritten; choose another name, or remove it")
    if not arguments.source.exists():
        raise UserError(f"{arguments.source} does not exist")
    if arguments.source.is_dir() and not arguments.to_ldm:
        raise UserError(
            f"{arguments.source} is a folder; give the ldm checkpoint file, or --to-ldm to make one from a folder"
        )
    files = [arguments.source, *arguments.source.rglob("*"), *([arguments.base] if arguments.base else [])]
    size = sum(file.stat().st_size for file in files if file.is_file())
    there = next(parent for parent in arguments.out.absolute().parents if parent.exists())
    require_writable(there, needed_mb=size // 2**20 + 64)
    (to_ldm if arguments.to_ldm else to_diffusers)(arguments)


def original_settings(path: Path | None, head_dim: int | None) -> Settings:
    """From the ldm YAML that the model was trained with.  Read as data: its class paths are not followed."""
    settings = Settings()
    if path is not None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        try:
            content: Any = OmegaConf.to_container(OmegaConf.load(path))
            params = content["model"]["params"]
            unet = params["unet_config"]["params"]
            for key, only in (("beta_schedule", "linear"), ("timesteps", 1000)):
                # ldm's "linear" is diffusers' scaled_linear: linear in the square root of beta
                if params.get(key, only) != only:
                    raise UserError(f"--config {path}: {key}={params[key]} is not supported; only {only} is")
            settings = Settings(
                int(unet.get("num_head_channels", settings.head_dim)),
                float(params.get("linear_start", settings.beta_start)),
                float(params.get("linear_end", settings.beta_end)),
                {"eps": "epsilon", "v": "v_prediction"}[params.get("parameterization", "eps")],
                float(params.get("scale_factor", settings.scaling_factor)),
            )
        except (OSError, OmegaConfBaseException, YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"--config {path} is not an ldm configuration that can be read ({error!r})") from None
    if head_dim is not None:
        settings.head_dim = head_dim
    if not 0 < settings.beta_start <= settings.beta_end < 1 or not settings.scaling_factor > 0:
        raise UserError(
            f"--config {path}: linear_start={settings.beta_start}, linear_end={settings.beta_end} and scale_factor="
            f"{settings.scaling_factor} make no noise schedule or latents"
        )
    if settings.head_dim < 1:
        raise UserError(f"{path}: num_head_channels={settings.head_dim} does not say the head size; give --head-dim")
    return settings


def to_diffusers(arguments: argparse.Namespace) -> None:
    """Maps all parts first, so that nothing is written for a file that lacks or holds what it should not."""
    # Imported here, so that --help and wrong paths do not wait for them.
    from models.checkpoint import ExportInfo, make_scheduler, write_index
    from models.released import PREFIXES, UNET
    from models.weights_file import read_weights, write_safetensors

    settings = original_settings(arguments.config, arguments.head_dim)
    weights = read_weights(arguments.source)
    if not any(name.startswith(UNET) for name in weights):
        groups = sorted({".".join(name.split(".")[:2]) for name in weights})[:6]
        raise UserError(
            f"{arguments.source} holds no multi-view UNet ({UNET}*): it has {', '.join(groups)}, ...; give the "
            "checkpoint of MVDream or Isotropic3D"
        )
    parts = [map_part(name, prefix, weights, settings, arguments.clip_head_width) for name, prefix in PREFIXES.items()]
    outside = [name for name in weights if part_of(name) is None]
    dropped = {name for name in outside if matches(name, LEFTOVERS)}
    unexpected = [name for name in outside if name not in dropped]
    if parts[0].missing and "unet" in arguments.allow_missing:
        raise UserError("--allow-missing unet: without the UNet there is nothing to convert; name its tensors instead")
    print_table(parts, PREFIXES, {name: weights[name] for name in dropped})
    refuse_gaps(arguments.source, parts, unexpected, arguments.allow_missing)
    compare_schedule(arguments.source, weights, settings)

    parts = [part for part in parts if part.tensors]
    info = ExportInfo(
        image_size=arguments.image_size,
        num_views=arguments.num_views,
        # The cameras of the released configuration (isotropic3d-shading.yaml); the checkpoints do not say theirs.
        elevation_deg=(0.0, 30.0),
        fov_deg=(15.0, 60.0),
        framing=(0.8, 1.0),
        camera=arguments.camera,
        stage=2 if any(part.name == "image_encoder" for part in parts) else 0,
        step=0,
    )
    # Without a VAE in the file, Stable Diffusion's: three halvings.
    blocks = next((part.config["block_out_channels"] for part in parts if part.name == "vae"), [0] * 4)
    step = 2 ** (len(blocks) - 1 + len(parts[0].config["block_out_channels"]) - 1)
    if arguments.image_size % step:
        raise UserError(f"--image-size {arguments.image_size} must be a multiple of {step} for this model")
    parts[0].config["sample_size"] = arguments.image_size // 2 ** (len(blocks) - 1)
    with atomic_folder(arguments.out) as temporary:
        for part in parts:
            empty(part).save_config(temporary / part.name)
            write_safetensors(temporary / part.name / WEIGHTS, part.tensors, {"format": "pt"})
        scheduler = make_scheduler(settings.prediction_type, False, settings.beta_start, settings.beta_end)
        scheduler.save_pretrained(temporary / "scheduler")
        write_index(temporary, {part.name: PARTS[part.name] for part in parts}, info)
    print(f"wrote {arguments.out}")


def part_of(name: str) -> str | None:
    """Which network an ldm tensor belongs to."""
    from models.released import PREFIXES

    if name.startswith(PREFIXES["image_encoder"]):
        return "image_encoder"
    if matches(name, LEFTOVERS):
        return None
    return next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def pairs_of(name: str, config: Mapping[str, Any]) -> Any:
    from models import released

    if name == "unet":
        return released.unet_pairs(config["layers_per_block"], [b != "DownBlock2D" for b in config["down_block_types"]])
    if name == "vae":
        return released.vae_pairs(len(config["block_out_channels"]), config["layers_per_block"])
    return None  # the names are the same


def map_part(
    name: str, prefix: str, weights: Mapping[str, Any], settings: Settings, clip_head_width: int | None
) -> Part:
    """The tensors below `prefix` under diffusers' names, and what is missing or left over."""
    from models import released

    inside = {key.removeprefix(prefix): weights[key] for key in weights if part_of(key) == name}
    if not inside:
        return Part(name, {}, missing={name: (name, ())})
    shapes = {key: tuple(tensor.shape) for key, tensor in inside.items()}
    try:
        if name == "unet":
            config = released.unet_config(shapes, settings.head_dim)
        elif name == "vae":
            config = released.vae_config(shapes, settings.scaling_factor)
        else:
            config = released.image_encoder_config(shapes, clip_head_width)
        part = Part(name, config)
        expected = {key: tuple(tensor.shape) for key, tensor in empty(part).state_dict().items()}
    except (ValueError, IndexError, KeyError, TypeError, ZeroDivisionError, RuntimeError, AssertionError) as error:
        raise UserError(f"the shapes below {prefix} make no {PARTS[name]} ({error}); the file is damaged") from None
    ldm_names = ldm_names_of(name, config, expected)
    for key, ldm_name in ldm_names.items():
        if ldm_name not in inside:
            part.missing[prefix + ldm_name] = key, expected[key]
            continue
        tensor = inside.pop(ldm_name)
        if name == "vae" and released.is_vae_projection(key) and tensor.shape[2:] == (1, 1):
            tensor = tensor[:, :, 0, 0]
        if tuple(tensor.shape) != expected[key]:
            raise UserError(
                f"{prefix}{ldm_name} is of shape {tuple(tensor.shape)}, and the architecture that the other tensors "
                f"tell wants {expected[key]}; the file is damaged, or of another kind of model"
            )
        part.tensors[key] = tensor
    part.unexpected = [prefix + key for key in inside]
    return part


def ldm_names_of(name: str, config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """diffusers name -> ldm name without prefix."""
    from models import released

    pairs = pairs_of(name, config)
    if pairs is None:
        return {key: key.removeprefix("visual.") for key in keys}
    found = released.renamed(keys, released.swapped(pairs))
    assert set(found) == set(keys), sorted(set(keys) - set(found))[:5]
    return found


def empty(part: Part) -> Any:
    """The network without memory."""
    import diffusers
    import torch

    from models.image_encoder import ClipImageEncoder

    kind = ClipImageEncoder if part.name == "image_encoder" else getattr(diffusers, PARTS[part.name])
    with torch.device("meta"):
        return kind(**part.config)


def print_table(parts: list[Part], prefixes: Mapping[str, str], dropped: Mapping[str, Any]) -> None:
    def line(what: str, where: str, tensors: Iterable[Any], note: str = "") -> None:
        tensors = list(tensors)
        print(f"{what:<10}{where:<34}{len(tensors):6d} tensors{sum(t.numel() for t in tensors) / 1e6:10.1f} M  {note}")

    for part in parts:
        where = f"{prefixes[part.name]}* -> {part.name}"
        line("mapped", where, part.tensors.values())
        if part.missing:
            print(f"{'missing':<10}{where:<34}{len(part.missing):6d} tensors: {', '.join(list(part.missing)[:3])}")
        if part.unexpected:
            print(f"{'unexpected':<10}{where:<34}{len(part.unexpected):6d} tensors: {', '.join(part.unexpected[:3])}")
    groups: dict[str, list[Any]] = {}
    for name, tensor in sorted(dropped.items()):
        group = ".".join(name.split(".")[:3]) if "." in name else "noise schedule"
        groups.setdefault(group, []).append(tensor)
    for group, tensors in groups.items():
        line("dropped", group, tensors)


def refuse_gaps(source: Path, parts: list[Part], unexpected: list[str], allowed: list[str]) -> None:
    """UserError for what is missing or unexpected and not named by --allow-missing."""
    import torch

    missing = [name for part in parts for name in part.missing]
    unknown = [name for part in parts for name in part.unexpected] + unexpected
    for words, names in (("lacks", missing), ("holds unexpected", unknown)):
        open_ = [name for name in names if not matches(name, allowed) and (part_of(name) or name) not in allowed]
        if open_:
            more = f" and {len(open_) - 4} more" if len(open_) > 4 else ""
            raise UserError(
                f"{source} {words} {', '.join(open_[:4])}{more}; if that is meant to be, name it: --allow-missing "
                f"{open_[0]}"
            )
    for part in parts:
        if part.missing and (part.name in allowed or not part.config):
            part.tensors.clear()  # left out whole
        elif part.missing:  # named one by one
            print(f"{part.name}: {', '.join(part.missing)} become zeros")
            part.tensors |= {key: torch.zeros(shape) for key, shape in part.missing.values()}


def compare_schedule(source: Path, weights: Mapping[str, Any], settings: Settings) -> None:
    """UserError when the file's own noise schedule or latent scale is not the one that is going to be written."""
    import torch

    from models.checkpoint import make_scheduler

    if "scale_factor" in weights and weights["scale_factor"].numel() == 1:
        scale = float(weights["scale_factor"])
        if abs(scale - settings.scaling_factor) > 1e-3 * settings.scaling_factor:  # the file may be in half precision
            raise UserError(
                f"{source}: its latents are scaled by {scale:.6g} and not {settings.scaling_factor}; give the original "
                "YAML with --config"
            )
    if "alphas_cumprod" in weights:
        ours = make_scheduler(settings.prediction_type, False, settings.beta_start, settings.beta_end).alphas_cumprod
        theirs = weights["alphas_cumprod"].float().reshape(-1)
        # The file may be in half precision, whose values in [0.5, 1) lie this far apart.
        apart = max(torch.finfo(weights["alphas_cumprod"].dtype).eps, 1e-5)
        if theirs.shape != ours.shape or not float((theirs - ours).abs().max()) <= apart:
            raise UserError(
                f"{source}: its noise schedule is not SD 2.1's ({len(theirs)} steps, the last {float(theirs[-1]):.5f} "
                f"and not {float(ours[-1]):.5f}); give the original YAML with --config"
            )


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


if __name__ == "__main__":
    main()
