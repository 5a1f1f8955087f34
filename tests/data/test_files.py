"""Files appear whole or not at all; folders have one worker; children end with their parent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.files import UserError, atomic_file, atomic_folder, read_json, require_writable, write_json
from data.processes import locked


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "b") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "a.json", "test") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("1", "2"):
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "x").write_text(content)
            assert content == "1" or (tmp_path / "f" / "sub" / "x").read_text() == "1"
    assert (tmp_path / "f" / "sub" / "x").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from data.files import UserError, atomic_file, atomic_folder
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # as on a full disk, a write beyond it fails
out = Path(sys.argv[1])
for write in (
    lambda: atomic_file(out / "a.bin"), lambda: atomic_folder(out / "b"),
):
    try:
        with write() as t:
            t = t if t.suffix == ".bin" else t / "x.safetensors"
            save = lambda: save_file({"x": torch.zeros(100_000)}, str(t))
            save() if t.suffix == ".safetensors" else t.write_bytes(bytes(20_000))
        sys.exit("no error")
    except UserError as error:
        print(error)
"""


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot write") == 2 and done.stdout.count("free space or choose another folder") == 2
    assert list(tmp_path.iterdir()) == []


def test_bad_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        require_writable(tmp_path / "file" / "sub")
    with pytest.raises(UserError, match=r"needs 999999999"):
        require_writable(tmp_path, needed_mb=999_999_999)
    with pytest.raises(UserError, match=r"settings: .*nothing\.json does not exist"):
        read_json(tmp_path / "nothing.json", "settings")


HOLD = "import sys, time; from pathlib import Path; from data.processes import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_one_process_a_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid}"), locked(tmp_path, wait_s=0.1):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path, wait_s=5):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path):
        assert "has no locks (Function not implemented); let no two processes" in capsys.readouterr().err


CHILD = "import time; from data.processes import die_with_parent as d; d(); print('up', flush=True); time.sleep(60)"
PARENT = (
    "import subprocess as s, sys; p = s.Popen([sys.executable, '-c', sys.argv[1]]); print(p.pid, flush=True); p.wait()"
)


LATE = "import os, subprocess as s, sys; p = s.Popen(['sh', '-c', 'sleep 1; exec ' + sys.executable + ' -c \"$0\"', "
LATE += "sys.argv[1]], env=os.environ | {'TORCHELASTIC_RUN_ID': 'none'}); print(p.pid, flush=True); p.wait()"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize(("starts", "when"), [(PARENT, "up\n"), (LATE, "")])
def test_children_end_with_a_killed_parent(starts: str, when: str) -> None:
    """Also where a launcher is killed before its process has asked for it."""
    parent = subprocess.Popen([sys.executable, "-c", starts, CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not when or parent.stdout.readline() == when
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
        assert time.monotonic() < deadline, f"process {child} outlived its parent"
        time.sleep(0.05)
    if not when:
        assert parent.stdout.read() == "", "it went on to work"
