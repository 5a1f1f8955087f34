"""One folder of shards, wherever it is: on this machine, on an http(s) server or in an object store.

Training reads one sample at a time, a byte range of a shard (data/shards.py), in random order.  What can pass by itself
is tried again and then named; what cannot is named at once.

http(s) goes through the standard library's client, with one open connection a thread and process.  fsspec's
HTTPFileSystem (2026.9) was tried in its place: from a server that ignores ranges it takes the whole file and returns it
as the range, an instance from before a fork raises in the child, and it is not faster where samples are small
(tests/benchmarks/bench_sources.py).  Object stores go through fsspec, with one file system a process.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import http.client
import importlib.util
import os
import random
import re
import select
import ssl
import stat
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from data.files import UserError
from data.range_cache import CacheConfig, RangeCache

__all__ = ["CacheConfig", "ShardFolder"]

T = TypeVar("T")
ATTEMPTS = 6
FIRST_DELAY_S = 0.5  # doubles with each attempt, times a random factor from 0.5 to 1.5: 15 s in all on average
SOCKET_S = 20.0  # without a byte
ATTEMPT_S, SLOWEST = 30.0, 1e6  # an attempt at `count` bytes may take ATTEMPT_S + count / SLOWEST (bytes a second)
MAX_READ = 2**30  # bytes at a time
MAX_REDIRECTS = 5
UNQUOTED = "/%:@!$&'()*+,;=~"  # what RFC 3986 allows in a path, and what is quoted already
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# scheme: the package that fsspec needs for it (our extra bears the scheme's name), and where that finds credentials
STORES = {
    "s3": (
        "s3fs",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws, or FSSPEC_S3='{\"anon\": true}' for a public one",
    ),
    "gs": ("gcsfs", 'GOOGLE_APPLICATION_CREDENTIALS, or FSSPEC_GS=\'{"token": "anon"}\' for a public one'),
}
KINDS = "a local folder, or file://, http://, https://, s3:// or gs://"
COPY = "copy the shard again, or pack the views again"


class TransientError(Exception):
    """May pass by itself: worth another attempt."""


class PermanentError(Exception):
    """Another attempt would end the same.  The message ends with the remedy."""


class UnreadableShard(UserError):
    """A file that is not as the manifest says, or not given out: another attempt would end the same."""


class Files(Protocol):
    """Plain files of one folder.  Both raise TransientError or PermanentError."""

    def size(self, name: str) -> int | None:
        """Bytes; None: not there."""

    def fetch(self, name: str, offset: int, count: int) -> bytes:
        """Exactly `count` > 0 bytes."""


class ShardFolder:
    """One folder of shards, wherever it is.

    location: a local folder, or a file://, http://, https://, s3:// or gs:// URL.  cache: for byte ranges that are read
    with a version.  Opens nothing until asked; can be pickled, and forked at any time: every process and thread has
    connections of its own.  Raises UserError for a location that is not understood, a missing package or a cache folder
    that cannot be written.
    """

    def __init__(self, location: str, cache: CacheConfig | None = None):
        self._files: Files
        self.local: Path | None = None
        self.location, scheme = parse_location(str(location))
        if scheme == "file":
            self.local = Path(self.location)
            self._files = LocalFiles(self.local)
        elif scheme in STORES:
            self._files = StoreFiles(self.location, scheme)
        else:
            self._files = HttpFiles(self.location)
        self._cache: RangeCache | None = None
        if cache is not None and cache.folder is not None:
            self._cache = RangeCache(cache.folder, int(cache.limit_gb * 1e9))

    def describe(self, name: str = "") -> str:
        """For messages: "shards: s3://bucket/run/shard-000001.tar"."""
        return f"shards: {self.location.rstrip('/')}/{name}" if name else f"shards: {self.location}"

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """Bytes; None when there is no such file."""
        self._check_name(name)
        return self._attempt(name, lambda: self._files.size(name))

    def read_whole(self, name: str, limit: int) -> bytes:
        """A small file, never from the cache.  Raises UserError also when it has more than `limit` bytes."""
        size = self.size(name)
        if size is None:
            raise UserError(f"{self.describe(name)} does not exist; check the folder's name")
        if size > limit:
            raise UserError(
                f"{self.describe(name)} has {size} bytes, and at most {limit} are read; pack the views again"
            )
        return self._attempt(name, lambda: self._files.fetch(name, 0, size)) if size else b""

    def read(self, name: str, offset: int, count: int, version: str = "") -> bytes:
        """Exactly `count` bytes from `offset` on, from the cache if they are there.

        version: the shard's SHA-256 from the manifest.  Without one the cache is passed by: it could not tell whether
        the shard has changed.  Raises UserError naming the shard, the range and the reason.
        """
        self._check_name(name)
        if not isinstance(offset, int) or not isinstance(count, int) or offset < 0 or not 0 <= count <= MAX_READ:
            raise UserError(f"{self.describe(name)}: {count} bytes from {offset} on are no range; pack the views again")
        if count == 0:
            return b""
        if self._cache is None or not version:
            return self._attempt(name, lambda: self._files.fetch(name, offset, count))
        key = self._key(name, offset, count, version)
        content = self._cache.get(key, count)
        if content is None:
            content = self._attempt(name, lambda: self._files.fetch(name, offset, count))
            self._cache.put(key, content)
        return content

    def forget(self, name: str, offset: int, count: int, version: str) -> None:
        """Takes what `read` gave out of the cache, since it turned out not to be what was packed."""
        if self._cache is not None:
            self._cache.drop(self._key(name, offset, count, version))

    def _key(self, name: str, offset: int, count: int, version: str) -> list[str | int]:
        where = str(self.local.absolute()) if self.local else self.location
        return [where, name, version, offset, count]

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name):  # it comes from a manifest
            raise UserError(f"{self.describe()}: {name!r} is no plain file name; pack the views again")

    def _attempt(self, name: str, action: Callable[[], T]) -> T:
        """With exponential backoff and jitter, so that many workers do not come back at the same moment."""
        reason, delay = "", FIRST_DELAY_S
        for number in range(ATTEMPTS):
            if number:
                time.sleep(delay * random.SystemRandom().uniform(0.5, 1.5))  # leaves training's random numbers alone
                delay *= 2
            try:
                return action()
            except TransientError as error:
                reason = str(error)
            except PermanentError as error:
                raise UnreadableShard(f"{self.describe(name)}: {error}") from None
        raise UserError(
            f"{self.describe(name)}: {ATTEMPTS} attempts failed, the last one with: {reason}; check the server and the "
            "network, or copy the shards to a local folder"
        )


def parse_location(location: str) -> tuple[str, str]:
    """-> (local path or URL without a slash at its end, scheme); UserError for what is not on the list.

    No message repeats a password.
    """
    found = SCHEME.match(location)
    if not found:
        if not location:
            raise UserError(f"shards: no location is given; give {KINDS}")
        return location, "file"
    scheme = found[1].lower()
    if scheme not in {"file", "http", "https", *STORES}:
        raise UserError(f"shards: {scheme}: is not read from; give {KINDS} (a local name with a colon as ./name)")
    shown = re.sub(r"//[^/]*@", "//***@", re.sub(r"[?#].*", "?***", location, flags=re.DOTALL))
    if "::" in location:
        raise UserError(f"shards: {shown}: chained URLs are not read from; give {KINDS}")
    try:
        parts = urlsplit(location)
        _ = parts.port  # raises for what is no number
    except ValueError as error:
        raise UserError(f"shards: {shown} is no URL ({error}); give {KINDS}") from None
    if scheme == "file":
        if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/") or parts.query or parts.fragment:
            raise UserError(f"shards: {shown} is no local folder; write it as file:///folder or as a plain path")
        return unquote(parts.path), "file"
    if "@" in parts.netloc or "?" in location or "#" in location:
        raise UserError(
            f"shards: {shown}: a password, a ? or a # in a URL would be kept in every run's configuration; give the "
            "folder's plain URL, and credentials through the environment"
        )
    if not parts.hostname or not re.fullmatch(r"[^\x00-\x20\x7f\\]+", location):
        raise UserError(f"shards: {shown!r} is no URL of a folder; give {KINDS}")
    return f"{scheme}://{location.partition('://')[2].rstrip('/')}", scheme


def past_end(offset: int, count: int, size: int | None) -> PermanentError:
    there = "is not there" if size is None else f"ends at {size}"
    return PermanentError(f"bytes {offset} to {offset + count} are asked for and the file {there}; {COPY}")


class LocalFiles:
    def __init__(self, folder: Path):
        self.folder = folder

    def size(self, name: str) -> int | None:
        try:
            status = os.stat(self.folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise PermanentError(f"cannot be read ({error.strerror}); {COPY}") from None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def fetch(self, name: str, offset: int, count: int) -> bytes:
        try:
            with open(self.folder / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if offset + count > size:  # before the memory is asked for
                    raise past_end(offset, count, size)
                file.seek(offset)
                content = file.read(count)
        except OSError as error:
            raise PermanentError(f"cannot be read ({error.strerror}); {COPY}") from None
        if len(content) != count:
            raise past_end(offset, count, offset + len(content))
        return content


class HttpFiles:
    def __init__(self, url: str):
        scheme, _, rest = url.partition("://")
        host, slash, path = rest.partition("/")
        self.url = f"{scheme}://{host}{slash}{quote(path, safe=UNQUOTED)}"

    def size(self, name: str) -> int | None:
        """Asks for the first byte rather than for the head, so that a server without ranges is named at the start."""
        deadline = time.monotonic() + ATTEMPT_S
        with http_range(f"{self.url}/{name}", 0, 1) as reply:
            if reply.status in {404, 410}:
                return None
            if reply.status == 200 and reply.getheader("Content-Length") == "0":
                return 0  # an empty file has no ranges
            _, _, total = content_range(reply)
            if reply.status == 206:
                read_body(reply, 1, deadline)
            return total

    def fetch(self, name: str, offset: int, count: int) -> bytes:
        deadline = time.monotonic() + ATTEMPT_S + count / SLOWEST
        with http_range(f"{self.url}/{name}", offset, count) as reply:
            first, last, total = content_range(reply)
            if offset + count > total:
                raise past_end(offset, count, total)
            if (first, last) != (offset, offset + count - 1):
                raise PermanentError(f"the server sent bytes {first} to {last + 1} for {offset} to {offset + count}")
            return read_body(reply, count, deadline)


@dataclass
class Kept:
    """A connection to a server, or to a proxy that is asked for whole URLs."""

    connection: http.client.HTTPConnection
    whole_urls: bool = False


_kept = threading.local()  # connections of this thread by (process, server); a child's never meet its parent's


@contextlib.contextmanager
def http_range(url: str, offset: int, count: int) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET of a byte range, after redirects.

    The connection is used again when the answer was read to its end, and closed otherwise.
    """
    headers = {
        "Range": f"bytes={offset}-{offset + count - 1}",
        "Accept-Encoding": "identity",
        "User-Agent": "isotropic3d",
    }
    for _ in range(MAX_REDIRECTS + 1):
        connection, target = connect(url)
        whole = False
        try:
            connection.request("GET", target, headers=headers)
            reply = connection.getresponse()
            if reply.status not in {301, 302, 303, 307, 308}:
                yield reply
                whole = reply.isclosed()
                return
            url = redirected(url, reply.getheader("Location", ""))
            reply.read(2**16)
            whole = reply.isclosed()
        except ssl.SSLCertVerificationError as error:
            raise PermanentError(f"the server's certificate is not valid ({error.verify_message})") from None
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(f"{type(error).__name__}: {error}") from None
        except (ValueError, UnicodeError) as error:  # of a redirect's target, which the server makes up
            raise PermanentError(f"the server leads to {url!r}, which is no URL ({error})") from None
        finally:
            if not whole:
                connection.close()
    raise PermanentError(f"more than {MAX_REDIRECTS} redirects; give the URL that they lead to")


