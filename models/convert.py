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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.cameras import CONVENTIONS
from data.files import UserError, atomic_folder, require_writable
from models.ldm_parts import LEFTOVERS, PARTS, WEIGHTS, Part, empty, ldm_names_of, matches, part_of
from models.to_ldm import to_ldm


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
        "--camera", help="camera convention of the weights: mvdream, isotropic3d_released_2d or "
        "isotropic3d_released_sds; mvdream where there is no image encoder, else it must be given",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
    if arguments.camera not in (None, *CONVENTIONS):
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
    with_encoder = any(part.name == "image_encoder" for part in parts)
    if with_encoder and arguments.camera is None:
        raise UserError(
            f"{arguments.source} does not say its camera convention: give --camera isotropic3d_released_sds for the "
            "authors' weights, or --camera mvdream for weights that this project trained"
        )
    info = ExportInfo(
        image_size=arguments.image_size,
        num_views=arguments.num_views,
        # The cameras of the released configuration (isotropic3d-shading.yaml); the checkpoints do not say theirs.
        elevation_deg=(0.0, 30.0),
        fov_deg=(15.0, 60.0),
        framing=(0.8, 1.0),
        camera=arguments.camera or "mvdream",
        stage=2 if with_encoder else 0,
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


if __name__ == "__main__":
    main()
