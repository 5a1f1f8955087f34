"""Objects to posed views: plans the cameras of each object, feeds Blender processes, keeps the books.

A views folder holds `<uid>/meta.json`, `<uid>/000.png` ... (RGBA, straight alpha, sRGB), where wanted
`000_normal.png` and `000_depth.png` (encoded as data/blender_worker.py says), and `contact.webp`, a strip of
thumbnails; beside them the ledger (data/render_ledger.py) and `contact_sheet.html`.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conf.cli import check
from data.assets import Asset, list_assets
from data.blender_pool import WORKER, BlenderProcess, ObjectFailed, ObjectRejected, check_blender, find_blender
from data.cameras import framing_distance, orbit_camera
from data.contact_sheet import draw_strip, write_contact_sheet
from data.files import UserError, atomic_folder, read_json, require_writable, write_json
from data.objaverse_assets import SOURCE as OBJAVERSE
from data.objaverse_assets import Downloads, Fetched, is_refusal
from data.processes import locked
from data.progress import Progress
from data.render_ledger import Verdict, ledger_path, printable, read_verdicts, verdict_table, write_verdict
from data.render_parts import in_part, only_renderer, which_part
from data.selection import SelectConfig, select_assets

RADIUS = 0.5  # object units: every object is scaled to a bounding sphere of this radius around the origin
BORDER_ALPHA = 64  # of 255: less at the border is the soft edge of an object that just fits
FIXED_LIGHT = {
    "sky": 0.55,  # with the suns below, a white diffuse face that looks up reaches about 1.0
    "suns": [
        {"towards": [0.6, 0.5, 1.0], "strength": 1.6, "angle_deg": 40},
        {"towards": [-0.8, -0.6, 0.5], "strength": 0.6, "angle_deg": 40},
    ],
}
CAMERA_SETTINGS = (
    "rings", "views_per_ring", "references", "reference_azimuth_deg", "eval_views", "eval_elevation_deg",
    "eval_reference_azimuth_deg", "elevation_deg", "fov_deg", "framing", "normals", "depth",
)  # fmt: skip
QUALITY_SETTINGS = ("resolution", "samples", "denoise", "max_bounces", "diffuse_bounces", "glossy_bounces")
LIMIT_SETTINGS = ("min_coverage", "reject_border", "object_limit_s", "object_limit_gb")


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
    denoise: bool = True  # Intel's Open Image Denoise, in its fast mode
    max_bounces: int = 6  # of a light path
    diffuse_bounces: int = 2
    glossy_bounces: int = 2
    normals: bool = False  # also NNN_normal.png, in the view's camera space
    depth: bool = False  # also NNN_depth.png, along the view's -z
    light: str = "fixed"  # the same for all objects; or sampled: drawn for each, from the next three ranges
    sky_strength: list[float] = field(default_factory=lambda: [0.35, 0.65])  # of a white sky; fixed: 0.55
    sun_strength: list[float] = field(default_factory=lambda: [0.2, 1.6])  # W/m2, each of two suns; fixed: 1.6, 0.6
    sun_elevation_deg: list[float] = field(default_factory=lambda: [15.0, 80.0])  # all around in azimuth
    seed: int = 0  # cameras and light are drawn from (seed, uid)
    device: str = "auto"  # gpu: Cycles on this machine's GPUs; cpu; auto: gpu where there is one
    processes: int = 0  # Blender processes of one thread each; 0: one per core, or 2 on a GPU
    part: int | None = None  # this process renders part `part` of `parts`, chosen by hash of the uid;
    parts: int | None = None  # null: as the SLURM array says, else all
    keep_downloads: bool = True  # false: what was fetched of Objaverse is deleted once it is rendered
    retry: bool = False  # try again what failed or was rejected with the same settings
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
    reject_border: bool = True  # objects that touch the picture's border in a ring view are rejected
    object_limit_s: float = 600  # an object that takes longer fails
    object_limit_gb: float = 8  # GiB of memory; an object that makes Blender take more fails (needs Linux)

    def __post_init__(self) -> None:
        check(bool(self.source), "source is empty; give source=FOLDER or source=LIBRARY.sh3f")
        check(bool(self.out), "out is empty; give out=FOLDER for the views")
        for name, choices in (("light", ("fixed", "sampled")), ("device", ("auto", "cpu", "gpu"))):
            value = getattr(self, name)
            check(value in choices, f"{name}={value} is none of {', '.join(choices)}; choose one of them")
        for name, low, high in (
            ("resolution", 8, 4096), ("samples", 1, 65536), ("rings", 1, 1000), ("views_per_ring", 4, 1000),
            ("references", 1, 1000), ("eval_views", 0, 1000), ("processes", 0, 4096), ("limit", 0, 10**9),
            ("reference_azimuth_deg", 0, 180), ("eval_reference_azimuth_deg", 0, 180), ("eval_elevation_deg", -89, 89),
            ("min_coverage", 0, 1), ("object_limit_s", 1, 10**6), ("object_limit_gb", 0.5, 10**6), ("seed", 0, 2**63),
            ("max_bounces", 0, 1024), ("diffuse_bounces", 0, 1024), ("glossy_bounces", 0, 1024),
        ):  # fmt: skip
            value = getattr(self, name)
            check(low <= value <= high, f"{name}={value} is outside {low}..{high}; choose a value inside")
        for name in ("part", "parts"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"{name}={value} is negative; count from 0, or leave it out")
        check(self.views_per_ring % 4 == 0, f"views_per_ring={self.views_per_ring} is no multiple of 4; try 12 or 16")
        check(
            self.view_count <= 1000, f"{self.view_count} views an object are more than 1000; lower rings or references"
        )
        for name, lowest, highest in (
            ("elevation_deg", -89.0, 89.0),
            ("fov_deg", 1.0, 120.0),
            ("framing", 0.01, 100.0),
            ("sky_strength", 0.0, 100.0),
            ("sun_strength", 0.0, 1000.0),
            ("sun_elevation_deg", -90.0, 90.0),
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


def keyed_random(key: str) -> np.random.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def plan_views(config: RenderConfig, uid: str) -> list[dict[str, Any]]:
    """The views of one object, in file order, each as in meta.json.  Drawn from a generator keyed by (seed, uid)."""
    random = keyed_random(f"{config.seed}/{uid}")
    views: list[dict[str, Any]] = []

    def draw(span: list[float]) -> float:
        return float(random.uniform(span[0], span[1]))

    def draw_lens() -> tuple[float, float, float]:
        return draw(config.elevation_deg), draw(config.fov_deg), draw(config.framing)

    def add(role: str, ring: int | None, index: int, azimuth: float, lens: tuple[float, float, float]) -> None:
        elevation, fov, framing = lens
        distance = float(framing_distance(framing, fov))
        c2w = orbit_camera(*(torch.tensor(x) for x in (azimuth, elevation, distance)))
        name = f"{len(views):03d}"
        views.append(
            {"file": f"{name}.png", "role": role, "ring": ring, "index": index, "azimuth_deg": azimuth,
             "elevation_deg": elevation, "fov_deg": fov, "distance": distance, "c2w": c2w.tolist()}
            | ({"normal": f"{name}_normal.png"} if config.normals else {})
            | ({"depth": f"{name}_depth.png"} if config.depth else {})
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


def plan_light(config: RenderConfig, uid: str) -> dict[str, Any]:
    """{"sky": strength, "suns": [{"towards": world direction, "strength": W/m2, "angle_deg": its disk}]} of one object.

    Drawn apart from the cameras, which stay the same whichever light is chosen.
    """
    if config.light == "fixed":
        return FIXED_LIGHT
    random = keyed_random(f"{config.seed}/{uid}/light")

    def draw(span: list[float]) -> float:
        return float(random.uniform(span[0], span[1]))

    suns = []
    for _ in range(2):
        azimuth, elevation = math.radians(draw([0, 360])), math.radians(draw(config.sun_elevation_deg))
        towards = [
            math.cos(elevation) * math.cos(azimuth),
            math.cos(elevation) * math.sin(azimuth),
            math.sin(elevation),
        ]
        suns.append({"towards": towards, "strength": draw(config.sun_strength), "angle_deg": 40})
    return {"sky": draw(config.sky_strength), "suns": suns}


def plan_depth_scale(views: list[dict[str, Any]]) -> float:
    """Object units a step of a 16-bit depth picture, such that it reaches behind the object in all views."""
    return (max(view["distance"] for view in views) + RADIUS) / 65535


def fingerprint(config: RenderConfig, asset: Asset) -> str:
    """Changes whenever the pictures would: cameras, light, quality, the object's file, the code that makes them.

    Not with the device: a GPU's pictures differ from a CPU's by less than their noise.
    """
    facts = {
        "settings": {name: getattr(config, name) for name in CAMERA_SETTINGS + QUALITY_SETTINGS},
        "seed": str(config.seed),
        "light": plan_light(config, asset.uid),
        "asset": [asset.uid, asset.path.name, file_size(asset), asset.front_yaw_deg, asset.rotation],
        "code": code_mark(),
    }
    facts = json.loads(json.dumps(facts), parse_int=float)  # 90 and 90.0 are the same setting
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def file_size(asset: Asset) -> int:
    """Bytes; 0 for objects of Objaverse, which never change and may have been deleted after they were rendered."""
    return 0 if asset.source == OBJAVERSE else asset.path.stat().st_size


@cache
def code_mark() -> str:
    """Of what plans the cameras and of the worker.  The plan itself, 30 ms an object, is not made to compare it."""
    planners = (keyed_random, plan_views, orbit_camera, framing_distance)
    source = "".join(inspect.getsource(each) for each in planners).encode()
    return hashlib.sha256(source + WORKER.read_bytes()).hexdigest()


# --- one object ---


def face_limits(config: RenderConfig) -> list[int | None]:
    """[lowest, highest] number of faces, null for no bound; an object outside is rejected once Blender has read it.

    For those whose file did not say its number (see data.faces).
    """
    return list(config.select.faces)


def render_object(
    config: RenderConfig,
    asset: Asset,
    print_: str,
    device: str,
    blender: BlenderProcess,
    on_view: Callable[[], None],
    faces: list[int | None],
) -> None:
    """Renders `asset` into `out/<uid>/`, which appears whole or not at all.

    faces: see `face_limits`.  ObjectFailed when it cannot be, ObjectRejected when it is not wanted.
    """
    views, light = plan_views(config, asset.uid), plan_light(config, asset.uid)
    quality = {name: getattr(config, name) for name in QUALITY_SETTINGS}
    wanted = ("file", "c2w", "fov_deg", "normal", "depth")
    with atomic_folder(Path(config.out) / asset.uid) as folder:
        job = quality | {
            "uid": asset.uid,
            "path": str(asset.path.absolute()),
            "front_yaw_deg": asset.front_yaw_deg,
            "rotation": asset.rotation,
            "faces": faces,
            "device": device,
            "light": light,
            "depth_scale": plan_depth_scale(views),
            "folder": str(folder.absolute()),
            "views": [{key: view[key] for key in wanted if key in view} for view in views],
        }
        result = blender.render(job, config.object_limit_s, config.object_limit_gb, on_view)
        check_pictures(config, folder, [view for view in views if view["role"] == "ring"])
        facts = {key: getattr(asset, key) for key in ("uid", "source", "license", "creator", "caption", "category")}
        facts |= {"resolution": config.resolution, "faces": result["faces"], "light": light, "device": device}
        if config.depth:
            facts["depth_scale"] = job["depth_scale"]
        write_json(folder / "meta.json", facts | {"fingerprint": print_, "views": views})
        draw_strip(folder, views)


def check_pictures(config: RenderConfig, folder: Path, views: list[dict[str, Any]]) -> None:
    """ObjectRejected when these views are nearly empty, or one of them cuts the object off."""
    alphas = {view["file"]: read_alpha(folder / view["file"]) for view in views}
    covered = float(np.mean([alpha.mean() / 255 for alpha in alphas.values()]))
    if covered < config.min_coverage:
        raise ObjectRejected(f"nearly empty: covers {covered:.4f} of the picture, min_coverage={config.min_coverage}")
    for name, alpha in alphas.items() if config.reject_border else ():
        border = max(alpha[[0, -1]].max(), alpha[:, [0, -1]].max())
        if border > BORDER_ALPHA:
            raise ObjectRejected(f"touches the border of {name} (alpha {border} of 255), reject_border=true")


def read_alpha(path: Path) -> np.ndarray:
    """(H, W) uint8."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.getchannel("A"))
    except (OSError, ValueError) as error:
        raise ObjectFailed(f"Blender left no readable picture {path.name}: {error}") from None


