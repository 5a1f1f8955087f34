"""Which weights a run trains."""

from __future__ import annotations

import pytest

from models.config import UNetConfig
from models.multiview import build_unet
from train.config import TrainConfig
from train.trainable import choose_trainable


@pytest.mark.parametrize(
    ("choice", "words"), [("lora", ".lora_"), ("attention", ".attn"), ("cross_attention", ".attn2."), ("all", "")]
)
@pytest.mark.parametrize("embedding_dim", [None, 40])
def test_what_trains(choice: str, words: str, embedding_dim: int | None) -> None:
    """The chosen layers, and always the one that maps an embedding of another width, since it is new."""
    unet = build_unet(UNetConfig(None, [32, 64], [1, 2], 1, 24, embedding_dim=embedding_dim), 4, 8)
    choose_trainable(unet, TrainConfig(trainable=choice, init_from="somewhere"))
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in unet.named_parameters() if words in n or n.startswith("encoder_hid_proj")}
