"""Embeddings from a file: shapes that are taken, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.files import UserError
from models.given_embedding import load_embedding


@pytest.mark.parametrize("shape", [(8,), (3, 8), (1, 3, 8)])
def test_shapes_and_no_words(tmp_path: Path, shape: tuple[int, ...]) -> None:
    given, empty = torch.randn(shape), torch.randn(shape)
    save_file({"embedding": given.half()}, tmp_path / "a.safetensors")
    context, unconditional = load_embedding(tmp_path / "a.safetensors")
    assert context.dtype == torch.float32 and context.shape == (1, 1 if len(shape) == 1 else 3, 8)
    assert torch.equal(context.flatten(), given.half().float().flatten()) and not unconditional.any()
    save_file({"embedding": given, "unconditional": empty}, tmp_path / "b.safetensors")
    assert torch.equal(load_embedding(tmp_path / "b.safetensors")[1].flatten(), empty.flatten())


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"context": torch.ones(8)}, "holds context; it must hold a tensor `embedding`"),
        ({"embedding": torch.ones(2, 3, 8)}, r"embedding is \(2, 3, 8\)"),
        ({"embedding": torch.ones(8, dtype=torch.int64)}, "must be finite floating-point numbers"),
        ({"embedding": torch.full((8,), float("nan"))}, "must be finite"),
        ({"embedding": torch.ones(8), "unconditional": torch.ones(9)}, "must be of one shape"),
    ],
)
def test_what_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    save_file(tensors, tmp_path / "e.safetensors")
    with pytest.raises(UserError, match=words):
        load_embedding(tmp_path / "e.safetensors")


def test_what_is_no_file_of_tensors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_embedding(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="that can be read"):
        load_embedding(tmp_path / "text.safetensors")