def is_present(out: Path, uid: str, print_: str) -> bool:
    """Whether `out/<uid>` was rendered with exactly these settings."""
    if not (out / uid / "meta.json").exists():
        return False
    try:
        meta = read_json(out / uid / "meta.json", "views")
        files = [view[key] for view in meta["views"] for key in ("file", "normal", "depth") if key in view]
        return meta["fingerprint"] == print_ and all((out / uid / name).exists() for name in files)
    except (UserError, KeyError, TypeError):
        return False


# --- all objects ---


def render_all(config: RenderConfig) -> None:
    """Renders what is not there yet; an object that fails or is rejected costs itself alone and is in the ledger.

    UserError when not one object of this part is there in the end.
    """
    out = Path(config.out)
    part, parts = which_part(config.part, config.parts, os.environ)
    blender = find_blender(config.blender)
    assets = [asset for asset in list_objects(config, parts) if in_part(asset.uid, part, parts)]
    require_writable(out, needed_mb=64)
    version, device = check_blender(blender, config.device)
    say(f"{version} on {device}" + (f", part {part} of {parts}" if parts > 1 else ""))
    with only_renderer(out, part, parts):
        prints = {asset.uid: fingerprint(config, asset) for asset in assets}
        missing = [asset for asset in assets if not is_present(out, asset.uid, prints[asset.uid])]
        left_out = {} if config.retry else verdicts_that_hold(config, missing, prints)
        waiting = [asset for asset in missing if asset.uid not in left_out]
        say(f"{len(assets)} objects, {len(assets) - len(missing)} already there, {len(waiting)} to render")
        if left_out:
            say(f"{count_statuses(left_out)} before with the same settings: not tried again; retry=true tries them")
        done = (len(assets) - len(waiting)) * config.view_count
        with Progress("render", len(assets) * config.view_count, unit="views", start=done) as progress:
            ledger = ledger_path(out, part, parts)
            left_out |= run_workers(config, waiting, prints, blender, device, ledger, progress) if waiting else {}
        sheet = write_contact_sheet(out, {a.uid for a in assets} - set(left_out), read_verdicts(out))
    conclude(config, len(assets), left_out, sheet)


