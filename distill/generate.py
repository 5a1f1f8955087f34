"""Images to meshes: `python distill/generate.py checkpoint=runs/mine/stage2/export image=chair.png out=runs/chair`.

Writes into `out`: config.yaml, snapshot/, mesh.glb, turntable.mp4, views.png, report.html, losses.json and result.json.
A run that was killed goes on when the same command is given again.  Ctrl-C once ends the optimisation and still makes
the mesh, twice stops.  `image=chair.png lamp.png ...`, or image= of a folder, makes one folder an image below `out`.
`embedding=words.safetensors` instead is for weights without an image encoder (models/given_embedding.py).
"""

import sys
from pathlib import Path

from conf.cli import run
from data.files import UserError
from distill.config import GenerateConfig, joined_words


def main(config: GenerateConfig) -> None:
    if config.image is not None and not config.more_images and not Path(config.image).exists():
        raise UserError(f"image {config.image} does not exist")
    # Imported here, so that --help and a wrong configuration do not wait for diffusers.
    from distill.many import generate

    generate(config)


if __name__ == "__main__":
    sys.argv[1:] = joined_words(sys.argv[1:])
    run(GenerateConfig, "distill/generate", main)
