"""The diffusion transformer of Wan2.1 (arXiv 2503.20314), text-to-video and image-to-video.

Shapes: B batch; C latent channels; t, h, w latent frames, height, width; L = (t/1)(h/2)(w/2) video tokens;
T text tokens; N image tokens; D width; H heads of width Dh = D/H. Names of the parameters are the original ones.

Precision, as in the original's autocast regions: the residual stream, norms, rotary embedding, modulation, time
embedding and head are computed in float32; the linears of the blocks compute in the dtype of the text tokens, which is
the dtype of `text_embedding`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightx2v.attention.base import AttentionFn
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.attention.turned import attend
from lightx2v.deferred import Heads, Residual, Tokens, add_gated, layer_norm, modulated_norm, norm_rope, tensor_of
from lightx2v.elementwise import Rope
from lightx2v.errors import ConfigError
from lightx2v.mm.together import project
from lightx2v.models.base import (
    AttentionPart,
    Branch,
    Conditions,
    Prepared,
    StepContext,
    Stream,
    TimeEmbedding,
    run_blocks,
)
from lightx2v.models.layers import FeedForward, Float32Linear, dtype_of, rope_angles, timestep_embedding
from lightx2v.models.wan.arch import WanArch

KeysValues = tuple[Tensor, Tensor]


def rope_table(head_dim: int, grid: tuple[int, int, int]) -> Rope:
    """Cosines and sines [L, 1, Dh/2], float32, for tokens on a (frames, height, width) grid.

    The Dh/2 rotation planes are shared out among the three axes, with the remainder of the division to the frames.
    """
    spatial = head_dim // 6
    planes = (head_dim // 2 - 2 * spatial, spatial, spatial)
    angles = []
    for axis, (length, count) in enumerate(zip(grid, planes, strict=True)):
        shape = [1, 1, 1, count]
        shape[axis] = length
        along = rope_angles(torch.arange(length), 2 * count)
        angles.append(along.view(shape).expand(*grid, count))
    angle = torch.cat(angles, dim=-1).reshape(-1, 1, head_dim // 2)
    return angle.cos().float(), angle.sin().float()


class LayerNorm(nn.LayerNorm):
    """Computed in float32, and rounded to `dtype`."""

    def forward(self, x: Residual, dtype: torch.dtype) -> Tokens:  # type: ignore[override]
        return layer_norm(x, self.weight, self.bias, self.eps, dtype)


class SelfAttention(nn.Module):
    fused: tuple[tuple[str, ...], ...] = (("q", "k", "v"),)
    """Projections of the same tokens, which may be computed as one."""

    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.heads, self.eps = arch.num_heads, arch.eps
        self.q = nn.Linear(arch.dim, arch.dim)
        self.k = nn.Linear(arch.dim, arch.dim)
        self.v = nn.Linear(arch.dim, arch.dim)
        self.o = nn.Linear(arch.dim, arch.dim)
        self.norm_q = nn.RMSNorm(arch.dim, arch.eps) if arch.qk_norm else None
        self.norm_k = nn.RMSNorm(arch.dim, arch.eps) if arch.qk_norm else None
        self.attention: AttentionFn = torch_sdpa

    def normed(self, x: Tensor, norm: nn.RMSNorm | None, rope: Rope | None = None) -> Heads:
        """The norm, over the full width, and the rotary embedding: [B, L, D] -> [B, L, H, Dh]."""
        return norm_rope(x, None if norm is None else norm.weight, self.eps, self.heads, rope)

    def forward(self, x: Tokens, rope: Rope) -> Tensor:
        q, k, v = project(x, self.q, self.k, self.v)
        turned = self.normed(q, self.norm_q, rope), self.normed(k, self.norm_k, rope)
        return self.o(attend(self.attention, *turned, v.unflatten(-1, (self.heads, -1))).flatten(2))


class CrossAttention(SelfAttention):
    """Attention to the text and, for image-to-video, to the image tokens; the two results are added."""

    fused = (("k", "v"), ("k_img", "v_img"))

    def __init__(self, arch: WanArch) -> None:
        super().__init__(arch)
        if arch.model_type == "i2v":
            self.k_img = nn.Linear(arch.dim, arch.dim)
            self.v_img = nn.Linear(arch.dim, arch.dim)
            self.norm_k_img = nn.RMSNorm(arch.dim, arch.eps) if arch.qk_norm else None
            self.image_attention: AttentionFn = torch_sdpa

    def keys_values(self, text: Tensor, image: Tensor | None) -> tuple[KeysValues, ...]:
        """Keys and values [B, T, H, Dh] of the text tokens and, where there are any, of the image tokens."""
        k, v = project(text, self.k, self.v)
        made = [(tensor_of(self.normed(k, self.norm_k)), v.unflatten(-1, (self.heads, -1)))]
        if image is not None:
            k, v = project(image, self.k_img, self.v_img)
            made.append((tensor_of(self.normed(k, self.norm_k_img)), v.unflatten(-1, (self.heads, -1))))
        return tuple(made)

    def forward(self, x: Tokens, keys_values: tuple[KeysValues, ...]) -> Tensor:  # type: ignore[override]
        q = tensor_of(self.normed(project(x, self.q)[0], self.norm_q))
        out = self.attention(q, *keys_values[0])
        for k, v in keys_values[1:]:
            out = out + self.image_attention(q, k, v)
        return self.o(out.flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward; the first and the last are modulated by the time embedding."""

    recallable: ClassVar[dict[str, tuple[str, ...]]] = {
        "self": ("self_attn",),
        "cross": ("cross_attn",),
        "mlp": ("ffn",),
    }

    def __init__(self, arch: WanArch, index: int) -> None:
        super().__init__()
        self.index, self.eps = index, arch.eps
        self.self_attn = SelfAttention(arch)
        self.norm3 = LayerNorm(arch.dim, arch.eps) if arch.cross_attn_norm else None
        self.cross_attn = CrossAttention(arch)
        self.ffn = FeedForward(arch.dim, arch.ffn_dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, arch.dim) / arch.dim**0.5)

    def forward(self, stream: Stream, context: StepContext) -> Stream:
        prepared = context.prepared
        if self.index not in prepared.memory:
            prepared.memory[self.index] = self.cross_attn.keys_values(prepared.text, prepared.image)
        dtype = prepared.text.dtype
        return Stream(self.compute(stream.x, context.time.blocks, context.rope, prepared.memory[self.index], dtype))

    def compute(
        self, x: Residual, time: Tensor, rope: Rope, keys_values: tuple[KeysValues, ...], dtype: torch.dtype
    ) -> Tensor:
        """The residual stream x [B, L, D] after this block; the linears compute in `dtype`."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + time).chunk(6, dim=1)
        y = self.self_attn(modulated_norm(x, shift1, scale1, self.eps, dtype), rope)
        x = add_gated(x, y, gate1)
        y = tensor_of(x).to(dtype) if self.norm3 is None else self.norm3(x, dtype)
        x = add_gated(x, self.cross_attn(y, keys_values))
        y = self.ffn(modulated_norm(x, shift2, scale2, self.eps, dtype))
        return tensor_of(add_gated(x, y, gate2))


class Head(nn.Module):
    """Video tokens back to latents: [B, L, D] -> [B, C, t, h, w] float32."""

    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.patch_size = arch.patch_size
        self.eps = arch.eps
        self.head = nn.Linear(arch.dim, arch.out_dim * math.prod(arch.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, arch.dim) / arch.dim**0.5)

    def forward(self, stream: Stream, context: StepContext) -> Tensor:
        shift, scale = (self.modulation.float() + context.time.head[:, None]).chunk(2, dim=1)
        y = modulated_norm(stream.x, shift, scale, self.eps, dtype_of(self.head))
        patches = project(y, self.head)[0].float().unflatten(1, context.grid).unflatten(-1, (*self.patch_size, -1))
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class ImageEmbedding(nn.Module):
    """Tokens of the image encoder [B, N, image_dim] -> [B, N, D]."""

    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(arch.image_dim),
            nn.Linear(arch.image_dim, arch.image_dim),
            nn.GELU(),
            nn.Linear(arch.image_dim, arch.dim),
            LayerNorm(arch.dim),
        )

    def forward(self, image: Tensor) -> Tensor:
        norm_in, linear_in, gelu, linear_out, norm_out = self.proj
        dtype = dtype_of(linear_in)
        (y,) = project(norm_in(image.float(), dtype), linear_in)
        return tensor_of(norm_out(linear_out(gelu(y)).float(), dtype))


class WanDiT(nn.Module):
    """Predicts the flow (noise minus data) of video latents. It runs on one device and knows nothing of features."""

    fp32_names = (
        "*modulation",
        "*norm_q.*",
        "*norm_k.*",
        "*norm_k_img.*",
        "*norm3.*",
        "img_emb.proj.0.*",
        "img_emb.proj.4.*",
        "head.*",
    )
    once = ("text_embedding", "time_embedding", "time_projection", "img_emb")
    time_signal = True

    def __init__(self, arch: WanArch) -> None:
        super().__init__()
        self.arch = arch
        self.patch_embedding = nn.Conv3d(arch.in_dim, arch.dim, arch.patch_size, arch.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(arch.text_dim, arch.dim), nn.GELU(approximate="tanh"), nn.Linear(arch.dim, arch.dim)
        )
        self.time_embedding = nn.Sequential(
            Float32Linear(arch.freq_dim, arch.dim), nn.SiLU(), Float32Linear(arch.dim, arch.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(arch.dim, 6 * arch.dim))
        if arch.model_type == "i2v":
            self.img_emb = ImageEmbedding(arch)
        self.blocks = nn.ModuleList(Block(arch, index) for index in range(arch.num_layers))
        self.head = Head(arch)
        self._rope: dict[tuple[tuple[int, int, int], torch.device], Rope] = {}

    def attention_parts(self) -> Iterator[AttentionPart]:
        """Every attention of the model."""
        for block in self.blocks:
            assert isinstance(block, Block)
            yield AttentionPart(block.index, "self", block.self_attn)
            yield AttentionPart(block.index, "cross", block.cross_attn)
            if self.arch.model_type == "i2v":
                yield AttentionPart(block.index, "image", block.cross_attn, "image_attention")

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding:
        """Timesteps [S] in 0..1000 to what the head [S, D] and the blocks [S, 6, D] add to their modulation."""
        head = self.time_embedding(timestep_embedding(timesteps, self.arch.freq_dim))
        return TimeEmbedding(head, self.time_projection(head).unflatten(1, (6, -1)))

    def prepare(self, conditions: Conditions) -> Prepared:
        """Text and image tokens in the model's own width."""
        image = None if conditions.image is None else self.img_emb(conditions.image)
        return Prepared(self._text_tokens(conditions.text), image, conditions.latent)

    def embed(
        self, latents: Tensor, time: TimeEmbedding, prepared: Prepared, *, step: int = 0, branch: Branch = "cond"
    ) -> tuple[Stream, StepContext]:
        """Latents [B, C, t, h, w] to tokens, and what the blocks read."""
        if prepared.latent is not None:
            latents = torch.cat([latents, prepared.latent.to(latents.dtype)], dim=1)
        tokens, grid = self._patches(latents)
        rope = self._rope_for(grid, latents.device)
        return Stream(tokens.float()), StepContext(time, rope, prepared, grid, step, branch)

    def signal(self, stream: Stream, context: StepContext) -> Tensor:
        """The time embedding as the blocks read it."""
        return context.time.blocks

    def forward(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """One evaluation at timestep [B]: [B, C, t, h, w] -> [B, out_dim, t, h, w] float32."""
        stream, context = self.embed(latents, self.embed_time(timestep), self.prepare(conditions))
        return self.head(run_blocks(self, stream, context), context)

    def _patches(self, latents: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """[B, C, t, h, w] -> tokens [B, L, D]; the convolution has stride = kernel, so it is one matrix product."""
        if latents.shape[1] != self.arch.in_dim:
            raise ConfigError(
                "latents", f"{latents.shape[1]} channels, {self.arch.in_dim} wanted by a {self.arch.model_type} model"
            )
        pt, ph, pw = self.arch.patch_size
        b, c, t, h, w = latents.shape
        grid = (t // pt, h // ph, w // pw)
        patches = latents.reshape(b, c, grid[0], pt, grid[1], ph, grid[2], pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches = patches.flatten(4).flatten(1, 3).to(dtype_of(self.patch_embedding))
        return F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias), grid

    def _text_tokens(self, text: Tensor) -> Tensor:
        """Zeros up to text_len, then the projection. The model was trained so: the padding is not masked."""
        if text.shape[1] > self.arch.text_len:
            raise ConfigError("text_len", f"{text.shape[1]} text tokens", allowed=f"at most {self.arch.text_len}")
        text = F.pad(text, (0, 0, 0, self.arch.text_len - text.shape[1]))
        return self.text_embedding(text.to(dtype_of(self.text_embedding)))

    def _rope_for(self, grid: tuple[int, int, int], device: torch.device) -> Rope:
        key = (grid, device)
        if key not in self._rope:
            with torch.inference_mode(False):  # a table made in inference mode could not be used in training later
                cos, sin = rope_table(self.arch.head_dim, grid)
                self._rope = {key: (cos.to(device), sin.to(device))}
        return self._rope[key]
