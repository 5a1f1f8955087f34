"""Runs inside Blender and imports nothing of ours: makes eight textured objects as GLB files.

`python parametric.py FOLDER [NAME ...]` with the bpy module, or `blender -b -P parametric.py -- FOLDER [NAME ...]`.
Objects stand on z = 0 with their front towards Blender's -y, which becomes glTF's +Z.  Lengths are arbitrary.
"""

import math
import sys
from pathlib import Path

import bpy

WHITE, RED, GREEN, BLUE = (0.9, 0.9, 0.9), (0.75, 0.06, 0.05), (0.08, 0.45, 0.1), (0.07, 0.2, 0.7)
YELLOW, ORANGE, BROWN, BLACK = (0.9, 0.65, 0.05), (0.9, 0.3, 0.03), (0.3, 0.14, 0.06), (0.03, 0.03, 0.03)


def paint(thing, colour, second=None, tiles=(8, 8)):
    """A matt material of one linear RGB colour; with a second one, a texture of `tiles` squares or stripes."""
    material = bpy.data.materials.new(f"{thing.name} paint")
    material.use_nodes = True
    surface = material.node_tree.nodes["Principled BSDF"]
    surface.inputs["Roughness"].default_value = 0.6
    surface.inputs["Base Color"].default_value = (*colour, 1)
    if second is not None:
        image = bpy.data.images.new(f"{thing.name} texture", 64, 64)
        pixels = []
        for y in range(64):
            for x in range(64):
                even = (x * tiles[0] // 64 + y * tiles[1] // 64) % 2 == 0
                pixels += [*(c ** (1 / 2.2) for c in (colour if even else second)), 1]  # images hold sRGB
        image.pixels = pixels
        image.pack()
        texture = material.node_tree.nodes.new("ShaderNodeTexImage")
        texture.image, texture.interpolation = image, "Closest"
        material.node_tree.links.new(texture.outputs["Color"], surface.inputs["Base Color"])
    thing.data.materials.append(material)
    return thing


def finished(colour, second, tiles, smooth):
    thing = bpy.context.object
    if smooth:
        bpy.ops.object.shade_smooth()
    return paint(thing, colour, second, tiles)


def ball(radius, at, colour, second=None, tiles=(8, 8), squash=1.0):
    bpy.ops.mesh.primitive_uv_sphere_add(radius=radius, location=at, scale=(1, 1, squash), segments=32, ring_count=16)
    return finished(colour, second, tiles, smooth=True)


def box(size, at, colour, second=None, tiles=(8, 8)):
    bpy.ops.mesh.primitive_cube_add(size=1, location=at, scale=size)
    return finished(colour, second, tiles, smooth=False)


def rod(radius, height, at, colour, second=None, tiles=(8, 8), top=None, tilt=(0, 0, 0)):
    """A cylinder, or with `top` a cone cut off at that radius, `height` long and centred at `at`."""
    bpy.ops.mesh.primitive_cone_add(
        radius1=radius, radius2=radius if top is None else top, depth=height, location=at, rotation=tilt, vertices=32
    )
    return finished(colour, second, tiles, smooth=False)


def ring(radius, thickness, at, colour, tilt=(0, 0, 0)):
    bpy.ops.mesh.primitive_torus_add(major_radius=radius, minor_radius=thickness, location=at, rotation=tilt)
    return finished(colour, None, (1, 1), smooth=True)


def mug():
    rod(0.5, 1.1, (0, 0, 0.55), RED, WHITE, (1, 6))
    rod(0.44, 0.02, (0, 0, 1.1), BROWN)
    ring(0.3, 0.08, (0.55, 0, 0.55), YELLOW, (math.pi / 2, 0, 0))


def chair():
    box((1, 1, 0.12), (0, 0, 0.9), BLUE, WHITE, (6, 6))
    box((1, 0.12, 1), (0, 0.44, 1.5), BLUE, YELLOW, (6, 6))
    for x in (-0.42, 0.42):
        for y in (-0.42, 0.42):
            rod(0.07, 0.9, (x, y, 0.45), BROWN)


def tree():
    rod(0.2, 0.8, (0, 0, 0.4), BROWN)
    for z, radius in ((1.1, 0.9), (1.7, 0.7), (2.3, 0.45)):
        rod(radius, 0.9, (0, 0, z), GREEN, (0.2, 0.65, 0.1), (12, 2), top=0)
    ball(0.16, (0, 0, 2.8), YELLOW)
    ball(0.13, (0, -0.72, 1.0), RED)


def snowman():
    ball(0.7, (0, 0, 0.6), WHITE)
    ball(0.5, (0, 0, 1.55), WHITE)
    ball(0.35, (0, 0, 2.25), WHITE)
    rod(0.08, 0.5, (0, -0.5, 2.25), ORANGE, top=0, tilt=(math.pi / 2, 0, 0))
    ring(0.38, 0.1, (0, 0, 1.98), RED)
    rod(0.3, 0.45, (0, 0, 2.75), BLACK)
    rod(0.48, 0.06, (0, 0, 2.54), BLACK)
    for x in (-0.13, 0.13):
        ball(0.06, (x, -0.31, 2.38), BLACK)
    for z in (1.4, 1.7):
        ball(0.06, (0, -0.49, z), BLUE)


def rocket():
    rod(0.45, 1.8, (0, 0, 1.4), WHITE, RED, (8, 6))
    rod(0.45, 0.8, (0, 0, 2.7), RED, top=0)
    rod(0.35, 0.4, (0, 0, 0.3), ORANGE, top=0.2)
    ball(0.2, (0, -0.4, 1.9), BLUE)
    for angle in (0, 120, 240):
        turn = math.radians(angle - 90)
        fin = box((0.7, 0.1, 0.7), (0.6 * math.cos(turn), 0.6 * math.sin(turn), 0.75), YELLOW)
        fin.rotation_euler.z = turn


def lamp():
    rod(0.5, 0.15, (0, 0, 0.08), BLACK)
    rod(0.07, 1.6, (0, 0, 0.9), YELLOW)
    rod(0.75, 0.8, (0, 0, 2.0), ORANGE, WHITE, (16, 1), top=0.4)


def table():
    rod(1.1, 0.12, (0, 0, 1.1), BROWN, ORANGE, (2, 2))
    rod(0.15, 1.0, (0, 0, 0.55), BROWN)
    rod(0.6, 0.12, (0, 0, 0.06), BROWN)
    ball(0.22, (-0.4, -0.3, 1.37), GREEN)
    ball(0.2, (0.1, -0.5, 1.35), RED)
    box((0.4, 0.5, 0.25), (0.4, 0.2, 1.28), BLUE)


def mushroom():
    rod(0.35, 1.0, (0, 0, 0.5), WHITE, top=0.25)
    ball(0.9, (0, 0, 1.05), RED, squash=0.7)
    for angle, height in ((-90, 35), (-20, 30), (60, 40), (140, 30), (210, 40)):
        a, e = math.radians(angle), math.radians(height)
        at = (0.88 * math.cos(a) * math.cos(e), 0.88 * math.sin(a) * math.cos(e), 1.05 + 0.62 * math.sin(e))
        ball(0.16, at, WHITE)


OBJECTS = (mug, chair, tree, snowman, rocket, lamp, table, mushroom)


def main(arguments):
    folder, names = Path(arguments[0]), arguments[1:]
    folder.mkdir(parents=True, exist_ok=True)
    for make in OBJECTS:
        if names and make.__name__ not in names:
            continue
        bpy.ops.wm.read_factory_settings(use_empty=True)
        make()
        target = folder / f"{make.__name__}.glb"
        temporary = folder / f".{make.__name__}.glb"
        bpy.ops.export_scene.gltf(filepath=str(temporary), export_format="GLB")
        temporary.rename(target)


if __name__ == "__main__":
    main(sys.argv[sys.argv.index("--") + 1 :] if "--" in sys.argv else sys.argv[1:])
