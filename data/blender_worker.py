"""Runs inside Blender and imports nothing of ours: renders the views of one object after another.

Started as `python blender_worker.py RESULTS [JOBS]` with the bpy module, or as
`blender -b -P blender_worker.py -- RESULTS [JOBS]`.  With `--check DEVICE` instead it says what it would render with.
Jobs are JSON lines from the file JOBS or from stdin, until it ends; results are JSON lines appended to the file RESULTS
(Blender itself writes what it likes to stdout).

Job: {"uid", "path", "front_yaw_deg", "rotation": 9 floats, "faces": [lowest, highest] or nulls, "folder",
"device": "CPU" or a Cycles GPU backend, "resolution", "samples", "denoise", "max_bounces", "diffuse_bounces",
"glossy_bounces", "light": {"sky", "suns": [{"towards", "strength", "angle_deg"}]}, "depth_scale",
"views": [{"file", "c2w": 4x4 rows, "fov_deg"} and, where wanted, "normal" and "depth": more files]}.
Results: {"uid", "view": index} after each view; at the end {"uid", "status": "done", "faces"} or
{"uid", "status": "rejected" or "failed", "error"}.

World: z up, the object's bounding-box centre at the origin, its farthest vertex at distance 0.5, its front facing +x.
An object's file is glTF-like (y up, front +Z), which Blender's importers turn into z up and front -y (FBX says its own
axes); PLY is read as it is, z up and front -y.

Normals: 8-bit RGBA, (n + 1) / 2 * 255 in the view's own camera space (x right, y up, z towards the camera), alpha as in
the picture.  Depth: 16-bit grey, the distance along the camera's -z in steps of `depth_scale` object units; 0: nothing.
"""

import json
import math
import os
import struct
import sys
import traceback
import zlib
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Vector

RADIUS = 0.5
Y_UP_TO_Z_UP = Matrix(((1, 0, 0), (0, 0, -1), (0, 1, 0)))
GPU_BACKENDS = ("OPTIX", "CUDA", "HIP", "METAL", "ONEAPI")  # the faster first, where a GPU has two
NOTHING = 1e9  # Cycles' depth of a pixel without surface is 1e10


class Rejected(Exception):
    """The object is not wanted."""


def find_device(wanted):
    """cpu, gpu or auto -> "CPU" or the Cycles backend of this machine's GPUs; ValueError when there is none for gpu."""
    cycles = bpy.context.preferences.addons["cycles"].preferences
    built = {kind for kind, *_ in cycles.get_device_types(bpy.context)}
    for kind in GPU_BACKENDS if wanted != "cpu" else ():
        if kind in built and any(device.type == kind for device in cycles.get_devices_for_type(kind)):
            return kind
    if wanted == "gpu":
        raise ValueError(f"Cycles finds no GPU here (it looked for {' '.join(k for k in GPU_BACKENDS if k in built)})")
    return "CPU"


def use_device(scene, device):
    scene.cycles.device = "CPU" if device == "CPU" else "GPU"
    if device != "CPU":
        cycles = bpy.context.preferences.addons["cycles"].preferences
        cycles.compute_device_type = device
        for found in cycles.get_devices_for_type(device):
            found.use = found.type == device


def import_object(path):
    suffix = Path(path).suffix.lower()
    if suffix in {".glb", ".gltf"}:
        bpy.ops.import_scene.gltf(filepath=path)
    elif suffix == ".obj":
        bpy.ops.wm.obj_import(filepath=path, forward_axis="NEGATIVE_Z", up_axis="Y")
    elif suffix == ".ply":
        bpy.ops.wm.ply_import(filepath=path, forward_axis="Y", up_axis="Z")
    elif suffix == ".fbx":
        bpy.ops.import_scene.fbx(filepath=path, use_anim=False, use_image_search=False)
    else:
        raise ValueError(f"{suffix} is not one of .glb .gltf .obj .ply .fbx")
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


def count_faces():
    """Polygons, modifiers and instances applied."""
    instances = bpy.context.evaluated_depsgraph_get().object_instances
    return sum(len(each.object.data.polygons) for each in instances if each.object.type == "MESH")


def check_faces(faces, lowest, highest):
    if (lowest is not None and faces < lowest) or (highest is not None and faces > highest):
        bounds = f"{'any' if lowest is None else lowest}..{'any' if highest is None else highest}"
        raise Rejected(f"has {faces} faces, outside {bounds}")


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


