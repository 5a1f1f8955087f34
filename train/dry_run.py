"""What a run would need, computed without weights, data or memory: every network is built on the meta device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.files import UserError
from data.shards import read_manifest
from data.sources import ShardFolder
from models.autoencoder import SD_VAE, autoencoder_kind
from models.folders import empty_network
from models.image_encoder import ClipImageEncoder, build_image_encoder, in_cache, require_image_encoder, with_choices
from train.config import TrainConfig
from train.flops import forward_on_meta, meta_unet
from train.networks import differences_of_training, require_fitting_parts
from train.objective import MULTI, REFERENCE

GIB = 2**30


@dataclass
class Networks:
    """On the meta device."""

    unet: nn.Module
    vae: Any
    image_encoder: Any


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build(config: TrainConfig) -> Networks:
    unet = meta_unet(config)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    weights = config.model.autoencoder.weights
    if weights is not None and Path(weights).is_dir():
        vae = empty_network(autoencoder_kind(weights), weights, "autoencoder")
    else:
        with torch.device("meta"):
            vae = AutoencoderKL(**SD_VAE)
    weights = config.model.image_encoder.weights
    if weights is not None and Path(weights).is_dir():
        require_image_encoder(weights)
        encoder = empty_network(ClipImageEncoder, weights, "image encoder")
        image_encoder = with_choices(encoder, config.model.image_encoder)
    else:
        with torch.device("meta"):
            image_encoder = build_image_encoder(config.model.image_encoder)
    return Networks(unet, vae.requires_grad_(False), image_encoder.requires_grad_(False))


def training_cost(config: TrainConfig, networks: Networks) -> tuple[float, float, float, float]:
    """For one object of V views (and the reference, where stage 2 has one), counted op by op.

    Returns FLOPs of the UNet's forward, of its forward and backward, of the frozen encoders' forward, and the bytes
    kept for the backward pass.
    """
    with_references = config.objective.reference_probability > 0
    views = config.data.num_views + (config.model.ema.references if with_references else 0)
    kept: dict[int, Any] = {}
    parameters = {p.untyped_storage()._cdata for p in networks.unet.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage
        return tensor

    pixels = config.data.image_size
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        networks.vae.encode(torch.empty(views, 3, pixels, pixels, device="meta"))
        side = networks.image_encoder.image_size
        tokens = networks.image_encoder(torch.empty(1, 3, side, side, device="meta")).shape[1]
    branch = REFERENCE if with_references else MULTI
    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = forward_on_meta(config, networks.unet, branch, tokens)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    ahead = forward.get_total_flops()
    return (
        ahead,
        ahead + backward.get_total_flops(),
        frozen.get_total_flops(),
        float(sum(storage.nbytes() for storage in kept.values())),
    )


def state_bytes(parameters: int, trained: int, zero_stage: int, world: int, offload: bool) -> dict[str, float]:
    """Bytes a GPU for bf16 training with AdamW and a running weight average, of which only `trained` have state.

    ZeRO (arXiv 1910.02054, sec. 5): stage 1 shards the optimizer state, 2 the gradients, 3 the weights.
    """
    shard = [1 / world if zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    on_gpu = 0.0 if offload else 1.0
    return {
        "weights, bf16": 2.0 * parameters * shard[2],
        "gradients, bf16": 2.0 * trained * shard[1],
        "fp32 masters and Adam's moments": 12.0 * trained * shard[0] * on_gpu,
        "weight average, fp32": 4.0 * trained * shard[0] * on_gpu,  # it lies where the masters do
    }


def missing(config: TrainConfig) -> list[tuple[str, str]]:
    """(what this machine lacks, remedy)."""
    rows: list[tuple[str, str]] = []
    if not torch.cuda.is_available():
        rows.append(("GPU: torch sees none", "run on a CUDA machine; experiment=demo trains on the CPU"))
    elif torch.cuda.device_count() < config.processes:
        few = f"GPU: this machine has {torch.cuda.device_count()} for {config.processes} processes"
        rows.append((few, f"several nodes, or --num_processes {torch.cuda.device_count()}"))
    try:
        read_manifest(ShardFolder(config.data.shards, config.data.cache))
    except UserError as error:
        rows.append((f"shards: {error}", "data.shards=<folder written by data/pack.py>"))
    if config.init_from is not None:
        try:
            differing = differences_of_training(config.model, Path(config.init_from))
            rows += [(f"start weights: trained with {key}={a} and not {b}", f"{key}={a}") for key, a, b in differing]
        except UserError as error:
            rows.append((f"start weights: {error}", "train stage 1 first, or init_from=<export folder>"))
    elif config.model.unet.weights is None and config.model.unet.from_scratch:
        pass
    elif config.model.unet.weights is None:
        rows.append(
            ("UNet weights: model.unet.weights is null",
             "model.unet.weights=<diffusers folder of sd-v2.1-base-4view's UNet>, or model.unet.from_scratch=true")
        )  # fmt: skip
    elif not Path(config.model.unet.weights).is_dir():
        rows.append((f"UNet weights: {config.model.unet.weights} does not exist", "model.unet.weights=<folder>"))
    vae = config.model.autoencoder.weights
    if vae is None or not Path(vae).is_dir():
        rows.append((f"autoencoder weights: {vae or 'not set'}", "model.autoencoder.weights=<vae folder of SD 2.1>"))
    encoder = config.model.image_encoder
    if encoder.weights is None and not encoder.from_scratch and not in_cache(encoder):
        rows.append(
            (f"image encoder: open_clip {encoder.arch}/{encoder.pretrained} comes from the hub at the first start",
             "start once with a network, or model.image_encoder.weights=<folder or file>")
        )  # fmt: skip
    elif encoder.weights is not None and not Path(encoder.weights).exists():
        rows.append((f"image encoder: {encoder.weights} does not exist", "model.image_encoder.weights=<folder>"))
    return rows


def dry_run(config: TrainConfig) -> None:
    """Prints the plan on rank 0.  ConfigError when the batch does not divide among the processes."""
    accumulation = config.accumulation
    if int(os.environ.get("RANK", "0")) != 0:
        return
    world = config.processes
    networks = build(config)
    forward, step, frozen, kept = training_cost(config, networks)
    sizes = {name: count(part) for name, part in vars(networks).items()}
    trained = sum(p.numel() for p in networks.unet.parameters() if p.requires_grad)
    memory = state_bytes(sizes["unet"], trained, config.deepspeed.zero_stage, world, config.deepspeed.offload_optimizer)
    memory["frozen encoders, fp32"] = 4.0 * (sizes["vae"] + sizes["image_encoder"])
    activations = f"kept for the backward pass, {config.micro_batch_size} objects"
    memory[activations] = kept * config.micro_batch_size
    views = config.data.num_views
    gaps = missing(config)
    try:
        require_fitting_parts(config, networks.vae, networks.image_encoder)
    except UserError as error:
        what, _, remedy = str(error).partition("; ")
        gaps.append((what, remedy))
    lines = [
        f"stage {config.stage}, {config.data.image_size} px, {views} views; nothing was loaded and nothing is written",
        "",
        "parameters",
        *(f"  {name:<34}{number / 1e6:10.1f} M" for name, number in sizes.items()),
        f"  {'trained: ' + config.trainable:<34}{trained / 1e6:10.1f} M",
        f"FLOPs a sample of {views} views" + (" and the reference" if config.objective.reference_probability else ""),
        f"  {'UNet, forward':<34}{forward / 1e12:10.3f} TFLOP",
        f"  {'UNet, forward and backward':<34}{step / 1e12:10.3f} TFLOP",
        f"  {'frozen encoders, forward':<34}{frozen / 1e12:10.3f} TFLOP",
        f"memory a GPU: ZeRO-{config.deepspeed.zero_stage}, {world} processes, bf16"
        + (", gradient checkpointing" if config.gradient_checkpointing else ""),
        *(f"  {name:<34}{size / GIB:10.2f} GiB" for name, size in memory.items()),
        f"  {'in all, without workspace':<34}{sum(memory.values()) / GIB:10.2f} GiB",
        "training",
        f"  {'steps':<34}{config.steps:10d}",
        f"  {'objects a step':<34}{config.batch_size:10d}   "
        f"= {world} processes x {config.micro_batch_size} x {accumulation} accumulated",
        f"  {'objects to be seen':<34}{config.steps * config.batch_size:10d}   "
        f"= {config.steps * config.batch_size * views} pictures",
        f"  {'compute':<34}{config.steps * config.batch_size * (step + frozen) / 1e18:10.1f} EFLOP",
        "missing on this machine",
        *(f"  - {what}\n      remedy: {remedy}" for what, remedy in gaps),
    ]
    if lines[-1] == "missing on this machine":
        lines.append("  nothing")
    print("\n".join(lines), flush=True)
