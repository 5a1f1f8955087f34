"""Renders posed views of 3D objects with Blender.

    python data/render.py source=objects/ out=views/ experiment=paper
    python data/render.py source=library.sh3f out=views/ names=[teddyBear,cactus] resolution=128

Every setting is a field of RenderConfig in data/rendering.py.  Run again to resume: objects already there are kept.
"""

from conf.cli import run
from data.rendering import RenderConfig, render_all

if __name__ == "__main__":
    run(RenderConfig, "data/render", render_all)
