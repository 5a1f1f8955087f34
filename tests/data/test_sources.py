"""Shards wherever they are: real servers, real processes, really killed; the right bytes or a named error."""

from __future__ import annotations

import contextlib
import datetime
import functools
import ipaddress
import multiprocessing
import os
import pickle
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_server import CONTENT, LARGE, SERVER, counts, running
from torch.utils.data import DataLoader

from data import sources
from data.files import UserError
from data.sources import CacheConfig, ShardFolder, parse_location

MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def set_up_s3(address: str, monkeypatch) -> None:
    values = {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "key", "ENDPOINT_URL": f"http://{address}"}
    for key, value in {**values, "DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    sources.store.cache_clear()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with running(sys.executable, "-c", MOTO) as (address, _), pytest.MonkeyPatch.context() as monkeypatch:
        set_up_s3(address, monkeypatch)
        files = fsspec.filesystem("s3")
        files.mkdir("bucket")
        files.pipe({"bucket/run/a.tar": CONTENT, "bucket/run/empty.tar": b""})
        yield "s3://bucket/run"
    sources.store.cache_clear()


@pytest.fixture
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(sources, "FIRST_DELAY_S", 0.01)


# Locations and names


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("pipe:curl -u me:secret http://x/a", "pipe: is not read from"),
        ("exec:rm -rf /", "exec: is not read from"),
        ("PIPE:ls", "pipe: is not read from"),
        ("ftp://host/folder", "ftp: is not read from"),
        ("simplecache::s3://bucket/run", "simplecache: is not read from"),
        ("zip://a.tar::s3://bucket/x.zip", "zip: is not read from"),
        ("s3://bucket/run::filecache", "chained URLs"),
        ("https://me:secret@host/run", r"https://\*\*\*@host/run: a password"),
        ("s3://me:secret@bucket/run", "a password"),
        ("https://host/run?token=secret", r"https://host/run\?\*\*\*: a password"),
        ("https://host/run#secret", "a #"),
        ("https://host:port/run", "is no URL"),
        ("https:///run", "is no URL of a folder"),
        ("http://host/a b", "is no URL of a folder"),
        ("http://host/a\r\nX: y", "is no URL of a folder"),
        ("file://host/run", "is no local folder"),
        ("file:run", "is no local folder"),
        ("", "no location is given"),
    ],
)
def test_other_locations_are_refused_before_anything_is_opened(location: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ShardFolder(location)
    assert "secret" not in str(caught.value) and "shards: " in str(caught.value)


def test_locations_are_understood(tmp_path: Path) -> None:
    assert parse_location("HTTPS://Host:8443/run//") == ("https://Host:8443/run", "https")
    assert parse_location("s3://bucket/") == ("s3://bucket", "s3")
    assert parse_location("file:///data/my%20run") == ("/data/my run", "file")
    assert ShardFolder(str(tmp_path)).local == ShardFolder(f"file://{tmp_path}").local == tmp_path
    assert ShardFolder("http://host/run/").describe("a.tar") == "shards: http://host/run/a.tar"
    assert ShardFolder("http://host/run").local is None


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs s3fs, which is not installed; pip install 'isotropic3d\[s3\]'"):
        ShardFolder("s3://bucket/run")


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "a/b.tar", ".hidden", "..", "", "a.tar\n", "a?b", "a%2f"])
def test_names_never_leave_the_folder(folder: Path, server: str, name: str) -> None:
    before = counts(server)
    for location in (str(folder), f"{server}/plain"):
        shards = ShardFolder(location)
        for ask in (
            shards.exists,
            shards.size,
            lambda n, s=shards: s.read_whole(n, 10),
            lambda n, s=shards: s.read(n, 0, 1),
        ):
            with pytest.raises(UserError, match="no plain file name"):
                ask(name)
    assert counts(server)["requests"] == before["requests"] + 1  # for the counts


# What is read


@pytest.fixture(params=["local", "http", "s3"])
def shards(request, folder: Path) -> ShardFolder:
    if request.param == "local":
        return ShardFolder(str(folder))
    if request.param == "http":
        return ShardFolder(request.getfixturevalue("server") + "/plain/")
    return ShardFolder(request.getfixturevalue("s3"))


def test_numbers_of_other_kinds_are_refused(folder: Path) -> None:
    for offset, count in (("0", 1), (0, None), (0.0, 1), (0, 2**31)):
        with pytest.raises(UserError, match="are no range"):
            ShardFolder(str(folder)).read("a.tar", offset, count)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="5 is no plain file name"):
        ShardFolder(str(folder)).read(5, 0, 1)  # type: ignore[arg-type]


def test_sizes_and_whole_files(shards: ShardFolder) -> None:
    assert shards.size("a.tar") == len(CONTENT) and shards.exists("empty.tar") and shards.size("empty.tar") == 0
    assert not shards.exists("nothing.tar")
    assert shards.read_whole("a.tar", len(CONTENT)) == CONTENT and shards.read_whole("empty.tar", 0) == b""
    with pytest.raises(UserError, match=r"a\.tar has 300000 bytes, and at most 299999 are read"):
        shards.read_whole("a.tar", len(CONTENT) - 1)
    with pytest.raises(UserError, match=r"nothing\.tar does not exist"):
        shards.read_whole("nothing.tar", 10)
    with pytest.raises(UserError, match=r"nothing\.tar: "):
        shards.read("nothing.tar", 0, 10)


