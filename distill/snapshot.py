"""Everything a distillation needs to go on after it was killed, in one file that appears whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.files import UserError, atomic_file, content_mark, read_json
from distill.backend import choose_backend
from distill.config import GenerateConfig
from distill.field import Field
from distill.hashgrid import grid_layout
from distill.volume import OccupancyGrid

FILE = "snapshot/latest.safetensors"
FREE_TO_CHANGE = (
    "checkpoint",
    "image",
    "embedding",
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
    "volume.samples_at_once",
)
REMEDIES = ("dtype", "guidance.scale", "optimizer.lr_grid", "optimizer.lr_network")  # free for a run that was given up


@dataclass
class Run:
    """The state of one distillation: what `step` steps made of it."""

    field: Field
    occupancy: OccupancyGrid
    optimizer: torch.optim.Optimizer
    step: int = 0
    losses: list[dict[str, float]] = field(default_factory=list)  # one entry a step
    chosen: dict[str, Any] = field(default_factory=dict)  # the values of REMEDIES
    failed: str = ""  # why it was given up


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
    occupancy = OccupancyGrid(config.field.bound, config.volume, device, backend)
    return Run(scene, occupancy, optimizer, chosen=chosen(config))


def dotted(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by the names that the command line gives them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def chosen(config: GenerateConfig) -> dict[str, Any]:
    return {key: value for key, value in dotted(dataclasses.asdict(config)).items() if key in REMEDIES}


def snapshot_mb(config: GenerateConfig) -> int:
    """Of the table and its two running means in AdamW; the rest is small."""
    field = config.field
    layout = grid_layout(field.levels, field.features, field.log2_entries, field.base_resolution, field.max_resolution)
    return -(-layout.rows * field.features * 4 * 3 // 2**20)


def identity(config: GenerateConfig, checkpoint: Path, image: Path) -> str:
    """A hash of what the field depends on, but for REMEDIES: settings, the checkpoint (its descriptions and sizes), the
    picture or embedding.
    """
    free = tuple(f"{key}." for key in FREE_TO_CHANGE + REMEDIES)
    settings = {k: v for k, v in dotted(dataclasses.asdict(config)).items() if not f"{k}.".startswith(free)}
    files = sorted([*checkpoint.rglob("*.safetensors"), *checkpoint.rglob("*config.json")])
    weights = [(p.relative_to(checkpoint).as_posix(), content_mark(p)) for p in files]
    info = (checkpoint / "isotropic3d.json").read_text()
    picture = hashlib.sha256(image.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([settings, weights, info, picture], sort_keys=True).encode()).hexdigest()


def mark_of(config: GenerateConfig) -> str:
    return identity(config, Path(config.checkpoint), Path(str(config.image or config.embedding)))


def made_of(config: GenerateConfig, mark: str) -> str:
    """A hash of all that the mesh and the pictures of it depend on.  mark: `mark_of(config)`."""
    return hashlib.sha256(f"{mark} {chosen(config)} {config.mesh} {config.turntable}".encode()).hexdigest()


def is_made(config: GenerateConfig, mark: str | None = None) -> bool:
    """Whether `out` holds the finished result of exactly this."""
    out = Path(config.out)
    parts = out / "result.json", out / "mesh.glb", Path(str(config.image or config.embedding))
    if not all(part.is_file() for part in parts):
        return False
    found = read_json(out / "result.json", "result")
    return isinstance(found, dict) and found.get("made_of") == made_of(config, mark or mark_of(config))


def save_snapshot(path: Path, run: Run, identity: str) -> None:
    tensors = {f"field.{name}": value for name, value in run.field.state_dict().items()}
    tensors["occupancy.density"] = run.occupancy.density
    tensors["occupancy.hidden"] = torch.tensor(run.occupancy.hidden, dtype=torch.float64)
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    content = {
        "identity": identity, "step": run.step, "losses": run.losses, "chosen": run.chosen, "failed": run.failed,
    }  # fmt: skip
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
    before = content.get("chosen", run.chosen)
    changed = ", ".join(f"{k}={v} (was {before.get(k)})" for k, v in run.chosen.items() if v != before.get(k))
    if changed and not content.get("failed"):
        raise UserError(f"{path} belongs to another configuration, but for {changed}; {remedy}")
    if changed:
        print(f"note: {path}: goes on from step {content['step']} with {changed}", flush=True)
    run.field.load_state_dict({k.removeprefix("field."): v for k, v in tensors.items() if k.startswith("field.")})
    run.occupancy.density = tensors["occupancy.density"]
    run.occupancy.hidden, run.occupancy.fresh = float(tensors["occupancy.hidden"]), False
    run.occupancy.mark()
    optimizer = run.optimizer.state_dict()
    optimizer["state"] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            # AdamW counts its steps on the CPU; read from CUDA, each step would wait for the device.
            optimizer["state"].setdefault(int(index), {})[name] = value.cpu() if name == "step" else value
    run.optimizer.load_state_dict(optimizer)
    run.step, run.losses = content["step"], content["losses"]
    return True


def config_from(values: Any) -> GenerateConfig:
    """The checked configuration of a mapping, such as `asdict` makes of one."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(GenerateConfig), values))
    assert isinstance(config, GenerateConfig)
    return config


def load_result(out: Path) -> tuple[Run, GenerateConfig]:
    """The newest state of the distillation in folder `out`, with its configuration, on the CPU.

    Whatever rendered it, here plain torch does.  UserError when `out` holds none.
    """
    path = out / FILE
    if not path.is_file() or not (out / "config.yaml").is_file():
        raise UserError(f"{out} holds no distillation: {path} or config.yaml is missing; run distill/generate.py first")
    config = config_from(OmegaConf.load(out / "config.yaml"))
    run = new_run(replace(config, backend="torch"), "cpu")
    with safe_open(path, framework="pt") as file:
        mark = json.loads(file.metadata()["run"])["identity"]
    load_snapshot(path, run, mark)
    return run, config
