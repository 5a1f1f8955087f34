"""What can be chosen of W&B; in the configurations of training and distilling."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from conf.cli import check

MODES = ("online", "offline", "disabled")
ARTIFACTS = ("reference", "upload", "none")


@dataclass
class WandbConfig:
    """The key comes from `wandb login` or WANDB_API_KEY, never from here."""

    # online, offline (sent later by `wandb sync`) or disabled; WANDB_MODE, else offline
    mode: str = field(default_factory=lambda: os.environ.get("WANDB_MODE", "offline"))
    project: str = "isotropic3d"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    artifacts: str = "reference"  # shards, checkpoints and meshes: by their place, uploaded, or none

    def __post_init__(self) -> None:
        check(self.mode in MODES, f"wandb.mode={self.mode} must be one of {', '.join(MODES)}")
        check(self.artifacts in ARTIFACTS, f"wandb.artifacts={self.artifacts} must be one of {', '.join(ARTIFACTS)}")
