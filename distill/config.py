"""What can be chosen for `python distill/generate.py`.  The defaults are the released configuration.

"released" is github.com/pkunliu/Isotropic3D, configs/isotropic3d-shading.yaml.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import MISSING

from conf.cli import check
from distill.backend import BACKENDS
from distill.field import FieldConfig
from distill.volume import VolumeConfig
from models.config import ReferenceConfig
from monitor.config import WandbConfig


@dataclass
class ScheduleConfig:
    """How the run divides.  Everything is a share of `steps`, so that a shorter run keeps its shape."""

    milestones: list[float] = field(default_factory=lambda: [0.5])  # where a phase ends and the next begins
    resolutions: list[int] = field(default_factory=lambda: [64, 256])  # rendered pixels a side, per phase
    sets: list[int] = field(default_factory=lambda: [2, 1])  # of V views a step, per phase (8, 4 pictures)

    def __post_init__(self) -> None:
        phases = len(self.milestones) + 1
        check(
            len(self.resolutions) == len(self.sets) == phases,
            f"schedule: {len(self.milestones)} milestones make {phases} phases, but resolutions={self.resolutions} "
            f"and sets={self.sets}; give one of each per phase",
        )
        check(
            all(0 < a < 1 for a in self.milestones) and sorted(self.milestones) == self.milestones,
            f"schedule.milestones={self.milestones} must be rising shares of the run between 0 and 1",
        )
        check(min(self.resolutions) >= 8, f"schedule.resolutions={self.resolutions} must be at least 8 pixels")
        check(min(self.sets) >= 1, f"schedule.sets={self.sets} must be at least 1")

    def at(self, progress: float) -> tuple[int, int]:
        """(resolution, sets) at `progress` in [0, 1)."""
        phase = sum(progress >= milestone for milestone in self.milestones)
        return self.resolutions[phase], self.sets[phase]


@dataclass
class GuidanceConfig:
    # sds: towards the guided x0 (released); asd: Asynchronous Score Distillation (arXiv 2407.02040), for which guidance
    # of 7.5 is usual and half as much again is computed.
    method: str = "sds"
    asd_share: float = 0.1  # of a timestep's height: how far later the rendering's own noise is predicted
    scale: float = 10.0  # classifier-free guidance (released)
    std_rescale: float = 0.5  # share of the guided x0 that gets the conditional one's spread (released)
    # The timesteps drawn from, as shares of all of them: start and end of the annealing.
    t_lowest: list[float] = field(default_factory=lambda: [0.98, 0.02])  # start, end (released)
    t_highest: list[float] = field(default_factory=lambda: [0.98, 0.50])  # (released)
    anneal_share: float = 0.8  # of the run over which both fall (released: 8000 of 10000)

    def __post_init__(self) -> None:
        for name, ends in (("t_lowest", self.t_lowest), ("t_highest", self.t_highest)):
            check(
                len(ends) == 2 and all(0 <= e < 1 for e in ends),
                f"guidance.{name}={ends} must be two shares in [0, 1): at the start and at the end",
            )
        check(
            self.t_lowest[0] <= self.t_highest[0] and self.t_lowest[1] <= self.t_highest[1],
            f"guidance.t_lowest={self.t_lowest} must not exceed guidance.t_highest={self.t_highest}",
        )
        check(self.method in ("sds", "asd"), f"guidance.method={self.method} must be sds or asd")
        check(0 <= self.asd_share <= 1, f"guidance.asd_share={self.asd_share} must lie in [0, 1]")
        check(0 < self.anneal_share <= 1, f"guidance.anneal_share={self.anneal_share} must lie in (0, 1]")
        check(0 <= self.std_rescale <= 1, f"guidance.std_rescale={self.std_rescale} must lie in [0, 1]")
        check(self.scale >= 0, f"guidance.scale={self.scale} must not be negative")


@dataclass
class LossConfig:
    sds: float = 1.0
    orientation: list[float] = field(default_factory=lambda: [10.0, 1000.0])  # start, end (released)
    orientation_share: float = 0.5  # of the run over which it rises (released: 5000 of 10000)
    sparsity: float = 0.0  # the next three: off in the released configuration
    opaque: float = 0.0
    depth_variance: float = 0.0

    def __post_init__(self) -> None:
        check(len(self.orientation) == 2, f"loss.orientation={self.orientation} must be two weights: start and end")
        check(0 < self.orientation_share <= 1, f"loss.orientation_share={self.orientation_share} must lie in (0, 1]")


@dataclass
class LightConfig:
    ambient_share: float = 0.5  # of the run that sees plain albedo only (released: 5000 of 10000)
    diffuse_prob: float = 0.75  # after it: chance of shading at all (threestudio's default, which the release keeps)
    textureless_prob: float = 0.5  # and of white material among the shaded (released)

    def __post_init__(self) -> None:
        for name in ("ambient_share", "diffuse_prob", "textureless_prob"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"light.{name}={value} must lie in [0, 1]")


@dataclass
class OptimizerConfig:
    lr_grid: float = 0.01  # hash table (released)
    lr_network: float = 0.001  # both networks (released)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])  # AdamW (released)
    eps: float = 1e-15  # (released)
    weight_decay: float = 0.01  # torch's default for AdamW, which the release keeps

    def __post_init__(self) -> None:
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas={self.betas} must be two numbers in [0, 1)",
        )
        for name in ("lr_grid", "lr_network", "eps", "weight_decay"):
            value = getattr(self, name)
            check(0 <= value < math.inf, f"optimizer.{name}={value} must be a number that is not negative")


@dataclass
class MeshConfig:
    resolution: int = 256  # marching-cubes cells a side (threestudio's isosurface resolution)
    keep_share: float = 0.02  # pieces with a smaller share of the largest one's faces are floaters and dropped
    faces: int = 40_000  # decimated to about as many triangles; 0: left as marching cubes made them
    watertight: bool = False  # a mesh that does not close is an error, not only a fact in result.json
    texture_size: int = 1024  # texels a side of the albedo's picture; 0: colours at the vertices instead
    unwrap_limit_s: float = 120.0  # seconds that finding texture coordinates may take; then colours at the vertices
    obj: bool = False  # mesh.obj, mesh.mtl and mesh.png beside mesh.glb

    def __post_init__(self) -> None:
        check(16 <= self.resolution <= 1024, f"mesh.resolution={self.resolution} must be 16 to 1024")
        check(0 <= self.keep_share <= 1, f"mesh.keep_share={self.keep_share} must lie in [0, 1]")
        check(self.faces == 0 or self.faces >= 100, f"mesh.faces={self.faces} must be at least 100, or 0 for all")
        check(
            self.texture_size == 0
            or (64 <= self.texture_size <= 8192 and self.texture_size & (self.texture_size - 1) == 0),
            f"mesh.texture_size={self.texture_size} must be a power of two from 64 to 8192, or 0 for none",
        )
        check(self.unwrap_limit_s > 0, f"mesh.unwrap_limit_s={self.unwrap_limit_s} must be positive")


@dataclass
class TurntableConfig:
    frames: int = 60  # one turn
    fps: int = 20
    size: int = 256  # pixels a side of each of the two pictures
    views: int = 8  # columns of the PNG strip

    def __post_init__(self) -> None:
        check(1 <= self.fps <= 120, f"turntable.fps={self.fps} must be 1 to 120")
        check(self.frames >= 2 and self.views >= 1, "turntable.frames must be at least 2 and turntable.views 1")
        check(self.size >= 16 and self.size % 16 == 0, f"turntable.size={self.size} must be a multiple of 16 (video)")


def joined_words(words: list[str]) -> list[str]:
    """Command-line words with those that are pictures, neither key=value nor an option, put into one override."""
    options = {"-c", "--cfg", "-p", "--package", "-cn", "--config-name", "-cd", "--config-dir", "-cp", "--config-path"}
    keys = {key.name for key in fields(GenerateConfig)}

    def is_picture(word: str) -> bool:
        key = word.split("=", maxsplit=1)[0]
        return "=" not in word or (key.split(".")[0] not in keys and Path(word).is_file())

    def literal(word: str) -> str:
        """The name of a file that is there is no list of a sweep's values and no formula; nor is out= without comma."""
        key, _, value = word.partition("=")
        there = key in ("image", "embedding", "checkpoint") and Path(value).exists()
        odd = key == "out" and re.fullmatch(r"[^'\",$][^\",$]*", value) and re.search(r"[=()\[\]{}' ]", value)
        return f"{key}={quoted(value)}" if there or odd else word

    images = [word for before, word in zip(["", *words], words, strict=False)
              if is_picture(word) and not word.startswith("-") and before not in options]  # fmt: skip
    words = [literal(word) for word in words if word not in images]
    return [*words, f"more_images=[{','.join(map(quoted, images))}]"] if images else words