def connect(url: str) -> tuple[http.client.HTTPConnection, str]:
    """This thread's connection to the server of `url`, and what to ask it for."""
    parts = urlsplit(url)
    connections: dict[tuple[int, str, str], Kept] = vars(_kept).setdefault("connections", {})
    key = (os.getpid(), parts.scheme, parts.netloc)
    if key not in connections:
        connections[key] = new_connection(parts)
    connection = connections[key].connection
    if connection.sock is not None:
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        if poll.poll(0):  # the server has closed it meanwhile; the next request opens it again
            connection.close()
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return connection, url if connections[key].whole_urls else path


def new_connection(parts: SplitResult) -> Kept:
    """Not open yet.  Through a proxy where http_proxy, https_proxy and no_proxy say so."""
    assert parts.hostname is not None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname):
        return Kept(kind(parts.hostname, parts.port, timeout=SOCKET_S))
    via = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if via.scheme != "http" or not via.hostname or via.username:
        raise PermanentError(
            f"{parts.scheme}_proxy is not http://host:port; set it so, or {parts.hostname} in no_proxy"
        )
    connection = kind(via.hostname, via.port or 80, timeout=SOCKET_S)
    if parts.scheme == "https":
        connection.set_tunnel(parts.hostname, parts.port)
    return Kept(connection, whole_urls=parts.scheme == "http")


