from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DoctorConfig:
    json: bool = False  # for programs: one list of checks
    out: str = "."  # where runs will be written
    weights: list[str] | None = None  # checkpoints and export folders that should be whole; null: those in weights/
    sha256: bool = False  # of weights, all of which are read; else a mark of each file's size and three samples
    timeout_s: float = 20.0  # of each check that waits for something