near = st.integers(-2, 2).map(lambda step: len(CONTENT) + step) | st.integers(-2, len(CONTENT) + 2)


@given(offset=near, count=st.integers(-1, 3) | near, version=st.sampled_from(["", "1"]))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_gives_its_bytes_or_an_error(
    shards: ShardFolder, cached: CacheConfig, offset: int, count: int, version: str
) -> None:
    shards = ShardFolder(shards.location, cached)
    if count == 0 and offset >= 0:
        assert shards.read("a.tar", offset, count, version) == b""
    elif offset >= 0 and count > 0 and offset + count <= len(CONTENT):
        for _ in range(2):
            assert shards.read("a.tar", offset, count, version) == CONTENT[offset : offset + count]
    else:
        with pytest.raises(UserError, match=rf"shards: {re.escape(shards.location)}/a\.tar: .*{offset}"):
            shards.read("a.tar", offset, count, version)


# Servers that misbehave


def test_one_connection_serves_many_reads(server: str) -> None:
    shards = ShardFolder(f"{server}/plain")
    before = counts(server)["connections"]
    for offset in range(0, 20_000, 1000):
        assert shards.read("a.tar", offset, 500) == CONTENT[offset : offset + 500]
    assert counts(server)["connections"] <= before + 2  # one for the counts, and one at most for the reads


def test_a_server_without_ranges_is_named_and_not_downloaded_from(server: str) -> None:
    shards = ShardFolder(f"{server}/ignore")
    before = counts(server)["bytes"]
    for ask in (lambda: shards.size("large.tar"), lambda: shards.read("large.tar", 5, 10)):
        with pytest.raises(UserError, match=r"/ignore/large\.tar: the server ignores Range requests"):
            ask()
    assert counts(server)["bytes"] - before < LARGE  # what the sockets hold, twice
    assert shards.size("empty.tar") == 0


@pytest.mark.parametrize("vice", ["busy", "half", "stall"])
def test_what_passes_is_tried_again_and_then_named(server: str, vice: str, impatient, monkeypatch) -> None:
    monkeypatch.setattr(sources, "SOCKET_S", 1.0)
    sources._kept.connections = {}  # they have their time limits
    shards = ShardFolder(f"{server}/{vice}/3")
    assert shards.read("a.tar", 100, 5000) == CONTENT[100:5100]
    assert counts(server)[f"/{vice}/3/a.tar"] == 4
    reason = {"busy": "503 Service Unavailable", "half": "ended after 2500 of 5000 bytes", "stall": "timed out"}[vice]
    with pytest.raises(UserError, match=rf"/{vice}/99/a\.tar: 6 attempts failed, the last one with: .*{reason}"):
        ShardFolder(f"{server}/{vice}/99").read("a.tar", 100, 5000)
    assert counts(server)[f"/{vice}/99/a.tar"] == sources.ATTEMPTS
    sources._kept.connections = {}


def test_an_attempt_ends_in_time_even_if_bytes_keep_dripping(server: str, impatient, monkeypatch) -> None:
    monkeypatch.setattr(sources, "ATTEMPT_S", 0.1)
    with pytest.raises(UserError, match=r"only \d+ of 1000 bytes came in time"):
        ShardFolder(f"{server}/drip").read("a.tar", 0, 1000)


def test_what_does_not_pass_is_named_at_once(server: str) -> None:
    for path, message in {
        "forbidden": "403 Forbidden; make the folder readable",
        "shifted": r"sent bytes 17 to 27 for 10 to 20",
        "outside": "redirects to file://None, which is not followed",
        "loop": "more than 5 redirects",
        "nowhere/at/all": "does not exist",
    }.items():
        before = counts(server)["requests"]
        with pytest.raises(UserError, match=message):
            shards = ShardFolder(f"{server}/{path}")
            shards.read("a.tar", 10, 10) if path != "nowhere/at/all" else shards.read_whole("none.tar", 10)
        assert counts(server)["requests"] - before <= sources.MAX_REDIRECTS + 2
    assert ShardFolder(f"{server}/moved").read("a.tar", 10, 10) == CONTENT[10:20]


def test_a_secure_redirect_stays_secure() -> None:
    assert sources.redirected("https://a/x?y", "/z w?k=v") == "https://a/z%20w?k=v"
    for location in ("http://a/x", "ftp://a/x", "https://me:secret@a/x", ""):
        with pytest.raises(sources.PermanentError, match="which is not followed") as caught:
            sources.redirected("https://a/x", location)
        assert "secret" not in str(caught.value)


