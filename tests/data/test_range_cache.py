"""Ranges kept on a local disk: within the limit, right after kills and damage, shared by processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shard_server import CONTENT, counts

from conf.cli import ConfigError
from data import range_cache
from data.files import UserError
from data.range_cache import RangeCache
from data.sources import CacheConfig, ShardFolder


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if path.is_file())


def test_a_range_is_fetched_once_for_each_place_and_version(server: str, cached: CacheConfig) -> None:
    def fetches(shards: ShardFolder, versions: str) -> int:
        before = counts(server)["requests"]
        for version in versions.split(","):
            assert shards.read("a.tar", 5, 10, version) == CONTENT[5:15]
        return counts(server)["requests"] - before - 1

    shards = ShardFolder(f"{server}/plain", cached)
    assert fetches(shards, "1,1,1") == 1
    assert fetches(shards, "1,2,1,2") == 1
    assert fetches(ShardFolder(f"{server}/busy/0", cached), "1,2,1,2") == 2  # the same name in another folder
    assert fetches(shards, ",,") == 3  # without a version it could be an older shard's


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        lambda path: os.truncate(path, 500),
        lambda path: os.truncate(path, 5),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        lambda path: path.write_bytes(next(p for p in entries(path.parents[1]) if p != path).read_bytes()),
    ],
    ids=["flipped", "truncated", "no content", "empty", "longer", "another range's"],
)
def test_damaged_files_are_fetched_again(folder: Path, cached: CacheConfig, damage) -> None:
    assert cached.folder is not None
    shards = ShardFolder(str(folder), cached)
    for offset in (10, 5000):
        shards.read("a.tar", offset, 1000, "1")
    whole = {path: path.read_bytes() for path in entries(Path(cached.folder))}
    for path, content in whole.items():
        damage(path)
        assert path.read_bytes() != content
        for offset in (10, 5000):
            assert shards.read("a.tar", offset, 1000, "1") == CONTENT[offset : offset + 1000]
        assert {path: path.read_bytes() for path in whole} == whole


def test_the_least_recently_used_go_and_nothing_else_does(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(range_cache, "SCAN_SHARE", 0.0)  # looks at each write
    place = tmp_path / "cache"
    (place / "aa").mkdir(parents=True)
    others = [place / "notes.txt", place / "aa" / "notes.txt", place / ("0" * 64)]
    for path in others:
        path.write_bytes(bytes(50_000))
    shards = ShardFolder(str(folder), CacheConfig(str(place), 1e-5))  # 10 kB
    for number in range(9):
        shards.read("a.tar", number, 1000, "1")
        (newest,) = [
            path for path in entries(place) if path.stat().st_mtime > time.time() - 1000 and path not in others
        ]
        os.utime(newest, (0, number - 10**4 + time.time()))
    kept = {path: path.stat().st_mtime for path in entries(place) if path not in others}
    first = min(kept, key=lambda path: kept[path])
    shards.read("a.tar", 0, 1000, "1")  # used again
    assert first.stat().st_mtime > time.time() - 1000
    for offset in (100, 200):  # what is over the limit goes before the next one comes
        shards.read("a.tar", offset, 1000, "1")
    gone = set(kept) - set(entries(place))
    assert gone == {sorted(kept, key=lambda path: kept[path])[1]} and all(path.exists() for path in others)
    there = entries(place)
    shards.read("a.tar", 0, 20_000, "1")  # more than the limit is not kept, and pushes nothing out
    assert entries(place) == there


def test_what_a_killed_process_left_is_removed_in_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(range_cache, "SCAN_SHARE", 0.0)
    cache = RangeCache(tmp_path, 1000)
    for name, age in (("old", range_cache.STALE_S + 10), ("new", 0)):
        path = tmp_path / "ab" / f".{name}.tmp"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10))
        os.utime(path, (time.time() - age,) * 2)
    cache.put(["key"], b"content")
    assert [path.name for path in (tmp_path / "ab").glob(".*")] == [".new.tmp"]
    assert cache.get(["key"], 7) == b"content"


READER = """
import random, sys
from pathlib import Path
from data.sources import CacheConfig, ShardFolder
folder, cache, seed, limit, reads = sys.argv[1:]
content = (Path(folder) / "a.tar").read_bytes()
shards, order = ShardFolder(folder, CacheConfig(cache, float(limit))), random.Random(int(seed))
print("up", flush=True)
for _ in range(int(reads)):
    offset = order.randrange(0, 280_000, 2000)
    assert shards.read("a.tar", offset, 20_000, "1") == content[offset : offset + 20_000]
    assert not shards._cache._off
