"""A full-size random released checkpoint there and back, under a memory limit: `python tests/benchmarks/conversion.py`.

Makes an ldm checkpoint with the released one's names and shapes (UNet, VAE, ViT-H-14 image tower, noise schedule; 6.3
GB), converts it, samples two steps, converts it back, and compares the SHA-256 of every tensor.  Each command runs by
itself and its largest resident set is printed.  Where this user may make a memory cgroup, the kernel holds both
conversions, pages of files included, to `--limit-gb`.  Needs about 20 GB of disk.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

from diffusers import AutoencoderKL  # noqa: E402
from released_values import fill  # noqa: E402

from models.autoencoder import SD_VAE  # noqa: E402
from models.config import ImageEncoderConfig, UNetConfig  # noqa: E402
from models.image_encoder import build_image_encoder  # noqa: E402
from models.ldm_parts import ldm_names_of  # noqa: E402
from models.multiview import build_unet  # noqa: E402
from models.released import PREFIXES, is_vae_projection  # noqa: E402
from models.to_ldm import schedule_buffers  # noqa: E402
from models.weights_file import read_weights  # noqa: E402


def make_checkpoint(path: Path, width: int) -> None:
    """Random weights by the recorded rule, under the released names."""
    channels = [width, 2 * width, 4 * width, 4 * width]
    with torch.device("meta"):
        parts = {
            "unet": build_unet(UNetConfig(None, channels, [c // 64 for c in channels]), 4, 32),
            "vae": AutoencoderKL(**SD_VAE),
            "image_encoder": build_image_encoder(ImageEncoderConfig()),
        }
    weights = schedule_buffers({"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012})
    for part, network in parts.items():
        tensors = network.state_dict()
        for key, name in ldm_names_of(part, network.config, tensors).items():
            shape = tuple(tensors[key].shape)
            shape += (1, 1) if part == "vae" and is_vae_projection(key) else ()
            weights[PREFIXES[part] + name] = fill(PREFIXES[part] + name, shape)
    torch.save({"state_dict": weights}, path)
    print(f"{path.name}: {len(weights)} tensors, {sum(t.numel() for t in weights.values()) / 1e6:.0f} M parameters, "
          f"{path.stat().st_size / 1e9:.2f} GB")  # fmt: skip


def hashes(path: Path) -> dict[str, str]:
    return {name: hashlib.sha256(t.contiguous().numpy()).hexdigest() for name, t in read_weights(path).items()}


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path | None]:
    """A cgroup (version 1 or 2) of `limit` bytes, or None where this user may not make one."""
    first = Path("/sys/fs/cgroup/memory")
    root, name = (first, "memory.limit_in_bytes") if first.is_dir() else (first.parent, "memory.max")
    group = root / f"conversion-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        print(f"no memory limit: {error}")
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def forget(path: Path) -> None:
    """Takes a file's pages out of memory, so that who reads it next is charged for them."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(title: str, arguments: list[str | Path], source: Path, group: Path | None) -> None:
    """Runs one of the project's commands on `source` and prints its time and largest resident set."""
    forget(source)

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    began = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, preexec_fn=enter)  # noqa: PLW1509
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"error: {title} ended with status {status}")
    print(f"{title:<24}{time.monotonic() - began:8.0f} s{usage.ru_maxrss / 1e6:10.2f} GB resident at most", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=320, help="the UNet's first channels; 320 is the full size")
    parser.add_argument("--limit-gb", type=float, default=4.0, help="memory that a conversion may take")
    parser.add_argument(
        "--folder", type=Path, help="where the files go; default: a temporary folder, removed at the end"
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="conversion-"))
    folder.mkdir(parents=True, exist_ok=True)
    source, out, back, picture = (folder / n for n in ("source.ckpt", "converted", "back.ckpt", "picture.png"))
    try:
        make_checkpoint(source, arguments.width)
        from PIL import Image

        Image.linear_gradient("L").convert("RGB").save(picture)
        with memory_group(int(arguments.limit_gb * 1e9)) as group:
            if group is not None:
                print(f"conversions are held to {arguments.limit_gb:g} GB, pages of files included")
            measured("to diffusers", ["models/convert.py", source, out, "--camera", "mvdream"], source, group)
            measured("back to ldm", ["models/convert.py", "--to-ldm", out, back], out, group)
        sample = ["models/sample.py", f"checkpoint={out}", f"image={picture}", f"out={folder}/views", "steps=2"]
        measured("load, sample 2 steps", sample, out, None)
        before, after = hashes(source), hashes(back)
        if before != after:
            differing = sorted(set(before.items()) ^ set(after.items()))
            raise SystemExit(f"error: not the same bits; first difference: {differing[0][0]}")
        print(f"all {len(before)} tensors came back with the same SHA-256; this process itself took "
              f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB to make them")  # fmt: skip
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
