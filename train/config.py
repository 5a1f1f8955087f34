"""Everything a training run can choose.  Each default lives here, with its unit and source; YAML holds only values.

Where the paper is silent (learning rate, batch, steps, probabilities), the defaults are those of its nearest documented
relatives, MVDream (arXiv 2308.16512) and ImageDream's pixel controller (arXiv 2312.02201).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

from conf.cli import check
from data.sources import CacheConfig
from models.config import LoraConfig, ModelConfig, autoencoder_of, image_encoder_of
from monitor.config import WandbConfig


@dataclass
class DataConfig:
    shards: str = "shards"  # folder with manifest.json, written by data/pack.py or data/precompute.py; or on a server
    cache: CacheConfig = field(
        default_factory=CacheConfig
    )  # of shards on a server (https://, s3://, ...), on local disk
    max_damaged: float = 0.01  # share of objects that may turn out damaged: others take their places; more stop the run
    on_change: str = "refuse"  # shards changed since the run began: refuse, or adopt them from the next epoch on
    image_size: int = 256  # pixels a side
    num_views: int = 4  # equally spaced views of one ring; must divide the ring
    workers: int = 2  # decoding processes a rank; 0 decodes in the training process

    def __post_init__(self) -> None:
        check(0 <= self.max_damaged <= 1, f"data.max_damaged={self.max_damaged} must lie between 0 and 1")
        check(self.on_change in ("refuse", "adopt"), f"data.on_change={self.on_change} must be refuse or adopt")
        check(self.workers >= 0, f"data.workers={self.workers} must not be negative")
        check(self.num_views >= 1, f"data.num_views={self.num_views} must be at least 1")
        check(self.image_size >= 16, f"data.image_size={self.image_size} must be at least 16")


@dataclass
class ObjectiveConfig:
    single_view_probability: float = 0.3  # share of steps on branch a: views apart, camera vector zero (MVDream: 0.3)
    reference_probability: float = 0.0  # share of multi-view steps with the clean reference in attention; stage 2 only
    condition_dropout: float = 0.1  # share of objects whose embedding becomes zeros (ImageDream)
    offset_noise: float = 0.0  # size of noise that is the same for all pixels of a view and channel; often 0.05 to 0.1
    min_snr_gamma: float | None = None  # loss weight min(SNR, gamma) / SNR (arXiv 2303.09556); null weighs all alike

    def __post_init__(self) -> None:
        for name in ("single_view_probability", "reference_probability", "condition_dropout"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"objective.{name}={value} must lie between 0 and 1")
        check(self.offset_noise >= 0, f"objective.offset_noise={self.offset_noise} must not be negative")
        gamma = self.min_snr_gamma
        check(gamma is None or gamma > 0, f"objective.min_snr_gamma={gamma} must be positive, or null")


@dataclass
class OptimConfig:
    lr: float = 1e-4  # peak
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 1000
    schedule: str = "constant"  # after the warm-up: constant, or cosine to zero at the last step
    clip_norm: float = 1.0
    weight_average_decay: float = 0.9999  # running mean of the fp32 weights; what is exported

    def __post_init__(self) -> None:
        check(self.lr > 0, f"optim.lr={self.lr} must be positive")
        check(self.schedule in ("constant", "cosine"), f"optim.schedule={self.schedule} must be constant or cosine")
        decay = self.weight_average_decay
        check(0 <= decay < 1, f"optim.weight_average_decay={decay} must lie in [0, 1)")
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas} must be two numbers in [0, 1)",
        )
        for name in ("eps", "clip_norm"):
            check(getattr(self, name) > 0, f"optim.{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "warmup_steps"):
            check(getattr(self, name) >= 0, f"optim.{name}={getattr(self, name)} must not be negative")


@dataclass
class DeepSpeedConfig:
    zero_stage: int = 2  # 0 replicates all, 1 shards optimizer state, 2 gradients too, 3 weights too
    offload_optimizer: bool = False  # keep optimizer state in CPU memory (compiles an op on first use)
    offload_parameters: bool = False  # and the weights too, but for those of the layer at work; with zero_stage=3

    def __post_init__(self) -> None:
        check(self.zero_stage in (0, 1, 2, 3), f"deepspeed.zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        check(
            not self.offload_optimizer or self.zero_stage >= 1,
            "deepspeed.offload_optimizer=true needs deepspeed.zero_stage of at least 1",
        )
        check(
            not self.offload_parameters or self.zero_stage == 3,
            "deepspeed.offload_parameters=true needs deepspeed.zero_stage=3",
        )


@dataclass
class LimitsConfig:
    """Seconds that a phase may last on any rank before it is named and the job ends; 0: for ever."""

    set_up_s: float = 3600
    step_s: float = 900  # the first one may compile
    checkpoint_s: float = 3600  # also pictures of samples, and the export

    def __post_init__(self) -> None:
        for name in ("set_up_s", "step_s", "checkpoint_s"):
            check(getattr(self, name) >= 0, f"limits.{name}={getattr(self, name)} must not be negative")


@dataclass
class ValidationConfig:
    shards: str | None = None  # of held-out objects; null: pictures of objects trained on, from views held out
    every: int = 2000  # steps; 0: only at the end
    loss_objects: int = 64  # held-out objects that the loss is measured on
    sample_objects: int = 4  # those whose views are sampled, measured and shown
    sample_steps: int = 50  # DDIM steps
    guidance: float = 5.0

    def __post_init__(self) -> None:
        check(self.every >= 0, f"validation.every={self.every} must not be negative")
        for name in ("loss_objects", "sample_objects", "sample_steps"):
            check(getattr(self, name) >= 1, f"validation.{name}={getattr(self, name)} must be at least 1")
        steps = self.sample_steps
        check(steps < 1000, f"validation.sample_steps={steps} must be below the schedule's 1000")


@dataclass
class ProfileConfig:
    """A window of steps whose work is recorded, for Perfetto or chrome://tracing."""

    steps: int = 0  # how many; 0: none
    after: int = 10  # steps of this start before it, so that compiling and warming up are not in it

    def __post_init__(self) -> None:
        for name in ("steps", "after"):
            check(getattr(self, name) >= 0, f"profile.{name}={getattr(self, name)} must not be negative")


