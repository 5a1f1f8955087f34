"""Objects to posed views: plans the cameras of each object, feeds Blender processes, keeps the books.

A views folder holds `<uid>/meta.json` and `<uid>/000.png` ... (RGBA, straight alpha, sRGB), and `render_ledger.jsonl`,
one line per object rendered, rejected or failed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conf.cli import check
from data.assets import Asset, list_assets
from data.blender_pool import WORKER, BlenderProcess, ObjectFailed, check_blender, find_blender
from data.cameras import framing_distance, orbit_camera
from data.files import UserError, atomic_folder, read_json, require_writable, write_json
from data.objaverse_assets import fetch_assets
from data.processes import locked
from data.progress import Progress
from data.selection import SelectConfig, select_assets

RADIUS = 0.5  # object units: every object is scaled to a bounding sphere of this radius around the origin
LEDGER = "render_ledger.jsonl"


@dataclass
class RenderConfig:
    """Settings of `data/render.py`."""

    source: str = ""  # a folder of .glb/.gltf/.obj/.ply/.fbx files, a .sh3f library, objaverse or objaverse:UIDS.txt
    out: str = ""  # the views folder
    names: list[str] = field(default_factory=list)  # only these objects (uid or file name without suffix); empty: all
    select: SelectConfig = field(default_factory=SelectConfig)  # filters and splits (data/selection.py)
    limit: int = 0  # only the first so many objects; 0: all
    resolution: int = 256  # pixels, width and height
    samples: int = 16  # Cycles samples a pixel, before denoising
    seed: int = 0  # cameras are drawn from (seed, uid)
    processes: int = 0  # Blender processes of one thread each; 0: one per core
    blender: str = "auto"  # or the path of Blender, or of a Python that has the bpy module
    rings: int = 4  # rings per object, each with its own start azimuth, elevation, fov and framing
    views_per_ring: int = 16  # equally spaced azimuths; a multiple of 4, so that four orthogonal views exist for each
    references: int = 8  # front views for the CLIP embedding and the reference
    reference_azimuth_deg: float = 90  # references are drawn within +- this of the front
    eval_views: int = 8  # a ring never trained on; 0: none
    eval_elevation_deg: float = 15  # its elevation; fov and framing are the middle of their ranges
    eval_reference_azimuth_deg: float = 30  # the evaluation's input picture is within +- this of the front
    elevation_deg: list[float] = field(default_factory=lambda: [0.0, 30.0])  # range, as in the paper's base model
    fov_deg: list[float] = field(default_factory=lambda: [15.0, 60.0])  # range, vertical
    framing: list[float] = field(default_factory=lambda: [0.58, 0.71])  # range, object units in half the height
    min_coverage: float = 0.01  # objects whose ring views cover less than this share of the picture are rejected
    object_limit_s: float = 600  # an object that takes longer fails

    def __post_init__(self) -> None:
        check(bool(self.source), "source is empty; give source=FOLDER or source=LIBRARY.sh3f")
        check(bool(self.out), "out is empty; give out=FOLDER for the views")
        for name, low, high in (
            ("resolution", 8, 4096), ("samples", 1, 65536), ("rings", 1, 1000), ("views_per_ring", 4, 1000),
            ("references", 1, 1000), ("eval_views", 0, 1000), ("processes", 0, 4096), ("limit", 0, 10**9),
            ("reference_azimuth_deg", 0, 180), ("eval_reference_azimuth_deg", 0, 180), ("eval_elevation_deg", -89, 89),
            ("min_coverage", 0, 1), ("object_limit_s", 1, 10**6), ("seed", 0, 2**63),
        ):  # fmt: skip
            value = getattr(self, name)
            check(low <= value <= high, f"{name}={value} is outside {low}..{high}; choose a value inside")
        check(self.views_per_ring % 4 == 0, f"views_per_ring={self.views_per_ring} is no multiple of 4; try 12 or 16")
        check(
            self.view_count <= 1000, f"{self.view_count} views an object are more than 1000; lower rings or references"
        )
        for name, lowest, highest in (
            ("elevation_deg", -89.0, 89.0),
            ("fov_deg", 1.0, 120.0),
            ("framing", 0.01, 100.0),
        ):
            span = getattr(self, name)
            ordered = len(span) == 2 and lowest <= span[0] <= span[1] <= highest
            check(ordered, f"{name}={span} must be [lowest, highest] within {lowest:g}..{highest:g}")
        needed = RADIUS / math.cos(math.radians(self.fov_deg[1]) / 2)
        check(
            self.framing[0] > needed,
            f"framing={self.framing} clips objects at fov_deg={self.fov_deg}: the lowest framing must be above "
            f"{RADIUS}/cos(fov/2) = {needed:.3f}; raise framing or lower fov_deg",
        )

    @property
    def view_count(self) -> int:
        """Views of one object."""
        return self.rings * self.views_per_ring + self.references + self.eval_views + 1


# --- the plan: which views of an object, a pure function of (config, uid) ---


def plan_views(config: RenderConfig, uid: str) -> list[dict[str, Any]]:
    """The views of one object, in file order, each as in meta.json.  Drawn from a generator keyed by (seed, uid)."""
    key = int.from_bytes(hashlib.sha256(f"{config.seed}/{uid}".encode()).digest()[:16], "little")
    random = np.random.Generator(np.random.Philox(key=key))
    views: list[dict[str, Any]] = []

    def draw(span: list[float]) -> float:
        return float(random.uniform(span[0], span[1]))

    def draw_lens() -> tuple[float, float, float]:
        return draw(config.elevation_deg), draw(config.fov_deg), draw(config.framing)

    def add(role: str, ring: int | None, index: int, azimuth: float, lens: tuple[float, float, float]) -> None:
        elevation, fov, framing = lens
        distance = float(framing_distance(framing, fov))
        c2w = orbit_camera(*(torch.tensor(x) for x in (azimuth, elevation, distance)))
        views.append(
            {"file": f"{len(views):03d}.png", "role": role, "ring": ring, "index": index, "azimuth_deg": azimuth,
             "elevation_deg": elevation, "fov_deg": fov, "distance": distance, "c2w": c2w.tolist()}
        )  # fmt: skip

    for ring in range(config.rings):
        start, lens = draw([0, 360]), draw_lens()
        for index in range(config.views_per_ring):
            add("ring", ring, index, (start + 360 * index / config.views_per_ring) % 360, lens)
    for index in range(config.references):
        azimuth = draw([-config.reference_azimuth_deg, config.reference_azimuth_deg])
        add("reference", None, index, azimuth % 360, draw_lens())
    middle = (config.eval_elevation_deg, sum(config.fov_deg) / 2, sum(config.framing) / 2)
    for index in range(config.eval_views):
        add("eval", config.rings, index, 360 * index / config.eval_views, middle)
    azimuth = draw([-config.eval_reference_azimuth_deg, config.eval_reference_azimuth_deg])
    add("eval_reference", None, 0, azimuth % 360, draw_lens())
    return views


def fingerprint(config: RenderConfig, asset: Asset) -> str:
    """Changes whenever the pictures would: cameras, resolution, samples, the object's file, the worker itself."""
    facts = {
        "views": plan_views(config, asset.uid),
        "resolution": config.resolution,
        "samples": config.samples,
        "asset": [asset.path.name, asset.path.stat().st_size, asset.front_yaw_deg, asset.rotation],
        "worker": hashlib.sha256(WORKER.read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


# --- one object ---


def render_object(config: RenderConfig, asset: Asset, print_: str, blender: BlenderProcess, on_view: Any) -> None:
    """Renders `asset` into `out/<uid>/`, which appears whole or not at all.  ObjectFailed when it cannot be."""
    views = plan_views(config, asset.uid)
    with atomic_folder(Path(config.out) / asset.uid) as folder:
        job = {
            "uid": asset.uid,
            "path": str(asset.path.absolute()),
            "front_yaw_deg": asset.front_yaw_deg,
            "rotation": asset.rotation,
            "resolution": config.resolution,
            "samples": config.samples,
            "folder": str(folder.absolute()),
            "views": [{key: view[key] for key in ("file", "c2w", "fov_deg")} for view in views],
        }
        blender.render(job, config.object_limit_s, on_view)
        covered = [coverage(folder / view["file"]) for view in views if view["role"] == "ring"]
        if np.mean(covered) < config.min_coverage:
            raise ObjectFailed(
                f"nearly empty: covers {np.mean(covered):.4f} of the picture, min_coverage={config.min_coverage}"
            )
        facts = {key: getattr(asset, key) for key in ("uid", "source", "license", "creator", "caption", "category")}
        write_json(
            folder / "meta.json", facts | {"resolution": config.resolution, "fingerprint": print_, "views": views}
        )


def coverage(path: Path) -> float:
    """Share of the picture the object covers: mean alpha."""
    try:
        with Image.open(path) as image:
            return float(np.asarray(image.getchannel("A"), dtype=np.float64).mean() / 255)
    except (OSError, ValueError) as error:
        raise ObjectFailed(f"Blender left no readable picture {path.name}: {error}") from None


def is_present(out: Path, uid: str, print_: str) -> bool:
    """Whether `out/<uid>` was rendered with exactly these settings."""
    if not (out / uid / "meta.json").exists():
        return False
    try:
        meta = read_json(out / uid / "meta.json", "views")
        return meta["fingerprint"] == print_ and all((out / uid / view["file"]).exists() for view in meta["views"])
    except (UserError, KeyError, TypeError):
        return False


# --- all objects ---


def render_all(config: RenderConfig) -> None:
    """Renders what is not there yet; failures cost their object only and are written to the ledger."""
    out = Path(config.out)
    blender = find_blender(config.blender)
    assets = select_assets(list_assets(config.source, out / ".assets", config.names), config.select)
    assets = assets[: config.limit] if config.limit else assets
    require_writable(out, needed_mb=64)
    version = check_blender(blender)
    assets = fetch_assets(assets)
    with only_renderer(out):
        prints = {asset.uid: fingerprint(config, asset) for asset in assets}
        missing = [asset for asset in assets if not is_present(out, asset.uid, prints[asset.uid])]
        processes = min(config.processes or len(os.sched_getaffinity(0)), max(len(missing), 1))
        say(f"{len(assets)} objects, {len(assets) - len(missing)} already there; {version}, {processes} processes")
        done = (len(assets) - len(missing)) * config.view_count
        with Progress("render", len(assets) * config.view_count, unit="views", start=done) as progress:
            failed = run_workers(config, missing, prints, blender, processes, progress) if missing else {}
    say(
        f"{len(assets) - len(failed)} of {len(assets)} objects are in {out}"
        + (f"; {len(failed)} failed, see {out / LEDGER}" if failed else "")
    )
    if len(failed) == len(assets):
        uid, reason = next(iter(failed.items()))
        raise UserError(f"no object could be rendered; {uid}: {reason}")


def run_workers(
    config: RenderConfig, assets: list[Asset], prints: dict[str, str], blender: Path, processes: int, progress: Progress
) -> dict[str, str]:
    """Feeds `assets` to the Blender processes, one thread for each.  Returns {uid: reason} of those that failed."""
    waiting: queue.SimpleQueue[Asset] = queue.SimpleQueue()
    for asset in assets:
        waiting.put(asset)
    lock, stop = threading.Lock(), threading.Event()
    failed: dict[str, str] = {}
    workers = [BlenderProcess(blender) for _ in range(processes)]

    def one_view() -> None:
        if stop.is_set():
            raise ObjectFailed("interrupted")
        with lock:
            progress.update(1, failed=str(len(failed)))

    def one_object(worker: BlenderProcess, asset: Asset) -> None:
        began, reason = time.monotonic(), ""
        try:
            render_object(config, asset, prints[asset.uid], worker, one_view)
        except ObjectFailed as error:
            if stop.is_set():
                return
            reason = str(error)
        with lock:
            if reason:
                failed[asset.uid] = reason
                say(f"{asset.uid} failed: {reason}")
            write_ledger(Path(config.out), asset.uid, reason, prints[asset.uid], time.monotonic() - began)

    def work(worker: BlenderProcess) -> None:
        try:
            while not stop.is_set() and not waiting.empty():
                with contextlib.suppress(queue.Empty):
                    one_object(worker, waiting.get_nowait())
        except BaseException:  # the disk is full, or a defect of ours: the others stop too
            stop.set()
            raise

    with ThreadPoolExecutor(processes) as threads:  # leaving it waits until what they were writing is removed
        try:
            for future in [threads.submit(work, worker) for worker in workers]:
                future.result()
        except KeyboardInterrupt:
            say("interrupted; the same command goes on from here")
            raise SystemExit(130) from None
        finally:
            stop.set()
            for worker in workers:
                worker.close()
    return failed


def write_ledger(out: Path, uid: str, reason: str, print_: str, seconds: float) -> None:
    status = "failed" if reason else "rendered"
    line = {"uid": uid, "status": status, "reason": reason, "fingerprint": print_, "seconds": round(seconds, 2)}
    with open(out / LEDGER, "a") as ledger:
        ledger.write(json.dumps(line) + "\n")


@contextlib.contextmanager
def only_renderer(out: Path) -> Iterator[None]:
    """Keeps a second renderer out of the folder and removes what an earlier one, killed, left half done."""
    with locked(out):
        for pattern in (".*.tmp", ".*.old"):
            for left in out.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)
        yield


def say(message: str) -> None:
    print(f"render: {message}", file=sys.stderr, flush=True)
