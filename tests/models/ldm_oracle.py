"""The multi-view UNet, the VAE and DDIM written out from their papers, on an ldm checkpoint's own tensors: an oracle.

Nothing of diffusers or of models/ is used, so that agreement says something.  latent diffusion (arXiv 2112.10752),
MVDream (arXiv 2308.16512), DDIM (arXiv 2010.02502, eq. 12).  Itself checked against recorded outputs of the released
modules (test_convert.py, test_parity.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LATENT_SCALE = 0.18215  # Stable Diffusion's scale_factor: brings the VAE's latents to about unit variance


class Network:
    """weights: tensors by their ldm names; each layer is called by its name."""

    def __init__(self, weights: Mapping[str, Tensor]):
        self.weights = weights

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = self.weights[f"{name}.weight"]
        return F.conv2d(x, kernel, self.weights[f"{name}.bias"], stride, padding=kernel.shape[-1] // 2)

    def group_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)


class Oracle(Network):
    """weights: an ldm state dict's `model.diffusion_model.*`, without that prefix."""

    def __init__(self, weights: Mapping[str, Tensor], head_dim: int):
        super().__init__(weights)
        self.head_dim = head_dim

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-5)

    def attention(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            self.linear(f"{name}.to_{n}", y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for n, y in (("q", x), ("k", context), ("v", context))
        )
        scores = (q @ k.transpose(-1, -2)) / math.sqrt(self.head_dim)
        return self.linear(f"{name}.to_out.0", (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))

    def residual(self, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv(f"{name}.in_layers.2", F.silu(self.group_norm(f"{name}.in_layers.0", x, 1e-5)))
        h = h + self.linear(f"{name}.emb_layers.1", F.silu(embedding))[:, :, None, None]
        h = self.conv(f"{name}.out_layers.3", F.silu(self.group_norm(f"{name}.out_layers.0", h, 1e-5)))
        return h + (self.conv(f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in self.weights else x)

    def transformer(self, name: str, x: Tensor, context: Tensor, views: int) -> Tensor:
        images, _, height, width = x.shape
        h = self.group_norm(f"{name}.norm", x, 1e-6).flatten(2).transpose(1, 2)
        h, block = self.linear(f"{name}.proj_in", h), f"{name}.transformer_blocks.0"
        joined = self.layer_norm(f"{block}.norm1", h).reshape(images // views, views * height * width, -1)
        h = h + self.attention(f"{block}.attn1", joined, joined).reshape(h.shape)
        h = h + self.attention(f"{block}.attn2", self.layer_norm(f"{block}.norm2", h), context)
        value, gate = self.linear(f"{block}.ff.net.0.proj", self.layer_norm(f"{block}.norm3", h)).chunk(2, dim=-1)
        h = h + self.linear(f"{block}.ff.net.2", value * F.gelu(gate))
        return x + self.linear(f"{name}.proj_out", h).transpose(1, 2).unflatten(2, (height, width))

    def layers(self, name: str, x: Tensor, embedding: Tensor, context: Tensor, views: int) -> Tensor:
        """One of ldm's input, middle or output blocks, in order of its layers."""
        for number in range(4):
            layer = f"{name}.{number}"
            if f"{layer}.in_layers.0.weight" in self.weights:
                x = self.residual(layer, x, embedding)
            elif f"{layer}.proj_in.weight" in self.weights:
                x = self.transformer(layer, x, context, views)
            elif f"{layer}.op.weight" in self.weights:
                x = self.conv(f"{layer}.op", x, stride=2)
            elif f"{layer}.conv.weight" in self.weights:
                x = self.conv(f"{layer}.conv", F.interpolate(x, scale_factor=2.0, mode="nearest"))
            elif f"{layer}.weight" in self.weights:
                x = self.conv(layer, x)
        return x

    @torch.no_grad()
    def __call__(self, x: Tensor, timesteps: Tensor, context: Tensor, camera: Tensor, views: int) -> Tensor:
        """x (B V, C, h, w), timesteps (B V,), context (B V, 1, D), camera (B V, 16) -> epsilon or v."""
        width = self.weights["input_blocks.0.0.weight"].shape[0]
        frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
        angles = timesteps[:, None].float() * frequencies
        embedding = self.linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
        embedding = self.linear("time_embed.2", F.silu(embedding))
        embedding = embedding + self.linear("camera_embed.2", F.silu(self.linear("camera_embed.0", camera)))
        inputs = sorted({int(n.split(".")[1]) for n in self.weights if n.startswith("input_blocks.")})
        outputs = sorted({int(n.split(".")[1]) for n in self.weights if n.startswith("output_blocks.")})
        kept = []
        for number in inputs:
            x = self.layers(f"input_blocks.{number}", x, embedding, context, views)
            kept.append(x)
        x = self.layers("middle_block", x, embedding, context, views)
        for number in outputs:
            x = self.layers(f"output_blocks.{number}", torch.cat([x, kept.pop()], dim=1), embedding, context, views)
        return self.conv("out.2", F.silu(self.group_norm("out.0", x, 1e-5)))


class VaeOracle(Network):
    """weights: an ldm state dict's `first_stage_model.*`, without that prefix."""

    def normed_conv(self, norm: str, conv: str, x: Tensor) -> Tensor:
        """GroupNorm, swish, 3 x 3 convolution."""
        return self.conv(conv, F.silu(self.group_norm(norm, x, 1e-6)))

    def residual(self, name: str, x: Tensor) -> Tensor:
        h = self.normed_conv(f"{name}.norm1", f"{name}.conv1", x)
        h = self.normed_conv(f"{name}.norm2", f"{name}.conv2", h)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        """One head over all positions of a picture; x (N, C, h, w)."""
        h = self.group_norm(f"{name}.norm", x, 1e-6)
        q, k, v = (self.conv(f"{name}.{n}", h).flatten(2) for n in "qkv")
        weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)  # (N, query, key)
        return x + self.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))

    def middle(self, name: str, x: Tensor) -> Tensor:
        return self.residual(f"{name}.block_2", self.attention(f"{name}.attn_1", self.residual(f"{name}.block_1", x)))

    def level(self, name: str, x: Tensor) -> Tensor:
        """The residual blocks of one resolution."""
        for number in sorted({int(n.split(".")[4]) for n in self.weights if n.startswith(f"{name}.block.")}):
            x = self.residual(f"{name}.block.{number}", x)
        return x

    def levels(self, side: str) -> list[int]:
        return sorted({int(n.split(".")[2]) for n in self.weights if n.startswith(f"{side}.")})

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) in [-1, 1] -> the posterior's mean (N, C, h, w), scaled."""
        x, levels = self.conv("encoder.conv_in", images), self.levels("encoder.down")
        for number in levels:
            x = self.level(f"encoder.down.{number}", x)
            if number != levels[-1]:
                down = f"encoder.down.{number}.downsample.conv"
                padded = F.pad(x, (0, 1, 0, 1))
                x = F.conv2d(padded, self.weights[f"{down}.weight"], self.weights[f"{down}.bias"], stride=2)
        x = self.normed_conv("encoder.norm_out", "encoder.conv_out", self.middle("encoder.mid", x))
        return self.conv("quant_conv", x).chunk(2, dim=1)[0] * LATENT_SCALE

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) -> images (N, 3, H, W), about [-1, 1], not clamped."""
        x = self.conv("decoder.conv_in", self.conv("post_quant_conv", latents / LATENT_SCALE))
        x = self.middle("decoder.mid", x)
        for number in reversed(self.levels("decoder.up")):
            x = self.level(f"decoder.up.{number}", x)
            if number > 0:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(f"decoder.up.{number}.upsample.conv", x)
        return self.normed_conv("decoder.norm_out", "decoder.conv_out", x)


def ddim(predict: Callable[[Tensor, int], Tensor], noise: Tensor, alphas_cumprod: Tensor, steps: int) -> Tensor:
    """DDIM, eta 0, epsilon: ldm's `steps` uniform timesteps from 1 on; the last step goes to the first alpha."""
    stride = len(alphas_cumprod) // steps
    times = [stride * i + 1 for i in range(steps)]
    x = noise
    for index in reversed(range(steps)):
        now = alphas_cumprod[times[index]]
        before = alphas_cumprod[times[index - 1]] if index > 0 else alphas_cumprod[0]
        epsilon = predict(x, times[index])
        clean = (x - (1 - now).sqrt() * epsilon) / now.sqrt()
        x = before.sqrt() * clean + (1 - before).sqrt() * epsilon
    return x
