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

SSIM_WINDOW = 11
ROUNDS = 5  # of nearest points and a new box
SAME_DEG = 1.0  # cameras whose directions differ by less are one
CONVENTIONS = {
    "ours": {
        "pictures": "alpha blended over white in floating point; the ground truth scaled to the prediction's size; "
        "masked: pixels where the ground truth's alpha exceeds one half, of ssim and lpips with all others white in "
        "both; ssim: Gaussian window 11, range 1, no borders",
        "chamfer_l1": "mean of both directions' mean distances between points on the surfaces",
        "chamfer_l2": "sum of both directions' mean squared distances",
        "f_score": "at the named distance; all distances in units of the ground truth's longest side",
        "volume_iou": "grid points of the common bounding box inside by the majority of three axes: on each, more "
        "triangles before the point face one way than the other; where a line does not come out even, or more than a "
        "tenth of them do not, an odd number of triangles",
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
        "pictures": "numbers 10 and on, where both sides have such; 8 bits, white only where alpha is 0, 256 x 256; "
        "cv2's PSNR, skimage's SSIM; LPIPS of Alex",
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
    lacking: dict[str, str] = field(default_factory=dict)  # what could not be measured of this object, and why
    # Azimuth from the reference in degrees, and PSNR, of each view with a camera.
    views: list[tuple[float, float]] = field(default_factory=list)
    pictures: Tensor | None = None  # (2, V, 3, S, S): prediction, truth
    meshes: tuple[trimesh.Trimesh, trimesh.Trimesh] | None = None  # as they were compared
    azimuths_deg: list[float] | None = None


def measure(pred: Item, truth: Item | None, config: EvaluateConfig, tools: Tools) -> Measured:
    """UserError naming the object where there is nothing that both have; without truth, consistency alone."""
    found = Measured()
    if truth is None:
        with_views_alone(found, pred, config, tools)
    elif config.preset == "ours":
        with_pictures(found, pred, truth, config, tools)
        with_meshes(found, pred, truth, config)
    else:
        with_preset(found, pred, truth, config, tools)
    if not found.metrics:
        if truth is None:
            why = "; ".join(found.lacking.values()) or "it has no pictures"
            raise UserError(f"{pred.name}: nothing can be measured without truth=: {why}")
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
    compared = pictures_to_compare(found, pred, truth, config)
    if compared is None:
        return
    ours, rgb, alpha, cameras = compared
    found.metrics["views"] = len(ours)
    quality = psnr(ours, rgb)
    found.metrics["psnr"] = float(quality.mean())
    kinds: dict[str, list[Tensor]] = {"": [ours, rgb]}
    mask = alpha[:, 0] > 0.5
    if bool((alpha == 1).all()):
        found.lacking["psnr_masked, ssim_masked, lpips_masked, mask_iou"] = "the ground truth's pictures have no alpha"
        found.metrics.pop("mask_iou", None)
    elif not bool(mask.any()):
        found.lacking["psnr_masked, ssim_masked, lpips_masked"] = "the ground truth's pictures are empty"
    else:
        found.metrics["psnr_masked"] = float(masked_psnr(ours, rgb, mask).nanmean())
        kinds["_masked"] = [torch.where(mask[:, None], images, 1.0) for images in (ours, rgb)]
    for name, (a, b) in kinds.items():
        if min(ours.shape[-2:]) >= SSIM_WINDOW:
            found.metrics[f"ssim{name}"] = float(ssim(a, b).mean())
        else:
            found.lacking["ssim"] = f"the pictures are smaller than its window of {SSIM_WINDOW} pixels"
        if tools.lpips is not None:
            found.metrics[f"lpips{name}"] = float(tools.lpips(a, b).mean())
    if tools.encoder is not None:
        found.metrics["clip_similarity"] = float((features(ours, tools) * features(rgb, tools)).sum(dim=-1).mean())
    found.pictures = torch.stack([ours, rgb])
    if config.consistency_steps:
        with_consistency(found, {"": ours, "_truth": rgb}, cameras, config, tools.device)
    azimuth = azimuths_of(cameras)
    if azimuth is None:
        found.lacking["janus, quality by azimuth"] = "no cameras are known: neither meta.json nor cameras.json"
        return
    found.azimuths_deg = azimuth.tolist()
    found.views = list(zip((azimuth - truth.reference_azimuth_deg).tolist(), quality.tolist(), strict=True))
    found.metrics["janus"] = janus_index(features(ours, tools), azimuth)
    found.metrics["janus_truth"] = janus_index(features(rgb, tools), azimuth)


def pictures_to_compare(
    found: Measured, pred: Item, truth: Item, config: EvaluateConfig
) -> tuple[Tensor, Tensor, Tensor, list[Cameras | None]] | None:
    """Prediction and truth (V, 3, H, W), the truth's alpha (V, 1, H, W), and the cameras; None where there are none."""
    pairs = paired_views(pred, truth)
    if pairs:
        rgb, alpha = stacked(truth, [b for _, b in pairs])
        ours, _ = stacked(pred, [a for a, _ in pairs])
        if ours.shape != rgb.shape:
            rgb, alpha = (F.interpolate(x, ours.shape[-2:], mode="area") for x in (rgb, alpha))
        return ours, rgb, alpha, [truth.cameras.get(b) or pred.cameras.get(a) for a, b in pairs]
    if numbers_of(pred) and numbers_of(truth):
        found.lacking["pictures"] = "prediction and ground truth have no view of the same number or camera"
    elif numbers_of(truth) and pred.mesh is not None:
        mesh = read_mesh(pred.mesh)
        known = sorted(n for n, camera in truth.cameras.items() if np.isfinite(camera.fov_deg))
        if known and has_colours(mesh):
            rgb, alpha = stacked(truth, known)
            cameras: list[Cameras | None] = [truth.cameras[n] for n in known]
            c2w = torch.stack([truth.cameras[n].c2w for n in known])
            views = mesh_views(mesh, c2w, torch.tensor([truth.cameras[n].fov_deg for n in known]), rgb.shape[-1])
            found.metrics["mask_iou"] = float(mask_iou(views.opacity > 0.5, alpha[:, 0] > 0.5).mean())
            return views.rgb.float(), rgb, alpha, cameras
        found.lacking["pictures"] = "the mesh has no colours" if known else "the ground truth's cameras are not known"
    elif numbers_of(truth) or numbers_of(pred):
        found.lacking["pictures"] = f"only the {'ground truth' if numbers_of(truth) else 'prediction'} has any"
    return None


def features(images: Tensor, tools: Tools) -> Tensor:
    return plain_features(images) if tools.encoder is None else embeddings(tools.encoder, images.to(tools.device)).cpu()


def azimuths_of(cameras: list[Cameras | None]) -> Tensor | None:
    """In degrees; None where a camera is not known."""
    known = [camera.azimuth_deg for camera in cameras if camera is not None]
    return torch.tensor(known) if known and len(known) == len(cameras) else None


def with_views_alone(found: Measured, pred: Item, config: EvaluateConfig, tools: Tools) -> None:
    """What needs no ground truth: whether the views can be of one object, and whether its sides look alike."""
    numbers = sorted(numbers_of(pred))
    if not numbers:
        return
    rgb, _ = stacked(pred, numbers)
    cameras = [pred.cameras.get(number) for number in numbers]
    found.pictures = rgb[None]
    with_consistency(found, {"": rgb}, cameras, config, tools.device)
    azimuth = azimuths_of(cameras)
    if azimuth is not None:
        found.azimuths_deg = azimuth.tolist()
        found.metrics["janus"] = janus_index(features(rgb, tools), azimuth)


def with_consistency(
    found: Measured, kinds: dict[str, Tensor], cameras: list[Cameras | None], config: EvaluateConfig,
    device: torch.device,
) -> None:  # fmt: skip
    """A NeRF of every other view, judged by those between: what cannot be one object is badly fitted."""
    from distill.fitting import views_agree

    known = [camera for camera in cameras if camera is not None]
    if len(known) < len(cameras) or len(known) < 4:
        found.lacking["consistency_psnr"] = "it takes four views or more whose cameras are known"
        return
    if any(rgb.shape[-1] != rgb.shape[-2] for rgb in kinds.values()):
        found.lacking["consistency_psnr"] = "the pictures are not square"
        return
    fovs = [camera.fov_deg if np.isfinite(camera.fov_deg) else config.fov_deg for camera in known]
    if any(fov is None for fov in fovs):
        found.lacking["consistency_psnr"] = "the cameras do not say their field of view; give fov_deg="
        return
    order = sorted(range(len(known)), key=lambda i: known[i].azimuth_deg)
    c2w = torch.stack([known[i].c2w for i in order])
    fov = torch.tensor([fovs[i] for i in order])
    for name, rgb in kinds.items():
        agree = views_agree(rgb[order], c2w, fov, config.consistency_steps, device, config.seed)
        found.metrics[f"consistency_psnr{name}"] = agree


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
        if pred.mesh is not None or truth.mesh is not None:
            found.lacking["shapes"] = f"only the {'ground truth' if pred.mesh is None else 'prediction'} has a mesh"
        return
    one, other = (bare(read_mesh(path)) for path in (pred.mesh, truth.mesh))
    unit = 1.0 if config.normalise == "box" else float(np.ptp(other.vertices, axis=0).max())
    if config.normalise == "box":
        for mesh in (one, other):
            mesh.vertices = shapes.unit_box(np.asarray(mesh.vertices, dtype=np.float64))
    sample = shapes.sample_visible if config.surface == "visible" else shapes.sample_surface
    there = sample(other, config.points, config.seed)
    if config.align != "none":
        aligned(found, one, sample(one, config.points, config.seed).points, there.points, config)
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


def aligned(
    found: Measured, mesh: trimesh.Trimesh, here: np.ndarray, there: np.ndarray, config: EvaluateConfig
) -> None:
    """Turns the mesh, of which `here` are points, to the points `there`; what is turned has another box."""
    boxed = config.normalise == "box"
    yaw = shapes.best_yaw(here, there, np.asarray(mesh.vertices) if boxed else None)
    points = shapes.turned(here, yaw)
    vertices = shapes.turned(np.asarray(mesh.vertices), yaw)
    if config.align == "yaw":
        found.metrics["yaw_deg"] = yaw
    for _ in range(ROUNDS if config.align == "icp" else 0):
        if boxed:
            points, vertices = shapes.in_box_of(points, vertices), shapes.unit_box(vertices)
        motion = shapes.rigid_motion(points, there)
        points, vertices = (shapes.moved(motion, some) for some in (points, vertices))
        if not boxed:
            break
    # After the nearest points no box, which would undo their shift.
    mesh.vertices = shapes.unit_box(vertices) if boxed and config.align == "yaw" else vertices


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
            given = config.truth_yaw_deg
            yaw = presets.YAWS_DEG.get(truth.name, 0.0) if given is None else given
            values = presets.syncdreamer_mesh(*meshes, read_depths(truth), yaw)
        else:
            values = presets.eschernet_mesh(*meshes)
        found.metrics |= values
        found.meshes = meshes
    else:
        found.lacking["shapes"] = "not both sides have a mesh"
    one = presets.syncdreamer_view if config.preset == "syncdreamer_gso" else presets.eschernet_view
    rows: list[dict[str, Any]] = []
    shown = []
    numbers = sorted(numbers_of(pred) & numbers_of(truth))
    if config.preset == "eschernet_gso" and numbers and numbers[-1] >= presets.ESCHERNET_FIRST:
        numbers = [number for number in numbers if number >= presets.ESCHERNET_FIRST]
    for number in numbers:
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
    if not rows:
        found.lacking["pictures"] = "prediction and ground truth have none of the same number"
    else:
        found.metrics |= {"views": len(rows)} | {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
        found.pictures = torch.stack(shown, dim=1)
