"""The checks, each a function that returns rows.  Nothing is changed, fetched or started that stays."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data.files import UserError, content_mark
from doctor.config import DoctorConfig
from monitor.facts import has_key

ROOT = Path(__file__).resolve().parents[1]
OK, WARNING, MISSING = "ok", "warning", "missing"
GIB = 2**30


@dataclass
class Row:
    name: str
    state: str  # OK, WARNING: works with less, or MISSING: what it is for does not work
    found: str
    remedy: str = ""


def output_of(words: list[str], seconds: float, **environment: str) -> str | None:
    """What a command prints; None where it is not there, fails or takes longer."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, check=True, env=os.environ | environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout or done.stderr).strip()


def python(config: DoctorConfig) -> Iterator[Row]:
    version = ".".join(map(str, sys.version_info[:3]))
    state = OK if sys.version_info[:2] in ((3, 11), (3, 12)) else WARNING
    yield Row("Python", state, f"{version}, {sys.executable}", "3.11 and 3.12 are what was tested")
    try:
        wanted = importlib.metadata.requires("isotropic3d") or []
    except importlib.metadata.PackageNotFoundError:
        yield Row("packages", MISSING, "isotropic3d is not installed in this environment", "make install")
        return
    lacking = []
    for line in wanted:
        if "extra ==" not in line:
            name = re.split(r"[<>=!\[; ]", line)[0]
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                lacking.append(name)
    found = f"missing: {', '.join(lacking)}" if lacking else "all that pyproject.toml asks for"
    yield Row("packages", MISSING if lacking else OK, found, "make install")


