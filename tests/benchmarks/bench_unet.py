"""What multi-view attention costs: `python tests/benchmarks/bench_unet.py [--width 320] [--size 32] [--dtype bf16]`.

One network, whose attention processors are swapped, in interleaved repeats on the same images:
  stock   diffusers' UNet2DConditionModel with AttnProcessor2_0: every view on its own, the baseline
  ours    multi-view attention as this project runs it
  naive   the same multi-view attention as einsum, softmax, einsum; must agree with ours
  EMA     ours with one clean reference beside the views, so with more images than the baseline
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.config import EmaConfig, UNetConfig
from models.multiview import MultiViewAttention, build_unet, predict_noise_output, predict_with_references

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative root mean square error


class NaiveMultiViewAttention(AttnProcessor2_0):
    """Self-attention over all views with the matrix of weights written out; cross-attention as stock."""

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        num_views: int = 1,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        folded = hidden_states.unflatten(0, (-1, num_views)).flatten(1, 2)
        q, k, v = (to(folded).unflatten(2, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5, dim=-1)
        attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return attn.to_out[0](attended).reshape(hidden_states.shape)


class Variant(NamedTuple):
    processor: AttnProcessor2_0
    call: Callable[[Any, dict[str, Tensor]], Tensor]  # (unet, inputs) -> (B, V, C, h, w)


def stock(unet: Any, x: dict[str, Tensor]) -> Tensor:
    """The images on their own; as `predict_noise_output` does, bf16 has its channels last."""
    b, v = x["latents"].shape[:2]
    dtype = unet.dtype
    sample = x["latents"].flatten(0, 1).to(dtype)
    if dtype == torch.bfloat16:
        sample = sample.contiguous(memory_format=torch.channels_last)
    output = unet(
        sample,
        x["timesteps"].repeat_interleave(v),
        encoder_hidden_states=x["context"].repeat_interleave(v, dim=0).to(dtype),
        class_labels=x["camera"].flatten(0, 1).to(dtype),
        return_dict=False,
    )[0]
    return output.unflatten(0, (b, v)).to(x["latents"].dtype)


def views_only(unet: Any, x: dict[str, Tensor]) -> Tensor:
    return predict_noise_output(unet, x["latents"], x["timesteps"], x["context"], x["camera"])


def with_reference(unet: Any, x: dict[str, Tensor]) -> Tensor:
    return predict_with_references(unet, **x, ema=EmaConfig())


VARIANTS = {
    "stock": Variant(AttnProcessor2_0(), stock),
    "ours": Variant(MultiViewAttention(), views_only),
    "naive": Variant(NaiveMultiViewAttention(), views_only),
    "EMA": Variant(MultiViewAttention(), with_reference),
}


def make_inputs(b: int, v: int, size: int, width: int, device: str | torch.device) -> dict[str, Tensor]:
    return {
        "latents": torch.randn(b, v, 4, size, size, device=device),
        "timesteps": torch.full((b,), 500, device=device),
        "context": torch.randn(b, 1, width, device=device),
        "camera": torch.randn(b, v, 16, device=device),
        "references": torch.randn(b, 1, 4, size, size, device=device),
        "reference_camera": torch.randn(b, 1, 16, device=device),
    }


def forward(unet: Any, variant: Variant, x: dict[str, Tensor]) -> None:
    with torch.no_grad():
        variant.call(unet, x)


def forward_backward(unet: Any, variant: Variant, x: dict[str, Tensor]) -> None:
    variant.call(unet, x).square().mean().backward()


def drop_gradients(unet: Any) -> None:
    """Frees every gradient when it is complete: at full width they would take as much memory as the weights."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in unet.parameters():
        parameter.register_post_accumulate_grad_hook(drop)


