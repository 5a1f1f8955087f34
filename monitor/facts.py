"""Where a run comes from, for its configuration in W&B.  The same each time that it starts again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from omegaconf import OmegaConf

from data.files import UserError, content_mark
from monitor.config import WandbConfig

ROOT = Path(__file__).resolve().parents[1]
# What does not change when a job is requeued.
SLURM = ("JOB_ID", "JOB_NAME", "JOB_PARTITION", "JOB_ACCOUNT", "JOB_NUM_NODES", "ARRAY_JOB_ID", "CLUSTER_NAME")
# What does.
PLACEMENT = {"nodes": "JOB_NODELIST", "gpus_on_node": "GPUS_ON_NODE", "restarts": "RESTART_COUNT"}


def git_state() -> dict[str, str | bool]:
    """Commit, and whether files differ from it; {} outside of a repository."""
    try:
        commit, changed = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit.strip(), "changed": bool(changed.strip())}


def slurm_facts() -> dict[str, str]:
    return {name.lower(): os.environ[f"SLURM_{name}"] for name in SLURM if f"SLURM_{name}" in os.environ}


def placement() -> dict[str, str]:
    """Where this start of a job runs; {} outside of SLURM."""
    found = {name: os.environ.get(f"SLURM_{key}") for name, key in PLACEMENT.items()}
    return {name: value for name, value in found.items() if value is not None}


@contextlib.contextmanager
def slurm_hidden() -> Iterator[None]:
    """Without SLURM's variables, of which SLURM_JWT is a key: W&B's own process writes all of them into its files."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM_")}
    try:
        yield
    finally:
        os.environ |= hidden


def mark_of(path: Path) -> str:
    """Tells versions of weights, a mesh or shards apart: of a folder, by its weights and its JSON files."""
    files = [path] if path.is_file() else [p for end in ("json", "safetensors") for p in path.rglob(f"*.{end}")]
    marks = sorted((file.relative_to(path).as_posix(), content_mark(file)) for file in files)
    return hashlib.sha256(repr(marks).encode()).hexdigest()


def name_of_weights(folder: str | Path) -> str:
    """As the run that made an export has noted it; of other weights, their folder's name."""
    folder = Path(folder).resolve()
    config = folder.parent / "config.yaml"
    if folder.name.startswith("export") and config.is_file():
        run = OmegaConf.load(config)
        return f"{run.name}-stage{run.stage}{folder.name.removeprefix('export')}"
    return folder.name


def has_key() -> bool:
    """Whether there is a key for W&B's server; the key itself is not looked at."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    return netrc.is_file() and host in netrc.read_text(errors="replace")


def require_key(config: WandbConfig) -> None:
    """UserError where W&B is to be written to online, and there is no key."""
    if config.mode == "online" and not has_key():
        raise UserError(
            "wandb.mode=online needs a key, and there is none; wandb login, or set WANDB_API_KEY, or wandb.mode=offline"
            " to send the run later with wandb sync"
        )