def light(sky, suns):
    """A white sky and broad suns, each shining from `towards`; strengths as Blender's (W/m2 for a sun)."""
    world = bpy.data.worlds.new("world")
    world.use_nodes = True
    world.node_tree.nodes["Background"].inputs["Color"].default_value = (1, 1, 1, 1)
    world.node_tree.nodes["Background"].inputs["Strength"].default_value = sky
    bpy.context.scene.world = world
    for each in suns:
        sun = bpy.data.lights.new("sun", "SUN")
        sun.energy, sun.angle = each["strength"], math.radians(each["angle_deg"])
        lamp = bpy.data.objects.new("sun", sun)
        lamp.rotation_euler = Vector(each["towards"]).to_track_quat("Z", "Y").to_euler()
        bpy.context.scene.collection.objects.link(lamp)


def prepare_scene(job):
    """Cycles (on the CPU with one thread), transparent film, nothing in the files that changes from run to run."""
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    use_device(scene, job["device"])
    scene.cycles.samples = job["samples"]
    scene.cycles.seed = 0
    scene.cycles.use_adaptive_sampling = False
    scene.cycles.use_denoising = job["denoise"]
    scene.cycles.denoiser = "OPENIMAGEDENOISE"
    scene.cycles.denoising_quality = scene.cycles.denoising_prefilter = "FAST"
    scene.cycles.max_bounces = job["max_bounces"]
    scene.cycles.diffuse_bounces, scene.cycles.glossy_bounces = job["diffuse_bounces"], job["glossy_bounces"]
    scene.cycles.caustics_reflective = scene.cycles.caustics_refractive = False
    scene.render.threads_mode, scene.render.threads = "FIXED", 1
    scene.render.use_persistent_data = True
    scene.render.film_transparent = True
    scene.render.resolution_x = scene.render.resolution_y = job["resolution"]
    scene.render.resolution_percentage = 100
    for name in dir(scene.render):
        if name.startswith("use_stamp"):
            setattr(scene.render, name, False)
    layer = bpy.context.view_layer
    layer.use_pass_normal = any("normal" in view for view in job["views"])
    layer.use_pass_z = any("depth" in view for view in job["views"])
    write_pictures(scene)
    return scene, add_camera(scene)


def add_camera(scene):
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    camera.data.sensor_fit = "VERTICAL"
    camera.data.clip_start, camera.data.clip_end = 0.01, 1000
    scene.collection.objects.link(camera)
    scene.camera = camera
    return camera


def write_pictures(scene):
    """What the renderer writes from now on: 8-bit RGBA PNG, plain sRGB."""
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):  # Blender 5
        settings.media_type = "IMAGE"
    settings.file_format, settings.color_mode, settings.color_depth = "PNG", "RGBA", "8"
    scene.view_settings.view_transform = "Standard"


def rendered_passes(scene, folder):
    """The passes of the picture just rendered, {channel: (H, W) float32}, by way of a temporary uncompressed EXR.

    A file, because Blender shows Python neither the render's result nor its passes.
    """
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):
        settings.media_type = "MULTI_LAYER_IMAGE"
    settings.file_format, settings.color_depth, settings.exr_codec = "OPEN_EXR_MULTILAYER", "32", "NONE"
    path = Path(folder) / "passes.exr"
    bpy.data.images["Render Result"].save_render(str(path), scene=scene)
    write_pictures(scene)
    try:
        return read_exr(path.read_bytes())
    finally:
        path.unlink()


def read_exr(content):
    """{last two parts of the channel's name: (H, W) float32} of an uncompressed float EXR with scan lines.

    https://openexr.com/en/latest/OpenEXRFileLayout.html
    """
    if content[:4] != bytes([0x76, 0x2F, 0x31, 0x01]) or content[5] & 0b00011010:  # tiles, deep data, several parts
        raise ValueError("Blender wrote no EXR file of scan lines")
    position, header = 8, {}
    while content[position]:
        name, kind, _ = content[position:].split(b"\0", 2)
        position += len(name) + len(kind) + 2
        (size,) = struct.unpack_from("<i", content, position)
        header[name.decode()] = content[position + 4 : position + 4 + size]
        position += 4 + size
    left, top, right, bottom = struct.unpack("<4i", header["dataWindow"])
    width, height = right - left + 1, bottom - top + 1
    names, channels = [], header["channels"]
    while channels[0]:
        name, channels = channels.split(b"\0", 1)
        if struct.unpack_from("<i", channels)[0] != 2 or header["compression"] != b"\0":
            raise ValueError("Blender wrote no uncompressed float EXR file")
        names.append(".".join(name.decode().split(".")[-2:]))
        channels = channels[16:]
    lines = np.frombuffer(content, "<u8", height, position + 1)
    rows = [np.frombuffer(content, "<f4", width * len(names), int(line) + 8) for line in lines]
    return dict(zip(names, np.stack(rows).reshape(height, len(names), width).swapaxes(0, 1), strict=True))