def quoted(word: str) -> str:
    """As Hydra reads a value with spaces or signs in it: a backslash counts as such unless a quote follows."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), word) + "'"


@dataclass
class GenerateConfig:
    checkpoint: str = MISSING  # export/ folder of a training run
    image: str | None = None  # picture of the object; only its embedding is used.  Or a folder of pictures
    more_images: list[str] = field(default_factory=list)  # further ones: the words without "=" on the command line
    embedding: str | None = None  # instead of a picture, a file: see models/given_embedding.py
    out: str = MISSING  # folder for the results, with one below it for each of several images; a run there is continued
    objects_at_once: int = 1  # images that share a batch of the diffusion model; fewer do where memory runs out
    name: str = "isotropic3d"  # of the pipeline, as its stages have it; W&B shows them together
    wandb: WandbConfig = field(default_factory=lambda: WandbConfig(mode="disabled"))
    steps: int = 10_000  # (released)
    seed: int = 0
    device: str = "auto"  # auto takes a CUDA device where there is one
    backend: str = "auto"  # of the renderer: torch, triton, or auto, which is triton on CUDA
    compile: str | None = "auto"  # torch.compile's backend for the diffusion model; auto: inductor on CUDA; null: none
    dtype: str = "auto"  # of the diffusion model: float32, bfloat16; auto is bfloat16 on CUDA, float32 elsewhere
    preview: int | None = None  # port of a web page that shows the objects while they are distilled; null: none
    snapshot_every: int = 500  # steps between snapshots to continue from
    elevation_deg: list[float] | None = None  # low, high; null: what the checkpoint was trained on
    fov_deg: list[float] | None = None  # vertical, likewise
    framing: list[float] | None = None  # distance * tan(fov / 2) in object units, likewise
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    light: LightConfig = field(default_factory=LightConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    volume: VolumeConfig = field(default_factory=VolumeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    turntable: TurntableConfig = field(default_factory=TurntableConfig)
    field: FieldConfig = field(default_factory=FieldConfig)  # last: it hides dataclasses.field

    def __post_init__(self) -> None:
        pictures = [*([] if self.image is None else [self.image]), *self.more_images]
        check(bool(pictures) or self.embedding is not None, "image is not set; give image=... (or embedding=...)")
        check(
            not pictures or self.embedding is None,
            f"embedding={self.embedding} stands instead of pictures, and {', '.join(pictures)} is given too; give one",
        )
        check(self.steps >= 1, f"steps={self.steps} must be at least 1")
        check(self.objects_at_once >= 1, f"objects_at_once={self.objects_at_once} must be at least 1")
        check(
            self.preview is None or 1 <= self.preview <= 65535,
            f"preview={self.preview} must be a port from 1 to 65535, such as 8080, or null",
        )
        check(self.snapshot_every >= 1, f"snapshot_every={self.snapshot_every} must be at least 1")
        check(self.dtype in ("auto", "float32", "bfloat16"), f"dtype={self.dtype} must be auto, float32 or bfloat16")
        check(self.backend in BACKENDS, f"backend={self.backend} must be one of {', '.join(BACKENDS)}")
        for name in ("elevation_deg", "fov_deg", "framing"):
            ends = getattr(self, name)
            check(
                ends is None or (len(ends) == 2 and ends[0] <= ends[1]),
                f"{name}={ends} must be null or two numbers, low and high",
            )
        if self.elevation_deg is not None:
            check(
                self.elevation_deg[0] > -90 and self.elevation_deg[1] < 90,
                f"elevation_deg={self.elevation_deg} must lie between -90 and 90",
            )
        if self.framing is not None:
            check(self.framing[0] > 0, f"framing={self.framing} must be above 0: a camera at the object sees nothing")
        check(0 <= self.seed < 2**31, f"seed={self.seed} must be 0 to {2**31 - 1}")
        if self.fov_deg is not None:
            check(self.fov_deg[0] > 0 and self.fov_deg[1] < 180, f"fov_deg={self.fov_deg} must lie between 0 and 180")
