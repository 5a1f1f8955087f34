"""Everything a distillation needs to go on after it was killed, in one file that appears whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.files import UserError, atomic_file, content_mark
from distill.backend import choose_backend
from distill.config import GenerateConfig
from distill.field import Field
from distill.volume import OccupancyGrid

FILE = "snapshot/latest.safetensors"
FREE_TO_CHANGE = (
    "checkpoint",
    "image",
    "more_images",
    "objects_at_once",
    "compile",
    "out",
    "name",
    "wandb",
    "device",
    "backend",
    "preview",
    "snapshot_every",
    "mesh",
    "turntable",
)


@dataclass
class Run:
    """The state of one distillation: what `step` steps made of it."""

    field: Field
    occupancy: OccupancyGrid
    optimizer: torch.optim.Optimizer
    step: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)  # one entry a step


def new_run(config: GenerateConfig, device: str | torch.device) -> Run:
    """A field in its initial state; the same for the same `config.seed`."""
    torch.manual_seed(config.seed)
    backend = choose_backend(config.backend, device)
    scene = Field(config.field, backend).to(device)
    groups = scene.parameter_groups(config.optimizer.lr_grid, config.optimizer.lr_network)
    optimizer = torch.optim.AdamW(
        groups,
        betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )
    return Run(scene, OccupancyGrid(config.field.bound, config.volume, device, backend), optimizer)


def identity(config: GenerateConfig, checkpoint: Path, image: Path) -> str:
    """A hash of what the result depends on: settings, the checkpoint (its descriptions and sizes), the picture."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_TO_CHANGE}
    files = sorted([*checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*config.json")])
    weights = [(p.relative_to(checkpoint).as_posix(), content_mark(p)) for p in files]
    info = (checkpoint / "isotropic3d.json").read_text()
    picture = hashlib.sha256(image.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([settings, weights, info, picture], sort_keys=True).encode()).hexdigest()


def save_snapshot(path: Path, run: Run, identity: str) -> None:
    tensors = {f"field.{name}": value for name, value in run.field.state_dict().items()}
    tensors["occupancy.density"] = run.occupancy.density
    tensors["occupancy.hidden"] = torch.tensor(run.occupancy.hidden, dtype=torch.float64)
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    content = {"identity": identity, "step": run.step, "losses": run.losses}
    with atomic_file(path) as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, metadata={"run": json.dumps(content)})


def load_snapshot(path: Path, run: Run, identity: str) -> bool:
    """Puts `run` where the snapshot at `path` was; False when there is none.  UserError when it is not this run's."""
    if not path.exists():
        return False
    remedy = f"choose another out, or delete {path} to start again"
    try:
        with safe_open(path, framework="pt", device=str(run.occupancy.live.device)) as file:
            content: dict[str, Any] = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a snapshot that can be read ({error}); {remedy}") from None
    if content.get("identity") != identity:
        raise UserError(f"{path} belongs to another checkpoint, image or configuration; {remedy}")
    run.field.load_state_dict({k.removeprefix("field."): v for k, v in tensors.items() if k.startswith("field.")})
    run.occupancy.density = tensors["occupancy.density"]
    run.occupancy.hidden, run.occupancy.fresh = float(tensors["occupancy.hidden"]), False
    run.occupancy.mark()
    optimizer = run.optimizer.state_dict()
    optimizer["state"] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            optimizer["state"].setdefault(int(index), {})[name] = value
    run.optimizer.load_state_dict(optimizer)
    run.step, run.losses = content["step"], content["losses"]
    return True


def load_result(out: Path) -> tuple[Run, GenerateConfig]:
    """The newest state of the distillation in folder `out`, with its configuration, on the CPU.

    UserError when `out` holds none.
    """
    path = out / FILE
    if not path.is_file() or not (out / "config.yaml").is_file():
        raise UserError(f"{out} holds no distillation: {path} or config.yaml is missing; run distill/generate.py first")
    merged = OmegaConf.merge(OmegaConf.structured(GenerateConfig), OmegaConf.load(out / "config.yaml"))
    config = OmegaConf.to_object(merged)
    assert isinstance(config, GenerateConfig)
    run = new_run(config, "cpu")
    with safe_open(path, framework="pt") as file:
        mark = json.loads(file.metadata()["run"])["identity"]
    load_snapshot(path, run, mark)
    return run, config
