"""A folder of shards, its server and a cache; lets the tests of this folder import the modules beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from shard_server import CONTENT, LARGE, SERVER, running

from data.sources import CacheConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shards")
    (path / "a.tar").write_bytes(CONTENT)
    (path / "empty.tar").write_bytes(b"")
    with open(path / "large.tar", "wb") as file:
        file.truncate(LARGE)
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with running(sys.executable, str(SERVER), str(folder), "0") as (address, _):
        yield f"http://{address}"


@pytest.fixture
def cached(tmp_path: Path) -> CacheConfig:
    return CacheConfig(str(tmp_path / "cache"), 1.0)
