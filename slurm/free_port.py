"""free_port.py FIRST: the first port from FIRST on that nobody on this machine uses."""

import socket
import sys

for port in range(int(sys.argv[1]), 65536):
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
    print(port)
    break
