"""Networks in diffusers' folders (`config.json` + `*.safetensors`), read whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from data.files import UserError, read_json


def class_name(folder: str | Path, what: str) -> str | None:
    """What the folder's config.json says it holds.  UserError when there is none."""
    config = read_json(Path(folder) / "config.json", what)
    return config.get("_class_name") if isinstance(config, dict) else None


def load_network(kind: Any, folder: str | Path, what: str, variant: str | None = None) -> Any:
    """A diffusers model of class `kind`, in fp32, with every weight from the file.

    variant: as diffusers', "fp16" for `diffusion_pytorch_model.fp16.safetensors`.
    diffusers leaves a weight that the file lacks random, and says so in a log line; here it is a UserError.
    """
    try:
        network, found = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            variant=variant,
        )
    except Exception as error:  # damaged values in config.json make diffusers and torch fail in any way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what}: {folder} cannot be loaded: {reason}") from None
    for words, key in (("lacks", "missing_keys"), ("holds unexpected", "unexpected_keys")):
        if names := sorted(found[key]):
            raise UserError(
                f"{what}: {folder} {words} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} "
                f"({len(names)} tensors); it is damaged, or config.json is of another network"
            )
    return network


def empty_network(kind: Any, folder: str | Path, what: str) -> Any:
    """The same on the meta device: from config.json alone, without weights or memory."""
    try:
        with torch.device("meta"):
            return kind.from_config(read_json(Path(folder) / "config.json", what))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what}: {folder}/config.json does not describe a {kind.__name__}: {error}") from None
