"""What there is to compare: objects as folders or files, each with pictures, cameras and a mesh, or some of them.

An object is a mesh file, or a folder that has a mesh (mesh.glb, .obj or .ply, or model.obj, or meshes/model.obj) or
pictures (numbered PNGs, here or in render_mvs_25/model, with data/render.py's meta.json or models/sample.py's
cameras.json above them where there is one; or one PNG with square views side by side).  A folder of such is many
objects, named as the files are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor

from data.files import UserError, read_json
from data.stream import views_of
from distill.glb import TO_GLTF, load_glb, picture_of
from models.reference_image import read_picture

MESHES = (".glb", ".obj", ".ply")
MESH_NAMES = ("mesh", "model", "meshes/model")
NUMBERED = re.compile(r"(?:view_|)(\d+)\.png")
GSO30_PICTURES = "render_mvs_25/model"  # of the folder that EscherNet's authors publish
DEPTHS = re.compile(r"(\d+)-depth\.png")


@dataclass
class Cameras:
    c2w: Tensor  # (4, 4)
    fov_deg: float
    azimuth_deg: float


@dataclass
class Item:
    """One object on one side of the comparison."""

    name: str
    pictures: dict[int, Path] = field(default_factory=dict)  # by number
    strip: Path | None = None  # one picture of square views side by side, in place of them
    cameras: dict[int, Cameras] = field(default_factory=dict)  # of the pictures, where they are known
    mesh: Path | None = None
    depths: dict[int, Path] = field(default_factory=dict)  # SyncDreamer's depth pictures of the mesh
    reference_azimuth_deg: float = 0.0  # of the held-out reference view; without one, the front


def find_objects(path: Path, key: str) -> dict[str, Item]:
    """By name.  UserError when nothing there can be compared."""
    if path.is_file():
        if path.suffix.lower() not in MESHES:
            raise UserError(f"{key}={path} is neither a mesh ({', '.join(MESHES)}) nor a folder")
        return {path.stem: Item(path.stem, mesh=path)}
    if not path.is_dir():
        raise UserError(f"{key}={path} does not exist")
    here = read_item(path, path)
    if here is not None:
        return {path.name: here}
    found = {p.stem: Item(p.stem, mesh=p) for p in sorted(path.iterdir()) if p.suffix.lower() in MESHES}
    for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
        item = read_item(folder, path)
        if item is not None:
            found[folder.name] = item
    if not found:
        raise UserError(
            f"{key}={path} holds no object: no mesh ({', '.join(f'{n}.glb' for n in MESH_NAMES)}; .obj, .ply), no "
            "numbered PNGs, and no folders of such"
        )
    return found


def read_item(folder: Path, above: Path) -> Item | None:
    """`folder` as one object; None where it has neither pictures nor a mesh by the names above."""
    item = Item(folder.name)
    inner = folder / GSO30_PICTURES
    for path in sorted([*folder.iterdir(), *(inner.iterdir() if inner.is_dir() else ())]):
        if match := NUMBERED.fullmatch(path.name):
            item.pictures[int(match.group(1))] = path
        elif match := DEPTHS.fullmatch(path.name):
            item.depths[int(match.group(1))] = path
    for name in MESH_NAMES:
        for suffix in MESHES:
            if item.mesh is None and (folder / f"{name}{suffix}").is_file():
                item.mesh = folder / f"{name}{suffix}"
    if (folder / "meta.json").is_file():
        with_meta(item, folder)
    elif len(item.pictures) == 1 and is_strip(next(iter(item.pictures.values()))):
        item.strip = item.pictures.popitem()[1]
    elif item.pictures and (above / "cameras.json").is_file():
        path = above / "cameras.json"
        described: Any = read_json(path, "cameras")
        if not isinstance(described, dict) or not isinstance(described.get("c2w"), list):
            raise UserError(f"{path} is not models/sample.py's: it has no list c2w; remove it, or sample again")
        for number, pose in enumerate(described["c2w"]):
            if number in item.pictures:
                item.cameras[number] = camera_of(pose, None, path)
    return item if item.pictures or item.strip or item.mesh else None


def with_meta(item: Item, folder: Path) -> None:
    """Pictures and cameras of data/render.py: the held-out ones where there are any, else the rings."""
    meta: Any = read_json(folder / "meta.json", "views")
    try:
        views = views_of(meta, "eval") or views_of(meta, "ring")
        item.pictures = {int(Path(view["file"]).stem): folder / view["file"] for view in views}
        item.cameras = {
            int(Path(view["file"]).stem): camera_of(view["c2w"], view["fov_deg"], folder / "meta.json")
            for view in views
        }
        for view in views_of(meta, "eval_reference")[:1]:
            item.reference_azimuth_deg = camera_of(view["c2w"], None, folder / "meta.json").azimuth_deg
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'meta.json'} is not data/render.py's: {error!r}; render the object again") from None


def camera_of(c2w: Any, fov_deg: float | None, path: Path) -> Cameras:
    try:
        pose = torch.tensor(c2w, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: a camera must be a 4 x 4 matrix of numbers: {error}") from None
    if pose.shape != (4, 4) or not bool(torch.isfinite(pose).all()):
        raise UserError(f"{path}: a camera must be a finite 4 x 4 matrix, not {tuple(pose.shape)}")
    azimuth = float(torch.rad2deg(torch.atan2(pose[1, 3], pose[0, 3])))
    return Cameras(pose, float("nan") if fov_deg is None else float(fov_deg), azimuth)


def is_strip(path: Path) -> bool:
    width, height = read_picture(path, whole=True).size
    return width > height and width % height == 0


def read_pixels(item: Item, number: int) -> np.ndarray:
    """(H, W, 4) uint8; alpha is 255 where the file has none."""
    if item.strip is None:
        return np.asarray(read_picture(item.pictures[number], whole=True))
    strip = np.asarray(read_picture(item.strip, whole=True))
    side = strip.shape[0]
    return strip[:, number * side : (number + 1) * side]


def numbers_of(item: Item) -> set[int]:
    if item.strip is None:
        return set(item.pictures)
    width, height = read_picture(item.strip, whole=True).size
    return set(range(width // height))


def read_depths(item: Item) -> np.ndarray | None:
    """(V, H, W) uint16 in the order of their numbers; None where there are none."""
    if not item.depths:
        return None
    pictures = [np.asarray(Image.open(item.depths[number])) for number in sorted(item.depths)]
    if len({picture.shape for picture in pictures}) > 1:
        raise UserError(f"{next(iter(item.depths.values())).parent}: depth pictures differ in size")
    return np.stack(pictures).astype(np.uint16)


def read_mesh(path: Path, merged: bool = False) -> trimesh.Trimesh:
    """In our axes: glTF's y is up, so GLB is turned to z up; OBJ and PLY are taken as they are.

    merged: equal vertices become one, as `trimesh.load` has it by itself.
    """
    try:
        mesh: Any = (
            read_glb(path) if path.suffix.lower() == ".glb" else trimesh.load(path, force="mesh", process=merged)
        )
    except UserError:
        raise
    except Exception as error:  # trimesh raises many kinds for a file that is not what it should be
        raise UserError(f"{path} cannot be read as a mesh: {type(error).__name__}: {error}") from None
    if not isinstance(mesh, trimesh.Trimesh) or len(mesh.faces) == 0:
        raise UserError(f"{path} has no triangles")
    vertices = np.asarray(mesh.vertices)
    if not np.isfinite(vertices).all() or not (np.ptp(vertices, axis=0).max() > 0):
        raise UserError(f"{path} has vertices that are not finite, or all in one place")
    if merged and path.suffix.lower() == ".glb":  # as a PLY of the same mesh would be
        mesh = trimesh.Trimesh(vertices, mesh.faces, process=True)
        vertices = np.asarray(mesh.vertices)
    if int(np.asarray(mesh.faces).max()) >= len(vertices) or int(np.asarray(mesh.faces).min()) < 0:
        raise UserError(f"{path} has triangles of vertices that are not there")
    return mesh


def read_glb(path: Path) -> trimesh.Trimesh:
    """With its colours where it is one of ours, as a bare shape where it is put together from parts."""
    scene = trimesh.load_scene(path, process=False)
    parts = list(scene.geometry.values())
    if len(parts) == 1 and (
        picture_of(parts[0]) is not None or "color" in getattr(parts[0].visual, "vertex_attributes", {})
    ):
        return load_glb(path)
    whole = scene.to_mesh()
    return trimesh.Trimesh(whole.vertices @ TO_GLTF[:3, :3], whole.faces, process=False)


def matched(preds: dict[str, Item], truths: dict[str, Item], pred: str, truth: str) -> list[tuple[Item, Item]]:
    """Pairs of one name; two single objects are a pair whatever they are called.  UserError where one is missing."""
    if len(preds) == len(truths) == 1:
        return [(next(iter(preds.values())), next(iter(truths.values())))]
    if missing := sorted(set(preds) - set(truths)):
        raise UserError(f"truth={truth} has nothing called {missing[0]}, which pred={pred} has; rename or remove it")
    if not preds.keys() & truths.keys():
        raise UserError(f"pred={pred} and truth={truth} share no name")
    return [(preds[name], truths[name]) for name in sorted(preds)]
