"""What a training step costs: `python tests/benchmarks/bench_step.py [--width 64] [--objects 2] [--precision fp32]`.

The same UNet weights, objects and number of them a step, in processes of their own that take turns:
  bare       forward, backward, clipping and AdamW on one batch that lies ready: the baseline
  ours       this project's step: stream, noise, DeepSpeed, running mean of weights, votes, figures
  diffusers  the loop of diffusers' text-to-image example with its running mean, around the same network and latents
  ours x 2   two processes with as many objects each; compared by objects a second
Latents and embeddings are computed ahead in all of them.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LR, WEIGHT_DECAY, CLIP = 1e-4, 0.01, 1.0
CONTEXT = 64  # width of the embedding


def overrides(options: argparse.Namespace, folder: Path, world: int) -> list[str]:
    channels = [options.width * times for times in (1, 2, 4, 4)]
    return [
        "experiment=paper", f"data.shards={folder}/latents", f"out={folder}/run-{options.variant}", "data.workers=2",
        f"model.autoencoder.weights={folder}/parts/vae", f"model.image_encoder.weights={folder}/parts/image_encoder",
        "model.unet.from_scratch=true", f"model.unet.block_out_channels={channels}".replace(" ", ""),
        f"model.unet.heads={[max(c // 64, 1) for c in channels]}".replace(" ", ""),
        f"model.unet.cross_attention_dim={CONTEXT}", f"batch_size={options.objects * world}",
        f"micro_batch_size={options.objects}", f"precision={options.precision}", "wandb.mode=disabled",
        "objective.single_view_probability=0", f"optim.lr={LR}", "optim.warmup_steps=1",
        f"gradient_checkpointing={str(options.checkpointing).lower()}", f"cpu={str(not options.cuda).lower()}",
        f"deepspeed.zero_stage={options.zero_stage}", *(["compile=inductor"] if options.compile else []),
    ]  # fmt: skip


def prepare(folder: Path) -> None:
    """Objects, small encoders, and the latents, by the project's own commands."""
    from tiny_views import draw_views

    from data.packing import pack

    draw_views(folder / "views")
    pack(folder / "views", folder / "shards")
    parts = [f"{key}.weights={folder}/parts/{name}"
             for key, name in (("autoencoder", "vae"), ("image_encoder", "image_encoder"))]  # fmt: skip
    for words in (
        ["models/small.py", f"shards={folder}/shards", "image_size=256", "patch_size=8", "latent_channels=4",
         f"embed_dim={CONTEXT}", f"out={folder}/parts"],
        ["data/precompute.py", *parts, f"shards={folder}/shards", f"out={folder}/latents", "image_size=256"],
    ):  # fmt: skip
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# The variants: each returns a function that does one step.


def composed(options: argparse.Namespace, folder: Path) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from train.config import TrainConfig

    ConfigStore.instance().store(name="stage1_schema", node=TrainConfig)
    with initialize_config_dir(str(ROOT / "conf" / "train"), version_base="1.3"):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return OmegaConf.to_object(compose("stage1", overrides(options, folder, world)))


def ours(options: argparse.Namespace, folder: Path) -> tuple[Callable[[], None], Callable[[], dict[str, float]]]:
    from train.engine import any_rank
    from train.loop import optimize
    from train.set_up import set_up, watched

    config = composed(options, folder)
    with watched(config) as watchdog:
        run = set_up(config, watchdog)
    assert run is not None
    averaging = []

    def update(inner: Callable[[], None] = run.average.update) -> None:
        synchronize(options)
        began = time.perf_counter()
        inner()
        synchronize(options)
        averaging.append(time.perf_counter() - began)

    if options.average:
        run.average.update = update  # type: ignore[method-assign]

    def step() -> None:
        optimize(run)
        any_rank([False, run.checkpoints.writing], run.engine.device)

    def facts() -> dict[str, float]:
        seconds, waited = time.monotonic() - run.meter.began, run.meter.waited
        return {"waited": waited / seconds, "averaging": sum(averaging) / seconds}

    def forget() -> dict[str, float]:
        found = facts()
        run.meter.reset()
        averaging.clear()
        return found

    return step, forget


