"""One object against its ground truth, by the protocol that was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import trimesh
from torch import Tensor

from data.files import UserError
from distill.evaluation import presets, shapes
from distill.evaluation.config import EvaluateConfig
from distill.evaluation.images import Perceptual, embeddings, janus_index, mask_iou, masked_psnr, plain_features
from distill.evaluation.objects import Cameras, Item, numbers_of, read_depths, read_mesh, read_pixels
from distill.evaluation.voxels import inside, volume_iou
from distill.glb import picture_of
from distill.mesh_views import mesh_views
from models.image_encoder import ClipImageEncoder
from models.image_metrics import psnr, ssim

SAME_DEG = 1.0  # cameras whose directions differ by less are one
CONVENTIONS = {
    "ours": {
        "pictures": "alpha blended over white in floating point; the ground truth scaled to the prediction's size; "
        "masked: pixels where the ground truth's alpha exceeds one half, of ssim and lpips with all others white in "
        "both; ssim: Gaussian window 11, range 1, no borders",
        "chamfer_l1": "mean of both directions' mean distances between points on the surfaces",
        "chamfer_l2": "sum of both directions' mean squared distances",
        "f_score": "at the named distance; all distances in units of the ground truth's longest side",
        "volume_iou": "grid points of the common bounding box inside by the majority of three axes' crossing parity",
        "normal_consistency": "mean |cosine| of the normals of nearest pairs, both ways",
        "janus": "mean cosine of features between the front view and those from 90 to 270 degrees",
    },
    "syncdreamer_gso": {
        "chamfer": "mean of both mean distances between points seen from 16 cameras, thinned to a 0.01 voxel grid; "
        "ground truth in a unit box, prediction as it is",
        "volume_iou": "mesh2sdf < 0 at 64^3 of [-1, 1]^3",
        "pictures": "alpha over white in floating point; torchmetrics' SSIM with its defaults; LPIPS of VGG",
    },
    "eschernet_gso": {
        "chamfer": "mean of both mean distances between the VERTICES of the meshes, each in a unit box",
        "volume_iou": "mesh2sdf < 0 at 64^3 of [-1, 1]^3",
        "pictures": "8 bits, white only where alpha is 0, 256 x 256; cv2's PSNR, skimage's SSIM; LPIPS of Alex",
    },
}


@dataclass
class Tools:
    """Networks, where they could be had."""

    lpips: Perceptual | None
    encoder: ClipImageEncoder | None
    device: torch.device


@dataclass
class Measured:
    metrics: dict[str, float | None] = field(default_factory=dict)
    # Azimuth from the reference in degrees, and PSNR, of each view with a camera.
    views: list[tuple[float, float]] = field(default_factory=list)
    pictures: Tensor | None = None  # (2, V, 3, S, S): prediction, truth
    meshes: tuple[trimesh.Trimesh, trimesh.Trimesh] | None = None  # as they were compared
    azimuths_deg: list[float] | None = None


def measure(pred: Item, truth: Item, config: EvaluateConfig, tools: Tools) -> Measured:
    """UserError naming the object where there is nothing that both have."""
    found = Measured()
    if config.preset == "ours":
        with_pictures(found, pred, truth, config, tools)
        with_meshes(found, pred, truth, config)
    else:
        with_preset(found, pred, truth, config, tools)
    if not found.metrics:
        raise UserError(
            f"{pred.name}: prediction and ground truth have neither views of the same number or camera nor meshes "
            "both; see distill/evaluation/objects.py for the names of files"
        )
    return found


# ---- pictures ----


def paired_views(pred: Item, truth: Item) -> list[tuple[int, int]]:
    """Numbers of pictures that show the same: by camera where both know theirs, else by number."""
    if not (pred.cameras and truth.cameras):
        return [(n, n) for n in sorted(numbers_of(pred) & numbers_of(truth))]
    pairs = []
    for number, camera in sorted(pred.cameras.items()):
        angles = {other: between(camera, seen) for other, seen in truth.cameras.items()}
        nearest = min(angles, key=lambda other: angles[other])
        if angles[nearest] < SAME_DEG:
            pairs.append((number, nearest))
    return pairs


def between(a: Cameras, b: Cameras) -> float:
    """Degrees between the directions in which two cameras lie."""
    cosine = F.cosine_similarity(a.c2w[:3, 3], b.c2w[:3, 3], dim=0)
    return float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))))


def with_pictures(found: Measured, pred: Item, truth: Item, config: EvaluateConfig, tools: Tools) -> None:
    pairs = paired_views(pred, truth)
    if pairs:
        rgb, alpha = stacked(truth, [b for _, b in pairs])
        ours, _ = stacked(pred, [a for a, _ in pairs])
        if ours.shape != rgb.shape:
            rgb, alpha = (F.interpolate(x, ours.shape[-2:], mode="area") for x in (rgb, alpha))
    elif pred.mesh is not None and not numbers_of(pred) and truth.cameras:
        mesh = read_mesh(pred.mesh)
        known = sorted(n for n, camera in truth.cameras.items() if np.isfinite(camera.fov_deg))
        if not known or not has_colours(mesh):
            return
        pairs = [(n, n) for n in known]
        rgb, alpha = stacked(truth, known)
        c2w = torch.stack([truth.cameras[n].c2w for n in known])
        fov = torch.tensor([truth.cameras[n].fov_deg for n in known])
        views = mesh_views(mesh, c2w, fov, rgb.shape[-1])
        ours = views.rgb.float()
        found.metrics["mask_iou"] = float(mask_iou(views.opacity > 0.5, alpha[:, 0] > 0.5).mean())
    else:
        return
    mask = alpha[:, 0] > 0.5
    quality = psnr(ours, rgb)
    found.metrics |= {
        "psnr": float(quality.mean()),
        "psnr_masked": float(masked_psnr(ours, rgb, mask).nanmean()) if bool(mask.any()) else None,
    }
    within = [torch.where(mask[:, None], images, 1.0) for images in (ours, rgb)]
    for name, (a, b) in (("", (ours, rgb)), ("_masked", within)):
        if min(ours.shape[-2:]) >= 11:
            found.metrics[f"ssim{name}"] = float(ssim(a, b).mean())
        if tools.lpips is not None:
            found.metrics[f"lpips{name}"] = float(tools.lpips(a, b).mean())

    def features(images: Tensor) -> Tensor:
        return (
            plain_features(images)
            if tools.encoder is None
            else embeddings(tools.encoder, images.to(tools.device)).cpu()
        )

    if tools.encoder is not None:
        found.metrics["clip_similarity"] = float((features(ours) * features(rgb)).sum(dim=-1).mean())
    found.pictures = torch.stack([ours, rgb])
    cameras = [truth.cameras.get(b) or pred.cameras.get(a) for a, b in pairs]
    if all(camera is not None for camera in cameras):
        azimuth = torch.tensor([camera.azimuth_deg for camera in cameras if camera is not None])
        found.azimuths_deg = azimuth.tolist()
        found.views = list(zip((azimuth - truth.reference_azimuth_deg).tolist(), quality.tolist(), strict=True))
        found.metrics["janus"] = janus_index(features(ours), azimuth)
        found.metrics["janus_truth"] = janus_index(features(rgb), azimuth)
        if config.consistency_steps:
            with_consistency(found, [camera for camera in cameras if camera is not None], config, tools.device)


def with_consistency(found: Measured, cameras: list[Cameras], config: EvaluateConfig, device: torch.device) -> None:
    """A NeRF of every other view, judged by those between: what cannot be one object is badly fitted."""
    from distill.fitting import views_agree

    if len(cameras) < 4 or not all(np.isfinite(camera.fov_deg) for camera in cameras):
        return
    assert found.pictures is not None
    order = sorted(range(len(cameras)), key=lambda i: cameras[i].azimuth_deg)
    c2w = torch.stack([cameras[i].c2w for i in order])
    fov = torch.tensor([cameras[i].fov_deg for i in order])
    for name, rgb in zip(("consistency_psnr", "consistency_psnr_truth"), found.pictures[:, order], strict=True):
        found.metrics[name] = views_agree(rgb, c2w, fov, config.consistency_steps, device, config.seed)


def stacked(item: Item, numbers: list[int]) -> tuple[Tensor, Tensor]:
    """RGB over white (V, 3, H, W) and alpha (V, 1, H, W), in [0, 1]."""
    pictures = [read_pixels(item, number) for number in numbers]
    if len({picture.shape for picture in pictures}) > 1:
        raise UserError(f"{item.name}: its pictures differ in size: {sorted({p.shape[:2] for p in pictures})}")
    rgba = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:], rgba[:, 3:]


def has_colours(mesh: trimesh.Trimesh) -> bool:
    return picture_of(mesh) is not None or getattr(mesh.visual, "kind", None) == "vertex"


# ---- meshes ----


def with_meshes(found: Measured, pred: Item, truth: Item, config: EvaluateConfig) -> None:
    if pred.mesh is None or truth.mesh is None:
        return
    one, other = (bare(read_mesh(path)) for path in (pred.mesh, truth.mesh))
    unit = 1.0 if config.normalise == "box" else float(np.ptp(other.vertices, axis=0).max())
    if config.normalise == "box":
        for mesh in (one, other):
            mesh.vertices = shapes.unit_box(np.asarray(mesh.vertices, dtype=np.float64))
    sample = shapes.sample_visible if config.surface == "visible" else shapes.sample_surface
    there = sample(other, config.points, config.seed)
    if config.align != "none":
        here = sample(one, config.points, config.seed).points
        if config.align == "yaw":
            yaw = shapes.best_yaw(here, there.points)
            found.metrics["yaw_deg"] = yaw
            one.vertices = shapes.turned(np.asarray(one.vertices), yaw)
        else:
            one.apply_transform(shapes.rigid_motion(here, there.points))
    apart = shapes.distances(sample(one, config.points, config.seed), there)
    apart = apart._replace(to_truth=apart.to_truth / unit, to_pred=apart.to_pred / unit)
    found.metrics |= {
        "chamfer_l1": shapes.chamfer_l1(apart),
        "chamfer_l2": shapes.chamfer_l2(apart),
        **{f"f_score_{near:g}": shapes.f_score(apart, near) for near in config.f_score_at},
        "normal_consistency": apart.normal_agreement,
        "volume_iou": shared_volume(one, other, config.voxels),
    }
    found.meshes = one, other


def bare(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The shape alone, corners at one place joined."""
    return trimesh.Trimesh(np.asarray(mesh.vertices, dtype=np.float64), mesh.faces, process=True)


