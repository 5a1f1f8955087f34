"""One folder of shards, wherever it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass
class CacheConfig:
    folder: str | None = None
    limit_gb: float = 100.0


class ShardFolder:
    def __init__(self, location: str, cache: CacheConfig | None = None):
        self.location, self.local = location, Path(location)

    def describe(self, name: str = "") -> str:
        return f"shards: {self.local / name}"

    def exists(self, name: str) -> bool:
        return (self.local / name).is_file()

    def size(self, name: str) -> int | None:
        return (self.local / name).stat().st_size if self.exists(name) else None

    def read_whole(self, name: str, limit: int) -> bytes:
        return (self.local / name).read_bytes()

    def read(self, name: str, offset: int, count: int, version: str = "") -> bytes:
        with open(self.local / name, "rb") as file:
            file.seek(offset)
            return file.read(count)
