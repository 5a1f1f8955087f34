"""A checkpoint and images in, everything in each one's `out` out; several images share the diffusion model's batch."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data.files import UserError, atomic_file, require_writable, write_json
from data.processes import REQUEUE, locked
from distill.config import GenerateConfig
from distill.distillation import Scene, camera_ranges, distil_together
from distill.glb import save_glb, save_obj
from distill.isotropy import isotropy
from distill.mesh import extract_mesh
from distill.page import write_page
from distill.preview import Preview
from distill.snapshot import FILE, is_made, load_snapshot, made_of, mark_of, new_run, snapshot_mb
from distill.stopping import LEAVE, StopSignals
from distill.texture import textured
from distill.turntable import save_turntable
from models.checkpoint import MultiViewModel, load_export, read_info
from models.device import choose_device, no_compiler
from models.given_embedding import load_embedding
from models.image_encoder import embed_image
from models.multiview import embedding_width
from models.reference_image import load_reference_image
from monitor.facts import name_of_weights, require_key
from monitor.monitor import Monitor

REMAINS = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\.\w+)?")  # of data.files.atomic_file


@dataclass
class Job:
    """One image or embedding, checked, on its way to a mesh."""

    config: GenerateConfig
    image: Tensor | None  # (3, H, W) in [0, 1], until it is embedded
    given: tuple[Tensor, Tensor] | None  # context and unconditional context (1, T, D), where an embedding is given
    mark: str  # of all that the field depends on
    began: float  # time.monotonic()

    @property
    def out(self) -> Path:
        return Path(self.config.out)


def images_to_meshes(configs: Sequence[GenerateConfig]) -> dict[str, str]:
    """Writes config.yaml, snapshot/, mesh.glb, turntable.mp4, views.png, report.html, losses.json and result.json into
    each `out`.  The configurations differ in `image` and `out` alone.

    Returns why some have no mesh: {out: words}.  UserError before anything is paid for when the checkpoint or the
    device will not do, or when there is one image and it will not.
    """
    shared = configs[0]
    device, dtype = choose_device(shared.device, shared.dtype)
    shared = what_can_be_built(shared, device)
    read_info(shared.checkpoint)
    require_key(shared.wandb)
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignals())
        jobs = []
        for config in (replace(one, backend=shared.backend, compile=shared.compile) for one in configs):
            with given_up(config, failed, len(configs)):
                image = None if config.image is None else load_reference_image(config.image, config.reference)
                given = None if config.embedding is None else load_embedding(config.embedding)
                require_writable(config.out, needed_mb=64 + 2 * snapshot_mb(config))  # twice while one replaces another
                stack.enter_context(locked(Path(config.out)))
                remove_remains(Path(config.out))
                job = Job(config, image, given, mark_of(config), time.monotonic())
                if is_made(config, job.mark):
                    print(f"{job.out / 'mesh.glb'} is finished; nothing to do")
                else:
                    jobs.append(job)
        if jobs:
            failed |= distil_and_mesh(jobs, device, dtype, stop)
    return failed


def what_can_be_built(config: GenerateConfig, device: torch.device) -> GenerateConfig:
    """Without a C compiler there is no Triton, and `auto` means plain torch.  UserError where Triton is asked for."""
    reason = no_compiler() if device.type == "cuda" else None
    if reason is None:
        return config
    asked = {"backend": config.backend == "triton", "compile": config.compile not in ("auto", None)}
    remedy = f"{reason}; install them (Debian: apt install gcc python3-dev)"
    if any(asked.values()):
        key = "backend" if asked["backend"] else "compile"
        raise UserError(f"{key}={getattr(config, key)}: {remedy}, or leave out {key}=")
    if "auto" in (config.backend, config.compile):
        print(f"warning: Triton cannot be used, and all is slower: {remedy}", file=sys.stderr, flush=True)
    return replace(config, backend="torch", compile=None)


def remove_remains(out: Path) -> None:
    """Files that killed writers left half done.  `out` is locked: nobody writes them now."""
    for path in (*out.glob(".*.tmp*"), *(out / FILE).parent.glob(".*.tmp*")):
        if REMAINS.fullmatch(path.name) and path.is_file():
            path.unlink()


@contextlib.contextmanager
def given_up(config: GenerateConfig, failed: dict[str, str], count: int, scene: Scene | None = None) -> Iterator[None]:
    """An error of the block costs this image alone, unless it is the only one."""
    try:
        yield
    except Exception as error:
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if scene is not None:
            scene.run.failed = words
        if count == 1:
            raise
        if not isinstance(error, UserError):  # one of ours, or of a library: whoever mends it needs to see where
            traceback.print_exc()
        failed[config.out] = words
        print(f"error: {config.image}: {words}", flush=True)


@contextlib.contextmanager
def enough_memory(what: str, keys: str) -> Iterator[None]:
    """UserError naming what may be lowered where the GPU's memory does not suffice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{what}: the GPU's memory does not suffice ({reason}); {keys}") from None


def load_model(config: GenerateConfig, device: torch.device, dtype: torch.dtype) -> MultiViewModel:
    with enough_memory("loading the model", "close what else uses it, or give another device="):
        model = load_export(config.checkpoint, device, dtype, decoder=False, image_encoder=config.embedding is None)
    compiled = ("inductor" if device.type == "cuda" else None) if config.compile == "auto" else config.compile
    if compiled is not None:
        model.unet.compile(backend=compiled)
        model.vae.encoder.compile(backend=compiled)
    return model


