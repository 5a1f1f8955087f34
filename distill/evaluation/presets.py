"""Other papers' protocols, as their published scripts compute them, from meshes and pictures.

syncdreamer_gso: github.com/liuyuan-pal/SyncDreamer, eval_mesh.py and eval_nvs.py (commit eb41a0c).
eschernet_gso: github.com/kxhit/EscherNet, metrics/eval_3D_GSO.py, eval_2D_NVS.py and metrics.py (commit 7b027bc).
Both say "Chamfer distance on GSO30", and measure different things; each function says what.
Shapes: X vertices, T triangles, P points; pictures are (H, W, 3 or 4) uint8.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import trimesh
from PIL import Image
from scipy.spatial import cKDTree
from skimage.metrics import structural_similarity
from torchmetrics.functional.image import structural_similarity_index_measure

from data.cameras import orbit_camera
from data.files import UserError
from distill.evaluation.shapes import unit_box
from distill.evaluation.voxels import mesh2sdf_inside, volume_iou
from distill.silhouette import filled, flat_weights

SIZE, FOCAL, DISTANCE, ELEVATION_DEG, VIEWS = 256, 280.0, 1.5, 30.0, 16  # SyncDreamer's meta_info/camera-16.pkl
VOXEL = 0.01  # open3d's voxel_down_sample, in units of the ground truth's longest side
DEPTH_RANGE = (0.6, 2.4)  # of SyncDreamer's depth PNGs, 16 bits
DEPTH_VALID = (0.63, 2.37)
# By which the script turns GSO30's ground truths, in degrees by name.
YAWS_DEG = {
    "sofa": -90.0, "elephant": 180.0, "school_bus1": 180.0, "sorter": 112.5,
    **dict.fromkeys(("school_bus2", "shoe", "train", "turtle"), 225.0),
    **dict.fromkeys(("blocks", "alarm", "backpack", "chicken", "soap", "grandfather", "grandmother", "lion",
                     "lunch_bag", "mario", "oil"), 270.0),
}  # fmt: skip
ESCHERNET_FIRST = 10  # the pictures before it may have been the network's input


def both_ways(a: np.ndarray, b: np.ndarray) -> float:
    """Mean of the two mean distances, not squared; both papers' "Chamfer distance"."""
    return float(cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()) / 2


# ---- SyncDreamer ----


def syncdreamer_mesh(
    pred: trimesh.Trimesh, truth: trimesh.Trimesh, truth_depth: np.ndarray | None = None, truth_yaw_deg: float = 0.0
) -> dict[str, float]:
    """Chamfer distance between what 16 cameras see of each mesh, and mesh2sdf's volume IoU at 64^3.

    The ground truth is scaled to a unit box, and then turned by -`truth_yaw_deg` about z (of GSO30's: YAWS_DEG); the
    prediction is taken as it is: z up, in the scale and place of the pictures.
    truth_depth (16, 256, 256) uint16: the data set's own depth pictures, which the script prefers to the mesh.
    """
    turn = trimesh.transformations.rotation_matrix(-np.radians(truth_yaw_deg), [0, 0, 1])[:3, :3]
    true = unit_box(np.asarray(truth.vertices, dtype=np.float64)) @ turn.T
    found = np.asarray(pred.vertices, dtype=np.float64)
    require_before_cameras(found)
    true_points = seen_points(true, truth.faces) if truth_depth is None else points_of_depth(truth_depth)
    return {
        "chamfer": both_ways(seen_points(found, pred.faces), true_points),
        "volume_iou": volume_iou(mesh2sdf_inside(found, pred.faces), mesh2sdf_inside(true, truth.faces)),
    }


def require_before_cameras(vertices: np.ndarray) -> None:
    radius = float(np.linalg.norm(vertices, axis=1).max())
    if radius >= DISTANCE - 0.5:  # its rasteriser's near plane
        raise UserError(
            "syncdreamer_gso takes meshes as its pictures show them, within a unit box at the origin; this one reaches "
            f"{radius:.3g} from it; scale the mesh"
        )


def camera_16(number: int) -> np.ndarray:
    """(4, 4), camera to world, OpenGL."""
    return orbit_camera(torch.tensor(number * 360.0 / VIEWS), ELEVATION_DEG, DISTANCE).double().numpy()


