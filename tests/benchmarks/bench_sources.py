"""What reading shards from elsewhere costs: `python tests/benchmarks/bench_sources.py [--kib 1024] [--reads 128]`.

Random ranges of one file, read by plain open, seek and read (the baseline, from the page cache), by ShardFolder from
the same folder, from a web server on loopback (written in Python, so that its own time counts too) by ShardFolder and
by fsspec's HTTPFileSystem, and by ShardFolder through an empty and a filled cache.  The kinds take turns; medians.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.sources import CacheConfig, ShardFolder

FILE_MIB = 256
SERVER = Path(__file__).resolve().parents[1] / "data" / "range_server.py"


def compare(folder: Path, url: str, count: int, reads: int, repeat: int) -> dict[str, float]:
    """Seconds for `reads` reads of `count` bytes, by kind."""
    path, cache = folder / "a.tar", folder / "cache"
    local, remote = ShardFolder(str(folder)), ShardFolder(url)
    cached = ShardFolder(url, CacheConfig(str(cache), 10.0))
    other = fsspec.filesystem("http")

    def plain(offset: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(count)

    kinds: dict[str, Callable[[int], bytes]] = {
        "plain open, seek, read": plain,
        "local": lambda offset: local.read("a.tar", offset, count, "1"),
        "http": lambda offset: remote.read("a.tar", offset, count, "1"),
        "http by fsspec": lambda offset: other.cat_file(f"{url}/a.tar", start=offset, end=offset + count),
        "http, empty cache": lambda offset: cached.read("a.tar", offset, count, "1"),
        "http, filled cache": lambda offset: cached.read("a.tar", offset, count, "1"),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(repeat + 1):
        offsets = random.Random(turn).sample(range(0, FILE_MIB * 2**20 - count), reads)
        for kind, read in random.Random(turn).sample(list(kinds.items()), len(kinds)):
            if kind == "http, filled cache":  # also when its turn comes before that of the empty one
                for offset in offsets:
                    read(offset)
            elif kind == "http, empty cache":
                shutil.rmtree(cache)
                cache.mkdir()
            began = time.perf_counter()
            lengths = {len(read(offset)) for offset in offsets}
            if turn:  # the first turn warms up
                times[kind].append(time.perf_counter() - began)
            assert lengths == {count}, kind
    return {kind: statistics.median(values) for kind, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kib", type=int, default=1024)
    parser.add_argument("--reads", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), options.kib * 1024
        (folder / "a.tar").write_bytes(np.random.default_rng(0).bytes(FILE_MIB * 2**20))
        command = [sys.executable, str(SERVER), str(folder), "0"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}/plain"
            seconds = compare(folder, url, count, options.reads, options.repeat)
        finally:
            server.kill()
            server.wait()
    print(f"{options.reads} reads of {options.kib} KiB at random:")
    baseline = seconds["plain open, seek, read"]
    for kind, value in seconds.items():
        rate = options.reads / value
        print(f"  {kind:<24}{rate:8.0f} reads/s {rate * count / 1e6:8.0f} MB/s {baseline / value:8.3f} of plain")
    print(f"  http: {seconds['http by fsspec'] / seconds['http']:.2f} times as fast as fsspec's HTTPFileSystem")


if __name__ == "__main__":
    main()
