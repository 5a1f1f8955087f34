"""Weights on disk, read and written a tensor at a time, so that a file may be larger than what memory is left.

Reads PyTorch's zip format (`.pt`, `.ckpt`; weights only, so nothing in it is executed) and safetensors
(https://github.com/huggingface/safetensors#format); writes both.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import UserError, atomic_file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """name -> tensor, mapped from the file and not yet in memory.  UserError for anything but named tensors."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    weights = read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    if not weights:
        raise UserError(f"{path} holds no tensors")
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(f"{path}: {name} is {tensor.layout} on {tensor.device}, and not a plain tensor")
        # A view can claim more than the file holds (stride 0), and would fill memory when it is written.
        if tensor.numel() * tensor.element_size() > path.stat().st_size or tensor.dtype not in NAMES:
            raise UserError(f"{path}: {name} claims {tuple(tensor.shape)} of {tensor.dtype}, which it cannot hold")
    return weights


def read_torch(path: Path) -> dict[str, Tensor]:
    try:
        mapped = zipfile.is_zipfile(path)  # the older format is one stream, and has to be read whole
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's message is long; its first sentences name the object it refuses.
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} holds more than tensors, or is no checkpoint, and is not opened, since that could run code "
            f"({reason}); save its state_dict alone, as safetensors"
        ) from None
    except Exception as error:  # a damaged file can make the unpickler fail in any way
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path} is not a checkpoint that can be read: truncated, or of another kind ({reason}); "
            "fetch it again, and compare its size with the original's"
        ) from None
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if any(not isinstance(name, str) for name in weights) or not weights:
        raise UserError(f"{path} is not a dictionary of named tensors")
    return {name: tensor.detach() for name, tensor in weights.items()}


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt"):
            pass  # it checks the header: offsets, overlaps, the file's end
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file that can be read ({error}); fetch it again") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    weights = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is of {entry['dtype']}, which this project does not read")
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if begin == end:
            weights[name] = torch.empty(shape, dtype=dtype)
            continue
        # Copy on write, since torch wants writable memory; a mapping, and so a storage, for each tensor.
        raw = np.memmap(path, np.uint8, "c", offset=8 + length + begin, shape=(end - begin,))
        weights[name] = torch.from_numpy(raw).view(dtype).view(shape)
    return weights


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Names in alphabetical order, one tensor in memory at a time."""
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(to_bytes(tensors[name]))


def write_torch(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_file(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise UserError(f"{path} cannot be written ({str(error).splitlines()[0]}); free space") from None
