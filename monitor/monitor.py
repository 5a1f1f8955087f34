"""metrics.jsonl in the run folder, and a W&B run that survives restarts.  Of rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from data.files import UserError, atomic_file
from monitor.config import WandbConfig
from monitor.facts import git_state, mark_of, placement, slurm_facts, slurm_hidden
from monitor.wandb_file import last_step

# W&B makes a section of panels of what stands before the slash.
SECTIONS = {
    "steps_per_s": "throughput", "samples_per_s": "throughput", "images_per_s": "throughput", "eta_s": "throughput",
    "tflops_per_s_a_process": "throughput", "mfu": "throughput", "data_wait_share": "throughput",
    "memory_gib": "memory", "lr": "optimizer", "grad_norm": "optimizer", "skipped_steps": "faults",
    "damaged_objects": "faults",
}  # fmt: skip
ALERT_EVERY_S = 3600  # of one title
SENT = "wandb_sent"


class Monitor:
    """One W&B run, however often it starts again: its id is in the folder, and no step is logged twice.

    A run that goes on takes the steps after its checkpoint once more, to the same values; those that W&B has already
    are not sent again, and those that a killed process had not sent yet come from metrics.jsonl.  Where W&B fails, at
    the start or later, that is said and the run goes on without it, to be sent all of it when it starts again.
    """

    def __init__(
        self,
        folder: Path,
        config: WandbConfig,
        pipeline: str,
        kind: str,
        settings: dict[str, Any],
        first_step: int = 0,
        title: str | None = None,
    ):
        """pipeline: the name that stages and meshes share.  kind: such as "stage1".  settings: the configuration."""
        self.path, self.folder, self.config = folder / "metrics.jsonl", folder, config
        self.title = title or f"{pipeline}-{kind}"
        self.unwritten = ""
        self.row: dict[str, Any] = {}  # of the step that is not over yet
        self.failed = False
        logged = drop_after(self.path, first_step)
        id_file = folder / "wandb_id"
        again = id_file.is_file()
        run_id = id_file.read_text().strip() if again else secrets.token_hex(4)
        with atomic_file(id_file) as temporary:
            temporary.write_text(run_id + "\n")
        self.sent = max(last_step(folder, run_id), self._noted_step())
        self._try(lambda: self._begin(run_id, pipeline, kind, settings))
        self._note_step()
        for row in logged:
            self._send(row)
        if again:
            where = "".join(f"; {name} {value}" for name, value in placement().items())
            self.alert("started again", f"goes on from step {first_step}{where}")

    def _begin(self, run_id: str, pipeline: str, kind: str, settings: dict[str, Any]) -> None:
        import wandb

        with slurm_hidden():
            self.run = wandb.init(
                dir=self.folder,
                id=run_id,
                resume="allow" if self.config.mode == "online" else None,
                mode=self.config.mode,  # type: ignore[arg-type]
                project=self.config.project,
                entity=self.config.entity,
                name=self.title,
                group=pipeline,
                job_type=kind,
                tags=[kind, *self.config.tags],
                config=settings | {"git": git_state(), "slurm": slurm_facts()},
                settings=wandb.Settings(silent=True),
            )
        if self.run.resumed:
            self.sent = max(self.sent, int(self.run.summary.get("global_step", -1)))
        self.run.define_metric("global_step")
        self.run.define_metric("*", step_metric="global_step")
        if placement():
            self.run.summary["slurm"] = placement()  # of the newest start; what is in config is the same at each

    def _noted_step(self) -> int:
        path = self.folder / SENT
        return int(path.read_text()) if path.is_file() else -1

    def _note_step(self) -> None:
        """What W&B has for certain: its files may be removed by `wandb clean` once they are synced."""
        if self.failed or self.config.mode == "disabled":
            return
        try:
            with atomic_file(self.folder / SENT) as temporary:
                temporary.write_text(f"{self.sent}\n")
        except UserError as error:  # a full disk must not end the run
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Values of a step; more may follow.  A str is the name of a picture's file in the folder."""
        self.unwritten += json.dumps({"global_step": step, **values}) + "\n"
        self.write()
        if self.row.get("global_step", step) != step:
            self._send_row()
        self.row |= {"global_step": step, **values}

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

    def picture(self, step: int, name: str, path: Path, picture: Image.Image) -> None:
        """Into the file `path`, which is in the folder, and W&B.  One that cannot be written is said."""
        try:
            with atomic_file(path) as temporary:
                picture.save(temporary)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return
        self.log(step, {name: str(path.relative_to(self.folder))})

    def alert(self, title: str, words: str, level: str = "INFO") -> None:
        """A message to whoever watches.  level: INFO, WARN or ERROR."""
        self._try(lambda: self.run.alert(title[:60], f"{self.title}: {words}", level, ALERT_EVERY_S))

    def media(self, step: int, video: Path, mesh: Path) -> None:
        """A turntable (MP4) and a mesh (GLB), to be looked at in W&B."""
        import wandb

        def show() -> None:
            shown = {"turntable": wandb.Video(str(video), format="mp4"), "mesh": wandb.Object3D(str(mesh))}
            self.run.log({"global_step": step, **shown}, step=step)

        self._send_row()  # W&B takes no step below one that it has
        self._try(show)

    def artifact(self, name: str, kind: str, place: str, made: bool, about: dict[str, Any]) -> None:
        """What the run takes (shards, a checkpoint) or has made, so that W&B can show what came from what.

        place: a folder, a file or a URL.  W&B notes what a run takes online alone.
        """
        import wandb

        def note() -> None:
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), kind, metadata=about)
            path = Path(place)
            # What makes another version of it, for W&B: a place, which is noted without its content, stays the same.
            with artifact.new_file("content.json") as file:
                json.dump(about if "://" in place else {"content": mark_of(path)}, file)
            if "://" in place:
                artifact.add_reference(place, checksum=False)
            elif self.config.artifacts == "reference" or not made:
                artifact.add_reference(path.resolve().as_uri(), checksum=False)
            elif path.is_dir():
                artifact.add_dir(str(path))
            else:
                artifact.add_file(str(path))
            (self.run.log_artifact if made else self.run.use_artifact)(artifact)

        if self.config.artifacts != "none" and self.config.mode in (("online", "offline") if made else ("online",)):
            self._try(note)

    def close(self, status: int = 0) -> None:
        self._send_row()
        self._try(lambda: self.run.finish(exit_code=status))
        self._note_step()

    def _send_row(self) -> None:
        self._send(self.row)
        self.row = {}

    def _send(self, row: dict[str, Any]) -> None:
        import wandb

        def send() -> None:
            shown: dict[str, Any] = {}
            for name, value in row.items():
                if not isinstance(value, str):
                    shown[f"{SECTIONS[name]}/{name}" if name in SECTIONS else name] = value
                elif (self.folder / value).is_file():
                    shown[name] = wandb.Image(str(self.folder / value))
            self.run.log(shown, step=step)
            self.sent = step

        step = row.get("global_step", -1)
        if step > self.sent:
            self._try(send)

    def _try(self, work: Callable[[], None]) -> None:
        """W&B's own process may die, its server or its disk refuse; the run is worth more."""
        import wandb

        if self.failed:
            return
        try:
            work()
        except Exception as error:
            self.failed = True
            with contextlib.suppress(Exception):  # else its exit handler would fail again, at length
                wandb.teardown()
            print(
                f"warning: W&B failed ({type(error).__name__}: {error}); the run goes on without it, and metrics.jsonl "
                "has everything",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def drop_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Removes what was logged after the checkpoint that the run goes on from; returns what stays, a row a step."""
    if not path.is_file():
        return []
    kept: list[str] = []
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError:  # the last line of a killed process
            continue
        if row["global_step"] <= step:
            kept.append(line)
            rows[row["global_step"]] = rows.get(row["global_step"], {}) | row
    with atomic_file(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))
    return list(rows.values())
