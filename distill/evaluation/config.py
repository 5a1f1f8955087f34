"""What can be chosen for `python distill/evaluate.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.cli import check

PRESETS = ("ours", "syncdreamer_gso", "eschernet_gso")


@dataclass
class EvaluateConfig:
    pred: str = MISSING  # what is judged: a mesh, a folder of one object, or a folder of objects
    truth: str | None = None  # what it is judged by, likewise, under the same names; null: consistency and Janus alone
    out: str = "evaluation"  # folder for evaluation.json, evaluation.html and pictures
    preset: str = "ours"  # ours, or another paper's protocol: syncdreamer_gso, eschernet_gso
    # How meshes are brought together (preset ours). box: longest side 1, centred, each by itself.
    normalise: str = "box"  # box or none
    align: str = "none"  # none; yaw: the best turn about z; icp: that, and then the nearest rigid motion
    points: int = 100_000  # on each mesh
    surface: str = "visible"  # visible: what cameras around it see; all: inside parts too
    f_score_at: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.05])  # of the ground truth's longest side
    voxels: int = 96  # a side of the common bounding box
    # syncdreamer_gso: the angle by which its script turns the ground truth; null: by its table of GSO30's names, or not
    truth_yaw_deg: float | None = None
    # Pictures.
    lpips: str = "alex"  # alex or vgg; a preset has its own; none leaves it out
    lpips_backbone: str | None = None  # torchvision's weights of that network as a file; null: from its hub or cache
    image_encoder: str | None = None  # folder of a ClipImageEncoder, such as an export's image_encoder/; null: none
    consistency_steps: int = 0  # of the NeRF that half of the views are fitted with; 0 leaves it out
    fov_deg: float | None = None  # of pictures whose cameras do not say it, such as models/sample.py's
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check(
            self.truth is not None or (self.consistency_steps > 0 and self.preset == "ours"),
            "truth= is missing: the ground truth; without it only preset=ours consistency_steps=500 can be measured",
        )
        check(self.fov_deg is None or 0 < self.fov_deg < 180, f"fov_deg={self.fov_deg} must lie between 0 and 180")
        check(self.preset in PRESETS, f"preset={self.preset} must be one of {', '.join(PRESETS)}")
        check(self.normalise in ("box", "none"), f"normalise={self.normalise} must be box or none")
        check(self.align in ("none", "yaw", "icp"), f"align={self.align} must be none, yaw or icp")
        check(self.surface in ("visible", "all"), f"surface={self.surface} must be visible or all")
        check(self.lpips in ("alex", "vgg", "none"), f"lpips={self.lpips} must be alex, vgg or none")
        check(self.points >= 1000, f"points={self.points} must be at least 1000")
        check(16 <= self.voxels <= 512, f"voxels={self.voxels} must be 16 to 512")
        check(
            len(self.f_score_at) > 0 and all(0 < near < 1 for near in self.f_score_at),
            f"f_score_at={self.f_score_at} must be shares of the longest side between 0 and 1",
        )
        check(self.consistency_steps >= 0, f"consistency_steps={self.consistency_steps} must not be negative")