def seen_points(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(P, 3): each pixel's first triangle put back into space, all views together, then averaged in voxels."""
    return thinned(np.concatenate([
        back_projected(*flat_depth(vertices, triangles, camera_16(number)), camera_16(number))
        for number in range(VIEWS)
    ]))  # fmt: skip


def flat_depth(vertices: np.ndarray, triangles: np.ndarray, c2w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth and mask (256, 256).  Depth is interpolated without perspective: the script's rasteriser gets w = 1."""
    local = (vertices - c2w[:3, 3]) @ c2w[:3, :3] * (1, -1, -1)
    pixels = FOCAL * local[:, :2] / local[:, 2:] + SIZE / 2
    depth = np.full(SIZE * SIZE, np.inf)
    corners, away = pixels[triangles], local[:, 2][triangles]
    for face, pixel, _ in filled(corners, SIZE):
        weights = flat_weights(corners[face], np.stack([pixel % SIZE + 0.5, pixel // SIZE + 0.5], axis=1))
        np.minimum.at(depth, pixel, np.einsum("ki,ki->k", weights, away[face]))
    grid = depth.reshape(SIZE, SIZE)
    return grid, np.isfinite(grid)


def back_projected(depth: np.ndarray, mask: np.ndarray, c2w: np.ndarray) -> np.ndarray:
    """Pixels with a depth -> points (P, 3), through whole-numbered rows and columns as the script does, not centres."""
    row, column = np.nonzero(mask)
    away = depth[row, column]
    local = np.stack([(column - SIZE / 2) / FOCAL * away, -(row - SIZE / 2) / FOCAL * away, -away], axis=1)
    return (local @ c2w[:3, :3].T + c2w[:3, 3]).astype(np.float32)


def points_of_depth(pictures: np.ndarray) -> np.ndarray:
    """(16, 256, 256) uint16 -> (P, 3)."""
    if pictures.shape != (VIEWS, SIZE, SIZE) or pictures.dtype != np.uint16:
        raise UserError(
            f"syncdreamer_gso's depth pictures are {VIEWS} of {SIZE} x {SIZE} in 16 bits, not {pictures.shape} of "
            f"{pictures.dtype}"
        )
    low, high = DEPTH_RANGE
    depth = pictures.astype(np.float32) / 65535 * (high - low) + low
    valid = (depth > DEPTH_VALID[0]) & (depth < DEPTH_VALID[1])
    return thinned(
        np.concatenate([back_projected(d, m, camera_16(i)) for i, (d, m) in enumerate(zip(depth, valid, strict=True))])
    )


def thinned(points: np.ndarray, voxel: float = VOXEL) -> np.ndarray:
    """One point a voxel, the mean of those in it; the grid starts half a voxel before the least coordinate (open3d)."""
    points = points.astype(np.float64)
    cell = np.floor((points - (points.min(axis=0) - voxel / 2)) / voxel).astype(np.int64)
    _, which, count = np.unique(cell, axis=0, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(which.ravel(), weights=points[:, i]) for i in range(3)], axis=1)
    return (sums / count[:, None]).astype(np.float32)


def syncdreamer_view(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """PSNR and SSIM of pictures over white, alpha blended in floating point; LPIPS is of the VGG kind."""
    a, b = (torch.from_numpy(over_white(picture)).permute(2, 0, 1)[None] for picture in (pred, truth))
    error = float((a - b).square().mean())
    # The script's SSIM: torchmetrics' with its defaults, whose range of values is the pictures' own.
    return {
        "psnr": 10 * math.log10(1 / max(error, 1e-30)),
        "ssim": float(structural_similarity_index_measure(a, b)),  # type: ignore[arg-type]
    }


def over_white(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3 or 4) uint8 -> (H, W, 3) fp32 in [0, 1]."""
    values = picture.astype(np.float32) / 255
    if values.shape[2] == 3:
        return values
    alpha = values[..., 3:]
    return values[..., :3] * alpha + (1 - alpha)


# ---- EscherNet ----


def eschernet_mesh(pred: trimesh.Trimesh, truth: trimesh.Trimesh) -> dict[str, float]:
    """Chamfer distance between the VERTICES of both meshes, and mesh2sdf's volume IoU, both scaled to unit boxes.

    So a mesh of large triangles is judged at its corners alone, and twice the triangles is another distance.
    """
    a, b = (unit_box(np.asarray(mesh.vertices, dtype=np.float64)) for mesh in (pred, truth))
    # Scaled again after the turns of other methods: the same numbers but for rounding, which decides on the grid.
    a = unit_box(a)
    return {
        "chamfer": both_ways(b, a),
        "volume_iou": volume_iou(mesh2sdf_inside(a, pred.faces), mesh2sdf_inside(b, truth.faces)),
    }


def eschernet_view(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """PSNR (cv2's) and SSIM (skimage's, window of 7) of 8-bit pictures of 256 x 256; LPIPS is of the Alex kind.

    Pixels of the ground truth are white where alpha is 0 and keep their unblended colour elsewhere; alpha of the
    prediction is ignored.
    """
    a, b = eschernet_picture(pred[..., :3]), eschernet_picture(truth)
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    # cv2.PSNR: 20 log10(255 / (sqrt(mse) + epsilon of a double), so that equal pictures have a number
    return {
        "psnr": float(20 * np.log10(255 / (np.sqrt(error) + np.finfo(np.float64).eps))),
        "ssim": float(structural_similarity(a, b, channel_axis=2)),
    }


def eschernet_picture(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3 or 4) uint8 -> (256, 256, 3) uint8."""
    values = picture.astype(np.float32) / np.float32(255)
    if values.shape[2] == 4:
        values[values[..., 3] == 0] = 1
    whole = Image.fromarray((values[..., :3] * np.float32(255)).astype(np.uint8))
    return np.array(whole if whole.size == (SIZE, SIZE) else whole.resize((SIZE, SIZE)))