def list_objects(config: RenderConfig, parts: int) -> list[Asset]:
    out = Path(config.out)
    is_library = parts > 1 and Path(config.source).is_file()  # unpacked once, and not by two tasks at the same time
    with locked(out / ".assets", wait_s=3600) if is_library else contextlib.nullcontext():
        assets = select_assets(list_assets(config.source, out / ".assets", config.names), config.select)
    return assets[: config.limit] if config.limit else assets


def limits_of(config: RenderConfig) -> dict[str, Any]:
    """The settings besides the fingerprint's that decide whether an object fails or is rejected."""
    return {name: getattr(config, name) for name in LIMIT_SETTINGS} | {"faces": face_limits(config)}


def verdicts_that_hold(config: RenderConfig, assets: list[Asset], prints: dict[str, str]) -> dict[str, Verdict]:
    """{uid: verdict} of those that failed or were rejected with exactly these settings."""
    held, limits = {}, limits_of(config)
    verdicts = read_verdicts(Path(config.out))
    for uid in (asset.uid for asset in assets):
        verdict = verdicts.get(uid)
        if verdict and verdict.status != "rendered" and (verdict.fingerprint, verdict.limits) == (prints[uid], limits):
            held[uid] = verdict
    return held


def count_statuses(verdicts: dict[str, Verdict]) -> str:
    counts = {status: sum(v.status == status for v in verdicts.values()) for status in ("failed", "rejected")}
    return " and ".join(f"{count} {status}" for status, count in counts.items() if count)


