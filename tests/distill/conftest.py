"""A tiny checkpoint and a picture; lets the tests of this folder import the modules beside them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.autoencoder import fit_patch_codec
from models.checkpoint import ExportInfo, MultiViewModel, make_scheduler, save_export
from models.config import UNetConfig
from models.image_encoder import ClipImageEncoder
from models.multiview import build_unet

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 1, "head_width": 48}
    folder: Path = tmp_path_factory.mktemp("export") / "export"
    model = MultiViewModel(
        unet=build_unet(UNetConfig(None, [32, 64], [1, 2], 1, 24, True), 6, 4).eval(),
        vae=fit_patch_codec(torch.rand(20, 3, 32, 32) * 2 - 1, 8, 6).eval(),
        image_encoder=ClipImageEncoder(24, vision).eval(),
        scheduler=make_scheduler("v_prediction", zero_terminal_snr=True),
        info=ExportInfo(32, 4, (0.0, 30.0), (40.0, 40.0), (0.58, 0.6), "mvdream", stage=2, step=7),
    )
    save_export(folder, model)
    return folder


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("image") / "object.png"
    Image.fromarray(np.full((40, 40, 3), 120, dtype=np.uint8)).save(path)
    return path
