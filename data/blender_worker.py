"""Runs inside Blender and imports nothing of ours: renders the views of one object after another.

Started as `python blender_worker.py RESULTS [JOBS]` with the bpy module, or as
`blender -b -P blender_worker.py -- RESULTS [JOBS]`.
Jobs are JSON lines from the file JOBS or from stdin, until it ends; results are JSON lines appended to the file RESULTS
(Blender itself writes what it likes to stdout).

Job: {"uid", "path", "front_yaw_deg", "rotation": 9 floats, "resolution", "samples", "folder",
"views": [{"file", "c2w": 4x4 rows, "fov_deg"}]}.
Results: {"uid", "view": index} after each picture; at the end {"uid", "status": "done"} or
{"uid", "status": "failed", "error"}.

World: z up, the object's bounding-box centre at the origin, its farthest vertex at distance 0.5, its front facing +x.
An object's file is glTF-like (y up, front +Z), which Blender's importers turn into z up and front -y; PLY is read as it
is, z up and front -y.
"""

import json
import math
import os
import sys
import traceback
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Vector

RADIUS = 0.5
Y_UP_TO_Z_UP = Matrix(((1, 0, 0), (0, 0, -1), (0, 1, 0)))


def import_object(path):
    suffix = Path(path).suffix.lower()
    if suffix in {".glb", ".gltf"}:
        bpy.ops.import_scene.gltf(filepath=path)
    elif suffix == ".obj":
        bpy.ops.wm.obj_import(filepath=path, forward_axis="NEGATIVE_Z", up_axis="Y")
    elif suffix == ".ply":
        bpy.ops.wm.ply_import(filepath=path, forward_axis="Y", up_axis="Z")
    else:
        raise ValueError(f"{suffix} is not one of .glb .gltf .obj .ply")
    if suffix == ".obj":
        read_mtl_colours_as_srgb()
    for thing in list(bpy.data.objects):
        if thing.type in {"LIGHT", "CAMERA"}:
            bpy.data.objects.remove(thing)


def read_mtl_colours_as_srgb():
    """MTL does not say what Kd is.  Nearly every file means display colours; Blender reads linear ones: washed out."""
    for material in bpy.data.materials:
        surface = principled(material)
        if surface is not None and not surface.inputs["Base Color"].is_linked:
            colour = surface.inputs["Base Color"].default_value
            colour[:3] = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]


def principled(material):
    nodes = material.node_tree.nodes if material.use_nodes else ()
    return next((node for node in nodes if node.type == "BSDF_PRINCIPLED"), None)


def world_vertices():
    """All vertices that belong to a face, modifiers and instances applied: (N, 3) in world axes."""
    pieces = []
    for instance in bpy.context.evaluated_depsgraph_get().object_instances:
        if instance.object.type != "MESH" or not len(instance.object.data.loops):
            continue
        mesh = instance.object.data
        points = np.empty(len(mesh.vertices) * 3, dtype=np.float32)
        mesh.vertices.foreach_get("co", points)
        used = np.empty(len(mesh.loops), dtype=np.int32)
        mesh.loops.foreach_get("vertex_index", used)
        points = points.reshape(-1, 3)[np.unique(used)].astype(np.float64)
        matrix = np.array(instance.matrix_world, dtype=np.float64)
        pieces.append(points @ matrix[:3, :3].T + matrix[:3, 3])
    return np.concatenate(pieces) if pieces else np.zeros((0, 3))


def normalise(front_yaw_deg, rotation):
    """Turns the front to +x, then centres the bounding box and scales the farthest vertex to RADIUS."""
    file_rotation = Y_UP_TO_Z_UP @ Matrix((rotation[0:3], rotation[3:6], rotation[6:9])) @ Y_UP_TO_Z_UP.transposed()
    turn = Matrix.Rotation(math.radians(90 - front_yaw_deg), 3, "Z") @ file_rotation
    points = world_vertices() @ np.array(turn).T
    if not len(points):
        raise ValueError("the file holds no faces")
    if not np.isfinite(points).all():
        raise ValueError("the file holds vertices that are not finite")
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    farthest = float(np.linalg.norm(points - centre, axis=1).max())
    if not farthest > 1e-9:
        raise ValueError("all vertices lie at one point")
    scale = RADIUS / farthest
    root = bpy.data.objects.new("root", None)
    bpy.context.scene.collection.objects.link(root)
    for thing in bpy.data.objects:
        if thing.parent is None and thing is not root:
            thing.parent = root
    root.matrix_world = Matrix.Scale(scale, 4) @ Matrix.Translation(-Vector(centre)) @ turn.to_4x4()


