"""What `distill/generate.py` does: a checkpoint and an image in, everything in `out` out."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

from data.files import atomic_file, read_json, require_writable, write_json
from data.processes import REQUEUE, locked
from distill.config import GenerateConfig
from distill.distillation import LEAVE, camera_ranges, distil
from distill.mesh import extract_mesh, save_glb
from distill.snapshot import FILE, identity, load_snapshot, new_run
from distill.turntable import save_turntable
from models.checkpoint import load_export, read_info
from models.device import choose_device
from models.image_encoder import embed_image
from models.reference_image import load_reference_image
from monitor.monitor import Monitor


def image_to_mesh(config: GenerateConfig) -> None:
    """Writes config.yaml, snapshot/, mesh.glb, turntable.mp4, views.png, losses.json and result.json into `config.out`.

    UserError before anything is paid for when checkpoint, image, device or folder will not do.
    """
    device, dtype = choose_device(config.device, config.dtype)
    read_info(config.checkpoint)
    image = load_reference_image(config.image, config.reference)
    require_writable(config.out, needed_mb=64)
    with locked(Path(config.out)):
        run_to_the_mesh(config, image, device, dtype)


def run_to_the_mesh(config: GenerateConfig, image: torch.Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """image (3, H, W) in [0, 1]; goes on from the snapshot in `config.out` if there is one."""
    began, out, checkpoint = time.monotonic(), Path(config.out), Path(config.checkpoint)
    mark = identity(config, checkpoint, Path(config.image))
    wanted = made_of(config, mark)
    if (out / "mesh.glb").is_file() and result_of(out) == wanted:
        print(f"{out / 'mesh.glb'} is finished; nothing to do")
        return
    model = load_export(checkpoint, device, dtype)
    run = new_run(config, device)
    continued = load_snapshot(out / FILE, run, mark)
    with atomic_file(out / "config.yaml") as temporary:
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))

    # The picture becomes its embedding, and is not needed again
    with torch.no_grad():
        context = embed_image(model.image_encoder, image[None]).to(device)
    del image
    ready, first = time.monotonic(), run.step

    monitor = watch(config, run.step)
    stopped_by = distil(run, model, context, config, mark, monitor)
    write_json(out / "losses.json", run.losses)
    distilled = time.monotonic()
    if stopped_by in LEAVE:  # the snapshot goes on elsewhere
        if monitor is not None:
            monitor.close()
        raise SystemExit(REQUEUE)

    mesh, facts = extract_mesh(run.field, run.occupancy, config.mesh)
    save_glb(out / "mesh.glb", mesh)
    meshed = time.monotonic()
    save_turntable(out, run.field, run.occupancy, camera_ranges(config, model.info).middle, config.turntable)
    seconds = {
        "load": ready - began,
        "distil": distilled - ready,
        "per_step": (distilled - ready) / max(run.step - first, 1),
        "mesh": meshed - distilled,
        "turntable": time.monotonic() - meshed,
    }
    about = {
        "made_of": wanted if run.step == config.steps else None,
        "steps": run.step,
        "of": config.steps,
        "continued": continued,
        "device": str(device),
        "dtype": str(dtype),
    }
    write_json(out / "result.json", about | {"mesh": facts, "seconds": {k: round(v, 3) for k, v in seconds.items()}})
    print(f"{out / 'mesh.glb'}: {facts['vertices']} vertices, {facts['faces']} faces; {run.step} steps")
    if monitor is not None:
        monitor.media(run.step, out / "turntable.mp4", out / "mesh.glb")
        monitor.artifact(f"{config.name}-{out.name}", "mesh", str(out / "mesh.glb"), made=True, about=facts)
        monitor.alert("finished", f"{out / 'mesh.glb'}")
        monitor.close()


def made_of(config: GenerateConfig, mark: str) -> str:
    """A hash of all that the mesh and the pictures of it depend on, beside what `mark` stands for."""
    return hashlib.sha256(f"{mark} {config.mesh} {config.turntable}".encode()).hexdigest()


def result_of(out: Path) -> str | None:
    """What the finished result in `out` was made of; None where there is none."""
    path = out / "result.json"
    found = read_json(path, "result") if path.is_file() else None
    return found.get("made_of") if isinstance(found, dict) else None


def watch(config: GenerateConfig, step: int) -> Monitor | None:
    """The W&B run of one mesh, which goes on from `step`."""
    if config.wandb.mode == "disabled":
        return None
    out, start = Path(config.out), Path(config.checkpoint)
    title = f"{config.name}-distill-{out.name}"
    monitor = Monitor(out, config.wandb, config.name, "distill", asdict(config), step, title)
    name = "-".join(start.resolve().parts[-3:-1]) or start.name
    monitor.artifact(name, "checkpoint", str(start), made=False, about={})
    return monitor
