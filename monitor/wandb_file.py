"""What an offline W&B run has on disk: its .wandb files.

W&B has no reader of them in Python any more, so the file is taken apart here, into messages that W&B's own types parse.
It is LevelDB's log format (github.com/google/leveldb/blob/main/doc/log_format.md) behind a header of 7 bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 32768
WHOLE, LAST = 1, 4  # kinds of pieces; the others are the first and those between


def pieces(content: bytes) -> Iterator[bytes]:
    """The records.  What a killed process has written of its last one is left out.  ValueError for other files."""
    if content[:4] != b":W&B":
        raise ValueError("not a W&B file")
    position, parts = HEADER, []
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:  # a block's end that is too short for a piece is filled with zeros
            position += left
            continue
        length, kind = struct.unpack_from("<HB", content, position + 4)  # behind the checksum
        piece = content[position + HEADER : position + HEADER + length]
        if kind == 0 or len(piece) < length:
            return
        parts.append(piece)
        position += HEADER + length
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []


def records(path: Path) -> Iterator[Any]:
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for content in pieces(path.read_bytes()):
        record = Record()
        try:
            record.ParseFromString(content)
        except DecodeError:
            return
        yield record


def history(path: Path) -> Iterator[dict[str, Any]]:
    """What was logged, in order."""
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def last_step(folder: Path, run_id: str) -> int:
    """The highest `global_step` in the offline files of a run below `folder`; -1 where there is none."""
    steps = [-1]
    for path in folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        try:
            steps += [int(row["global_step"]) for row in history(path) if "global_step" in row]
        except (OSError, ValueError):  # another version's file: at worst, points appear twice
            continue
    return max(steps)
