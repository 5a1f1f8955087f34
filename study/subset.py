"""A share of a views folder's objects, by a hash of the uid, so that a smaller share is part of a larger one.

python -m study.subset runs/study/views_train runs/study/views_train_0.25 0.25
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from data.files import UserError, atomic_folder


def main(views: Path, out: Path, share: float) -> None:
    def place(folder: Path) -> bytes:  # salted: the hash of the uid alone has decided that the object is in `views`
        return hashlib.sha256(f"subset:{folder.name}".encode()).digest()

    folders = sorted((path.parent for path in views.glob("*/meta.json")), key=place)
    chosen = folders[: round(share * len(folders))]
    if not chosen:
        raise UserError(f"{views}: a share of {share:g} holds no object; take a larger one")
    with atomic_folder(out) as temporary:
        for folder in chosen:
            (temporary / folder.name).symlink_to(folder.resolve())
    print(f"{out}: {len(chosen)} objects")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