def distil_and_mesh(jobs: list[Job], device: torch.device, dtype: torch.dtype, stop: StopSignals) -> dict[str, str]:
    """Goes on from the snapshots in each `out` where there are any."""
    shared, failed = jobs[0].config, dict[str, str]()
    with contextlib.ExitStack() as stack:
        preview = None
        if shared.preview is not None:
            camera = camera_ranges(shared, read_info(shared.checkpoint)).middle
            preview = Preview(shared.preview, [job.out.name for job in jobs], camera)
            stack.callback(preview.close)
        model = load_model(shared, device, dtype)
        scenes: list[Scene] = []
        started: list[Job] = []
        for job in jobs:
            with given_up(job.config, failed, len(jobs)):
                scenes.append(begin(job, model, device))
                started.append(job)
                stack.enter_context(told(scenes[-1]))
        if not scenes:
            return failed
        model.image_encoder = None  # not needed again, and 2.5 GB at full size
        ready, first = time.monotonic(), [scene.run.step for scene in scenes]

        stopped_by = distil_together(scenes, model, shared, preview, stop)
        distilled = time.monotonic()
        if stopped_by in LEAVE:  # the snapshots go on elsewhere
            raise SystemExit(REQUEUE)

        for job, scene, step in zip(started, scenes, first, strict=True):
            seconds = {"load": ready - job.began, "distil": distilled - ready}
            seconds["per_step"] = seconds["distil"] / max(scene.run.step - step, 1)
            with given_up(job.config, failed, len(jobs), scene):
                write_json(scene.out / "losses.json", scene.run.losses)
                conclude(job, scene, model, seconds, continued=step > 0)
    return failed


@contextlib.contextmanager
def told(scene: Scene) -> Iterator[None]:
    """Says to whoever watches in W&B how a scene ended, and closes its run."""
    if scene.monitor is None:
        yield
        return
    try:
        yield
    except SystemExit:
        scene.monitor.alert("asked to end", f"step {scene.run.step}; its snapshot goes on when it starts again", "WARN")
        raise
    finally:
        if scene.failed:
            scene.monitor.alert("stopped", scene.failed, "ERROR")
        scene.monitor.close(status=int(bool(scene.failed)))


def begin(job: Job, model: MultiViewModel, device: torch.device) -> Scene:
    """The scene where its snapshot left it.  The picture becomes its embedding, and is not needed again."""
    run = new_run(job.config, device)
    load_snapshot(job.out / FILE, run, job.mark)
    context, unconditional = (one.to(device) for one in condition(job, model))
    job.image = None
    with atomic_file(job.out / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(job.config)))
    monitor = watch(job.config, run.step)
    return Scene(run, context, job.out, job.mark, monitor, unconditional)


@torch.no_grad()
def condition(job: Job, model: MultiViewModel) -> tuple[Tensor, Tensor]:
    """Context and unconditional context (1, T, D).  UserError when a given one does not fit the model."""
    if job.given is None:
        assert job.image is not None
        context = embed_image(model.image_encoder, job.image[None])
        return context, torch.zeros_like(context)
    width, wanted = job.given[0].shape[-1], embedding_width(model.unet)
    if width != wanted:
        raise UserError(
            f"embedding {job.config.embedding} has {width} numbers a token and {job.config.checkpoint} takes {wanted}; "
            "give one of the encoder that it was trained with"
        )
    return job.given


def conclude(job: Job, scene: Scene, model: MultiViewModel, seconds: dict[str, float], continued: bool) -> None:
    """`finish`, also of what was given up, whose sound steps may be worth a look.  UserError where it was."""
    keys = "lower mesh.resolution, mesh.texture_size or turntable.size, and give the same command again"
    if scene.run.step == 0:
        raise UserError(scene.failed or "stopped before its first step; give the same command again")
    if not scene.failed:
        with enough_memory("the mesh", keys):
            finish(job, scene, model, seconds, continued)
        return
    try:
        with enough_memory("the mesh", keys):
            finish(job, scene, model, seconds, continued)
    except UserError as error:
        raise UserError(f"{scene.failed}; what its sound steps made has no mesh ({error})") from None
    except Exception:  # the reason for giving it up is the first thing to know
        traceback.print_exc()
        raise UserError(f"{scene.failed}; what its sound steps made has no mesh, as the traceback above says") from None
    raise UserError(f"{scene.failed}; {scene.out / 'mesh.glb'} shows what its sound steps made")


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
        "made_of": made_of(config, job.mark) if run.step == config.steps else None,
        "steps": run.step,
        "of": config.steps,
        "continued": continued,
        "device": str(device),
        "dtype": str(next(model.unet.parameters()).dtype),
        "peak_memory_gib": round(peak_memory(device) / 2**30, 3),
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
        if not scene.failed:
            scene.monitor.alert("finished", f"{out / 'mesh.glb'}")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def watch(config: GenerateConfig, step: int) -> Monitor | None:
    """The W&B run of one mesh, which goes on from `step`."""
    if config.wandb.mode == "disabled":
        return None
    out, start = Path(config.out), config.checkpoint
    title = f"{config.name}-distill-{out.name}"
    monitor = Monitor(out, config.wandb, config.name, "distill", asdict(config), step, title)
    monitor.artifact(name_of_weights(start), "checkpoint", start, made=False, about={})
    return monitor
