"""free_port.py FIRST: FIRST if nobody on this machine uses that port, else one drawn at random that is free.

Not the next one, which is likely that of the neighbour's job.
"""

import itertools
import random
import socket
import sys

for port in itertools.chain([int(sys.argv[1])], iter(lambda: random.randrange(20000, 32768), None)):
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
    print(port)
    break