def shared_volume(a: trimesh.Trimesh, b: trimesh.Trimesh, size: int) -> float:
    """Grid points between the sides of the common bounding box, so that no flat side lies on them."""
    low, high = np.minimum(a.bounds[0], b.bounds[0]), np.maximum(a.bounds[1], b.bounds[1])
    step = float((high - low).max()) / size
    start = (high + low) / 2 - step * (size - 1) / 2

    def cells(mesh: trimesh.Trimesh) -> np.ndarray:
        return inside(np.asarray(mesh.vertices)[mesh.faces] - start, size, 0.0, step)

    return volume_iou(cells(a), cells(b))


# ---- other papers' protocols ----


def with_preset(found: Measured, pred: Item, truth: Item, config: EvaluateConfig, tools: Tools) -> None:
    if pred.mesh is not None and truth.mesh is not None:
        at_corners = config.preset == "eschernet_gso"  # which are counted, and its script merges them
        meshes = read_mesh(pred.mesh, at_corners), read_mesh(truth.mesh, at_corners)
        if config.preset == "syncdreamer_gso":
            values = presets.syncdreamer_mesh(*meshes, read_depths(truth), config.truth_yaw_deg)
        else:
            values = presets.eschernet_mesh(*meshes)
        found.metrics |= values
        found.meshes = meshes
    one = presets.syncdreamer_view if config.preset == "syncdreamer_gso" else presets.eschernet_view
    rows: list[dict[str, Any]] = []
    shown = []
    for number in sorted(numbers_of(pred) & numbers_of(truth)):
        a, b = read_pixels(pred, number), read_pixels(truth, number)
        if config.preset == "syncdreamer_gso":
            seen = presets.over_white(a), presets.over_white(b)
        else:
            low = presets.eschernet_picture(a[..., :3]), presets.eschernet_picture(b)
            seen = low[0].astype(np.float32) / 255, low[1].astype(np.float32) / 255
        if seen[0].shape != seen[1].shape:
            raise UserError(f"{pred.name}: view {number} is {a.shape[:2]}, the ground truth's {b.shape[:2]}")
        rows.append(one(a, b))
        pair = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2)
        shown.append(pair)
        if tools.lpips is not None:
            rows[-1]["lpips"] = float(tools.lpips(pair[:1], pair[1:])[0])
    if rows:
        found.metrics |= {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        found.pictures = torch.stack(shown, dim=1)
