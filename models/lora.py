"""Low-rank adapters on the UNet's linear layers (LoRA, arXiv 2106.09685), by peft, and merging one into a checkpoint.

python models/lora.py checkpoint=weights/mvdream adapter=runs/mine/stage1/export/lora out=weights/merged
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf.cli import run
from data.files import UserError, require_writable
from models.config import LoraConfig


@dataclass
class MergeConfig:
    checkpoint: str = MISSING  # folder that the adapter was trained on
    adapter: str = MISSING  # `lora` folder of an export, or another in diffusers' format
    out: str = MISSING  # folder for the merged checkpoint; must not be there yet


def add_adapter(unet: Any, config: LoraConfig) -> None:
    """Puts an adapter that changes nothing yet beside the layers `config.targets` and freezes all else.

    ConfigError's cousin, a UserError, for targets that the network has not.
    """
    import peft

    try:
        unet.add_adapter(peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)))
    except ValueError as error:
        raise UserError(f"lora.targets={config.targets}: {' '.join(str(error).split())}") from None


def has_adapter(unet: Any) -> bool:
    return bool(getattr(unet, "peft_config", None))


def save_adapter(unet: Any, folder: Path) -> None:
    """In diffusers' format (`pytorch_lora_weights.safetensors`), rank and alpha in the file's metadata."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of modules to keep in fp32, of which there are none
    try:
        unet.save_lora_adapter(folder)
    finally:
        logging.set_verbosity(level)


def load_adapter(unet: Any, folder: str | Path) -> None:
    """UserError when `folder` holds no adapter of exactly this network's layers."""
    from peft import get_peft_model_state_dict

    from models.weights_file import read_weights

    path = Path(folder) / "pytorch_lora_weights.safetensors"
    if not path.is_file():
        raise UserError(f"adapter {folder} has no {path.name}; give the lora/ folder of an export")
    wanted = {name: tuple(tensor.shape) for name, tensor in read_weights(path).items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    for name, shape in wanted.items():
        layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
        base = shapes.get(f"{layer}.weight")
        if base is None or side not in ("A", "B") or shape[1 if side == "A" else 0] != base[1 if side == "A" else 0]:
            raise UserError(f"adapter {folder}: {name} of shape {shape} is of another network than the checkpoint's")
    try:
        unet.load_lora_adapter(folder, prefix=None, adapter_name="default", local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"adapter {folder} cannot be loaded: {error}") from None
    found = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(unet).items()}
    if differing := sorted(set(wanted.items()) ^ set(found.items())):
        raise UserError(f"adapter {folder} was not taken in whole; first difference: {differing[0][0]}")


def merge_adapter(unet: Any) -> None:
    """Adds the adapter to the weights beside it (W + alpha / rank B A); removes it.  UserError when one overflows."""
    try:
        unet.fuse_lora(safe_fusing=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}") from None
    unet.unload_lora()


def main(config: MergeConfig) -> None:
    if Path(config.out).exists():
        raise UserError(f"{config.out} is there already and is not overwritten; choose another out=")
    require_writable(Path(config.out).absolute().parent, needed_mb=64)
    # Imported here, so that --help and wrong paths do not wait for them.
    from models.checkpoint import load_export, save_export

    model = load_export(config.checkpoint)
    load_adapter(model.unet, config.adapter)
    merge_adapter(model.unet)
    save_export(config.out, model)
    print(f"wrote {config.out}: {config.checkpoint} with {config.adapter} merged into its UNet")


if __name__ == "__main__":
    run(MergeConfig, "models/lora", main)
