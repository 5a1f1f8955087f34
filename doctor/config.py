from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DoctorConfig:
    json: bool = False  # for programs: one list of checks
    out: str = "."  # where runs will be written
    weights: list[str] | None = None  # checkpoints and export folders that should be whole; null: those in weights/
    timeout_s: float = 20.0  # of each check that waits for something