def network_and_objects(options: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any, Any]:
    import torch

    from data.stream import ViewDataset
    from train.networks import initial_unet, scheduler_of

    config = composed(options, folder)
    unet = initial_unet(config).to("cuda" if options.cuda else "cpu").train()
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if options.compile:
        unet.compile()
    dataset = ViewDataset(config.data.shards, config.data.image_size, config.data.num_views, config.seed)
    torch.manual_seed(0)
    return config, unet, dataset, scheduler_of(config.model)


def bare(options: argparse.Namespace, folder: Path) -> tuple[Callable[[], None], Callable[[], dict[str, float]]]:
    import torch

    from models.multiview import predict_noise_output

    config, unet, _, _ = network_and_objects(options, folder)
    device = next(unet.parameters()).device
    b, v = options.objects, config.data.num_views
    x, target = torch.randn(2, b, v, 4, 32, 32, device=device)
    timesteps, context = torch.full((b,), 500, device=device), torch.randn(b, 1, CONTEXT, device=device)
    camera = torch.randn(b, v, 16, device=device)
    masters = list(unet.parameters())
    if options.precision == "bf16":  # weights in bf16, masters and moments in fp32, as the engine has them
        masters = [torch.nn.Parameter(p.detach().clone()) for p in masters]
        torch.nn.Module.to(unet, torch.bfloat16)
    optimizer = torch.optim.AdamW(masters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    def step() -> None:
        output = predict_noise_output(unet, x, timesteps, context, camera)
        (output.float() - target).square().mean().backward()
        weights = list(unet.parameters())
        if weights[0] is not masters[0]:
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float()
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if weights[0] is not masters[0]:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)

    return step, dict


def diffusers(options: argparse.Namespace, folder: Path) -> tuple[Callable[[], None], Callable[[], dict[str, float]]]:
    """Re-written minimally after examples/text_to_image/train_text_to_image.py, with --use_ema."""
    import torch
    import torch.nn.functional as F
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    from data.cameras import camera_conditioning
    from data.stream import collate
    from models.multiview import predict_noise_output

    config, unet, dataset, noise_scheduler = network_and_objects(options, folder)
    accelerator = Accelerator(mixed_precision="no" if options.precision == "fp32" else "bf16", cpu=not options.cuda)
    average = EMAModel(copy.deepcopy(unet).parameters())
    average.to(accelerator.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    loader = torch.utils.data.DataLoader(
        dataset, sampler=torch.utils.data.RandomSampler(range(len(dataset)), num_samples=10**6, replacement=True),
        collate_fn=collate, batch_size=options.objects, num_workers=2,
    )  # fmt: skip
    lr_scheduler = get_scheduler("constant", optimizer=optimizer)
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    batches = iter(loader)

    def step() -> None:
        batch, device = next(batches), accelerator.device
        with accelerator.accumulate(unet):
            mean, log_variance = batch.moments[:, : config.data.num_views].to(device).chunk(2, dim=2)
            latents = (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)) * 0.18215
            noise = torch.randn_like(latents)
            b, v = latents.shape[:2]
            timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (b,), device=device)
            per_view = timesteps.repeat_interleave(v)
            noisy = noise_scheduler.add_noise(latents.flatten(0, 1), noise.flatten(0, 1), per_view).unflatten(0, (b, v))
            camera = camera_conditioning(batch.c2w.to(device), config.model.camera)
            output = predict_noise_output(unet, noisy, timesteps, batch.embeddings.to(device), camera)
            loss = F.mse_loss(output.float(), noise.float(), reduction="mean")
            accelerator.gather(loss.repeat(b)).mean().item()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), CLIP)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(unet.parameters())

    return step, dict


