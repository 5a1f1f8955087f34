"""Progress with rate and ETA: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """`with Progress("stage 1", total, unit="step") as p: p.update(1, loss="0.12")`.

    Off a terminal it prints a line at most every `every_s` seconds, and one at the end.
    """

    def __init__(self, what: str, total: int, unit: str, start: int = 0, every_s: float = 10, show: bool = True):
        self.what, self.total, self.unit, self.done, self.start = what, total, unit, start, start
        self.every_s, self.show = every_s, show
        self.began = self.last = time.monotonic()
        self.facts: dict[str, str] = {}
        bar = show and sys.stderr.isatty()
        self.bar = tqdm(desc=what, total=total, initial=start, unit=unit, dynamic_ncols=True) if bar else None

    def update(self, count: int = 1, **facts: str) -> None:
        self.done += count
        self.facts |= facts
        if self.bar is not None:
            self.bar.set_postfix(self.facts, refresh=False)
            self.bar.update(count)
        elif self.show and (time.monotonic() - self.last > self.every_s or self.done == self.total):
            self.line()

    def line(self) -> None:
        self.last = time.monotonic()
        rate = (self.done - self.start) / max(self.last - self.began, 1e-9)
        left = (self.total - self.done) / max(rate, 1e-9)
        facts = "".join(f"  {key} {value}" for key, value in self.facts.items())
        print(
            f"{self.what}: {self.done}/{self.total} {self.unit}  {rate:.2f} {self.unit}/s"
            f"  ETA {int(left) // 60}:{int(left) % 60:02d}{facts}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
