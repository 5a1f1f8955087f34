"""Views to shards: `python data/pack.py views=... out=...`; with `--verify out=...` it reads them all again.

Packing again adds what is new or rendered again, in new shards; packing unchanged views changes nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from conf.cli import check, run
from data.files import UserError


@dataclass
class PackConfig:
    out: str = MISSING  # folder for shard-*.tar and manifest.json; with verify also one on a server (https://, s3://)
    views: str | None = None  # folder that data/render.py wrote; needed but with verify
    shard_mb: float = 512.0  # a shard's size at most: an object of 73 views at 256 px has about 4 MB
    image_format: str = "png"  # as rendered, or webp, lossless: a third smaller, slower to pack
    processes: int = 0  # 0: one a core
    min_clip_score: float | None = None  # leave out objects that data/score.py gave less
    verify: bool = False  # instead of packing, read all shards again (also: --verify)
    decode: bool = False  # with verify: decode every picture too

    def __post_init__(self) -> None:
        check(self.shard_mb > 0, f"shard_mb={self.shard_mb} must be positive")
        check(self.processes >= 0, f"processes={self.processes} must not be negative")
        check(self.image_format in ("png", "webp"), f"image_format={self.image_format} must be png or webp")
        check(self.verify or self.views is not None, "views is not set; give the folder that data/render.py wrote")


def main(config: PackConfig) -> None:
    from data.packing import pack, verify
    from data.shards import read_manifest

    if config.verify:
        problems = verify(config.out, config.decode, config.processes)
        for problem in problems:
            print(problem)
        if problems:
            raise UserError(f"{config.out}: {len(problems)} problems; copy those shards again, or pack the views again")
        manifest, done = read_manifest(config.out), "verified"
    else:
        views = Path(str(config.views))
        if not views.is_dir():
            raise UserError(
                f"views={views} is not a folder; correct it, or render there first: python data/render.py out={views}"
            )
        manifest = pack(
            views, Path(config.out), config.shard_mb, config.image_format, config.processes, config.min_clip_score
        )
        done = "packed"
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    print(
        f"{done}: {manifest.count} objects in {len(manifest.shards)} shards, {size:.1f} MiB: {config.out}/manifest.json"
    )


if __name__ == "__main__":
    sys.argv = [sys.argv[0], *("verify=true" if argument == "--verify" else argument for argument in sys.argv[1:])]
    run(PackConfig, "data/pack", main)