def redirected(url: str, location: str) -> str:
    target = urlsplit(urljoin(url, location))
    allowed = {"https"} if urlsplit(url).scheme == "https" else {"http", "https"}
    if not location or target.scheme not in allowed or not target.hostname or "@" in target.netloc:
        where = f"{target.scheme}://{target.hostname}" if location else "nowhere"
        raise PermanentError(f"the server redirects to {where}, which is not followed; give the URL of the shards")
    return quote(target._replace(fragment="").geturl(), safe=UNQUOTED + "?[]")


def content_range(reply: http.client.HTTPResponse) -> tuple[int, int, int]:
    """(first byte, last byte, the file's size) of what the server sends; first > last when there is nothing there."""
    status = f"{reply.status} {reply.reason}"
    if reply.status >= 500 or reply.status in {408, 425, 429}:
        raise TransientError(status)
    if reply.status == 200:
        raise PermanentError(
            "the server ignores Range requests and would send the whole file for every sample (python -m http.server "
            "does so); serve the shards with nginx or Apache or from an object store, or copy them to a local folder"
        )
    if reply.status in {401, 403}:
        raise PermanentError(
            f"the server says {status}; make the folder readable, or copy the shards to a local folder"
        )
    if reply.status not in {206, 416}:
        raise PermanentError(f"the server says {status}; check the URL, or {COPY}")
    sent = reply.getheader("Content-Range", "")
    found = re.fullmatch(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})", sent.strip())
    if (
        not found
        or (reply.status == 206) != (found[1] is not None)
        or reply.getheader("Content-Encoding", "identity") != "identity"
    ):
        raise PermanentError(
            f"the server answers a Range request with {status} and Content-Range {sent!r}; use another"
        )
    return int(found[1] or 0), int(found[2] or -1), int(found[3])


