"""The released checkpoints' layout (ldm) and ours (diffusers): which tensor is which, and what the shapes tell.

An ldm checkpoint is one flat dictionary: `model.diffusion_model.*` (UNet), `first_stage_model.*` (VAE),
`cond_stage_model.model.visual.*` (open_clip image tower), and leftovers.  Every rule here is a pair of module
prefixes, so that it reads in both directions (CompVis/latent-diffusion: openaimodel.py, model.py; MVDream adds
`camera_embed`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import open_clip

from data.files import UserError

Shapes = Mapping[str, tuple[int, ...]]
Pairs = list[tuple[str, str]]  # (ldm prefix, diffusers prefix)

UNET, VAE, IMAGE_ENCODER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model.visual."
PREFIXES = {"unet": UNET, "vae": VAE, "image_encoder": IMAGE_ENCODER}

RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]
VAE_RESNET = [(n, n) for n in ("norm1", "conv1", "norm2", "conv2")] + [("nin_shortcut", "conv_shortcut")]
VAE_ATTENTION = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]


def below(ldm: str, diffusers: str, pairs: Pairs) -> Pairs:
    return [(f"{ldm}.{a}", f"{diffusers}.{b}") for a, b in pairs]


def unet_pairs(layers_per_block: int, attends: list[bool]) -> Pairs:
    """attends: for each level, highest resolution first, whether it has attention."""
    pairs = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("camera_embed.0", "class_embedding.linear_1"),
        ("camera_embed.2", "class_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
        *below("middle_block.0", "mid_block.resnets.0", RESNET),
        ("middle_block.1", "mid_block.attentions.0"),
        *below("middle_block.2", "mid_block.resnets.1", RESNET),
    ]
    number = 1
    for level, attention in enumerate(attends):
        block = f"down_blocks.{level}"
        for layer in range(layers_per_block):
            pairs += below(f"input_blocks.{number}.0", f"{block}.resnets.{layer}", RESNET)
            if attention:
                pairs.append((f"input_blocks.{number}.1", f"{block}.attentions.{layer}"))
            number += 1
        if level < len(attends) - 1:
            pairs.append((f"input_blocks.{number}.0.op", f"{block}.downsamplers.0.conv"))
            number += 1
    number = 0
    for index, attention in enumerate(reversed(attends)):
        block = f"up_blocks.{index}"
        for layer in range(layers_per_block + 1):
            pairs += below(f"output_blocks.{number}.0", f"{block}.resnets.{layer}", RESNET)
            if attention:
                pairs.append((f"output_blocks.{number}.1", f"{block}.attentions.{layer}"))
            if layer == layers_per_block and index < len(attends) - 1:
                last = 2 if attention else 1
                pairs.append((f"output_blocks.{number}.{last}.conv", f"{block}.upsamplers.0.conv"))
            number += 1
    return pairs


def vae_pairs(levels: int, layers_per_block: int) -> Pairs:
    pairs = [(n, n) for n in ("quant_conv", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        pairs += [(f"{side}.conv_in", f"{side}.conv_in"), (f"{side}.conv_out", f"{side}.conv_out")]
        pairs += [(f"{side}.norm_out", f"{side}.conv_norm_out")]
        pairs += below(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0", VAE_RESNET)
        pairs += below(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", VAE_ATTENTION)
        pairs += below(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1", VAE_RESNET)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers_per_block):
            pairs += below(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", VAE_RESNET)
        for layer in range(layers_per_block + 1):
            pairs += below(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", VAE_RESNET)
        pairs.append((f"encoder.down.{level}.downsample.conv", f"{down}.downsamplers.0.conv"))
        pairs.append((f"decoder.up.{level}.upsample.conv", f"{up}.upsamplers.0.conv"))
    return pairs


def renamed(names: Iterable[str], pairs: Pairs) -> dict[str, str]:
    """name -> its other name, for those that a pair's first prefix covers."""
    table = dict(pairs)
    found = {}
    for name in names:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            prefix = ".".join(parts[:length])
            if prefix in table:
                found[name] = ".".join([table[prefix], *parts[length:]])
                break
    return found


def swapped(pairs: Pairs) -> Pairs:
    return [(b, a) for a, b in pairs]


def is_vae_projection(name: str) -> bool:
    """Whether a diffusers VAE tensor is a linear layer that ldm keeps as a 1 x 1 convolution."""
    return bool(re.search(r"mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.weight$", name))


def numbered(names: Iterable[str], pattern: str) -> list[int]:
    """The distinct numbers that `pattern`'s first group matches, in order."""
    return sorted({int(match[1]) for name in names if (match := re.match(pattern, name))})


def shape_of(shapes: Shapes, name: str, part: str) -> tuple[int, ...]:
    if name not in shapes:
        raise UserError(f"the {part} lacks {name}; is the file damaged, or of another kind of model?")
    return shapes[name]


