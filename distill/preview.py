"""A web page on which objects can be looked at from any side while they are distilled.

Browsers of this machine alone reach it; from another, `ssh -L 8080:localhost:8080 machine`.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.cameras import camera_rays, framing_distance, orbit_camera
from data.files import UserError
from distill.snapshot import Run
from distill.turntable import RAYS_AT_ONCE, picture_of_rays, to_bytes

SHARE = 0.2  # of the time that pictures may take
STALE_S = 2.0  # after which a picture is made again though its camera has not moved
PIXELS = {"cpu": 96, "cuda": 512}  # height of a picture; the browser enlarges it
LOOKS = {"colour": slice(0, 3), "normals": slice(3, 6), "opacity": slice(6, 7)}
FLIP = np.diag([1.0, -1.0, -1.0])  # viser's cameras look along +z, y down (OpenCV); ours along -z, y up (OpenGL)


class Preview:
    """names: of the objects.  camera: elevation_deg, fov_deg, framing to begin with.

    Serves from `port` on, or the next free one.  UserError without viser.
    """

    def __init__(self, port: int, names: list[str], camera: tuple[float, float, float]):
        try:
            import viser
        except ImportError as error:
            raise UserError(f"preview={port} needs viser: pip install '.[preview]', or leave it out") from error
        self.server: Any = viser.ViserServer(host="127.0.0.1", port=port, verbose=False)
        elevation, fov, framing = camera
        start = orbit_camera(torch.tensor(30.0), torch.tensor(elevation), framing_distance(framing, fov))
        self.server.initial_camera.position = start[:3, 3].numpy()
        self.server.initial_camera.look_at = np.zeros(3)
        self.server.initial_camera.fov = np.radians(fov)
        self.server.scene.set_up_direction("+z")
        self.which = self.server.gui.add_dropdown("object", names)
        self.look = self.server.gui.add_dropdown("show", list(LOOKS))
        self.about = self.server.gui.add_markdown("")
        self.sent: dict[int, tuple[bytes, float]] = {}  # of each browser: what it was last shown, and when
        self.next = 0.0
        self.broken = False
        print(f"preview: http://localhost:{self.server.get_port()}", flush=True)

    def show(self, runs: dict[str, Run]) -> None:
        """`draw_all`, of which no failure (a browser's, the GPU's memory's) is worth the optimisation."""
        if self.broken:
            return
        try:
            self.draw_all(runs)
        except Exception as error:
            self.broken = True
            print(f"warning: no preview any more ({type(error).__name__}: {error})", file=sys.stderr, flush=True)

    def draw_all(self, runs: dict[str, Run]) -> None:
        """Draws for each browser what it looks at, where that moved or is stale, within SHARE of the time."""
        began = time.monotonic()
        run = runs.get(self.which.value)
        if began < self.next or run is None:
            return
        clients = self.server.get_clients()
        self.sent = {number: self.sent[number] for number in clients if number in self.sent}
        for number, client in clients.items():
            camera = client.camera
            asked = b"".join(
                np.asarray(x, dtype=np.float64).tobytes() for x in (camera.wxyz, camera.position, camera.fov)
            )
            asked += f"{self.which.value}/{self.look.value}".encode()
            before, when = self.sent.get(number, (b"", 0.0))
            if asked == before and began - when < STALE_S:
                continue
            height = PIXELS[run.occupancy.live.device.type]
            width = max(8, min(round(height * camera.aspect), 4 * height))
            picture = draw(run, c2w_of(camera.wxyz, camera.position), np.degrees(camera.fov), height, width)
            shown = picture[LOOKS[self.look.value]].expand(3, -1, -1)
            client.scene.set_background_image(to_bytes(shown), format="jpeg")
            self.sent[number] = asked, began
        if clients and run.losses:
            last = run.losses[-1]
            self.about.content = f"step {run.step}, loss {last['loss']:.3g}, rendered at {last['resolution']:.0f} px"
        self.next = time.monotonic() + (time.monotonic() - began) * (1 - SHARE) / SHARE

    def close(self) -> None:
        self.server.stop()


def c2w_of(wxyz: np.ndarray, position: np.ndarray) -> Tensor:
    """A viser camera's quaternion (4,) and place (3,) -> c2w (4, 4)."""
    from viser.transforms import SO3

    c2w = np.eye(4)
    c2w[:3, :3] = SO3(np.asarray(wxyz, dtype=np.float64)).as_matrix() @ FLIP
    c2w[:3, 3] = position
    return torch.from_numpy(c2w).float()


@torch.no_grad()
def draw(run: Run, c2w: Tensor, fov_deg: float, height: int, width: int) -> Tensor:
    """Colour, normal, opacity, depth (8, H, W) of the field as it is; fov_deg is vertical.  Draws nothing at random."""
    device = run.occupancy.live.device
    origins, directions = (x.reshape(-1, 3) for x in camera_rays(c2w.to(device), torch.tensor(fov_deg), height, width))
    parts = zip(*(x.split(RAYS_AT_ONCE[device.type]) for x in (origins, directions)), strict=True)
    drawn = torch.cat([picture_of_rays(run.field, run.occupancy, o, d) for o, d in parts])
    return drawn.T.reshape(8, height, width)
