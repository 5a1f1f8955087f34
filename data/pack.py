"""Views to shards: `python data/pack.py views=... out=...`.  Packing unchanged views again changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.cli import check, run
from data.shards import pack


@dataclass
class PackConfig:
    views: str = MISSING  # folder that data/render.py wrote
    out: str = MISSING  # folder for shard-*.tar and manifest.json
    objects_per_shard: int = 128  # an object of 72 views at 256 px is about 4 MB, so a shard is about 500 MB

    def __post_init__(self) -> None:
        check(self.objects_per_shard >= 1, f"objects_per_shard={self.objects_per_shard} must be at least 1")


def main(config: PackConfig) -> None:
    manifest = pack(Path(config.views), Path(config.out), config.objects_per_shard)
    objects = sum(len(shard.samples) for shard in manifest.shards)
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    print(f"{objects} objects in {len(manifest.shards)} shards, {size:.1f} MiB: {config.out}/manifest.json")


if __name__ == "__main__":
    run(PackConfig, "data/pack", main)