def unet_config(shapes: Shapes, head_dim: int) -> dict[str, Any]:
    """UNet2DConditionModel's arguments, from ldm shapes without prefix.  UserError for another architecture."""
    channels, attends, layers, counts = [], [], 0, []
    numbers = numbered(shapes, r"input_blocks\.(\d+)\.")
    for number in numbers[1:]:
        if f"input_blocks.{number}.0.op.weight" in shapes:
            counts.append(layers)
            layers = 0
            continue
        if layers == 0:
            channels.append(shape_of(shapes, f"input_blocks.{number}.0.in_layers.2.weight", "UNet")[0])
            attends.append(f"input_blocks.{number}.1.norm.weight" in shapes)
        layers += 1
    counts.append(layers)
    first = shape_of(shapes, "input_blocks.0.0.weight", "UNet")
    if len(set(counts)) != 1 or counts[0] == 0:
        raise UserError(f"the UNet has {counts} layers in its levels; only equal numbers are supported")
    if "camera_embed.0.weight" not in shapes:
        raise UserError("the UNet has no camera_embed: it is not a multi-view model (MVDream, Isotropic3D)")
    if any(".transformer_blocks.1." in name for name in shapes):
        raise UserError("the UNet has more than one transformer block a layer; only SD 2.1's single one is supported")
    if len(shape_of(shapes, "middle_block.1.proj_in.weight", "UNet")) != 2:
        raise UserError("the UNet projects by convolution (SD 1.x); MVDream and Isotropic3D are of SD 2.1's kind")
    attending = [c for c, a in zip(channels, attends, strict=True) if a] + [channels[-1]]
    if any(c % head_dim for c in attending):
        raise UserError(f"head_dim={head_dim} does not divide the UNet's channels {attending}; give another")
    context = shape_of(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", "UNet")[1]
    return {
        "in_channels": first[1],
        "out_channels": shape_of(shapes, "out.2.weight", "UNet")[0],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "layers_per_block": counts[0],
        "attention_head_dim": [max(c // head_dim, 1) for c in channels],  # diffusers' name for the number of heads
        "cross_attention_dim": context,
        "use_linear_projection": True,
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": shape_of(shapes, "camera_embed.0.weight", "UNet")[1],
    }


def vae_config(shapes: Shapes, scaling_factor: float) -> dict[str, Any]:
    """AutoencoderKL's arguments, from ldm shapes without prefix."""
    levels = numbered(shapes, r"encoder\.down\.(\d+)\.")
    if not levels:
        raise UserError("the VAE has no encoder.down blocks; is the file damaged, or of another kind of model?")
    if any(re.match(r"(en|de)coder\.(down|up)\.\d+\.attn\.", name) for name in shapes):
        raise UserError("the VAE has attention outside its middle block; only SD's KL-f8 kind is supported")
    channels = [shape_of(shapes, f"encoder.down.{level}.block.0.conv1.weight", "VAE")[0] for level in levels]
    return {
        "in_channels": shape_of(shapes, "encoder.conv_in.weight", "VAE")[1],
        "out_channels": shape_of(shapes, "decoder.conv_out.weight", "VAE")[0],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": len(numbered(shapes, r"encoder\.down\.0\.block\.(\d+)\.")),
        "latent_channels": shape_of(shapes, "post_quant_conv.weight", "VAE")[0],
        "scaling_factor": scaling_factor,
    }


def image_encoder_config(shapes: Shapes, head_width: int | None) -> dict[str, Any]:
    """ClipImageEncoder's arguments, from open_clip's names without prefix.

    The head width is not in the shapes: it comes from the open_clip architecture of the same size, or by flag.
    """
    width, _, patch, _ = shape_of(shapes, "conv1.weight", "image encoder")
    layers = len(numbered(shapes, r"transformer\.resblocks\.(\d+)\."))
    tokens = shape_of(shapes, "positional_embedding", "image encoder")[0]
    embed_dim = shape_of(shapes, "proj", "image encoder")[1]
    hidden = shape_of(shapes, "transformer.resblocks.0.mlp.c_fc.weight", "image encoder")[0]
    side = round((tokens - 1) ** 0.5)
    found = {"width": width, "layers": layers, "patch_size": patch, "image_size": side * patch}
    if side * side != tokens - 1:
        raise UserError(f"the image encoder has {tokens} positions, which is no square and a class token")
    if head_width is None:
        for name in open_clip.list_models():
            known = (open_clip.get_model_config(name) or {}).get("vision_cfg", {})
            if known and isinstance(known.get("layers"), int) and all(known.get(k) == v for k, v in found.items()):
                head_width = known.get("head_width", 64)
                break
        else:
            raise UserError(f"no open_clip architecture has an image tower of {found}; give clip_head_width=")
    if width % head_width:
        raise UserError(f"clip_head_width={head_width} does not divide the image encoder's width {width}")
    return {
        "embed_dim": embed_dim,
        "vision_cfg": found | {"head_width": head_width, "mlp_ratio": hidden / width},
    }
