"""The process of one group of a queue, which distill/many.py starts: `python distill/group.py asked.json answer.json`.

asked.json holds its configurations; answer.json will hold why some have no mesh, {out: words}, when all are done.
"""

from __future__ import annotations

import sys
from pathlib import Path

from data.files import UserError, read_json, write_json
from distill.snapshot import config_from


def main(asked: Path, answer: Path) -> int:
    # Imported here, as in distill/generate.py.
    from distill.image_to_mesh import images_to_meshes

    configs = [config_from(values) for values in read_json(asked, "group")]
    try:
        failed = images_to_meshes(configs)
    except UserError as error:  # of the only image, or of what all of them need
        failed = {config.out: str(error) for config in configs}
    write_json(answer, failed)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
