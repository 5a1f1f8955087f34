"""Where a run comes from, for its configuration in W&B.  The same each time that it starts again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from data.files import UserError
from monitor.config import WandbConfig

ROOT = Path(__file__).resolve().parents[1]
# What does not change when a job is requeued.
SLURM = ("JOB_ID", "JOB_NAME", "JOB_PARTITION", "JOB_ACCOUNT", "JOB_NUM_NODES", "ARRAY_JOB_ID", "CLUSTER_NAME")


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
