"""Low-rank adapters on the UNet's linear layers (LoRA, arXiv 2106.09685), by peft, and merging one into a checkpoint.

python models/lora.py checkpoint=weights/mvdream adapter=runs/mine/stage1/export/lora out=weights/merged
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf.cli import run
from data.files import UserError, atomic_folder, read_json, require_writable, write_json
from models.config import LoraConfig

MOST_ALPHA = 10**6
OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save", "use_qalora")


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
    import torch

    modules = dict(unet.named_modules())
    for target in config.targets:
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            raise UserError(
                f"lora.targets={config.targets}: the UNet has no layer {target}; name such as to_q or ff.net.2"
            )
    for name, module in modules.items():
        named = any(name == target or name.endswith(f".{target}") for target in config.targets)
        if named and not isinstance(module, torch.nn.Linear):
            raise UserError(
                f"lora.targets={config.targets}: {name} is a {type(module).__name__}, and adapters stand beside linear "
                "layers only; name such, as to_q or ff.net.2"
            )
    try:
        unet.add_adapter(peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets)))
    except ValueError as error:
        raise UserError(f"lora.targets={config.targets}: {' '.join(str(error).split())}") from None


def has_adapter(unet: Any) -> bool:
    return bool(getattr(unet, "peft_config", None))


def save_adapter(unet: Any, folder: Path) -> None:
    """In diffusers' format (`pytorch_lora_weights.safetensors`), rank and alpha in the file's metadata.

    `base.json` beside it tells which weights it belongs to.
    """
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of modules to keep in fp32, of which there are none
    try:
        unet.save_lora_adapter(folder)
    finally:
        logging.set_verbosity(level)
    write_json(folder / "base.json", {"sha256": base_mark(unet)})


def base_mark(unet: Any) -> str:
    """SHA-256 of the network's weights without the adapter's, in fp32 and in the network's order.

    Without the layer of another embedding's width too, which trains beside an adapter.
    """
    import torch

    from models.weights_file import to_bytes

    digest = hashlib.sha256()
    for name, parameter in unet.named_parameters():
        if ".lora_" not in name and not name.startswith("encoder_hid_proj"):
            digest.update(to_bytes(parameter.detach().to("cpu", torch.float32)))
    return digest.hexdigest()


def load_adapter(unet: Any, folder: str | Path) -> None:
    """UserError when `folder` holds no adapter of exactly this network's layers.

    Of the file's metadata only rank and alpha are taken: peft would import modules that others of its keys name.
    """
    import peft

    from models.weights_file import read_weights

    path = Path(folder) / "pytorch_lora_weights.safetensors"
    if not path.is_file():
        raise UserError(f"adapter {folder} has no {path.name}; give the lora/ folder of an export")
    weights = read_weights(path)
    alpha = read_alpha(path)
    shapes = {name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}
    layers, ranks = [], set()
    for name, tensor in weights.items():
        layer, _, side = name.removesuffix(".weight").rpartition(".lora_")
        base, shape = shapes.get(f"{layer}.weight"), tuple(tensor.shape)
        if base is None or len(base) != 2 or len(shape) != 2 or (side, shape[side == "A"]) not in zip(
            "AB", reversed(base), strict=True
        ):  # fmt: skip
            raise UserError(f"adapter {folder}: {name} of shape {shape} is of another network than the checkpoint's")
        layers.append(layer)
        ranks.add(shape[side == "B"])
    if len(ranks) != 1:
        raise UserError(f"adapter {folder} has ranks {sorted(ranks)}; only one for all layers is read")
    (rank,) = ranks
    unet.add_adapter(
        peft.LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=sorted(set(layers)))
    )
    result: Any = peft.set_peft_model_state_dict(unet, weights, "default")
    found = {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(unet).items()}
    differing = set(found.items()) ^ {(name, tuple(tensor.shape)) for name, tensor in weights.items()}
    if differing or result.unexpected_keys:
        raise UserError(f"adapter {folder} was not taken in whole; first difference: {min(differing)[0]}")
    if (path.parent / "base.json").is_file():
        mark = read_json(path.parent / "base.json", "adapter")
        if not isinstance(mark, dict) or mark.get("sha256") != base_mark(unet):
            print(f"note: adapter {folder} was trained beside other weights than these; its effect may be another")


def read_alpha(path: Path) -> int | None:
    """lora_alpha of the file's metadata.  UserError for a kind of adapter that is more than W + alpha / rank B A."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    try:
        content = json.loads(text) if text is not None else {}
        alpha = content.get("lora_alpha")
        if alpha is not None and not (isinstance(alpha, int) and 0 < alpha <= MOST_ALPHA):
            raise ValueError(f"lora_alpha={alpha}")
        if kinds := [key for key in OTHER_KINDS if content.get(key)]:
            raise ValueError(f"{kinds[0]}={content[kinds[0]]}, which is not read")
    except (ValueError, AttributeError) as error:
        raise UserError(f"adapter {path} cannot be loaded: its metadata says {error}") from None
    return alpha


def merge_adapter(unet: Any) -> None:
    """Adds the adapter to the weights beside it (W + alpha / rank B A); removes it.  UserError when one overflows."""
    import torch

    try:
        unet.fuse_lora(safe_fusing=True)
    except ValueError as error:
        raise UserError(f"the adapter cannot be merged: {error}") from None
    unet.unload_lora()
    if bad := [name for name, p in unet.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise UserError(f"the adapter cannot be merged: {bad[0]} is not finite then")


def main(config: MergeConfig) -> None:
    if Path(config.out).exists():
        raise UserError(f"{config.out} is there already and is not overwritten; choose another out=")
    # Imported here, so that --help and wrong paths do not wait for them.
    from models.checkpoint import load_unet, read_info

    source = Path(config.checkpoint)
    read_info(source)
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    require_writable(next(p for p in Path(config.out).absolute().parents if p.exists()), needed_mb=size // 2**20 + 64)
    unet = load_unet(source / "unet")
    load_adapter(unet, config.adapter)
    merge_adapter(unet)
    with atomic_folder(config.out) as temporary:
        unet.save_pretrained(temporary / "unet")
        for part in source.iterdir():
            if part.is_dir() and part.name not in ("unet", "lora"):
                shutil.copytree(part, temporary / part.name)
            elif part.is_file():
                shutil.copy2(part, temporary)
    print(f"wrote {config.out}: {config.checkpoint} with {config.adapter} merged into its UNet")


if __name__ == "__main__":
    run(MergeConfig, "models/lora", main)