VARIANTS = {"bare": bare, "ours": ours, "diffusers": diffusers, "ours x 2": ours}


def synchronize(options: argparse.Namespace) -> None:
    if options.cuda:
        import torch

        torch.cuda.synchronize()


def serve(options: argparse.Namespace) -> None:
    """The child: a number of steps for each line, and the seconds that they took."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(options.threads)
    step, facts = VARIANTS[options.variant](options, Path(options.folder))
    for line in sys.stdin:
        facts()
        synchronize(options)
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        synchronize(options)
        answers.write(json.dumps({"seconds": time.perf_counter() - began, **facts()}) + "\n")
    os._exit(0)


class Variant:
    """The processes of one variant, waiting for their turn."""

    def __init__(self, name: str, folder: Path, arguments: list[str], world: int, errors: Any):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = []
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if "ours" in name else {}  # fmt: skip
            command = [sys.executable, __file__, "--variant", name, "--folder", str(folder), *arguments]
            environment = os.environ | {key: str(value) for key, value in place.items()}
            self.ranks.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                 env=environment, cwd=ROOT)
            )  # fmt: skip

    def run(self, steps: int) -> dict[str, float]:
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self.ranks if process.stdout is not None]
        if not all(lines):
            raise SystemExit("error: a variant ended; its words are above")
        found: dict[str, float] = json.loads(lines[0])
        return found | {"seconds": found["seconds"] / steps}

    def close(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of the first block, a multiple of 32")
    parser.add_argument("--objects", type=int, default=2, help="objects a step and process")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--average", action="store_true", help="time the running mean of weights too (synchronizes)")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--variant", choices=list(VARIANTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant is not None:
        serve(options)
        return
    import torch

    what = torch.cuda.get_device_name() if options.cuda else f"CPU, {options.threads} thread(s) a process"
    print(f"{datetime.date.today()}, {what}, {platform.machine()}, torch {torch.__version__}, {options.precision}")
    print(f"width {options.width}, latents 32^2, {options.objects} objects x 4 views a step and process, "
          f"ZeRO-{options.zero_stage}, compiled {options.compile}, checkpointing {options.checkpointing}")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        variants = {
            one: Variant(one, folder, sys.argv[1:], 2 if one.endswith("2") else 1, None) for one in options.only
        }
        measured: dict[str, list[dict[str, float]]] = {one: [] for one in variants}
        try:
            for variant in variants.values():
                variant.run(2)  # warms up
            for _ in range(options.turns):
                for one, variant in variants.items():
                    measured[one].append(variant.run(options.steps))
        finally:
            for variant in variants.values():
                variant.close()
    show(measured, options.objects)


def show(measured: dict[str, list[dict[str, float]]], objects: int) -> None:
    medians = {name: statistics.median(turn["seconds"] for turn in turns) for name, turns in measured.items()}
    fastest = {name: min(turn["seconds"] for turn in turns) for name, turns in measured.items()}
    print(f"{'':12}{'median':>10}{'fastest':>10}{'objects/s':>11}{'over bare':>11}{'(fastest)':>11}{'data wait':>11}")
    for name, turns in measured.items():
        processes = 2 if name.endswith("2") else 1
        over = [f"{t[name] / t['bare'] - 1:+.1%}" if "bare" in t else "" for t in (medians, fastest)]
        wait = f"{statistics.median(t['waited'] for t in turns):.2%}" if "waited" in turns[0] else ""
        rate = objects * processes / medians[name]
        print(f"{name:12}{medians[name]:8.3f} s{fastest[name]:8.3f} s{rate:11.2f}{over[0]:>11}{over[1]:>11}{wait:>11}")
        if turns[0].get("averaging"):
            print(f"  of it the running mean of weights: {statistics.median(t['averaging'] for t in turns):.2%}")
    if {"ours", "ours x 2"} <= medians.keys():
        print(f"scaling efficiency of two processes: {medians['ours'] / medians['ours x 2']:.1%}")


if __name__ == "__main__":
    main()
