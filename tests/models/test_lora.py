"""LoRA adapters: nothing changes at first; W + alpha / rank B A; saved, loaded and merged as diffusers does it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import small_model

from data.files import UserError
from models.checkpoint import load_export, save_export
from models.config import LoraConfig
from models.lora import add_adapter, has_adapter, load_adapter, merge_adapter, save_adapter
from models.multiview import predict_noise_output

ROOT = Path(__file__).resolve().parents[2]
FILE = "pytorch_lora_weights.safetensors"


def trained_adapter(unet, config: LoraConfig) -> None:
    add_adapter(unet, config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@torch.no_grad()
def output(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 3, 6, 4, 4, generator=generator)
    context = torch.randn(1, 1, 24, generator=generator)
    camera = torch.randn(1, 3, 16, generator=generator)
    return predict_noise_output(unet, x, torch.tensor([400]), context, camera)


def test_a_new_adapter_changes_nothing_and_is_all_that_trains() -> None:
    plain, adapted = small_model().unet, small_model().unet
    add_adapter(adapted, LoraConfig(rank=2))
    torch.testing.assert_close(output(plain), output(adapted), atol=1e-5, rtol=0)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    layers = {name.split(".lora_")[0].split(".", 4)[-1] for name in trained}
    assert all(layer.endswith(("to_q", "to_k", "to_v", "to_out.0")) for layer in layers)


def test_it_is_w_plus_ba() -> None:
    unet = small_model().unet
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before = unet.get_submodule(layer).weight.clone()
    trained_adapter(unet, LoraConfig(rank=3, alpha=6))
    adapter = unet.get_submodule(layer)
    a, b = adapter.lora_A["default"].weight, adapter.lora_B["default"].weight
    merge_adapter(unet)
    assert not has_adapter(unet)
    torch.testing.assert_close(unet.get_submodule(layer).weight, before + 6 / 3 * b @ a, atol=1e-6, rtol=1e-5)


def test_save_load_and_merge(tmp_path: Path) -> None:
    unet = small_model().unet
    trained_adapter(unet, LoraConfig(rank=3, alpha=12))
    expected = output(unet)
    assert float((expected - output(small_model().unet)).abs().max()) > 1e-2
    save_adapter(unet, tmp_path)
    loaded = small_model().unet
    load_adapter(loaded, tmp_path)
    assert torch.equal(output(loaded), expected)
    merge_adapter(loaded)
    torch.testing.assert_close(output(loaded), expected, atol=1e-5, rtol=1e-4)


def test_an_export_with_an_adapter_is_merged_and_holds_it(tmp_path: Path) -> None:
    model = small_model()
    base = {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    trained_adapter(model.unet, LoraConfig(rank=2))
    expected = output(model.unet)
    save_export(tmp_path / "export", model)
    assert torch.equal(output(model.unet), expected), "the model in training must stay as it is"
    torch.testing.assert_close(output(load_export(tmp_path / "export").unet), expected, atol=1e-5, rtol=1e-4)
    stock = small_model().unet  # as a user of diffusers takes it up
    stock.load_state_dict(base)
    stock.load_lora_adapter(tmp_path / "export" / "lora", prefix=None, use_safetensors=True)
    assert torch.equal(output(stock), expected)


def test_the_merging_command(tmp_path: Path) -> None:
    model = small_model()
    save_export(tmp_path / "base", model)
    trained_adapter(model.unet, LoraConfig(rank=2))
    save_adapter(model.unet, tmp_path / "lora")
    command = [sys.executable, ROOT / "models" / "lora.py", "checkpoint=base", "adapter=lora", "out=merged"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    merged = load_export(tmp_path / "merged")
    for part in ("vae", "image_encoder", "scheduler"):
        assert {p.name for p in (tmp_path / "merged" / part).iterdir()} == {
            p.name for p in (tmp_path / "base" / part).iterdir()
        }
    torch.testing.assert_close(output(merged.unet), output(model.unet), atol=1e-5, rtol=1e-4)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 2 and again.stderr.startswith("error: merged is there already")


def test_foreign_adapters(tmp_path: Path, monkeypatch) -> None:
    unet = small_model().unet
    trained_adapter(unet, LoraConfig(rank=2))
    save_adapter(unet, tmp_path)
    good = load_file(tmp_path / FILE)
    name = next(n for n in good if "attn2.to_k.lora_A" in n)
    for changed, words in (
        ({**good, "elsewhere.to_q.lora_A.weight": torch.zeros(2, 8)}, "elsewhere.*another network"),
        ({**good, name: torch.zeros(2, 99)}, "another network"),
        ({"a": torch.zeros(1)}, "another network"),
    ):
        save_file(changed, tmp_path / FILE)
        with pytest.raises(UserError, match=words):
            load_adapter(small_model().unet, tmp_path)
    save_file({**good, name: torch.full_like(good[name], float("nan"))}, tmp_path / FILE)
    unet = small_model().unet
    load_adapter(unet, tmp_path)
    with pytest.raises(UserError, match="cannot be merged"):
        merge_adapter(unet)
    for metadata in ('{"use_dora": true}', '{"lora_alpha": 1e30}', '{"lora_alpha": "x"}', "[]", "nothing"):
        save_file(good, tmp_path / FILE, {"lora_adapter_metadata": metadata})
        with pytest.raises(UserError, match="cannot be loaded"):
            load_adapter(small_model().unet, tmp_path)
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    named = '{"lora_alpha": 2, "megatron_config": {"a": 1}, "megatron_core": "stranger"}'  # peft would import it
    save_file(good, tmp_path / FILE, {"lora_adapter_metadata": named})
    load_adapter(small_model().unet, tmp_path)
    assert not (tmp_path / "executed").exists()
    save_file({**good, name: torch.zeros(())}, tmp_path / FILE)
    with pytest.raises(UserError, match="another network"):
        load_adapter(small_model().unet, tmp_path)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a safetensors file"):
        load_adapter(small_model().unet, tmp_path)
    with pytest.raises(UserError, match="has no pytorch_lora_weights"):
        load_adapter(small_model().unet, tmp_path / "none")


def test_targets_that_are_not_there() -> None:
    with pytest.raises(UserError, match=r"lora\.targets=\['nowhere'\]"):
        add_adapter(small_model().unet, LoraConfig(targets=["nowhere"]))


@pytest.mark.parametrize(
    ("targets", "words"),
    [(["to_q", "nowhere"], "the UNet has no layer nowhere"), (["conv_in"], "conv_in is a Conv2d")],
)
def test_targets_that_cannot_be(targets: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        add_adapter(small_model().unet, LoraConfig(targets=targets))


def test_an_adapter_beside_other_weights_is_told(tmp_path: Path, capsys) -> None:
    unet = small_model().unet
    trained_adapter(unet, LoraConfig(rank=2))
    save_adapter(unet, tmp_path)
    load_adapter(small_model().unet, tmp_path)
    assert capsys.readouterr().out == ""
    other = small_model().unet
    other.conv_in.weight.data[0, 0, 0, 0] += 1
    load_adapter(other, tmp_path)
    assert "was trained beside other weights" in capsys.readouterr().out
