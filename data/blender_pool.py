"""Blender processes that render one object after another, so that a crash or a hang costs one object."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.files import UserError

REPOSITORY = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("blender_worker.py")
PACKAGES = "libegl1 libgl1 libxi6 libxxf86vm1 libxfixes3 libxkbcommon0 libsm6 libxrender1"
REMEDY = "run `make blender`, or install Blender >= 4.2 and put it on the PATH, or give blender=/path/to/blender"


class ObjectFailed(Exception):
    """One object could not be rendered; the others can."""


class ObjectRejected(Exception):
    """One object could be rendered, and is not wanted."""


def find_blender(setting: str = "auto") -> Path:
    """A Blender program, or a Python that has bpy.  auto: `.venv-blender` in the repository, then the PATH."""
    if setting != "auto":
        found = shutil.which(Path(setting).expanduser())
        if found is None:
            raise UserError(f"blender={setting} is not a program; give the path of Blender or of a Python with bpy")
        return Path(found).absolute()
    own = REPOSITORY / ".venv-blender" / "bin" / "python"
    if own.exists():
        return own
    found = shutil.which("blender")
    if found is None:
        raise UserError(f"blender=auto found neither {own} nor blender on the PATH; {REMEDY}")
    return Path(found)


def script_command(blender: Path, script: Path) -> list[str]:
    """The command that runs a Python script inside Blender; the script's own arguments follow."""
    if blender.name.startswith("python"):
        return [str(blender), str(script)]
    return [str(blender), "-b", "--factory-startup", "-Y", "-P", str(script), "--"]


def check_blender(blender: Path, device: str = "auto") -> tuple[str, str]:
    """Starts Blender once: its version, and what `device` (auto, cpu, gpu) means: "CPU" or the GPUs' Cycles backend.

    UserError with the remedy when it cannot start, or finds no GPU for device=gpu.
    """
    command = [*script_command(blender, WORKER), "--check", device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{blender} does not start: {error}; {REMEDY}") from None
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("blender ", "device ")))
    if done.returncode == 3 and "blender" in told:
        reason = done.stdout.strip().splitlines()[-1].removeprefix("no device: ")
        raise UserError(f"device={device}: {reason}; give device=cpu, or device=auto to take what there is")
    if done.returncode != 0 or len(told) < 2:
        reason = " ".join((done.stderr or done.stdout).strip().splitlines()[-1:])
        if "cannot open shared object file" in done.stderr:
            raise UserError(
                f"Blender lacks a system library: {reason}; on Debian or Ubuntu: apt-get install {PACKAGES}"
            )
        raise UserError(f"{blender} does not start: {reason}; {REMEDY}")
    return f"blender {told['blender']}", told["device"]


def memory_gb(pid: int) -> float:
    """Resident memory of a process and its descendants in GiB; 0 when it has ended, or where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        lists = [(task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (OSError, IndexError):
        return 0.0
    own = pages * os.sysconf("SC_PAGE_SIZE") / 2**30
    return own + sum(memory_gb(int(child)) for children in lists for child in children.split())


class BlenderProcess:
    """One long-lived worker; started by the first job, and again by the job after a failure."""

    def __init__(self, blender: Path):
        self.blender = blender
        self.folder = Path(tempfile.mkdtemp(prefix="isotropic3d-blender-"))
        self.results, self.log = self.folder / "results.jsonl", self.folder / "log.txt"
        self.process: subprocess.Popen[str] | None = None
        self.position = 0  # bytes of `results` already read

    def start(self) -> subprocess.Popen[str]:
        self.results.write_bytes(b"")
        self.position = 0
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [*script_command(self.blender, WORKER), str(self.results)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C reaches us, and we stop the workers
            )

    def render(
        self, job: dict[str, Any], limit_s: float, limit_gb: float, on_view: Callable[[], None]
    ) -> dict[str, Any]:
        """Renders one job and returns the worker's last result (see blender_worker.py).

        ObjectFailed on an error, a crash, after `limit_s` or above `limit_gb`; ObjectRejected when it is not wanted.
        """
        if self.process is not None and memory_gb(self.process.pid) > limit_gb / 2:
            self.stop()  # what objects before left behind is not to be held against this one
        if self.process is None or self.process.poll() is not None:
            self.process = self.start()
        os.truncate(self.log, 0)
        try:
            result = self.follow(self.process, job, limit_s, limit_gb, on_view)
        except BaseException:  # a crash, a hang, an interruption: the next object gets a new process
            self.stop()
            raise
        if result["status"] == "rejected":
            raise ObjectRejected(str(result["error"]))
        if result["status"] != "done":
            raise ObjectFailed(str(result["error"]))
        return result

    def follow(
        self,
        process: subprocess.Popen[str],
        job: dict[str, Any],
        limit_s: float,
        limit_gb: float,
        on_view: Callable[[], None],
    ) -> dict[str, Any]:
        """Hands over the job and waits for its end."""
        look = time.monotonic()  # when to ask for the memory next: often enough, and not dear
        deadline = look + limit_s
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        except OSError:
            raise ObjectFailed(f"Blender ended before the job: {self.last_words()}") from None
        while True:
            running = process.poll() is None  # asked before reading: what it wrote before its end is read
            for result in self.new_results():
                if "view" not in result:
                    return result
                on_view()
            if not running:
                raise ObjectFailed(f"Blender ended with status {process.returncode}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise ObjectFailed(f"took longer than object_limit_s={limit_s:g}")
            if time.monotonic() > look:
                look = time.monotonic() + 0.2
                if (used := memory_gb(process.pid)) > limit_gb:
                    raise ObjectFailed(f"took {used:.1f} GiB of memory, more than object_limit_gb={limit_gb:g}")
            time.sleep(0.04)

    def new_results(self) -> list[dict[str, Any]]:
        with open(self.results, "rb") as file:
            file.seek(self.position)
            lines = file.read().split(b"\n")
        self.position += sum(len(line) + 1 for line in lines[:-1])
        return [json.loads(line) for line in lines[:-1]]

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        lines = [line.strip() for line in lines if line.strip() and not line.startswith(("Fra:", "Saved:", " Time:"))]
        return " | ".join(lines[-3:])[:500] or "it said nothing"

    def stop(self) -> None:
        """May be called from another thread than `render`, which then fails."""
        process, self.process = self.process, None
        if process is not None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its session, for `blender` may be a script around the program
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