def encode_normals(passes, c2w):
    """World-space normals, weighted with their coverage, to (H, W, 4) uint8 in the camera's space."""
    world = np.stack([passes[f"Normal.{axis}"] for axis in "XYZ"], axis=-1).astype(np.float64)
    length = np.linalg.norm(world, axis=-1, keepdims=True)
    normals = (world / np.maximum(length, 1e-9)) @ np.array(c2w)[:3, :3]
    alpha = np.clip(passes["Combined.A"], 0, 1)[..., None]
    return np.rint(np.concatenate([(normals + 1) / 2, alpha], axis=-1) * 255).astype(np.uint8)


def encode_depth(passes, scale):
    depth = passes["Depth.Z"].astype(np.float64)
    return np.where(depth < NOTHING, np.clip(np.rint(depth / scale), 1, 65535), 0).astype(np.uint16)


def write_png(path, pixels):
    """(H, W) uint16 as grey or (H, W, 4) uint8 as RGBA.  Blender's Python has no other writer of 16-bit PNG."""
    height, width = pixels.shape[:2]
    depth, colour = (16, 0) if pixels.dtype == np.uint16 else (8, 6)
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    data = np.hstack([np.zeros((height, 1), np.uint8), rows]).tobytes()  # each row after its filter's number, none
    chunks = [
        (b"IHDR", struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(data, 6)),
        (b"IEND", b""),
    ]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


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
    """Renders all views; returns the number of faces."""
    bpy.ops.wm.read_factory_settings(use_empty=True)  # nothing of the object before survives
    bpy.context.preferences.filepaths.use_scripts_auto_execute = False
    import_object(job["path"])
    faces = count_faces()
    check_faces(faces, *job["faces"])
    show_vertex_colours()
    normalise(job["front_yaw_deg"], job["rotation"])
    light(**job["light"])
    scene, camera = prepare_scene(job)
    folder = Path(job["folder"])
    for index, view in enumerate(job["views"]):
        camera.matrix_world = Matrix(view["c2w"])
        camera.data.angle = math.radians(view["fov_deg"])
        scene.render.filepath = str(folder / view["file"])
        bpy.ops.render.render(write_still=True)
        keep_pixels_only(scene.render.filepath)
        if "normal" in view or "depth" in view:
            passes = rendered_passes(scene, folder)
            if "normal" in view:
                write_png(folder / view["normal"], encode_normals(passes, view["c2w"]))
            if "depth" in view:
                write_png(folder / view["depth"], encode_depth(passes, job["depth_scale"]))
        report({"uid": job["uid"], "view": index})
    return faces


def run_job(job, report):
    try:
        faces = render_job(job, report)
        report({"uid": job["uid"], "status": "done", "faces": faces})
    except Rejected as reason:
        report({"uid": job["uid"], "status": "rejected", "error": str(reason)})
    except Exception as error:
        traceback.print_exc()
        report({"uid": job["uid"], "status": "failed", "error": f"{type(error).__name__}: {error}"})


def say_what_is_here(wanted):
    """Two lines on stdout: the version, and the device that jobs may name.  Status 3: no device as wanted."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    print(f"blender {bpy.app.version_string}")
    try:
        print(f"device {find_device(wanted)}", flush=True)
    except ValueError as error:
        print(f"no device: {error}", flush=True)
        sys.exit(3)


def main(arguments):
    if arguments[0] == "--check":
        say_what_is_here(arguments[1])
        return
    parent = os.getppid()
    with open(arguments[0], "a", buffering=1) as results:

        def report(line):
            if os.getppid() != parent:
                os._exit(3)  # whoever asked is gone
            results.write(json.dumps(line) + "\n")

        with open(arguments[1]) if len(arguments) > 1 else sys.stdin as jobs:
            for line in iter(jobs.readline, ""):
                run_job(json.loads(line), report)


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:])