def measure(work: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds, and GiB at the peak (0 on the CPU, which does not keep count)."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began, 0.0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated(device) / 2**30


def count_flops(config: UNetConfig, options: argparse.Namespace, step: Callable[..., None]) -> dict[str, int]:
    """Multiplications and additions of one step of each variant, counted without computing."""
    with torch.device("meta"):
        unet = build_unet(config, 4, options.size)
        x = make_inputs(options.objects, options.views, options.size, config.cross_attention_dim, "meta")
    counts = {}
    for name, variant in VARIANTS.items():
        unet.set_attn_processor(variant.processor)
        with FlopCounterMode(display=False) as counter:
            step(unet, variant, x)
        counts[name] = counter.get_total_flops()
    return counts


def agreement(unet: Any, x: dict[str, Tensor]) -> float:
    """Root mean square error of ours against the naive output, relative to the latter."""
    outputs = []
    for name in ("ours", "naive"):
        unet.set_attn_processor(VARIANTS[name].processor)
        with torch.no_grad():
            outputs.append(VARIANTS[name].call(unet, x).double())
    ours, naive = outputs
    return float((ours - naive).square().mean().sqrt() / naive.square().mean().sqrt())


def compare(unet: Any, x: dict[str, Tensor], step: Callable[..., None], repeat: int) -> dict[str, list[tuple]]:
    """(seconds, GiB) of every repeat; the variants take turns, so that what else the machine does hits all alike.

    Only stock and ours take every turn: the others are slow, and too far from the baseline to need as many.
    """
    measured: dict[str, list[tuple]] = {name: [] for name in VARIANTS}
    for turn in range(repeat):
        for name, variant in VARIANTS.items():
            if turn % 3 and name not in ("stock", "ours"):
                continue
            unet.set_attn_processor(variant.processor)
            measured[name].append(measure(lambda v=variant: step(unet, v, x), x["latents"].device))
    return measured


def show(title: str, measured: dict[str, list[tuple]], flops: dict[str, int]) -> None:
    seconds = {name: [s for s, _ in turns] for name, turns in measured.items()}
    base = seconds["stock"]
    print(f"\n{title:24}{'median':>10}{'fastest':>10}{'overhead':>10}{'(fastest)':>11}{'added FLOPs':>13}{'TFLOP':>7}")
    for name, own in seconds.items():
        median, fastest = statistics.median(own), min(own)
        memory = max(gib for _, gib in measured[name])
        print(
            f"  {name:22}{median * 1e3:7.0f} ms{fastest * 1e3:7.0f} ms"
            f"{median / statistics.median(base) - 1:+10.1%}{fastest / min(base) - 1:+11.1%}"
            f"{flops[name] / flops['stock'] - 1:+13.1%}{flops[name] / 1e12:7.2f}"
            + (f"  {memory:.2f} GiB" if memory else ""),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=320, help="channels of the first block, a multiple of 64")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--objects", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="auto: bf16 on CUDA, else fp32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    usable = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(usable if options.device == "auto" else options.device)
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(options.dtype, auto)

    channels = [options.width * times for times in (1, 2, 4, 4)]
    config = UNetConfig(None, channels, [c // 64 for c in channels], cross_attention_dim=1024)
    with torch.device(device):
        unet = build_unet(config, 4, options.size)
    if dtype != torch.float32:
        unet.to(dtype)
    drop_gradients(unet)
    x = make_inputs(options.objects, options.views, options.size, 1024, device)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {options.threads} threads"
    print(f"{datetime.date.today()}, {what}, {platform.machine()}, torch {torch.__version__}, {dtype}")
    print(f"channels {channels}, latents {options.size}^2, {options.objects} x {options.views} views", flush=True)

    error = agreement(unet, x)
    print(f"ours against naive: relative error {error:.1e}")
    if error > AGREEMENT[dtype]:
        sys.exit(f"error: ours and naive disagree by {error:.1e}, more than {AGREEMENT[dtype]:.0e}")
    for title, step in (("forward", forward), ("forward and backward", forward_backward)):
        for variant in VARIANTS.values():  # warms up
            unet.set_attn_processor(variant.processor)
            step(unet, variant, x)
        show(title, compare(unet, x, step, options.repeat), count_flops(config, options, step))


if __name__ == "__main__":
    main()
