"""What the demo can choose."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.cli import check


@dataclass
class DemoConfig:
    out: str = "runs/demo"  # everything the demo makes; relative paths are the repository's
    cache: str = ".cache"  # downloaded objects
    source: str | None = None  # folder or library of objects; null: Debian's sweethome3d-furniture
    objects: list[str] = field(  # of the library: colourful, and unlike each other; another source is taken whole
        default_factory=lambda: [
            "motorbike", "cactus", "forkLift", "teddyBear", "cupcake", "kitchenaid", "cartoon_biplane", "woodToy",
        ]
    )  # fmt: skip
    distill: str | None = None  # uid of the object to distil; null: one that suits the source
    processes: int = 2  # training processes
    cpu: bool = True  # train on the CPU, so that two processes fit any machine; false: one process a GPU
    strict: bool = True  # exit non-zero when the result misses the bars
    # More overrides for single steps, for instance stage1='["steps=4"]'.
    render: list[str] = field(default_factory=list)
    pack: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    stage1: list[str] = field(default_factory=list)
    stage2: list[str] = field(default_factory=list)
    generate: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.processes >= 1, f"processes={self.processes} must be at least 1")
