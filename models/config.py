"""What a model is made of.  The defaults are the full size: MVDream's UNet, SD's VAE, open_clip ViT-H-14."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.cli import check


@dataclass
class UNetConfig:
    weights: str | None = None  # diffusers `unet` folder to start from; null needs from_scratch
    block_out_channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    heads: list[int] = field(default_factory=lambda: [5, 10, 20, 20])  # attention heads of each block
    layers_per_block: int = 2
    cross_attention_dim: int = 1024  # width of what the layers attend to: the image embedding's
    attention_in_last_block: bool = False  # SD has none at its lowest resolution but the middle block's
    from_scratch: bool = False  # start from random weights, keyed by the seed
    embedding_dim: int | None = None  # an image embedding of another width, mapped to it by a layer trained along

    def __post_init__(self) -> None:
        channels, heads = self.block_out_channels, self.heads
        check(self.layers_per_block >= 1, f"model.unet.layers_per_block={self.layers_per_block} must be at least 1")
        check(
            self.cross_attention_dim >= 1, f"model.unet.cross_attention_dim={self.cross_attention_dim} must be positive"
        )
        check(
            self.embedding_dim is None or self.embedding_dim >= 1,
            f"model.unet.embedding_dim={self.embedding_dim} must be positive, or null",
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
    weights: str | None = None  # diffusers `vae` folder (AutoencoderKL or PatchCodec); null: init_from's
    downscale: int = 8  # pixels per latent cell and side
    latent_channels: int = 4

    def __post_init__(self) -> None:
        check(self.downscale >= 1, f"model.autoencoder.downscale={self.downscale} must be at least 1")
        check(self.latent_channels >= 1, f"model.autoencoder.latent_channels={self.latent_channels} must be at least 1")


@dataclass
class ImageEncoderConfig:
    # Folder written by this project, or open_clip's own file of `arch`; null: init_from's, or else the hub's.
    weights: str | None = None
    arch: str = "ViT-H-14"  # open_clip architecture
    # open_clip weight tag: what the hub gives, or how the weights in a file were trained (activation, normalisation).
    pretrained: str = "laion2b_s32b_b79k"
    from_scratch: bool = False  # random weights, keyed by the seed
    # The condition: pooled, the one projected embedding, or patches, the last layer's patch tokens in the tower's own
    # width (1280 for ViT-H-14).  null: as the folder says, else pooled.
    tokens: str | None = None
    # How pictures become the tower's input: released, as the released code does it, or open_clip, as the weights were
    # trained.  null: as the folder says, else released.
    preprocess: str | None = None

    def __post_init__(self) -> None:
        check(
            self.tokens in (None, "pooled", "patches"),
            f"model.image_encoder.tokens={self.tokens} must be pooled, patches or null",
        )
        check(
            self.preprocess in (None, "released", "open_clip"),
            f"model.image_encoder.preprocess={self.preprocess} must be released, open_clip or null",
        )


MATTING_MODELS = ("u2net", "u2netp", "silueta", "isnet-general-use", "birefnet-general", "birefnet-general-lite")


@dataclass
class ReferenceConfig:
    """How a picture from outside becomes one object on white.  The released code only composites it."""

    matting: bool = False  # cut the object out of a picture without transparency (needs the `matting` extra)
    matting_model: str = "u2net"  # one of MATTING_MODELS, which rembg fetches once, or an .onnx file of U2-Net's kind
    fill: float | None = (
        None  # centre the object, its longer side this share of the picture; null leaves it where it is
    )
    background: str = "refuse"  # one that is neither transparent, nor cut out, nor white; keep: the embedding sees it

    def __post_init__(self) -> None:
        check(
            self.matting_model in MATTING_MODELS or self.matting_model.endswith(".onnx"),
            f"reference.matting_model={self.matting_model} must be an .onnx file or one of {', '.join(MATTING_MODELS)}",
        )
        check(
            self.fill is None or 0.05 <= self.fill <= 1, f"reference.fill={self.fill} must lie in [0.05, 1], or be null"
        )
        check(self.background in ("refuse", "keep"), f"reference.background={self.background} must be refuse or keep")


@dataclass
class LoraConfig:
    """LoRA (arXiv 2106.09685): W + alpha / rank B A in the linear layers that `targets` names."""

    rank: int = 16
    alpha: int = 16
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # ends of layers' names

    def __post_init__(self) -> None:
        check(self.rank >= 1, f"lora.rank={self.rank} must be at least 1")
        check(self.alpha > 0, f"lora.alpha={self.alpha} must be positive")
        check(len(self.targets) > 0, "lora.targets=[] names no layer")


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
            self.downscales is None
            or (len(self.downscales) > 0 and all(d >= 1 and d & (d - 1) == 0 for d in self.downscales)),
            f"model.ema.downscales={self.downscales} must be null, or powers of 2 such as [1,2]",
        )


@dataclass
class ModelConfig:
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    image_encoder: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    camera: str = "mvdream"  # how the UNet reads cameras: one of data.cameras.CONVENTIONS
    prediction_type: str = "epsilon"  # or "v_prediction"
    zero_terminal_snr: bool = False  # arXiv 2305.08891; needs v_prediction
    beta_start: float = 0.00085  # noise schedule (scaled linear, 1000 steps): SD 2.1's
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        check(
            self.prediction_type in ("epsilon", "v_prediction"),
            f"model.prediction_type={self.prediction_type} must be epsilon or v_prediction",
        )
        check(
            not self.zero_terminal_snr or self.prediction_type == "v_prediction",
            "model.zero_terminal_snr=true needs model.prediction_type=v_prediction: epsilon says nothing at zero SNR",
        )
        check(
            0 < self.beta_start <= self.beta_end < 1,
            f"model.beta_start={self.beta_start} and model.beta_end={self.beta_end} must lie in (0, 1) and ascend",
        )
        if self.camera != "mvdream":
            from data.cameras import CONVENTIONS  # here, so that --help does not wait for torch

            check(self.camera in CONVENTIONS, f"model.camera={self.camera} must be one of {', '.join(CONVENTIONS)}")


def autoencoder_of(start: str, config: AutoencoderConfig) -> AutoencoderConfig:
    """`config`, or where it names no weights those of the checkpoint folder `start`, if it has such."""
    if config.weights is not None or not (Path(start) / "vae" / "config.json").is_file():
        return config
    return replace(config, weights=str(Path(start) / "vae"))


def image_encoder_of(start: str, config: ImageEncoderConfig) -> ImageEncoderConfig:
    """The same of the image encoder, where `config` chooses none: no weights, architecture or tag but the default."""
    default = ImageEncoderConfig()
    chosen = config.weights is not None or config.from_scratch
    chosen = chosen or (config.arch, config.pretrained) != (default.arch, default.pretrained)
    if chosen or not (Path(start) / "image_encoder" / "config.json").is_file():
        return config
    return replace(config, weights=str(Path(start) / "image_encoder"))