def test_a_server_that_dies_midway_and_comes_back(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "FIRST_DELAY_S", 0.2)
    command = (sys.executable, str(SERVER), str(folder))
    with contextlib.ExitStack() as stack:
        address, process = stack.enter_context(running(*command, "0"))
        shards = ShardFolder(f"http://{address}/die/2")
        assert shards.read("a.tar", 0, 50_000) == CONTENT[:50_000]

        def restart() -> None:
            process.wait()
            stack.enter_context(running(*command, address.partition(":")[2]))

        watcher = threading.Thread(target=restart)
        watcher.start()
        assert shards.read("a.tar", 7, 50_000) == CONTENT[7:50_007]
        watcher.join()
        assert process.returncode == 1


def test_a_server_that_stays_dead_is_named(folder: Path, impatient) -> None:
    with running(sys.executable, str(SERVER), str(folder), "0") as (address, process):
        shards = ShardFolder(f"http://{address}/die/1")
        with pytest.raises(UserError, match=rf"{address}/die/1/a\.tar: 6 attempts failed, .*ConnectionRefused"):
            shards.read("a.tar", 7, 50_000)
        assert process.wait() == 1


def test_an_object_store_that_dies_is_named(monkeypatch, impatient) -> None:
    with running(sys.executable, "-c", MOTO) as (address, process), pytest.MonkeyPatch.context() as environment:
        set_up_s3(address, environment)
        sources.store("s3", os.getpid()).mkdir("other")
        sources.store("s3", os.getpid()).pipe("other/a.tar", CONTENT)
        shards = ShardFolder("s3://other")
        assert shards.read("a.tar", 7, 1000) == CONTENT[7:1007]
        process.kill()
        process.wait()
        with pytest.raises(UserError, match=r"s3://other/a\.tar: 6 attempts failed, .*Could not connect"):
            shards.read("a.tar", 7, 1000)
    sources.store.cache_clear()


def test_missing_credentials_are_named(s3: str, monkeypatch) -> None:
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(key)
    for key in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(key, "/nonexistent")
    sources.store.cache_clear()
    with pytest.raises(UserError, match=r"s3://bucket/run/a\.tar: .*credentials.*AWS_ACCESS_KEY_ID"):
        ShardFolder(s3).read("a.tar", 0, 10)
    sources.store.cache_clear()


def test_a_proxy_is_gone_through(server: str, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert ShardFolder("http://shards.invalid/plain").read("a.tar", 3, 9) == CONTENT[3:12]
    assert counts(server)["proxied"] == 1


def certificate(path: Path) -> Path:
    """A self-signed one for 127.0.0.1, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - day).not_valid_after(now + day)
    signed = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(signed.public_bytes(serialization.Encoding.PEM) + private)
    return path


def test_https_with_a_certificate_that_is_known_and_through_a_proxy(
    folder: Path, server: str, tmp_path: Path, monkeypatch
) -> None:
    pem = str(certificate(tmp_path / "server.pem"))
    with running(sys.executable, str(SERVER), str(folder), "0", pem) as (address, _):
        shards = ShardFolder(f"https://{address}/plain")
        with pytest.raises(UserError, match="certificate is not valid"):
            shards.read("a.tar", 3, 9)
        monkeypatch.setenv("SSL_CERT_FILE", pem)
        sources._kept.connections = {}  # they have read the list of certificates
        for offset in range(10):
            assert shards.read("a.tar", offset, 9999) == CONTENT[offset : offset + 9999]
        monkeypatch.setenv("https_proxy", server)
        sources._kept.connections = {}  # they go without
        before = counts(server).get("connects", 0)
        for offset in range(10):
            assert shards.read("a.tar", offset, 9999) == CONTENT[offset : offset + 9999]
        assert counts(server)["connects"] == before + 1


# Processes


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["http", "s3"])
def test_loader_workers_read_with_connections_of_their_own(start: str, where: str, request) -> None:
    """Also when the parent has used its own before, and goes on using them meanwhile."""
    location = request.getfixturevalue("server") + "/plain" if where == "http" else request.getfixturevalue("s3")
    shards = ShardFolder(location)
    assert shards.read("a.tar", 0, 10) == CONTENT[:10]
    offsets = list(range(0, 20_000, 1000))
    read = functools.partial(ShardFolder.read, shards, "a.tar", count=777)
    context = multiprocessing.get_context(start)
    loader: DataLoader[bytes] = DataLoader(
        offsets,  # type: ignore[arg-type]  # a list is a dataset too
        batch_size=None,
        collate_fn=read,
        num_workers=2,
        multiprocessing_context=context,
    )
    for offset, content in zip(offsets, loader, strict=True):
        assert content == CONTENT[offset : offset + 777]
        assert shards.read("a.tar", offset, 10) == CONTENT[offset : offset + 10]


def test_a_folder_can_be_pickled(server: str, cached: CacheConfig) -> None:
    shards = ShardFolder(f"{server}/plain", cached)
    assert shards.read("a.tar", 5, 10, "1") == CONTENT[5:15]
    assert pickle.loads(pickle.dumps(shards)).read("a.tar", 5, 11, "1") == CONTENT[5:16]
