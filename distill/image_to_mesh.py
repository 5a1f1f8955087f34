"""A checkpoint and images in, everything in each one's `out` out; several images share the diffusion model's batch."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.files import UserError, atomic_file, read_json, require_writable, write_json
from data.processes import REQUEUE, locked
from distill.config import GenerateConfig
from distill.distillation import LEAVE, Scene, camera_ranges, distil_together
from distill.glb import save_glb, save_obj
from distill.isotropy import isotropy
from distill.mesh import extract_mesh
from distill.page import write_page
from distill.preview import Preview
from distill.snapshot import FILE, identity, load_snapshot, new_run
from distill.texture import textured
from distill.turntable import save_turntable
from models.checkpoint import MultiViewModel, load_export, read_info
from models.device import choose_device
from models.image_encoder import embed_image
from models.reference_image import load_reference_image
from monitor.facts import name_of_weights, require_key
from monitor.monitor import Monitor


@dataclass
class Job:
    """One image, checked, on its way to a mesh."""

    config: GenerateConfig
    image: Tensor  # (3, H, W) in [0, 1]
    mark: str  # of all that the field depends on
    began: float  # time.monotonic()

    @property
    def out(self) -> Path:
        return Path(self.config.out)

    @property
    def made_of(self) -> str:
        """A hash of all that the mesh and the pictures of it depend on."""
        return hashlib.sha256(f"{self.mark} {self.config.mesh} {self.config.turntable}".encode()).hexdigest()


def images_to_meshes(configs: Sequence[GenerateConfig]) -> dict[str, str]:
    """Writes config.yaml, snapshot/, mesh.glb, turntable.mp4, views.png, report.html, losses.json and result.json into
    each `out`.  The configurations differ in `image` and `out` alone.

    Returns why some have no mesh: {out: words}.  UserError before anything is paid for when the checkpoint or the
    device will not do, or when there is one image and it will not.
    """
    shared = configs[0]
    device, dtype = choose_device(shared.device, shared.dtype)
    read_info(shared.checkpoint)
    require_key(shared.wandb)
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as locks:
        jobs = []
        for config in configs:
            with given_up(config, failed, len(configs)):
                image = load_reference_image(config.image, config.reference)
                require_writable(config.out, needed_mb=64)
                locks.enter_context(locked(Path(config.out)))
                mark = identity(config, Path(config.checkpoint), Path(config.image))
                job = Job(config, image, mark, time.monotonic())
                if (job.out / "mesh.glb").is_file() and result_of(job.out) == job.made_of:
                    print(f"{job.out / 'mesh.glb'} is finished; nothing to do")
                else:
                    jobs.append(job)
        if jobs:
            failed |= distil_and_mesh(jobs, device, dtype)
    return failed


@contextlib.contextmanager
def given_up(config: GenerateConfig, failed: dict[str, str], count: int) -> Any:
    """A UserError of the block costs this image alone, unless it is the only one."""
    try:
        yield
    except UserError as error:
        if count == 1:
            raise
        failed[config.out] = str(error)
        print(f"error: {config.image}: {error}", flush=True)


def distil_and_mesh(jobs: list[Job], device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Goes on from the snapshots in each `out` where there are any."""
    shared, failed = jobs[0].config, dict[str, str]()
    preview = None
    if shared.preview is not None:
        camera = camera_ranges(shared, read_info(shared.checkpoint)).middle
        preview = Preview(shared.preview, [job.out.name for job in jobs], camera)
    model = load_export(shared.checkpoint, device, dtype, decoder=False)
    compiled = ("inductor" if device.type == "cuda" else None) if shared.compile == "auto" else shared.compile
    if compiled is not None:
        model.unet.compile(backend=compiled)
        model.vae.encoder.compile(backend=compiled)
    scenes: list[Scene] = []
    started: list[Job] = []
    for job in jobs:
        with given_up(job.config, failed, len(jobs)):
            scenes.append(begin(job, model, device))
            started.append(job)
    ready, first = time.monotonic(), [scene.run.step for scene in scenes]

    stopped_by = distil_together(scenes, model, shared, preview)
    distilled = time.monotonic()
    for scene in scenes:
        write_json(scene.out / "losses.json", scene.run.losses)
    if stopped_by in LEAVE:  # the snapshots go on elsewhere
        for scene in scenes:
            if scene.monitor is not None:
                scene.monitor.close()
        raise SystemExit(REQUEUE)

    for job, scene, step in zip(started, scenes, first, strict=True):
        seconds = {"load": ready - job.began, "distil": distilled - ready}
        seconds["per_step"] = seconds["distil"] / max(scene.run.step - step, 1)
        with given_up(job.config, failed, len(jobs)):
            if scene.failed:
                raise UserError(scene.failed)
            finish(job, scene, model, seconds, continued=step > 0)
    return failed