"""


def reader(folder: Path, cache: Path, seed: int, limit: float, reads: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READER, str(folder), str(cache), str(seed), str(limit), str(reads)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_several_processes_share_one_cache_within_its_limit(folder: Path, tmp_path: Path) -> None:
    """4 processes over 140 ranges of 20 kB, of which 50 fit; what is kept is measured while all of them are stopped."""
    limit, sizes = 1_000_000, []
    processes = [reader(folder, tmp_path, seed, limit / 1e9, 1500) for seed in range(4)]
    while any(process.poll() is None for process in processes):
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)
        sizes.append(sum(path.stat().st_size for path in tmp_path.glob("??/*")))
        for process in processes:
            process.send_signal(signal.SIGCONT)
        time.sleep(random.uniform(0, 0.05))
    assert [process.returncode for process in processes] == [0] * 4
    bound = limit * (range_cache.KEEP_SHARE + 2 * 4 * range_cache.SCAN_SHARE) + 4 * 20_032  # range_cache.py's
    assert 0.5 * limit < max(sizes) <= bound, f"{max(sizes) / limit:.3f} of the limit"
    assert not list(tmp_path.glob("??/.*"))


@pytest.mark.slow
def test_killed_processes_leave_a_cache_that_is_right(folder: Path, tmp_path: Path) -> None:
    for round_number in range(10):
        processes = [reader(folder, tmp_path, 2 * round_number + i, 5e-4, 10**9) for i in range(2)]
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(random.uniform(0, 0.1))
        for process in processes:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
    survivor = reader(folder, tmp_path, 99, 5e-4, 2000)
    assert survivor.wait() == 0
    assert 0 < sum(path.stat().st_size for path in tmp_path.glob("??/[0-9a-f]*")) <= 1.1 * 500_000


FULL = """
import resource, signal, sys
from data.sources import CacheConfig, ShardFolder
shards = ShardFolder(sys.argv[1], CacheConfig(sys.argv[2]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # as on a full disk, a write beyond it fails
for offset in range(5):
    assert len(shards.read("a.tar", offset, 20_000, "1")) == 20_000
"""


def test_a_full_disk_turns_the_cache_off_with_one_line(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.count("note: the cache") == 1 and "goes on without it" in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_that_is_a_file_meanwhile_turns_it_off(folder: Path, cached: CacheConfig, capfd) -> None:
    assert cached.folder is not None
    shards = ShardFolder(str(folder), cached)
    Path(cached.folder).rmdir()
    Path(cached.folder).write_text("")
    for offset in range(5):
        assert shards.read("a.tar", offset, 10, "1") == CONTENT[offset : offset + 10]
    assert capfd.readouterr().err.count("note: the cache") == 1


def test_a_deleted_cache_folder_is_made_again(folder: Path, cached: CacheConfig) -> None:
    assert cached.folder is not None
    shards = ShardFolder(str(folder), cached)
    Path(cached.folder).rmdir()
    assert shards.read("a.tar", 0, 10, "1") == CONTENT[:10] and len(entries(Path(cached.folder))) == 1


def test_unusable_caches_are_refused_at_the_start(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        ShardFolder(str(folder), CacheConfig(str(tmp_path / "file")))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"cache\.limit_gb="):
            CacheConfig("x", limit)
    with pytest.raises(ConfigError, match=r"cache\.folder="):
        CacheConfig("")
    assert ShardFolder(str(folder), CacheConfig()).read("a.tar", 0, 4, "1") == CONTENT[:4]
