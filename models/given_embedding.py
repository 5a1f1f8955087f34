"""An embedding from a file, for weights that have no image encoder of their own, such as MVDream's text model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.files import UserError


def load_embedding(path: str | Path) -> tuple[Tensor, Tensor]:
    """A file of safetensors -> context and unconditional context (1, T, D) each, fp32.  UserError for any other.

    The file holds `embedding`: (D,), (T, D) or (1, T, D), and may hold `unconditional` of the same shape: a text
    model's embedding of no words.  Where it does not, zeros stand for it, as in image-conditioned training.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"embedding {path} does not exist")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"embedding {path} is not a file of safetensors that can be read ({error})") from None
    if "embedding" not in tensors or not set(tensors) <= {"embedding", "unconditional"}:
        raise UserError(
            f"embedding {path} holds {', '.join(sorted(tensors)) or 'nothing'}; it must hold a tensor `embedding`, and "
            "`unconditional` where the model was not trained on zeros"
        )
    for name, tensor in tensors.items():
        if tensor.ndim not in (1, 2, 3) or tensor.numel() == 0 or (tensor.ndim == 3 and len(tensor) != 1):
            raise UserError(f"embedding {path}: {name} is {tuple(tensor.shape)}; it must be (D,), (T, D) or (1, T, D)")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"embedding {path}: {name} must be finite floating-point numbers")
    given = {name: tensor.float().reshape(1, -1, tensor.shape[-1]) for name, tensor in tensors.items()}
    context = given["embedding"]
    unconditional = given.get("unconditional", torch.zeros_like(context))
    if unconditional.shape != context.shape:
        raise UserError(
            f"embedding {path}: unconditional is {tuple(unconditional.shape)} and embedding {tuple(context.shape)}; "
            "they must be of one shape"
        )
    return context, unconditional
