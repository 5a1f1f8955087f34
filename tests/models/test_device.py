"""Where inference runs, and what its kernels need there."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
import torch

from models import device


def test_the_chosen_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts its kernels there, and fails on tensors of another one."""
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    assert device.choose_device("cuda:1", "auto") == (torch.device("cuda:1"), torch.bfloat16)
    assert made_current == [torch.device("cuda:1")]
    assert device.choose_device("cpu", "auto") == (torch.device("cpu"), torch.float32) and len(made_current) == 1


def test_what_triton_cannot_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(device.shutil, "which", lambda name: None)
    assert "no C compiler" in (device.no_compiler() or "")
    monkeypatch.setenv("CC", "mine")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "headers are missing" in (device.no_compiler() or "")
    (tmp_path / "Python.h").write_text("")
    assert device.no_compiler() is None