def conclude(config: RenderConfig, count: int, left_out: dict[str, Verdict], sheet: Path) -> None:
    for line in verdict_table(left_out.values()):
        say(line)
    say(
        f"{count - len(left_out)} of {count} objects are in {config.out}"
        + (f"; {count_statuses(left_out)}" if left_out else "")
        + f"; see {sheet}"
    )
    if left_out and len(left_out) == count:
        first = next(iter(left_out.values()))
        raise UserError(f"no object could be rendered; {first.uid}: {printable(first.reason)}")


def run_workers(
    config: RenderConfig,
    assets: list[Asset],
    prints: dict[str, str],
    blender: Path,
    device: str,
    ledger: Path,
    progress: Progress,
) -> dict[str, Verdict]:
    """Feeds `assets` to the Blender processes, one thread for each.  Returns {uid: verdict} of those not rendered."""
    lock, stop = threading.Lock(), threading.Event()
    left_out: dict[str, Verdict] = {}
    at_once = config.processes or (len(os.sched_getaffinity(0)) if device == "CPU" else 2)
    workers = [BlenderProcess(blender) for _ in range(min(at_once, len(assets)))]
    limits = limits_of(config)

    def one_view() -> None:
        if stop.is_set():
            raise ObjectFailed("interrupted")
        with lock:
            progress.update(1, left_out=str(len(left_out)))

    def one_object(worker: BlenderProcess, item: Fetched) -> None:
        asset, began, status, reason = item.asset, time.monotonic(), "rendered", ""
        try:
            if item.error is not None:
                raise ObjectFailed(f"cannot be fetched: {item.error}")
            render_object(config, asset, prints[asset.uid], device, worker, one_view, limits["faces"])
        except (ObjectFailed, ObjectRejected) as error:
            if stop.is_set():
                return
            status, reason = "failed" if isinstance(error, ObjectFailed) else "rejected", printable(str(error))
        seconds = round(time.monotonic() - began, 2)
        verdict = Verdict(asset.uid, status, reason, prints[asset.uid], limits, seconds, round(time.time(), 3))
        with lock:
            if item.error is None or is_refusal(item.error):  # what the network did not give is tried again next time
                write_verdict(ledger, verdict)
            if reason:
                remove_pictures(Path(config.out) / asset.uid)
                left_out[asset.uid] = verdict
                say(f"{asset.uid} {status}: {reason}")

    def work(worker: BlenderProcess) -> None:
        try:
            while not stop.is_set() and (item := next(downloads, None)) is not None:
                one_object(worker, item)
                if item.is_new and not config.keep_downloads:
                    item.asset.path.unlink(missing_ok=True)
        except BaseException:  # the disk is full, or a defect of ours: the others stop too
            stop.set()
            raise

    with (
        Downloads(assets) as downloads,
        ThreadPoolExecutor(len(workers)) as threads,
    ):  # leaving it waits until what they were writing is removed
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
    return left_out


def remove_pictures(folder: Path) -> None:
    """Of an object that other settings had rendered and these do not: a views folder is not to mix settings."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.stale.old")  # `only_renderer` removes it, should we be killed here
        folder.rename(old)
        shutil.rmtree(old)


def say(message: str) -> None:
    print(f"render: {message}", file=sys.stderr, flush=True)
