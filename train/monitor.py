"""What can be watched: metrics.jsonl in the run folder, and one W&B run that survives restarts.  Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from data.files import UserError, atomic_file
from train.config import TrainConfig


class Monitor:
    def __init__(self, config: TrainConfig, folder: Path, first_step: int):
        import wandb

        self.path = folder / "metrics.jsonl"
        self.unwritten = ""
        drop_after(self.path, first_step)
        id_file = folder / "wandb_id"
        run_id = id_file.read_text().strip() if id_file.is_file() else secrets.token_hex(4)
        with atomic_file(id_file) as temporary:
            temporary.write_text(run_id + "\n")
        self.run = wandb.init(
            dir=folder,
            id=run_id,
            resume="allow" if config.wandb.mode == "online" else None,
            mode=config.wandb.mode,  # type: ignore[arg-type]
            project=config.wandb.project,
            entity=config.wandb.entity,
            name=f"{config.name}-stage{config.stage}",
            group=os.environ.get("SLURM_JOB_ID", config.name),
            job_type=f"stage{config.stage}",
            tags=config.wandb.tags,
            config=asdict(config),
            settings=wandb.Settings(silent=True),
        )
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.unwritten += json.dumps({"global_step": step, **values}) + "\n"
        self.write()
        self.run.log({"global_step": step, **values})

    def write(self) -> None:
        """Appends whole lines or nothing: a full disk must not end the run, and they are written when there is room."""
        size = self.path.stat().st_size if self.path.is_file() else 0
        try:
            with open(self.path, "a") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)
            print(f"warning: {self.path} cannot be written now: {error.strerror}", file=sys.stderr, flush=True)

    def image(self, step: int, name: str, path: Path, picture: Image.Image, caption: str) -> None:
        """Into the file `path` and W&B.  One that cannot be written is said."""
        import wandb

        try:
            with atomic_file(path) as temporary:
                picture.save(temporary)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return
        self.run.log({"global_step": step, name: wandb.Image(str(path), caption=caption)})

    def close(self) -> None:
        self.run.finish()


def drop_after(path: Path, step: int) -> None:
    """Removes what was logged after the checkpoint that the run goes on from, so that no point appears twice."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed process
            continue
        if row["global_step"] <= step:
            kept.append(line)
    with atomic_file(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))