def show_vertex_colours():
    """Gives meshes that carry colours but no textured or coloured material a material that shows them."""
    for thing in bpy.data.objects:
        if thing.type != "MESH" or not thing.data.color_attributes:
            continue
        if any(slot.material and is_coloured(slot.material) for slot in thing.material_slots):
            continue
        material = bpy.data.materials.new("vertex colours")
        material.use_nodes = True
        colour = material.node_tree.nodes.new("ShaderNodeVertexColor")
        colour.layer_name = thing.data.color_attributes[0].name
        surface = material.node_tree.nodes["Principled BSDF"]
        material.node_tree.links.new(colour.outputs["Color"], surface.inputs["Base Color"])
        thing.data.materials.clear()
        thing.data.materials.append(material)


def is_coloured(material):
    surface = principled(material)
    if surface is None:
        return True
    socket = surface.inputs["Base Color"]
    return socket.is_linked or min(socket.default_value[:3]) < 0.7


def light():
    """A white sky and two broad suns fixed in the world: a white diffuse face that looks up reaches about 1.0."""
    world = bpy.data.worlds.new("world")
    world.use_nodes = True
    world.node_tree.nodes["Background"].inputs["Color"].default_value = (1, 1, 1, 1)
    world.node_tree.nodes["Background"].inputs["Strength"].default_value = 0.55
    bpy.context.scene.world = world
    for name, strength, towards in (("key", 1.6, (0.6, 0.5, 1.0)), ("fill", 0.6, (-0.8, -0.6, 0.5))):
        sun = bpy.data.lights.new(name, "SUN")
        sun.energy, sun.angle = strength, math.radians(40)
        lamp = bpy.data.objects.new(name, sun)
        lamp.rotation_euler = Vector(towards).to_track_quat("Z", "Y").to_euler()
        bpy.context.scene.collection.objects.link(lamp)


def prepare_scene(resolution, samples):
    """Cycles on one CPU thread, transparent film, plain sRGB, nothing in the PNG that changes from run to run."""
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    scene.cycles.device = "CPU"
    scene.cycles.samples = samples
    scene.cycles.seed = 0
    scene.cycles.use_adaptive_sampling = False
    scene.cycles.use_denoising = True
    scene.cycles.denoiser = "OPENIMAGEDENOISE"
    scene.cycles.denoising_quality = scene.cycles.denoising_prefilter = "FAST"
    scene.cycles.max_bounces, scene.cycles.diffuse_bounces, scene.cycles.glossy_bounces = 6, 2, 2
    scene.cycles.caustics_reflective = scene.cycles.caustics_refractive = False
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.render.use_persistent_data = True
    scene.render.film_transparent = True
    scene.render.resolution_x = scene.render.resolution_y = resolution
    scene.render.resolution_percentage = 100
    scene.render.image_settings.file_format = "PNG"
    scene.render.image_settings.color_mode = "RGBA"
    scene.render.image_settings.color_depth = "8"
    scene.view_settings.view_transform = "Standard"
    for name in dir(scene.render):
        if name.startswith("use_stamp"):
            setattr(scene.render, name, False)
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.sensor_fit = "VERTICAL"
    camera.data.clip_start, camera.data.clip_end = 0.01, 1000
    scene.collection.objects.link(camera)
    scene.camera = camera
    return scene, camera


def keep_pixels_only(path):
    """Drops a PNG's text, EXIF and time chunks: Cycles writes how long it took, which differs from run to run."""
    content = Path(path).read_bytes()
    kept, position = [content[:8]], 8
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big") + 12
        if content[position + 4 : position + 8] in {b"IHDR", b"IDAT", b"IEND"}:
            kept.append(content[position : position + length])
        position += length
    Path(path).write_bytes(b"".join(kept))


def render_job(job, report):
    bpy.ops.wm.read_factory_settings(use_empty=True)  # nothing of the object before survives
    bpy.context.preferences.filepaths.use_scripts_auto_execute = False
    import_object(job["path"])
    show_vertex_colours()
    normalise(job["front_yaw_deg"], job["rotation"])
    light()
    scene, camera = prepare_scene(job["resolution"], job["samples"])
    for index, view in enumerate(job["views"]):
        camera.matrix_world = Matrix(view["c2w"])
        camera.data.angle = math.radians(view["fov_deg"])
        scene.render.filepath = str(Path(job["folder"]) / view["file"])
        bpy.ops.render.render(write_still=True)
        keep_pixels_only(scene.render.filepath)
        report({"uid": job["uid"], "view": index})


def main(arguments):
    parent = os.getppid()
    with open(arguments[0], "a", buffering=1) as results:

        def report(line):
            if os.getppid() != parent:
                os._exit(3)  # whoever asked is gone
            results.write(json.dumps(line) + "\n")

        with open(arguments[1]) if len(arguments) > 1 else sys.stdin as jobs:
            for line in iter(jobs.readline, ""):
                job = json.loads(line)
                try:
                    render_job(job, report)
                    report({"uid": job["uid"], "status": "done"})
                except Exception as error:
                    traceback.print_exc()
                    report({"uid": job["uid"], "status": "failed", "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:])
