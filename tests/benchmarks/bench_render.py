"""What the renderer adds to Blender: `python tests/benchmarks/bench_render.py [--resolution 256] [--samples 16]`.

The same objects, cameras and Cycles settings, with one process of one thread each, taking turns:
  by hand   a plain bpy script: import, scale, light, then one picture after another
  ours      `data/render.py`, with its worker, ledger, checks, fsyncs, thumbnails and contact sheet
The pictures must agree.  Both whole commands are timed, and the time from the first object on, without the start of
Python, torch and Blender, which is what is left of it with many objects.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.blender_pool import find_blender, script_command
from data.render_ledger import LEDGER

REPOSITORY = Path(__file__).resolve().parents[2]
BY_HAND = """
import json, math, sys, time
import bpy
from mathutils import Matrix, Vector

for job in json.load(open(sys.argv[-1])):
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.import_scene.gltf(filepath=job["path"])
    scene = bpy.context.scene
    meshes = [thing for thing in bpy.data.objects if thing.type == "MESH"]
    points = [thing.matrix_world @ vertex.co for thing in meshes for vertex in thing.data.vertices]
    low, high = (Vector(pick(point[axis] for point in points) for axis in range(3)) for pick in (min, max))
    centre = (low + high) / 2
    scale = 0.5 / max((point - centre).length for point in points)
    root = bpy.data.objects.new("root", None)
    scene.collection.objects.link(root)
    for thing in bpy.data.objects:
        if thing.parent is None and thing is not root:
            thing.parent = root
    turn = Matrix.Rotation(math.radians(90), 4, "Z")
    root.matrix_world = turn @ Matrix.Scale(scale, 4) @ Matrix.Translation(-centre)
    world = bpy.data.worlds.new("world")
    world.use_nodes = True
    world.node_tree.nodes["Background"].inputs["Color"].default_value = (1, 1, 1, 1)
    world.node_tree.nodes["Background"].inputs["Strength"].default_value = job["light"]["sky"]
    scene.world = world
    for each in job["light"]["suns"]:
        sun = bpy.data.lights.new("sun", "SUN")
        sun.energy, sun.angle = each["strength"], math.radians(each["angle_deg"])
        lamp = bpy.data.objects.new("sun", sun)
        lamp.rotation_euler = Vector(each["towards"]).to_track_quat("Z", "Y").to_euler()
        scene.collection.objects.link(lamp)
    scene.render.engine = "CYCLES"
    scene.cycles.samples = job["samples"]
    scene.cycles.use_adaptive_sampling = False
    scene.cycles.use_denoising = True
    scene.cycles.denoising_quality = scene.cycles.denoising_prefilter = "FAST"
    scene.cycles.max_bounces, scene.cycles.diffuse_bounces, scene.cycles.glossy_bounces = 6, 2, 2
    scene.cycles.caustics_reflective = scene.cycles.caustics_refractive = False
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.render.use_persistent_data = True
    scene.render.film_transparent = True
    scene.render.resolution_x = scene.render.resolution_y = job["resolution"]
    scene.render.image_settings.color_mode = "RGBA"
    scene.view_settings.view_transform = "Standard"
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.sensor_fit = "VERTICAL"
    camera.data.clip_start, camera.data.clip_end = 0.01, 1000
    scene.collection.objects.link(camera)
    scene.camera = camera
    for view in job["views"]:
        camera.matrix_world = Matrix(view["c2w"])
        camera.data.angle = math.radians(view["fov_deg"])
        scene.render.filepath = job["folder"] + "/" + view["file"]
        bpy.ops.render.render(write_still=True)
    print("object took", time.monotonic(), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-render-"))
    try:
        measure(folder, arguments.resolution, arguments.samples, arguments.repeat)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, resolution: int, samples: int, repeat: int) -> None:
    blender = find_blender()
    words = [*script_command(blender, REPOSITORY / "data" / "parametric.py"), str(folder / "objects")]
    subprocess.run([*words, "mug", "chair", "tree", "rocket"], check=True, capture_output=True)
    (folder / "by_hand.py").write_text(BY_HAND)
    settings = {"resolution": resolution, "samples": samples, "rings": 1, "views_per_ring": 16, "references": 4}
    command = [sys.executable, "data/render.py", f"source={folder}/objects", f"out={folder}/ours", "processes=1"]
    command += [f"{key}={value}" for key, value in settings.items()]
    plain = [*script_command(blender, folder / "by_hand.py"), str(folder / "jobs.json")]
    times: dict[str, list[float]] = {"by hand": [], "ours": [], "by hand, whole": [], "ours, whole": []}
    for turn in range(repeat + 1):
        shutil.rmtree(folder / "ours", ignore_errors=True)
        began = time.monotonic()
        subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
        ours_whole = time.monotonic() - began
        metas = [json.loads(path.read_text()) for path in sorted((folder / "ours").glob("*/meta.json"))]
        write_jobs(folder, metas, settings)
        began = time.monotonic()
        output = subprocess.run(plain, check=True, capture_output=True, text=True).stdout
        by_hand_whole = time.monotonic() - began
        if turn:  # the first one warms the disk's cache
            times["ours, whole"].append(ours_whole)
            times["by hand, whole"].append(by_hand_whole)
            times["ours"].append(after_the_first(ledger_times(folder / "ours" / LEDGER)))
            ends = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("object took")]
            times["by hand"].append(after_the_first(ends))
    show(times, metas, folder)


def write_jobs(folder: Path, metas: list[dict], settings: dict[str, int]) -> None:
    jobs = []
    for meta in metas:
        target = folder / "hand" / meta["uid"]
        target.mkdir(parents=True, exist_ok=True)
        jobs.append(
            settings
            | {"path": f"{folder}/objects/{meta['uid']}.glb", "folder": str(target)}
            | {key: meta[key] for key in ("light", "views")}
        )
    (folder / "jobs.json").write_text(json.dumps(jobs))


def ledger_times(path: Path) -> list[float]:
    return [json.loads(line)["time"] for line in path.read_text().splitlines()]


def after_the_first(ends: list[float]) -> float:
    """Seconds from the end of the first object to the end of the last one."""
    return ends[-1] - ends[0]


def show(times: dict[str, list[float]], metas: list[dict], folder: Path) -> None:
    difference = 0
    for meta in metas:
        for view in meta["views"]:
            ours, hand = (
                np.asarray(Image.open(folder / side / meta["uid"] / view["file"])).astype(int)
                for side in ("ours", "hand")
            )
            difference = max(difference, int(np.abs(ours - hand).max()))
    views = sum(len(meta["views"]) for meta in metas)
    print(f"{len(metas)} objects, {views} views; largest difference of a pixel: {difference} of 255")
    for name, count in (("by hand", views * (len(metas) - 1) // len(metas)), ("by hand, whole", views)):
        hand, ours = times[name], times[name.replace("by hand", "ours")]
        ratio = statistics.median(ours) / statistics.median(hand)
        print(
            f"{'from the second object on' if count < views else 'whole commands':26}"
            f"  by hand {count / statistics.median(hand):.2f}, ours {count / statistics.median(ours):.2f} views/s"
            f"  overhead {100 * (ratio - 1):+.1f} % (medians of {len(ours)};"
            f" of the fastest {100 * (min(ours) / min(hand) - 1):+.1f} %)"
        )


if __name__ == "__main__":
    main()
