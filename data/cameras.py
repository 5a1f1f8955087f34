"""Cameras: the one place where orbits, rays and the conditioning vector are computed.

World: right-handed, z up, metres; the object lies in the unit cube around the origin and its front faces +x.
Cameras are OpenGL camera-to-world matrices (c2w): the camera looks along its -z, its +y is up in the picture.
Azimuth 0 puts the camera on +x, 90 on +y. Angles are degrees in every argument and file.
Shapes: (...) any batch, V views, H rows, W columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orbit_camera(azimuth_deg: Tensor | float, elevation_deg: Tensor | float, distance: Tensor | float) -> Tensor:
    """Camera on a sphere around the origin, looking at it, world z up in the picture.

    azimuth_deg, elevation_deg (-90, 90) exclusive, distance > 0: broadcastable to (...).  Returns c2w (..., 4, 4).
    """
    azimuth, elevation, away = torch.broadcast_tensors(
        *(
            torch.as_tensor(a, dtype=torch.get_default_dtype(), device=torch.as_tensor(azimuth_deg).device)
            for a in (azimuth_deg, elevation_deg, distance)
        )
    )
    a, e = torch.deg2rad(azimuth), torch.deg2rad(elevation)
    backward = torch.stack([e.cos() * a.cos(), e.cos() * a.sin(), e.sin()], dim=-1)  # camera +z: away from the object
    right = torch.stack([-a.sin(), a.cos(), torch.zeros_like(a)], dim=-1)
    up = torch.linalg.cross(backward, right)
    c2w = torch.zeros(*azimuth.shape, 4, 4, dtype=backward.dtype, device=backward.device)
    c2w[..., :3, 0], c2w[..., :3, 1], c2w[..., :3, 2] = right, up, backward
    c2w[..., :3, 3] = backward * away[..., None]
    c2w[..., 3, 3] = 1
    return c2w


def framing_distance(framing: Tensor | float, fov_deg: Tensor | float) -> Tensor:
    """Distance at which `framing` object units fill half the picture's height at the origin: framing / tan(fov/2).

    The form of the released config, "U(0.8, 1.0) / tan(fov/2)".
    """
    return torch.as_tensor(framing) / torch.tan(
        torch.deg2rad(torch.as_tensor(fov_deg, dtype=torch.get_default_dtype())) / 2
    )


def camera_rays(c2w: Tensor, fov_deg: Tensor | float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Rays through pixel centres.  c2w (..., 4, 4), fov_deg (...) vertical field of view.

    Returns origins and unit directions in world space, each (..., H, W, 3); row 0 is the top of the picture.
    """
    y, x = torch.meshgrid(
        torch.arange(height, dtype=c2w.dtype, device=c2w.device),
        torch.arange(width, dtype=c2w.dtype, device=c2w.device),
        indexing="ij",
    )
    fov = torch.deg2rad(torch.as_tensor(fov_deg, dtype=c2w.dtype, device=c2w.device))
    tangent = torch.tan(fov / 2)[..., None, None]
    right = (2 * (x + 0.5) / width - 1) * tangent * (width / height)
    up = (1 - 2 * (y + 0.5) / height) * tangent
    local = torch.stack([right, up, -torch.ones_like(right)], dim=-1)  # (..., H, W, 3)
    directions = torch.einsum("...ij,...hwj->...hwi", c2w[..., :3, :3], local)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    origins = c2w[..., None, None, :3, 3].expand_as(directions)
    return origins, directions


def orbit_angles(c2w: Tensor) -> tuple[Tensor, Tensor]:
    """azimuth_deg in [0, 360) and elevation_deg of cameras that look at the origin: the inverse of `orbit_camera`."""
    x, y, z = c2w[..., :3, 3].unbind(-1)
    return torch.rad2deg(torch.atan2(y, x)) % 360, torch.rad2deg(torch.atan2(z, torch.hypot(x, y)))


CONVENTIONS = ("mvdream", "isotropic3d_released_2d", "isotropic3d_released_sds")


def camera_conditioning(c2w: Tensor, convention: str = "mvdream") -> Tensor:
    """The 16 floats a multi-view UNet is conditioned on, as its weights were trained to read them.

    c2w (..., V, 4, 4) -> (..., V, 16), row-major, translation scaled to length 1 (so neither fov nor distance is told).
    "mvdream" is MVDream's convention and that of every model trained here.  The released Isotropic3D code turns degrees
    into radians twice, so that it sees angles of pi / 180 their size: "isotropic3d_released_sds" is its SDS path; in
    "isotropic3d_released_2d", its 2D sampler, the elevation shrinks once more with every view after the first.
    ValueError for another name, or a camera at the origin.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"camera convention {convention!r} must be one of {', '.join(CONVENTIONS)}")
    if convention != "mvdream":
        azimuth, elevation = orbit_angles(c2w)
        times = torch.ones_like(elevation)
        if convention == "isotropic3d_released_2d":
            times = torch.arange(1, c2w.shape[-3] + 1, dtype=c2w.dtype, device=c2w.device).expand_as(elevation)
        c2w = orbit_camera(torch.deg2rad(azimuth), elevation * torch.deg2rad(torch.ones_like(times)) ** times, 1.0)
    return mvdream_conditioning(c2w)


def mvdream_conditioning(c2w: Tensor) -> Tensor:
    """c2w (..., 4, 4) -> (..., 16).

    MVDream's azimuth 0 lies on the world's -y (mvdream/camera_utils.py: y-up OpenGL to Blender axes), ours on +x:
    the world is turned by -90 degrees about z, so that pretrained MVDream weights see the views they know.
    """
    turn = torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=c2w.dtype, device=c2w.device)
    turned = turn @ c2w
    length = turned[..., :3, 3].norm(dim=-1, keepdim=True)
    if not bool((length > math.ulp(1.0)).all()):
        raise ValueError("camera_conditioning: a camera lies at the origin, so its direction is undefined")
    turned = turned.clone()
    turned[..., :3, 3] = turned[..., :3, 3] / length
    return turned.flatten(-2)
