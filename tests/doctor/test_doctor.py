"""On this machine, and on ones that lack things."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from doctor import checks
from doctor.checks import MISSING, OK, WARNING, Row
from doctor.config import DoctorConfig

ROOT = Path(__file__).resolve().parents[2]


def one(rows) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_the_command(tmp_path) -> None:
    words = [sys.executable, "doctor/run.py", "json=true", f"out={tmp_path}", "timeout_s=5"]
    secret = "0123456789abcdef" * 2
    environment = os.environ | {"WANDB_API_KEY": secret, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    names = {"Python", "packages", "torch", "CUDA", "NCCL", "DeepSpeed", "its compiler", "Blender", "SLURM",
             "W&B login", "disk for runs", "weights hub", "open_clip ViT-H-14"}  # fmt: skip
    assert names <= rows.keys() and not [row for row in rows.values() if "Error" in row["found"]], done.stdout
    assert rows["packages"]["state"] == rows["DeepSpeed"]["state"] == rows["W&B login"]["state"] == OK
    assert all(row["remedy"] for row in rows.values() if row["state"] == MISSING)
    assert done.returncode == int(any(row["state"] == MISSING for row in rows.values()))
    assert secret not in done.stdout + done.stderr


def test_what_is_not_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(checks, "ROOT", tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    config = DoctorConfig(out=str(tmp_path / "none"), weights=[], timeout_s=5)
    assert one(checks.blender(config))["Blender"].state == MISSING
    assert one(checks.slurm(config))["SLURM"].state == WARNING
    assert one(checks.wandb(config))["W&B login"].state == WARNING
    assert one(checks.disk(config))["disk for runs"].found.endswith("is not there")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "does not answer" in one(checks.hub(config))["weights hub"].found
    # A Blender that is too old, and a broken one of our own.
    (tmp_path / "blender").write_text("#!/bin/sh\necho Blender 3.6.1\n")
    (tmp_path / "blender").chmod(0o755)
    assert one(checks.blender(config))["Blender"].state == WARNING
    (tmp_path / "blender").unlink()
    (tmp_path / ".venv-blender" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-blender" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    assert "does not work" in one(checks.blender(config))["Blender"].found


def test_weights(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert one(checks.weights(DoctorConfig()))["weights"].state == WARNING
    (tmp_path / "weights" / "mine").mkdir(parents=True)
    (tmp_path / "weights" / "model.pt").write_bytes(b"0" * 100)
    found = one(checks.weights(DoctorConfig()))
    assert found["weights weights/mine"].state == MISSING and found["weights weights/model.pt"].state == OK
    whole = one(checks.weights(DoctorConfig(sha256=True)))["weights weights/model.pt"].found
    assert f"sha256 {hashlib.sha256(b'0' * 100).hexdigest()}" in whole, "as sha256sum says"


def test_a_check_that_fails_is_a_row(monkeypatch) -> None:
    def broken(config: DoctorConfig):
        raise RuntimeError("odd")
        yield

    monkeypatch.setattr(checks, "CHECKS", (broken,))
    assert checks.examine(DoctorConfig()) == [Row("broken", MISSING, "RuntimeError: odd", "report this, with --json")]


def test_an_export_folder(tiny_export: Path) -> None:
    (row,) = checks.weights(DoctorConfig(weights=[str(tiny_export)]))
    assert row.state == OK and "stage " in row.found and "unet " in row.found and " tensors mark " in row.found
    path = next((tiny_export / "unet").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:1000])
    (row,) = checks.weights(DoctorConfig(weights=[str(tiny_export)]))
    assert row.state == MISSING and f"{path} is damaged" in row.found


@pytest.fixture
def tiny_export(tmp_path) -> Path:
    sys.path.insert(0, str(ROOT / "tests" / "models"))
    from test_checkpoint import small_model

    from models.checkpoint import save_export

    save_export(tmp_path / "export", small_model())
    return tmp_path / "export"