def read_body(reply: http.client.HTTPResponse, count: int, deadline: float) -> bytes:
    content = bytearray()
    while len(content) < count:
        part = reply.read1(min(count - len(content), 2**18))
        if not part:
            raise TransientError(f"the connection ended after {len(content)} of {count} bytes")
        content += part
        if time.monotonic() > deadline:
            raise TransientError(f"only {len(content)} of {count} bytes came in time")
    if reply.read(1):
        raise TransientError(f"the server sent more than the {count} bytes that it had announced")
    return bytes(content)


class StoreFiles:
    """An object store, through fsspec."""

    def __init__(self, url: str, scheme: str):
        self.url, self.scheme = url, scheme
        package, self.credentials = STORES[scheme]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"shards: {url} needs {package}, which is not installed; pip install 'isotropic3d[{scheme}]'"
            )

    def size(self, name: str) -> int | None:
        try:
            with store_errors(self.credentials):
                info = store(self.scheme, os.getpid()).info(f"{self.url}/{name}", timeout=ATTEMPT_S)
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def fetch(self, name: str, offset: int, count: int) -> bytes:
        content, limit = b"", ATTEMPT_S + count / SLOWEST
        try:
            with store_errors(self.credentials):
                files = store(self.scheme, os.getpid())
                content = files.cat_file(f"{self.url}/{name}", start=offset, end=offset + count, timeout=limit)
        except (FileNotFoundError, RangeError):
            pass  # said below
        if len(content) != count:
            size = self.size(name)
            if size is None or offset + count > size:
                raise past_end(offset, count, size)
            raise TransientError(f"{len(content)} of {count} bytes came")
        return content


class RangeError(Exception):
    """The store has no such range, or calls another argument invalid."""


@functools.cache
def store(scheme: str, pid: int) -> Any:
    """The file system of process `pid`.

    A forked child makes its own and never lets go of its parent's: closing that would take the parent's sockets out of
    the event queue, which the two share.
    """
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        timeouts = {"connect_timeout": SOCKET_S, "read_timeout": SOCKET_S}
        options = {"config_kwargs": {**timeouts, "retries": {"total_max_attempts": 1}}}
    files = fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **options)
    files.retries = 1  # the attempts are counted here, once
    return files


@contextlib.contextmanager
def store_errors(credentials: str) -> Iterator[None]:
    """What fsspec and the libraries below it raise, as TransientError or PermanentError; FileNotFoundError passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, OSError) and library not in {
            "aiobotocore", "aiohttp", "botocore", "fsspec", "gcsfs", "google", "s3fs"
        }:  # fmt: skip
            raise  # a mistake of ours
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.errno == errno.EINVAL:
            raise RangeError(reason) from None
        if isinstance(error, PermissionError) or re.search("Credential|Token|Profile", type(error).__name__):
            raise PermanentError(f"{reason}; give credentials that may read it ({credentials})") from None
        raise TransientError(reason) from None
