"""Picks the picture that is distilled: a render of the object from near its front that was never trained on.

python -m demo.reference runs/demo/views/cactus runs/demo/reference.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from data.files import UserError, atomic_file, read_json
from data.stream import views_of


def main(folder: Path, out: Path) -> None:
    meta = read_json(folder / "meta.json", "rendered object")
    view = views_of(meta, "eval_reference")[0]
    with atomic_file(out) as temporary:
        temporary.write_bytes((folder / view["file"]).read_bytes())
    print(f"{out}: {meta['uid']} from azimuth {view['azimuth_deg']:.0f}, elevation {view['elevation_deg']:.0f} degrees")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
