"""Many images to meshes: groups of them wait in a queue, and each device takes one after the other.

A group is a process of its own (distill/group.py): one that crashes or runs out of memory costs its own images, and
what is finished is not made again.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data.files import UserError, read_json, write_json
from data.processes import REQUEUE, die_with_parent
from distill.config import GenerateConfig
from distill.page import write_page
from distill.snapshot import is_made
from distill.stopping import LEAVE

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
AGAIN = "give the same command again"


def generate(config: GenerateConfig) -> None:
    """SystemExit with 1 when some images have no mesh, REQUEUE when asked to leave the machine."""
    jobs, devices = jobs_of(config), devices_of(config)
    at_once = min(config.objects_at_once, -(-len(jobs) // len(devices)))  # no device is idle while another has several
    if len(jobs) <= at_once:
        from distill.image_to_mesh import images_to_meshes

        failed = images_to_meshes(jobs)
    else:
        failed = Queue(jobs, devices, at_once).work()
    if len(jobs) > 1:
        made = [Path(job.out) for job in jobs if job.out not in failed]
        if made:
            write_page(Path(config.out) / "report.html", made, failed)
            print(f"{len(made)} of {len(jobs)} images have a mesh: {Path(config.out) / 'report.html'}", flush=True)
    if failed:
        for out, words in failed.items():
            print(f"error: {out}: {words}", file=sys.stderr, flush=True)
        raise SystemExit(1)


def jobs_of(config: GenerateConfig) -> list[GenerateConfig]:
    """One configuration an image.  UserError when two would write to one folder, or a folder has no picture."""
    images = [Path(name) for name in (config.image, *config.more_images) if name is not None]
    if not images:
        return [config]  # of an embedding
    if images[0].is_dir():
        folder = images[0]
        images[:1] = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
        if not images:
            raise UserError(f"image={folder} is a folder without pictures ({', '.join(SUFFIXES)})")
    elif len(images) == 1:
        return [replace(config, image=str(images[0]), more_images=[])]
    twice = [stem for stem, count in Counter(path.stem for path in images).items() if count > 1]
    if twice:
        raise UserError(f"image: {twice[0]} is the name of two pictures, and each wants out/{twice[0]}; rename one")
    return [replace(config, image=str(path), more_images=[], out=str(Path(config.out) / path.stem)) for path in images]


def devices_of(config: GenerateConfig) -> list[str]:
    if config.device == "auto" and torch.cuda.device_count() > 1:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [config.device]


def told_as_made(job: GenerateConfig) -> bool:
    try:
        made = is_made(job)
    except UserError:  # its group says why, and costs the others nothing
        return False
    if made:
        print(f"{Path(job.out) / 'mesh.glb'} is finished; nothing to do", flush=True)
    return made


class Queue:
    def __init__(self, jobs: list[GenerateConfig], devices: list[str], at_once: int):
        self.jobs, self.devices = jobs, devices
        self.waiting: queue.SimpleQueue[list[GenerateConfig]] = queue.SimpleQueue()
        # A process for what is finished would load everything for nothing.
        left = [job for job in jobs if not told_as_made(job)]
        for start in range(0, len(left), at_once):
            self.waiting.put(left[start : start + at_once])
        self.before = len(jobs) - len(left)
        self.failed: dict[str, str] = {}
        self.answered: set[str] = set()  # out of those whose groups have ended
        self.began = time.monotonic()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.signal = 0
        self.lock = threading.Lock()

    def work(self) -> dict[str, str]:
        """Why some have no mesh: {out: words}."""
        former = {number: signal.signal(number, self.note) for number in (signal.SIGINT, *LEAVE)}
        try:
            threads = [threading.Thread(target=self.serve, args=(device,)) for device in self.devices]
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)  # so that signals are met meanwhile
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        if self.signal in LEAVE:
            raise SystemExit(REQUEUE)
        for job in self.jobs:
            if job.out not in self.answered and not is_made(job):
                self.failed[job.out] = f"stopped before its turn; {AGAIN}"
        return self.failed

    def note(self, number: int, frame: object) -> None:
        """Hands a scheduler's signal on; Ctrl-C reaches the groups by itself.  None is begun any more."""
        self.signal = number
        if number != signal.SIGINT:
            for process in list(self.running.values()):
                process.send_signal(number)

    def serve(self, device: str) -> None:
        """Takes one group after the other, as long as there are any."""
        while not self.signal:
            try:
                group = self.waiting.get_nowait()
            except queue.Empty:
                return
            try:
                with tempfile.TemporaryDirectory() as folder:
                    answer = Path(folder, "answer.json")
                    status = self.run(group, device, Path(folder, "asked.json"), answer)
                    failed = why_failed(group, status, answer)
            except Exception as error:  # no process, a full disk: it costs this group, and the device takes the next
                failed = {job.out: f"{type(error).__name__}: {error}" for job in group}
            with self.lock:
                self.account(group, failed)

    def run(self, group: list[GenerateConfig], device: str, asked: Path, answer: Path) -> int:
        write_json(asked, [asdict(replace(job, device=device)) for job in group])
        command = [sys.executable, str(Path(__file__).with_name("group.py")), str(asked), str(answer)]
        process = subprocess.Popen(command, preexec_fn=die_with_parent)  # noqa: PLW1509
        self.running[device] = process
        if self.signal in LEAVE:  # which came between the last look at it and the start
            process.send_signal(self.signal)
        return process.wait()

    def account(self, group: list[GenerateConfig], failed: dict[str, str]) -> None:
        self.failed |= failed
        self.answered |= {job.out for job in group}
        here = len(self.answered)
        done = self.before + here
        left = (time.monotonic() - self.began) / here * (len(self.jobs) - done)
        print(f"[{done}/{len(self.jobs)}] images; ETA {int(left) // 60}:{int(left) % 60:02d}", flush=True)


def why_failed(group: list[GenerateConfig], status: int, answer: Path) -> dict[str, str]:
    """{out: words}: the group's own, or, of one that ended without an answer, of each that is not finished."""
    if answer.is_file():
        failed: dict[str, str] = read_json(answer, "group")
        return failed
    if status == REQUEUE:
        words = f"was asked to leave the machine, and has saved its snapshot; {AGAIN}"
    elif status in (-signal.SIGINT, 128 + signal.SIGINT):
        words = f"interrupted; {AGAIN}"
    else:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        words = f"its process ended with {how}; its words are above"
    return {job.out: words for job in group if not is_made(job)}
