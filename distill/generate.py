"""An image to a mesh: `python distill/generate.py checkpoint=runs/mine/stage2/export image=chair.png out=runs/chair`.

Writes into `out`: config.yaml, snapshot/, mesh.glb, turntable.mp4, views.png, losses.json and result.json.  A run that
was killed goes on when the same command is given again.  Ctrl-C ends the optimisation and still makes the mesh.
"""

from conf.cli import run
from distill.config import GenerateConfig


def main(config: GenerateConfig) -> None:
    # Imported here, so that --help and a wrong configuration do not wait for diffusers.
    from distill.image_to_mesh import image_to_mesh

    image_to_mesh(config)


if __name__ == "__main__":
    run(GenerateConfig, "distill/generate", main)
