"""From a checkpoint's averaged weights to an export folder, without engine or data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from torch import Tensor

from conf.cli import ConfigError, check
from data.files import UserError, read_json, require_writable
from models.checkpoint import MultiViewModel, save_export
from train.checkpoints import FORMAT, average_file, checkpoint_folders, damaged_files, step_of
from train.config import TrainConfig
from train.networks import empty_unet, frozen_parts, initial_unet, scheduler_of
from train.resharding import read_slices
from train.set_up import export_info
from train.shard_history import read_saved, saved_spans
from train.trainable import choose_trainable


@dataclass
class ExportConfig:
    run: str = "???"  # run folder, such as runs/mine/stage1
    step: int | None = None  # of which checkpoint; null: the newest
    out: str | None = None  # null: export_<step> in the run folder

    def __post_init__(self) -> None:
        check(self.step is None or self.step >= 1, f"step={self.step} must be at least 1, or null")


def read_config(folder: Path) -> TrainConfig:
    """The configuration that a run was last started with.  UserError when the folder is not of a run."""
    path = folder / "config.yaml"
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path)))
    except OSError:
        raise UserError(f"run: {folder} has no config.yaml; give a run folder, such as runs/mine/stage1") from None
    except (OmegaConfBaseException, ConfigError, ValueError) as error:
        raise UserError(f"run: {path} is not of this version of the project: {str(error).splitlines()[0]}") from None
    assert isinstance(config, TrainConfig)
    return config


def export_checkpoint(choice: ExportConfig) -> None:
    folder = Path(choice.run)
    config = read_config(folder)
    found = {step_of(path): path for path in checkpoint_folders(folder / "checkpoints")}
    if not found or (choice.step is not None and choice.step not in found):
        steps = ", ".join(map(str, found)) or "none"
        raise UserError(f"run: {folder}/checkpoints has no step {choice.step or ''}; there are: {steps}")
    step = choice.step or max(found)
    path = found[step]
    out = Path(choice.out) if choice.out is not None else folder / f"export_{step:08d}"
    if out.exists():
        raise UserError(f"out: {out} is there already; remove it, or give another out=")
    wrong = damaged_files(path, 0, 1)
    state = read_json(path / "state.json", "checkpoint")
    if wrong or state.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path} is damaged or of another version ({(wrong or ['format'])[0]}); take another"
        )
    require_writable(out.parent, needed_mb=64)

    vae, image_encoder = frozen_parts(config)
    unet = fill(config, path, int(state["world_size"]))
    cameras = read_saved(folder, saved_spans(state["spans"], folder)[-1].manifest).cameras
    info = export_info(config, cameras)
    info.step = step
    save_export(out, MultiViewModel(unet, vae, image_encoder, scheduler_of(config.model), info))
    print(f"stage {config.stage}: exported step {step} to {out}")


def fill(config: TrainConfig, path: Path, world_size: int) -> Any:
    """The UNet with the checkpoint's averaged weights; weights that are not trained come from where the run started."""
    if config.trainable == "all":
        unet = empty_unet(config)
    else:
        unet = initial_unet(config)
        choose_trainable(unet, config)
    parameters = list(unet.named_parameters())
    wanted = {f"{i:05d}": (0, p.numel()) for i, (_, p) in enumerate(parameters) if p.requires_grad}
    try:
        flat = read_slices([path / average_file(rank) for rank in range(world_size)], wanted)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error}); take another") from None
    weights: dict[str, Tensor] = {
        name: flat[f"{i:05d}"].view(p.shape) for i, (name, p) in enumerate(parameters) if p.requires_grad
    }
    unet.load_state_dict(weights, strict=config.trainable == "all", assign=True)
    return unet.requires_grad_(False).eval()
