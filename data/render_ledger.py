"""The ledger of a views folder: a JSON line for every object rendered, rejected or failed; its newest one counts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LEDGER = "render_ledger.jsonl"


@dataclass(frozen=True)
class Verdict:
    """What became of one object.  status: rendered, rejected or failed, the latter two with a reason.

    fingerprint: of the settings that make the pictures; limits: the settings that reject, or let fail; time: Unix time
    in seconds at the end.
    """

    uid: str
    status: str
    reason: str
    fingerprint: str
    limits: dict[str, Any]
    seconds: float
    time: float


def ledger_path(out: Path, part: int, parts: int) -> Path:
    """Each part of an array writes a ledger of its own; all are read."""
    return out / (LEDGER if parts == 1 else LEDGER.replace(".", f"-{part:05d}."))


def write_verdict(path: Path, verdict: Verdict) -> None:
    with open(path, "ab+") as ledger:
        torn = ledger.tell() > 0
        if torn:
            ledger.seek(-1, 2)
            torn = ledger.read(1) != b"\n"  # a writer was killed in the middle of a line
        ledger.write((b"\n" if torn else b"") + json.dumps(asdict(verdict)).encode() + b"\n")


def read_verdicts(out: Path) -> dict[str, Verdict]:
    """{uid: newest verdict} from all ledgers in `out`; lines that a killed writer left half written are passed over."""
    verdicts: dict[str, Verdict] = {}
    for path in sorted(out.glob(LEDGER.replace(".", "*."))):
        with open(path, errors="replace") as ledger:
            for line in ledger:
                try:
                    verdict = Verdict(**json.loads(line))
                    newer = verdict.uid not in verdicts or verdict.time >= verdicts[verdict.uid].time
                except (ValueError, TypeError):
                    continue
                if newer:
                    verdicts[verdict.uid] = verdict
    return verdicts


def printable(text: str) -> str:
    """One line without control characters: reasons quote assets and Blender's log."""
    return "".join(c if c.isprintable() else " " for c in text)[:500]


def verdict_table(verdicts: Iterable[Verdict], most: int = 20) -> list[str]:
    """Lines for a terminal: the objects that were not rendered, with reasons; `most` of them."""
    left_out = sorted((v for v in verdicts if v.status != "rendered"), key=lambda v: (v.status, v.uid))
    width = max((len(v.uid) for v in left_out[:most]), default=0)
    lines = [f"{v.status:8}  {v.uid:{width}}  {printable(v.reason)}" for v in left_out[:most]]
    if len(left_out) > most:
        more = Counter(v.status for v in left_out[most:])
        lines.append("and " + ", ".join(f"{count} more {status}" for status, count in sorted(more.items())))
    return lines