@dataclass
class TrainConfig:
    stage: int = 1
    name: str = "isotropic3d"
    out: str = "runs/${name}/stage${stage}"  # the run folder: checkpoints, samples, metrics, export
    # Checkpoint folder to start from (stage 2: stage 1's export): its UNet, and the frozen networks that `model` names
    # no others for.  null: model.unet.
    init_from: str | None = None
    resume: str = "auto"  # auto: from the newest whole checkpoint in `out`; never: refuse a folder that has any
    seed: int = 0

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainable: str = "all"  # weights of the UNet: all; attention or cross_attention, those layers'; lora, an adapter
    lora: LoraConfig = field(default_factory=LoraConfig)  # read with trainable=lora
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    steps: int = 60000  # optimizer steps
    batch_size: int = 64  # objects a step over all processes; 64 objects x 4 views = 256 pictures
    micro_batch_size: int = 8  # objects a forward pass on one process; the rest is accumulated
    precision: str = "auto"  # bf16, fp16, fp32, or auto: bf16 where the hardware multiplies in it
    gradient_checkpointing: bool = False
    compile: str | None = None  # torch.compile's backend for the UNet, such as inductor; null: not compiled
    cpu: bool = False  # train on the CPU although there is a GPU

    log_every: int = 10  # steps
    checkpoint_every: int = 1000
    checkpoint_in_background: bool = True  # written while training goes on, from a copy in memory
    keep_checkpoints: int = 2  # newest ones
    milestone_every: int = 0  # steps; checkpoints at its multiples are kept for ever; 0: none
    end_after: int = 0  # steps of this start, after which it saves and ends as if asked to, with exit code 75; 0: never
    max_skipped: int = 10  # steps in a row that may be left out because a gradient was not finite; more stop the run

    tryrun: bool = False  # three steps, a checkpoint, a resume and a validation of this configuration, then stop
    dry_run: bool = False  # print size, FLOPs and memory without weights or data, then stop
    dry_run_processes: int = 0  # number of processes a dry run assumes; 0: as many as were launched

    def __post_init__(self) -> None:
        check(self.stage in (1, 2), f"stage={self.stage} must be 1 or 2")
        check(
            self.stage == 2 or self.objective.reference_probability == 0,
            f"objective.reference_probability={self.objective.reference_probability} needs stage=2: "
            "stage 1 has no reference view; set it to 0",
        )
        check(
            self.trainable in ("all", "attention", "cross_attention", "lora"),
            f"trainable={self.trainable} must be all, attention, cross_attention or lora",
        )
        check(
            self.trainable == "all" or self.init_from is not None or self.model.unet.weights is not None,
            f"trainable={self.trainable} keeps most weights as they are, and there are none to start from: give "
            "model.unet.weights or init_from",
        )
        check(self.resume in ("auto", "never"), f"resume={self.resume} must be auto or never")
        check(
            self.precision in ("auto", "bf16", "fp16", "fp32"),
            f"precision={self.precision} must be auto, bf16, fp16 or fp32",
        )
        for name in (
            "steps",
            "batch_size",
            "micro_batch_size",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
            "max_skipped",
        ):
            value = getattr(self, name)
            check(value >= 1, f"{name}={value} must be at least 1")
        levels = [2**level for level in range(len(self.model.unet.block_out_channels))]
        check(
            self.model.ema.downscales is None or set(self.model.ema.downscales) <= set(levels),
            f"model.ema.downscales={self.model.ema.downscales} names resolutions that the UNet has not: {levels}",
        )
        check(
            not (self.precision == "fp16" and self.deepspeed.zero_stage == 0),
            "precision=fp16 with deepspeed.zero_stage=0: DeepSpeed keeps its fp32 weights there where no average of "
            "them can be taken; set deepspeed=zero1",
        )
        check(
            self.compile is None or self.deepspeed.zero_stage < 3,
            "compile does not go with deepspeed.zero_stage=3, whose hooks break the graph; set compile=null, or a "
            "lower stage",
        )
        downscale = self.model.autoencoder.downscale
        blocks = 2 ** (len(self.model.unet.block_out_channels) - 1)
        check(
            self.data.image_size % (downscale * blocks) == 0,
            f"data.image_size={self.data.image_size} must be a multiple of {downscale * blocks}: "
            f"model.autoencoder.downscale={downscale} times {blocks} for the UNet's levels",
        )

    @property
    def processes(self) -> int:
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        return self.dry_run_processes if self.dry_run and self.dry_run_processes > 0 else launched

    @property
    def accumulation(self) -> int:
        """Forward passes a step on each process.  ConfigError when the batch does not divide."""
        world = self.processes
        share = world * self.micro_batch_size
        check(
            self.batch_size % share == 0,
            f"batch_size={self.batch_size} does not divide among {world} processes x micro_batch_size="
            f"{self.micro_batch_size}; use a multiple of {share}, or another micro_batch_size or number of processes",
        )
        return self.batch_size // share


def with_parts_of_start(config: TrainConfig) -> TrainConfig:
    """Where `config` names no autoencoder or no image encoder, `init_from`'s, if it has one."""
    if config.init_from is None:
        return config
    start, model = config.init_from, config.model
    autoencoder, image_encoder = autoencoder_of(start, model.autoencoder), image_encoder_of(start, model.image_encoder)
    return replace(config, model=replace(model, autoencoder=autoencoder, image_encoder=image_encoder))
