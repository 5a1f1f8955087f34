"""Which of the held-out objects the tables are made from, and which the settings are held against."""

from __future__ import annotations

import hashlib
from typing import Any

# In dB of the nearest object trained on: a held-out object that reaches it was trained on, under another uid.
TWIN = 30.0


def without_twins(objects: dict[str, Any]) -> dict[str, Any]:
    """Those of samples.json's objects that no object trained on looks like."""
    return {uid: values for uid, values in objects.items() if values["nearest_trained"] < TWIN}


def parted(objects: dict[str, Any], share: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """samples.json's objects without twins: those that are judged, and the share that settings are chosen on.

    By a hash of the uid, and rounded down: of fewer than 1 / share objects all are judged.
    """
    known = without_twins(objects)
    # Salted: the hash of the uid alone has decided that they are held out.
    ranked = sorted(known, key=lambda uid: hashlib.sha256(f"choosing:{uid}".encode()).digest())
    choosing = set(ranked[: int(share * len(ranked) + 1e-9)])
    return ({uid: values for uid, values in known.items() if uid not in choosing},
            {uid: values for uid, values in known.items() if uid in choosing})  # fmt: skip
