"""What can be chosen for `python study/run.py`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from typing import Any

from conf.cli import check


@dataclass(frozen=True)
class Distillation:
    name: str  # of its folders
    seed: int
    model: str  # variant
    stage: str
    scale: float  # guidance


@dataclass
class StudyConfig:
    out: str = "runs/study"  # everything the study makes; relative paths are the repository's
    cache: str = ".cache"  # downloaded libraries of objects
    libraries: list[str] = field(default_factory=lambda: ["BlendSwap-CC-0", "BlendSwap-CC-BY", "KatorLegaz"])
    limit: int = 0  # objects of each library and split, for a try; 0: all
    val_share: float = 0.13  # of objects held out, by hash of the uid
    variants: list[str] = field(default_factory=list)  # names in study/variants.py; empty: all
    image_size: int = 64  # that the models are trained at
    guidance: float = 1.0  # of the 2D samples, and of what is distilled from stage 1 and the longer training
    sample_steps: int = 2  # DDIM; few give the model's mean picture, which so small a model draws best
    choose_share: float = 0.2  # of the held-out objects: settings are chosen on them, no other table has them
    # What the samples of variants that ask for stages and for the amount of training are drawn with besides.
    other_guidances: list[float] = field(default_factory=lambda: [1.5, 3.0, 6.0])
    other_sample_steps: list[int] = field(default_factory=lambda: [5, 10, 50])
    seeds: list[int] = field(default_factory=lambda: [0])  # of training; each variant is trained with each
    distil: int = 5  # held-out objects made into meshes, evenly spread from the best to the worst
    guidance_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 5.0])  # of the distillation
    processes: int = 2  # of training
    threads: int = 1  # of each of them; with cpu=true, processes x threads are the cores to use
    jobs: int = 1  # variants at a time, each with that many processes and threads; what they say goes to out/jobs
    cpu: bool = True  # train on the CPU; false: one process a GPU
    tables: bool = True  # write RESULTS.md; false, for jobs: make the named variants alone, and not what they meet
    list_variants: bool = False  # print the names of the chosen variants and of those whose stage 1 they take, and end
    # More overrides for single steps, for instance stage1='["steps=4"]'.
    render: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)
    stage1: list[str] = field(default_factory=list)
    stage2: list[str] = field(default_factory=list)
    generate: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)  # of the meshes; lpips=none unless it says otherwise

    def __post_init__(self) -> None:
        from study.variants import VARIANTS

        known = [variant.name for variant in VARIANTS]
        unknown = [name for name in self.variants if name not in known]
        check(not unknown, f"variants={unknown} are none of {', '.join(known)}")
        check(len(self.libraries) > 0 and len(self.seeds) > 0, "libraries and seeds must name at least one each")
        wrong = [steps for steps in (self.sample_steps, *self.other_sample_steps) if steps < 1]
        check(not wrong, f"sample_steps and other_sample_steps must be at least 1, not {wrong}")
        check(self.limit >= 0 and self.distil >= 0, "limit and distil must not be negative")
        check(0 <= self.choose_share < 1, f"choose_share={self.choose_share} must lie in [0, 1)")
        for name in ("processes", "threads", "image_size", "jobs"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.cpu or self.jobs == 1, "jobs share one machine's CPU; with GPUs, slurm/study.sh gives each its own")

    def samplings(self) -> list[tuple[str, float, int]]:
        """(name, guidance, DDIM steps) of the other samples of DRAWN_ALL_WAYS."""
        return [(f"guidance{one:g}", one, self.sample_steps) for one in self.other_guidances] + [
            (f"steps{one}", self.guidance, one) for one in self.other_sample_steps
        ]

    def distillations(self, seed: int) -> list[Distillation]:
        """By both stages with every guidance scale, by stage 1 alone with the samples' one; so the longer training."""
        from study.variants import BASE, LONGEST

        found = []
        for model in [BASE, LONGEST] if self.distils_longest() else [BASE] if self.distil else []:
            scales = {"stage2": {self.guidance, *self.guidance_scales} if model == BASE else {self.guidance},
                      "stage1": {self.guidance}}  # fmt: skip
            before = f"{model}-" if model != BASE else ""
            found += [Distillation(f"{before}{stage}-{seed}-{scale:g}", seed, model, stage, scale)
                      for stage, some in scales.items() for scale in sorted(some)]  # fmt: skip
        return found

    def distils_longest(self) -> bool:
        from study.variants import LONGEST, chosen

        return self.distil > 0 and any(one.name == LONGEST for one in chosen(self.variants))


def words_of(config: StudyConfig, without: tuple[str, ...] = ()) -> list[str]:
    """The overrides that make it: of all keys that are not at their defaults."""

    def written(value: Any) -> str:
        if isinstance(value, list):
            return "[" + ",".join(map(written, value)) + "]"
        if isinstance(value, bool) or not isinstance(value, str):
            return str(value).lower()
        return value if re.fullmatch(r"[\w./-]+", value, re.ASCII) else json.dumps(value, ensure_ascii=False)

    usual = StudyConfig()
    changed = [f.name for f in fields(config) if getattr(config, f.name) != getattr(usual, f.name)]
    return [f"{name}={written(getattr(config, name))}" for name in changed if name not in without]
