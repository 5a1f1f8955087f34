"""A web server with every vice: `python tests/data/range_server.py FOLDER PORT [PEM]`.  Prints its port.

With a PEM file (certificate and key) it speaks https.  It is a proxy for http and, by CONNECT, for https.  The path
chooses:

/plain/NAME serves ranges; /ignore/ always sends the whole file; /busy/N/ is unavailable, /half/N/ hangs up midway and
/stall/N/ stops midway the first N times; /drip/ sends a byte at a time; /shifted/ sends other bytes than it was asked
for; /moved/ redirects to /plain/, /outside/ to file:, /loop/ to itself; /forbidden/ is; /die/N/ ends this process
midway through the N-th answer; /counts/ tells what happened so far as JSON.
"""

from __future__ import annotations

import collections
import json
import os
import re
import select
import socket
import ssl
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COUNTS: collections.Counter[str] = collections.Counter()
FOLDER = Path(sys.argv[1])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open

    def setup(self) -> None:
        COUNTS["connections"] += 1
        super().setup()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.send(body)

    def send(self, body: bytes) -> None:
        for start in range(0, len(body), 65536):
            self.wfile.write(body[start : start + 65536])
            COUNTS["bytes"] += len(body[start : start + 65536])

    def do_CONNECT(self) -> None:
        COUNTS["connects"] += 1
        self.send_response(200)
        self.end_headers()
        host, _, port = self.path.partition(":")
        with socket.create_connection((host, int(port))) as upstream:
            other = {upstream: self.connection, self.connection: upstream}
            while True:
                for source in select.select(list(other), [], [])[0]:
                    if not (content := source.recv(65536)):
                        self.close_connection = True
                        return
                    other[source].sendall(content)

    def do_GET(self) -> None:
        COUNTS["requests"] += 1
        # With a proxy the whole URL is asked for.
        _, vice, *numbers, name = re.sub(r"^http://[^/]*", "", self.path).split("/")
        if vice == "counts":
            return self.answer(200, json.dumps(COUNTS).encode())
        COUNTS[self.path] += 1
        if self.path.startswith("http://"):
            COUNTS["proxied"] += 1
        if vice in {"moved", "outside", "loop"}:
            to = {"moved": f"/plain/{name}", "outside": f"file:///{name}", "loop": self.path}[vice]
            return self.answer(302, b"elsewhere", Location=to)
        if vice == "forbidden":
            return self.answer(403, b"no")
        if vice == "busy" and COUNTS[self.path] <= int(numbers[0]):
            return self.answer(503, b"later")
        if not (FOLDER / name).is_file():
            return self.answer(404, b"none")
        self.serve(vice, numbers, FOLDER / name)

    def serve(self, vice: str, numbers: list[str], path: Path) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if vice == "ignore" or not asked:
            return self.answer(200, path.read_bytes())
        size = path.stat().st_size
        first, last, shift = int(asked[1]), min(int(asked[2]), size - 1), 7 if vice == "shifted" else 0
        if first > last:
            return self.answer(416, Content_Range=f"bytes */{size}")
        with open(path, "rb") as file:
            file.seek(first)
            body = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{size}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if vice == "drip":
            for byte in body:
                self.send(bytes([byte]))
                time.sleep(0.05)
        elif vice in {"half", "stall"} and COUNTS[self.path] <= int(numbers[0]):
            self.send(body[: len(body) // 2])
            time.sleep(2 if vice == "stall" else 0)
            self.close_connection = True
        elif vice == "die" and COUNTS[self.path] == int(numbers[0]):
            self.send(body[: len(body) // 2])
            os._exit(1)
        else:
            self.send(body)


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
server.daemon_threads = True
if len(sys.argv) > 3:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[3])
    server.socket = context.wrap_socket(server.socket, server_side=True)
print(server.server_address[1], flush=True)
server.serve_forever()