def torch_and_gpus(config: DoctorConfig) -> Iterator[Row]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Row("torch", MISSING, str(error).splitlines()[0], "make install")
        return
    yield Row("torch", OK, torch.__version__)
    if not torch.cuda.is_available():
        driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], config.timeout_s)
        if driver:
            words = f"driver {driver.splitlines()[0]}, and a torch for CUDA {torch.version.cuda}"
            yield Row("CUDA", MISSING, words, "install the torch of your driver (pytorch.org), or a newer driver")
        else:
            yield Row("CUDA", WARNING, "no GPU: small runs on the CPU alone", "a machine with an NVIDIA GPU")
        yield Row("NCCL", WARNING, "not needed without GPUs; gloo is used", "")
        return
    yield Row("CUDA", OK, f"torch is built for {torch.version.cuda}")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        bf16 = torch.cuda.is_bf16_supported()
        enough = total >= 24 * GIB and bf16
        words = f"{name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, bf16 {'yes' if bf16 else 'no'}"
        remedy = "trainable=lora, deepspeed=zero3, deepspeed.offload_optimizer=true; precision=fp16 without bf16"
        yield Row(f"GPU {number}", OK if enough else WARNING, words, remedy)
    if torch.distributed.is_nccl_available():
        yield Row("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))
    else:
        yield Row("NCCL", MISSING, "this torch has none", "the torch of pytorch.org for Linux and CUDA")


def deepspeed(config: DoctorConfig) -> Iterator[Row]:
    """In a process of its own: DeepSpeed chooses its accelerator when it is imported."""
    import torch

    code = "import deepspeed; print(deepspeed.__version__, 'for', deepspeed.get_accelerator().device_name())"
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    environment = {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", usual)}
    version = output_of([sys.executable, "-c", code], 6 * config.timeout_s, **environment)
    if version is None:
        yield Row("DeepSpeed", MISSING, "it cannot be imported", "python -c 'import deepspeed' says why")
        return
    yield Row("DeepSpeed", OK, f"{version.splitlines()[-1]}: imported; tryrun=true of a training command runs it")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    lacking = [name for name in ("ninja", "g++") if program(name) is None]
    lacking += [] if headers.is_file() else ["Python.h"]
    found = f"missing: {', '.join(lacking)}" if lacking else "ninja, g++ and Python.h"
    remedy = "make system; on GPUs, only deepspeed.offload_optimizer needs them"
    yield Row("its compiler", WARNING if lacking else OK, found, remedy)


def program(name: str) -> str | None:
    """As training finds it: this environment's first."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def blender(config: DoctorConfig) -> Iterator[Row]:
    on_path = output_of(["blender", "--version"], config.timeout_s)
    module = ROOT / ".venv-blender" / "bin" / "python"
    remedy = "make blender (rendering alone needs it)"
    if on_path:
        found = re.search(r"Blender (\d+)\.(\d+)", on_path)
        new = found is not None and (int(found[1]), int(found[2])) >= (4, 2)
        yield Row("Blender", OK if new else WARNING, on_path.splitlines()[0], "4.2 or newer")
    elif module.exists():
        version = output_of([str(module), "-c", "import bpy; print(bpy.app.version_string)"], 6 * config.timeout_s)
        works = Row("Blender", OK, f"bpy {version.splitlines()[-1]}, .venv-blender") if version else None
        yield works or Row("Blender", MISSING, ".venv-blender is there and does not work", f"make system; {remedy}")
    else:
        yield Row("Blender", MISSING, "none", remedy)


def slurm(config: DoctorConfig) -> Iterator[Row]:
    if shutil.which("sbatch") is None:
        remedy = "not needed on one machine; slurm/local-cluster.sh install, to try the scripts"
        yield Row("SLURM", WARNING, "no sbatch here", remedy)
        return
    nodes = output_of(["sinfo", "--noheader", "--format=%P %D nodes %T"], config.timeout_s)
    version = output_of(["sbatch", "--version"], config.timeout_s) or "sbatch"
    if nodes is None:
        yield Row("SLURM", WARNING, f"{version}; no cluster answers", "log in where sinfo works, or set SLURM_CONF")
    else:
        yield Row("SLURM", OK, f"{version}; {'; '.join(nodes.splitlines()[:4])}")


def wandb(config: DoctorConfig) -> Iterator[Row]:
    there = has_key()
    remedy = "wandb login; offline runs are written without it, and sent by wandb sync"
    yield Row("W&B login", OK if there else WARNING, "a key is there, not tried" if there else "none", remedy)


def disk(config: DoctorConfig) -> Iterator[Row]:
    for name, place, needed, why in (
        ("disk for runs", Path(config.out), 50, "a full-size stage keeps about 45 GB of checkpoints"),
        ("/dev/shm", Path("/dev/shm"), 1, "data.workers=0, or a larger one (docker --shm-size=8g)"),
        ("temporary files", Path(os.environ.get("TMPDIR", "/tmp")), 5, "TMPDIR= on a disk with room"),
    ):
        if not place.is_dir():
            yield Row(name, WARNING, f"{place} is not there", "mkdir -p it, or out= another")
            continue
        free = shutil.disk_usage(place).free / GIB
        writable = os.access(place, os.W_OK)
        state = OK if writable and free >= needed else WARNING if writable else MISSING
        yield Row(name, state, f"{free:.0f} GiB free in {place.resolve()}{'' if writable else ', not writable'}", why)


def hub(config: DoctorConfig) -> Iterator[Row]:
    """Whether the hub answers where Hugging Face's own library looks for it."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Row("weights hub", WARNING, "HF_HUB_OFFLINE is set", "only what is in HF_HOME is used")
        return
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    state, found = OK, "it answers"
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=config.timeout_s).close()
    except urllib.error.HTTPError as error:
        state, found = (OK, found) if error.code < 500 else (WARNING, f"it answers with {error.code}")
    except (OSError, ValueError) as error:
        state, found = WARNING, f"it does not answer ({str(error)[:80]})"
    yield Row("weights hub", state, found, "fetch weights where there is a network, with HF_HOME on shared storage")


def clip(config: DoctorConfig) -> Iterator[Row]:
    from models.config import ImageEncoderConfig
    from models.image_encoder import cached_weights

    encoder = ImageEncoderConfig()
    path = cached_weights(encoder)
    remedy = "it is fetched at the first start; README, section 2, for nodes without a network"
    found = f"in the cache, {mark(path, config)}" if path is not None else "not in the cache"
    yield Row(f"open_clip {encoder.arch}", OK if path is not None else WARNING, found, remedy)


def weights(config: DoctorConfig) -> Iterator[Row]:
    """Folders of this project's kind, and .ckpt and .pt files to convert: there, whole, and what tells them apart."""
    given = config.weights
    places = [Path(p) for p in given] if given is not None else sorted(Path("weights").glob("*"))
    if not places:
        remedy = "models/convert.py MVDream's checkpoint to weights/mvdream, or model.unet.from_scratch=true"
        yield Row("weights", WARNING, "none in weights/", remedy)
    for place in places:
        if place.is_file():
            yield Row(f"weights {place}", OK, f"{place.stat().st_size / GIB:.2f} GiB, {mark(place, config)}")
            continue
        try:
            yield Row(f"weights {place}", OK, described(place, config))
        except UserError as error:
            yield Row(f"weights {place}", MISSING, str(error), "convert or copy it again")


def mark(path: Path, config: DoctorConfig) -> str:
    if not config.sha256:
        return f"mark {content_mark(path)[:16]}"
    with open(path, "rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def described(folder: Path, config: DoctorConfig) -> str:
    """What an export folder holds; UserError when it is not whole."""
    from safetensors import SafetensorError, safe_open

    from models.checkpoint import read_info

    info = read_info(folder)
    marks = []
    for path in sorted(folder.glob("*/*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                count = len(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error})") from None
        marks.append(f"{path.parent.name} {count} tensors {mark(path, config)}")
    if not any(mark.startswith("unet ") for mark in marks):
        raise UserError(f"{folder}/unet has no safetensors file")
    return f"stage {info.stage}, step {info.step}: {', '.join(marks)}"


CHECKS: tuple[Callable[[DoctorConfig], Iterator[Row]], ...] = (
    python, torch_and_gpus, deepspeed, blender, slurm, wandb, disk, hub, clip, weights,
)  # fmt: skip


def examine(config: DoctorConfig) -> list[Row]:
    """All rows, in order; checks that wait do so side by side.  A check that fails itself is a row too."""

    def rows(check: Callable[[DoctorConfig], Iterator[Row]]) -> list[Row]:
        try:
            return list(check(config))
        except Exception as error:
            return [Row(check.__name__, MISSING, f"{type(error).__name__}: {error}", "report this, with --json")]

    with ThreadPoolExecutor() as pool:
        return [row for found in pool.map(rows, CHECKS) for row in found]
