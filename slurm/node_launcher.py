"""What srun starts on each node: `accelerate launch`, with signals and statuses as a scheduler wants them.

    python slurm/node_launcher.py ACCELERATE_LAUNCH_ARGUMENTS train/stage1.py [key=value ...]

`accelerate launch` itself gives its processes 30 seconds after SIGTERM, knows no SIGUSR1, and ends with 1 whatever
they ended with.  Here SIGUSR1 and SIGTERM reach the processes as SIGUSR1, which have as long as they need to save; the
status is 0, REQUEUE when they want to be started again, and above 100 when one failed: srun reports the highest of its
tasks', so that a failure on one node outranks the others, which have lost that node and want to go on.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.processes import REQUEUE


def hand_on(number: int, frame: FrameType | None) -> None:
    """SIGUSR1 to the processes.  One that is still starting has nothing to save and ends by it."""
    for child in psutil.Process().children():
        child.send_signal(signal.SIGUSR1)


def status_of(exitcodes: Iterable[int], processes: int) -> int:
    """Of this node's processes, of `processes` in all.  exitcodes: as Popen has them, -N for signal N; SIGTERM is the
    launcher's own, and NCCL ends by SIGABRT the processes that have lost another."""
    wishes = [REQUEUE, -signal.SIGUSR1, -signal.SIGTERM] + ([-signal.SIGABRT] if processes > 1 else [])
    own = [128 - code if code < 0 else 100 + min(code, 27) for code in exitcodes if code not in wishes]
    return max(own, default=REQUEUE)


def main() -> None:
    arguments = launch_command_parser().parse_args()
    arguments.signals_to_handle = "SIGQUIT"  # the rest are ours
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, hand_on)
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        exitcodes = [failure.exitcode for failure in error.failures.values()]
        raise SystemExit(status_of(exitcodes, arguments.num_processes)) from None
    except ConnectionError as error:
        port = str(arguments.main_process_port)
        if port not in str(error):  # accelerate names it, at the first node
            raise
        words = f"error: port {port} was taken since the job chose it; another start takes another"
        print(words, file=sys.stderr, flush=True)
        raise SystemExit(REQUEUE) from None


if __name__ == "__main__":
    main()
