"""Texture coordinates from xatlas, in a process of its own that can be stopped.

xatlas is C++ that may take minutes, or crash, on a mesh it does not like.  As a program, `python -m distill.unwrap
in.npz out.npz` is that process.  Shapes: X vertices, T triangles, Y vertices of the unwrapped mesh: one for each chart
that a vertex borders on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.processes import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
PADDING = 4  # texels between charts: two levels of a mipmap do not mix them


class UnwrapFailed(Exception):
    """There are no texture coordinates, and the message says why."""


class Layout(NamedTuple):
    """Where each triangle lies in the picture."""

    uv: np.ndarray  # (Y, 2) in [0, 1], v downwards from the top of the picture
    source: np.ndarray  # (Y,) number of the vertex in the mesh
    triangles: np.ndarray  # (T, 3) numbers into uv, in the mesh's order of triangles and corners
    charts: int


def unwrap(vertices: np.ndarray, triangles: np.ndarray, size: int, limit_s: float) -> Layout:
    """vertices (X, 3), triangles (T, 3) -> charts that do not overlap in a picture of size x size texels.

    UnwrapFailed after `limit_s` seconds, and when xatlas is missing, crashes or answers nonsense.
    """
    with tempfile.TemporaryDirectory(prefix="isotropic3d-unwrap-") as name:
        given, answer = Path(name, "in.npz"), Path(name, "out.npz")
        np.savez(given, vertices=vertices.astype(np.float32), triangles=triangles.astype(np.uint32), size=size)
        run_limited([sys.executable, "-m", "distill.unwrap", str(given), str(answer)], Path(name, "log"), limit_s)
        with np.load(answer, allow_pickle=False) as made:
            layout = Layout(
                made["uv"].astype(np.float64),
                made["source"].astype(np.int64),
                made["triangles"].astype(np.int64),
                int(made["charts"]),
            )
    same = layout.triangles.shape == triangles.shape and bool((layout.source[layout.triangles] == triangles).all())
    if not same or not np.isfinite(layout.uv).all() or layout.uv.min() < 0 or layout.uv.max() > 1:
        raise UnwrapFailed("xatlas answered with other triangles, or with coordinates outside of the picture")
    return layout


def run_limited(command: Sequence[str], log: Path, limit_s: float) -> None:
    """Runs a program; UnwrapFailed with its last words on an error, or after `limit_s` seconds.

    However this ends, the program and whatever it started has ended too.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # so that one signal reaches all that it started
            preexec_fn=lambda: die_with_parent(signal.SIGKILL),  # noqa: PLW1509
        )
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise UnwrapFailed(f"it took longer than mesh.unwrap_limit_s={limit_s:g}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody of its session is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if status != 0:
        words = " ".join(log.read_text(errors="replace").strip().splitlines()[-1:])[:300] or "it said nothing"
        raise UnwrapFailed(f"{words} ({f'signal {-status}' if status < 0 else f'status {status}'})")


def main(given: str, answer: str) -> None:
    import xatlas

    with np.load(given, allow_pickle=False) as mesh:
        vertices, triangles, size = mesh["vertices"], mesh["triangles"], int(mesh["size"])
    atlas, pack = xatlas.Atlas(), xatlas.PackOptions()
    pack.resolution, pack.padding, pack.bilinear = size, PADDING, True
    atlas.add_mesh(vertices, triangles)
    atlas.generate(xatlas.ChartOptions(), pack)
    source, parts, uv = atlas.get_mesh(0)
    # fractions of the picture that xatlas made, which need be neither square nor of the size asked for
    extent = np.array([atlas.width, atlas.height], dtype=np.float64)
    np.savez(answer, uv=uv * extent / extent.max(), source=source, triangles=parts, charts=atlas.chart_count)


if __name__ == "__main__":
    main(*sys.argv[1:])
