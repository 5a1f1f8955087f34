"""What a model is made of.  The defaults are the full size: MVDream's UNet, SD's VAE, open_clip ViT-H-14."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.cli import check


@dataclass
class UNetConfig:
    weights: str | None = None  # diffusers `unet` folder to start from; null needs from_scratch
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    heads: list[int] = field(default_factory=lambda: [5, 10, 20, 20])  # attention heads of each block
    layers_per_block: int = 2
    cross_attention_dim: int = 1024  # width of the image embedding
    attention_in_last_block: bool = False  # SD has none at its lowest resolution but the middle block's
    from_scratch: bool = False  # start from random weights, keyed by the seed

    def __post_init__(self) -> None:
        channels, heads = self.block_out_channels, self.heads
        check(self.layers_per_block >= 1, f"model.unet.layers_per_block={self.layers_per_block} must be at least 1")
        check(
            self.cross_attention_dim >= 1, f"model.unet.cross_attention_dim={self.cross_attention_dim} must be positive"
        )
        check(
            len(channels) == len(heads) and len(channels) > 0,
            f"model.unet.heads={heads} must name one number for each of block_out_channels={channels}",
        )
        for channel, head in zip(channels, heads, strict=True):
            check(
                channel % 32 == 0 and head > 0 and channel % head == 0,
                f"model.unet: {channel} channels must be a multiple of 32 (group norm) and of its {head} heads",
            )


@dataclass
class AutoencoderConfig:
    weights: str | None = None  # diffusers `vae` folder (AutoencoderKL or PatchCodec); required for training
    downscale: int = 8  # pixels per latent cell and side
    latent_channels: int = 4

    def __post_init__(self) -> None:
        check(self.downscale >= 1, f"model.autoencoder.downscale={self.downscale} must be at least 1")
        check(self.latent_channels >= 1, f"model.autoencoder.latent_channels={self.latent_channels} must be at least 1")


@dataclass
class ImageEncoderConfig:
    weights: str | None = None  # folder written by this project, or null for open_clip's `arch` and `pretrained`
    arch: str = "ViT-H-14"  # open_clip architecture
    pretrained: str = "laion2b_s32b_b79k"  # open_clip weight tag, from the hub


@dataclass
class EmaConfig:
    """Explicit Multi-view Attention (arXiv 2403.10395, sec. 3.2): how clean references meet the noisy views.

    models/README.md has a table of what the paper says and what is left open.
    """

    references: int = 1  # clean views of the object that join; training only
    timestep: str = "shared"  # the references': shared with the noisy views (ImageDream), or zero
    camera: str = "zero"  # the references': zero (ImageDream), or own
    reads_views: bool = True  # whether the references attend to the noisy views too, and not only to themselves
    downscales: list[int] | None = None  # the resolutions in which they join: 1 the latent's own, 2 half ...; null: all

    def __post_init__(self) -> None:
        check(self.references >= 1, f"model.ema.references={self.references} must be at least 1")
        check(self.timestep in ("shared", "zero"), f"model.ema.timestep={self.timestep} must be shared or zero")
        check(self.camera in ("zero", "own"), f"model.ema.camera={self.camera} must be zero or own")
        check(
            self.downscales is None or all(d >= 1 and d & (d - 1) == 0 for d in self.downscales),
            f"model.ema.downscales={self.downscales} must be null, or powers of 2 such as [1,2]",
        )


@dataclass
class ModelConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    prediction_type: str = "epsilon"  # or "v_prediction"
    zero_terminal_snr: bool = False  # arXiv 2305.08891; needs v_prediction

    def __post_init__(self) -> None:
        check(
            self.prediction_type in ("epsilon", "v_prediction"),
            f"model.prediction_type={self.prediction_type} must be epsilon or v_prediction",
        )
        check(
            not self.zero_terminal_snr or self.prediction_type == "v_prediction",
            "model.zero_terminal_snr=true needs model.prediction_type=v_prediction: epsilon says nothing at zero SNR",
        )
