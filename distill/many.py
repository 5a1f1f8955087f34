"""Many images to meshes: groups of them wait in a queue, and each device takes one after the other.

A group is this very command for its images alone, in a process of its own: one that crashes or runs out of memory costs
its own images, and what is finished is not made again.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from data.files import UserError
from data.processes import REQUEUE, die_with_parent
from distill.config import GenerateConfig, quoted
from distill.page import write_page

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def generate(config: GenerateConfig) -> None:
    """SystemExit with 1 when some images have no mesh, REQUEUE when asked to leave the machine."""
    jobs = jobs_of(config)
    if len(jobs) <= config.objects_at_once:
        from distill.image_to_mesh import images_to_meshes

        failed = images_to_meshes(jobs)
    else:
        failed = Queue(config, jobs).work()
    if len(jobs) > 1:
        made = [Path(job.out) for job in jobs if job.out not in failed]
        if made and not os.environ.get(GROUP):
            write_page(Path(config.out) / "report.html", made)
            print(f"{len(made)} of {len(jobs)} images have a mesh: {Path(config.out) / 'report.html'}", flush=True)
    if failed:
        for out, words in failed.items():
            print(f"error: {out}: {words}", file=sys.stderr, flush=True)
        raise SystemExit(1)


GROUP = "ISOTROPIC3D_GROUP"  # set in the process of a group, which leaves the common page to the one that started it


def jobs_of(config: GenerateConfig) -> list[GenerateConfig]:
    """One configuration an image.  UserError when two would write to one folder, or a folder has no picture."""
    first = Path(config.image)
    images = [first, *map(Path, config.more_images)]
    if first.is_dir():
        images[:1] = sorted(path for path in first.iterdir() if path.suffix.lower() in SUFFIXES)
        if not images:
            raise UserError(f"image={first} is a folder without pictures ({', '.join(SUFFIXES)})")
    elif len(images) == 1:
        return [config]
    twice = [stem for stem, count in Counter(path.stem for path in images).items() if count > 1]
    if twice:
        raise UserError(f"image: {twice[0]} is the name of two pictures, and each wants out/{twice[0]}; rename one")
    return [replace(config, image=str(path), more_images=[], out=str(Path(config.out) / path.stem)) for path in images]


def devices_of(config: GenerateConfig) -> list[str]:
    if config.device == "auto" and torch.cuda.device_count() > 1:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return [config.device]


class Queue:
    def __init__(self, config: GenerateConfig, jobs: list[GenerateConfig]):
        self.config, self.jobs, self.devices = config, jobs, devices_of(config)
        self.waiting: queue.SimpleQueue[list[GenerateConfig]] = queue.SimpleQueue()
        for start in range(0, len(jobs), config.objects_at_once):
            self.waiting.put(jobs[start : start + config.objects_at_once])
        self.failed: dict[str, str] = {}
        self.done, self.began = 0, time.monotonic()
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.signal = 0
        self.lock = threading.Lock()

    def work(self) -> dict[str, str]:
        """Why some have no mesh: {out: words}."""
        former = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1,
                                                                         signal.SIGUSR2)}  # fmt: skip
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
        if self.signal not in (0, signal.SIGINT):
            raise SystemExit(REQUEUE)
        for job in self.jobs:
            if self.signal and not (Path(job.out) / "result.json").is_file():
                self.failed.setdefault(job.out, "stopped before its turn; give the same command again")
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
            status = self.run(group, device)
            with self.lock:
                self.account(group, status)

    def run(self, group: list[GenerateConfig], device: str) -> int:
        first, *more = (str(Path(job.image)) for job in group)
        out = Path(self.config.out) if more else Path(group[0].out)
        words = [word for word in sys.argv[1:] if word.split("=")[0] not in ("image", "more_images", "out", "device")]
        command = [sys.executable, str(Path(__file__).with_name("generate.py")), *words,
                   f"image={quoted(first)}", f"more_images=[{','.join(map(quoted, more))}]", f"out={quoted(str(out))}",
                   f"device={device}"]  # fmt: skip
        process = subprocess.Popen(command, env=os.environ | {GROUP: "1"}, preexec_fn=die_with_parent)  # noqa: PLW1509
        self.running[device] = process
        return process.wait()

    def account(self, group: list[GenerateConfig], status: int) -> None:
        for job in group:
            self.done += 1
            whole = (Path(job.out) / "result.json").is_file() and (Path(job.out) / "mesh.glb").is_file()
            if status != 0 and not whole and status != REQUEUE:
                how = f"signal {-status}" if status < 0 else f"status {status}"
                self.failed[job.out] = f"its process ended with {how}; its words are above"
        spent = time.monotonic() - self.began
        left = spent / self.done * (len(self.jobs) - self.done)
        print(f"[{self.done}/{len(self.jobs)}] images; ETA {int(left) // 60}:{int(left) % 60:02d}", flush=True)