def begin(job: Job, model: MultiViewModel, device: torch.device) -> Scene:
    """The scene where its snapshot left it.  The picture becomes its embedding, and is not needed again."""
    run = new_run(job.config, device)
    load_snapshot(job.out / FILE, run, job.mark)
    with atomic_file(job.out / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(job.config)))
    with torch.no_grad():
        context = embed_image(model.image_encoder, job.image[None]).to(device)
    return Scene(run, context, job.out, job.mark, watch(job.config, run.step))


def finish(job: Job, scene: Scene, model: MultiViewModel, seconds: dict[str, float], continued: bool) -> None:
    """Mesh, turntable, and what is said of them."""
    config, run, out, began = job.config, scene.run, job.out, time.monotonic()
    mesh, facts = extract_mesh(run.field, run.occupancy, config.mesh)
    mesh, about_texture = textured(run.field, run.occupancy, mesh, facts["iso_density"], config.mesh)
    facts |= about_texture
    if config.mesh.obj:
        save_obj(out / "mesh.obj", mesh, out.name)
    save_glb(out / "mesh.glb", mesh, out.name)
    meshed = time.monotonic()
    ranges = camera_ranges(config, model.info)
    save_turntable(out, run.field, run.occupancy, ranges.middle, config.turntable)
    by_azimuth = isotropy(run, model, scene.context, ranges, config.turntable.size)
    device = run.occupancy.live.device
    seconds |= {"mesh": meshed - began, "turntable": time.monotonic() - meshed}
    about = {
        "made_of": job.made_of if run.step == config.steps else None,
        "steps": run.step,
        "of": config.steps,
        "continued": continued,
        "device": str(device),
        "dtype": str(next(model.unet.parameters()).dtype),
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "mesh": facts,
        "isotropy": by_azimuth,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    write_json(out / "result.json", about)
    write_page(out / "report.html", [out])
    print(f"{out / 'mesh.glb'}: {facts['vertices']} vertices, {facts['faces']} faces; {run.step} steps")
    if scene.monitor is not None:
        scene.monitor.media(run.step, out / "turntable.mp4", out / "mesh.glb")
        scene.monitor.artifact(f"{config.name}-{out.name}", "mesh", str(out / "mesh.glb"), made=True, about=facts)
        scene.monitor.alert("finished", f"{out / 'mesh.glb'}")
        scene.monitor.close()


def result_of(out: Path) -> str | None:
    """What the finished result in `out` was made of; None where there is none."""
    path = out / "result.json"
    found = read_json(path, "result") if path.is_file() else None
    return found.get("made_of") if isinstance(found, dict) else None


def watch(config: GenerateConfig, step: int) -> Monitor | None:
    """The W&B run of one mesh, which goes on from `step`."""
    if config.wandb.mode == "disabled":
        return None
    out, start = Path(config.out), config.checkpoint
    title = f"{config.name}-distill-{out.name}"
    monitor = Monitor(out, config.wandb, config.name, "distill", asdict(config), step, title)
    monitor.artifact(name_of_weights(start), "checkpoint", start, made=False, about={})
    return monitor
