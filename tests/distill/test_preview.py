"""The page in the browser, over a real connection, as the browser speaks."""

from __future__ import annotations

import io
import socket
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import viser.transforms
import zstandard
from PIL import Image
from tiny_model import config
from viser import _messages as messages
from websockets.sync.client import ClientConnection, connect

from data.cameras import orbit_camera
from data.files import UserError
from distill.distillation import Scene, distil, distil_together
from distill.preview import FLIP, Preview, c2w_of, draw
from distill.snapshot import Run, new_run
from distill.turntable import render_views
from models.checkpoint import load_export

CAMERA = 15.0, 40.0, 0.6


def looking_from(azimuth: float, wide: bool = False) -> messages.ViewerCameraMessage:
    c2w = orbit_camera(torch.tensor(azimuth), torch.tensor(20.0), 1.7).double().numpy()
    wxyz = viser.transforms.SO3.from_matrix(c2w[:3, :3] @ FLIP).wxyz
    return messages.ViewerCameraMessage(
        wxyz=tuple(wxyz), position=tuple(c2w[:3, 3]), fov=float(np.radians(40)), near=0.01, far=100.0, image_height=96,
        image_width=192 if wide else 96, look_at=(0.0, 0.0, 0.0), up_direction=(0.0, 0.0, 1.0),
    )  # fmt: skip


class Browser:
    """What viser's page sends and gets."""

    def __init__(self, preview: Preview):
        port = preview.server.get_port()
        self.wire: ClientConnection = connect(
            f"ws://127.0.0.1:{port}", subprotocols=[f"viser-v{viser.__version__}"], max_size=None
        )

    def look(self, message: messages.ViewerCameraMessage, preview: Preview) -> None:
        self.wire.send(msgspec.msgpack.encode(message.as_serializable_dict()))
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            for client in preview.server.get_clients().values():
                if np.allclose(client.camera.position, message.position):
                    return
            time.sleep(0.02)
        raise AssertionError("the server never learned of the camera")

    def picture(self) -> np.ndarray | None:
        """The next background picture (H, W, 3); None when none comes."""
        while True:
            try:
                frame = self.wire.recv(timeout=3)
            except TimeoutError:
                return None
            assert isinstance(frame, bytes)
            size = int.from_bytes(frame[8:16], "little")
            content = msgspec.msgpack.decode(zstandard.decompress(frame[16 : 16 + size]))
            for message in content["messages"]:
                if message["type"] == "BackgroundImageMessage" and message["rgb_data"] is not None:
                    return np.asarray(Image.open(io.BytesIO(message["rgb_data"])))


def lopsided(tmp_path: Path) -> Run:
    """A field that looks different from every side."""
    run = new_run(config(tmp_path), "cpu")
    with torch.no_grad():
        for parameter in run.field.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    run.occupancy.update(run.field.density)
    return run


@pytest.fixture
def free_port() -> int:
    with socket.socket() as chance:
        chance.bind(("127.0.0.1", 0))
        port: int = chance.getsockname()[1]
        return port


def test_a_browser_sees_what_its_camera_sees(free_port: int, tmp_path: Path) -> None:
    run, preview = lopsided(tmp_path), Preview(free_port, ["chair", "lamp"], CAMERA)
    try:
        browser = Browser(preview)
        found = []
        for azimuth in (0.0, 120.0):
            browser.look(looking_from(azimuth), preview)
            preview.next = 0
            preview.show({"chair": run})
            shown = browser.picture()
            assert shown is not None and shown.shape == (96, 96, 3)
            c2w = orbit_camera(torch.tensor([azimuth]), torch.tensor(20.0), 1.7)
            expected = render_views(run.field, run.occupancy, c2w, 40.0, 96).rgb[0].permute(1, 2, 0).numpy() * 255
            found.append(shown.astype(float))
            assert abs(found[-1] - expected).mean() < 4  # JPEG
        assert abs(found[0] - found[1]).mean() > 6

        preview.next = 0
        preview.show({"chair": run})  # it has just been shown
        assert browser.picture() is None
        browser.look(looking_from(60.0, wide=True), preview)
        preview.next = 0
        preview.show({"lamp": run})  # another object is chosen on the page
        assert browser.picture() is None
        preview.show({"chair": run, "lamp": run})
        wide = browser.picture()
        assert wide is not None and wide.shape == (96, 192, 3)
        browser.wire.close()
    finally:
        preview.close()


def test_the_run_is_the_same_with_it(checkpoint: Path, free_port: int, tmp_path: Path) -> None:
    model, context = load_export(checkpoint), torch.ones(1, 1, 24)
    alone = new_run(config(tmp_path / "a"), "cpu")
    distil(alone, model, context, config(tmp_path / "a"), "x")
    run = new_run(config(tmp_path / "b"), "cpu")
    preview = Preview(free_port, ["b"], CAMERA)
    try:
        browser = Browser(preview)
        browser.look(looking_from(30.0), preview)
        scene = Scene(run, context, tmp_path / "b", "x")
        distil_together([scene], model, config(tmp_path / "b"), preview)
        assert browser.picture() is not None and "step" in preview.about.content
        browser.wire.close()
    finally:
        preview.close()
    assert run.losses == alone.losses


def test_a_broken_page_costs_no_optimisation(
    free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preview = Preview(free_port, ["chair"], CAMERA)
    try:
        calls = []
        monkeypatch.setattr(preview.server, "get_clients", lambda: calls.append(1) or {}[0])
        for _ in range(2):
            preview.show({"chair": lopsided(tmp_path)})
        assert calls == [1] and "no preview any more (KeyError: 0)" in capsys.readouterr().err
    finally:
        preview.close()


def test_cameras_of_the_page_are_ours() -> None:
    c2w = orbit_camera(torch.tensor(77.0), torch.tensor(-12.0), 2.0)
    wxyz = viser.transforms.SO3.from_matrix(c2w[:3, :3].double().numpy() @ FLIP).wxyz
    assert torch.allclose(c2w_of(wxyz, c2w[:3, 3].numpy()), c2w, atol=1e-6)


def test_normals_and_opacity_can_be_looked_at(tmp_path: Path) -> None:
    run = lopsided(tmp_path)
    c2w = orbit_camera(torch.tensor([40.0]), torch.tensor(20.0), 1.7)
    drawn, views = draw(run, c2w[0], 40.0, 24, 24), render_views(run.field, run.occupancy, c2w, 40.0, 24)
    for got, wanted in ((drawn[:3], views.rgb[0]), (drawn[3:6], views.normal[0]), (drawn[6], views.opacity[0])):
        assert torch.allclose(got.clamp(0, 1), wanted, atol=1e-5)


def test_without_viser_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(UserError, match=r"pip install '.\[preview\]'"):
        Preview(8080, ["chair"], CAMERA)
