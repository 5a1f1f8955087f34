"""Of each held-out object the nearest one that was trained on, by the embeddings of their reference pictures.

    python -m study.nearest runs/study/parts/image_encoder runs/study/views_val runs/study/views_train nearest.json 64

A model that has learned its objects by heart would draw that one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import UserError, read_json, write_json
from data.shards import decode_image
from data.stream import composite, views_of
from distill.evaluation.images import embeddings
from models.image_encoder import load_image_encoder_folder


def references(folder: Path, role: str, size: int) -> tuple[list[str], Tensor]:
    """The pictures of that role: the uid of each (N), and (N, 3, S, S)."""
    metas: list[Any] = [read_json(path, "views") for path in sorted(folder.glob("*/meta.json"))]
    if not metas:
        raise UserError(f"{folder} holds no rendered object")
    files = [(meta["uid"], folder / meta["uid"] / view["file"]) for meta in metas for view in views_of(meta, role)]
    pictures = [composite(decode_image(file.read_bytes(), size)) for _, file in files]
    return [uid for uid, _ in files], torch.stack(pictures)


def main(encoder: Path, held_out: Path, trained: Path, out: Path, size: int) -> None:
    network = load_image_encoder_folder(str(encoder))
    asked, asked_pictures = references(held_out, "eval_reference", size)
    known, known_pictures = references(trained, "reference", size)
    likeness = embeddings(network, asked_pictures) @ embeddings(network, known_pictures).T
    best = likeness.max(dim=1)
    write_json(out, {
        uid: {"nearest": known[int(index)], "cosine": float(value)}
        for uid, index, value in zip(asked, best.indices, best.values, strict=True)
    })  # fmt: skip
    print(f"{out}: {len(asked)} held-out objects against {len(set(known))}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
