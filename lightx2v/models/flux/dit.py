"""The diffusion transformer of FLUX.1 (Black Forest Labs, 2024): dev, schnell and Kontext.

Shapes: B batch; C latent channels; h, w latent height and width; L = (h/2)(w/2) image tokens, and as many more as a
reference image has; T text tokens; D width; H heads of width Dh = D/H. Names of the parameters are the original ones.

A double-stream block has weights for the image and for the text, which meet in one attention; in a single-stream block
both are one sequence, text first, and attention and feed-forward run side by side. Precision: the two residual streams,
norms, rotary embedding, time embedding and head are float32, so that no block rounds what the others added (diffusers
keeps the streams in the compute dtype); the linears of the blocks compute in the dtype of `txt_in`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightx2v.attention.base import AttentionFn
from lightx2v.attention.sdpa import torch_sdpa
from lightx2v.attention.turned import attend
from lightx2v.deferred import Heads, Tokens, add_gated, modulated_norm, norm_rope, tensor_of
from lightx2v.elementwise import Rope
from lightx2v.errors import ConfigError
from lightx2v.mm.together import project, project_joined
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
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.layers import FeedForward, Float32Linear, dtype_of, rope_angles, timestep_embedding

Grid = tuple[int, int, int]
"""Frames (one), height and width in tokens."""


def rope_table(axes: tuple[int, int, int], text: int, images: tuple[Grid, ...]) -> Rope:
    """Cosines and sines [T + L, 1, Dh/2], float32: `text` tokens at the origin, then the tokens of `images`.

    An image token's place on the first axis is the number of its image, on the others its row and its column.
    """
    places = [torch.zeros(text, 3)]
    for number, (_, height, width) in enumerate(images):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places.append(torch.stack([torch.full_like(rows, number), rows, columns], dim=-1).flatten(0, 1))
    by_axis = torch.cat(places).unbind(-1)
    angles = [rope_angles(place, width) for place, width in zip(by_axis, axes, strict=True)]
    angle = torch.cat(angles, dim=-1)[:, None]
    return angle.cos().float(), angle.sin().float()


class Embedder(nn.Module):
    """Two float32 linears with a SiLU between them: [B, K] -> [B, D]."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.in_layer = Float32Linear(width, dim)
        self.out_layer = Float32Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """`count` shifts, scales and gates, [B, 1, D] float32, from the activated time embedding [B, D]."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.lin = nn.Linear(dim, count * dim)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(vec)[:, None].float().chunk(self.count, dim=-1)


class HeadNorm(nn.Module):
    """The weight of an RMS norm of each head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))


class QKNorm(nn.Module):
    """The norms of queries and keys, which the rotary embedding follows."""

    def __init__(self, arch: FluxArch) -> None:
        super().__init__()
        self.heads, self.eps = arch.num_heads, arch.eps
        self.query_norm = HeadNorm(arch.head_dim)
        self.key_norm = HeadNorm(arch.head_dim)

    def forward(self, qkv: Tensor, rope: Rope | None) -> tuple[Heads, Heads, Tensor]:
        """[B, L, 3 D] to queries, keys and values [B, L, H, Dh]."""
        q, k, v = qkv.chunk(3, dim=-1)
        return (
            norm_rope(q, self.query_norm.scale, self.eps, self.heads, rope),
            norm_rope(k, self.key_norm.scale, self.eps, self.heads, rope),
            v.unflatten(-1, (self.heads, -1)),
        )


class StreamAttention(nn.Module):
    """The weights that one of two streams has of an attention."""

    def __init__(self, arch: FluxArch) -> None:
        super().__init__()
        self.qkv = nn.Linear(arch.dim, 3 * arch.dim)
        self.norm = QKNorm(arch)
        self.proj = nn.Linear(arch.dim, arch.dim)


class JointAttention(nn.Module):
    """Attention of text and image tokens to each other, with the weights of their streams."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: AttentionFn = torch_sdpa

    def forward(self, img: StreamAttention, txt: StreamAttention, x: Tokens, text: Tokens, rope: Rope) -> Tensor:
        """x [B, L, D] and text [B, T, D] to the branches of both, [B, T + L, D], text first."""
        tokens = text.shape[1]
        of_text = txt.norm(project(text, txt.qkv)[0], None)  # text is at the origin, where nothing turns
        of_image = img.norm(project(x, img.qkv)[0], (rope[0][tokens:], rope[1][tokens:]))
        pairs = zip(map(tensor_of, of_text), map(tensor_of, of_image), strict=True)
        q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
        out = self.attention(q, k, v).flatten(2)
        return torch.cat([txt.proj(out[:, :tokens]), img.proj(out[:, tokens:])], dim=1)


class ParallelAttention(nn.Module):
    """Attention beside a feed-forward, with the weights of a single-stream block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: AttentionFn = torch_sdpa

    def forward(self, linear1: nn.Module, norm: QKNorm, linear2: nn.Module, x: Tensor, rope: Rope) -> Tensor:
        """x [B, T + L, D] to the branch [B, T + L, D]."""
        made = linear1(x)
        width = 3 * x.shape[-1]
        out = attend(self.attention, *norm(made[..., :width], rope)).flatten(2)
        return project_joined(out, made[..., width:], linear2)


class DoubleBlock(nn.Module):
    """Attention of two streams to each other, then a feed-forward for each."""

    recallable: ClassVar[dict[str, tuple[str, ...]]] = {"self": ("joint",), "mlp": ("img_mlp", "txt_mlp")}

    def __init__(self, arch: FluxArch, index: int) -> None:
        super().__init__()
        self.index, self.eps = index, arch.eps
        self.img_mod = Modulation(arch.dim, 6)
        self.img_attn = StreamAttention(arch)
        self.img_mlp = FeedForward(arch.dim, arch.ffn_dim)
        self.txt_mod = Modulation(arch.dim, 6)
        self.txt_attn = StreamAttention(arch)
        self.txt_mlp = FeedForward(arch.dim, arch.ffn_dim)
        self.joint = JointAttention()

    def forward(self, stream: Stream, context: StepContext) -> Stream:
        assert stream.txt is not None
        return Stream(*self.compute(stream.x, stream.txt, context.time.blocks, context.rope))

    def compute(self, x: Tensor, txt: Tensor, vec: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """The residual streams x [B, L, D] and txt [B, T, D] after this block; the linears compute in vec's dtype."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.img_mod(vec)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(vec)
        y = self.joint(
            self.img_attn,
            self.txt_attn,
            modulated_norm(x, shift1, scale1, self.eps, vec.dtype),
            modulated_norm(txt, txt_shift1, txt_scale1, self.eps, vec.dtype),
            rope,
        )
        tokens = txt.shape[1]
        img, text = add_gated(x, y[:, tokens:], gate1), add_gated(txt, y[:, :tokens], txt_gate1)
        img = add_gated(img, self.img_mlp(modulated_norm(img, shift2, scale2, self.eps, vec.dtype)), gate2)
        y = self.txt_mlp(modulated_norm(text, txt_shift2, txt_scale2, self.eps, vec.dtype))
        return tensor_of(img), tensor_of(add_gated(text, y, txt_gate2))


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, for text and image tokens as one sequence."""

    recallable: ClassVar[dict[str, tuple[str, ...]]] = {"self": ("joint",)}

    def __init__(self, arch: FluxArch, index: int) -> None:
        super().__init__()
        self.index, self.eps = index, arch.eps
        self.linear1 = nn.Linear(arch.dim, 3 * arch.dim + arch.ffn_dim)
        self.linear2 = nn.Linear(arch.dim + arch.ffn_dim, arch.dim)
        self.norm = QKNorm(arch)
        self.modulation = Modulation(arch.dim, 3)
        self.joint = ParallelAttention()

    def forward(self, stream: Stream, context: StepContext) -> Stream:
        assert stream.txt is not None
        return Stream(*self.compute(stream.x, stream.txt, context.time.blocks, context.rope))

    def compute(self, x: Tensor, txt: Tensor, vec: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """As `DoubleBlock.compute`."""
        shift, scale, gate = self.modulation(vec)
        parts = [tensor_of(modulated_norm(part, shift, scale, self.eps, vec.dtype)) for part in (txt, x)]
        y = self.joint(self.linear1, self.norm, self.linear2, torch.cat(parts, dim=1), rope)
        tokens = txt.shape[1]
        return tensor_of(add_gated(x, y[:, tokens:], gate)), tensor_of(add_gated(txt, y[:, :tokens], gate))


class FinalLayer(nn.Module):
    """Image tokens back to latents: [B, L, D] -> [B, C, 1, h, w] float32."""

    def __init__(self, arch: FluxArch) -> None:
        super().__init__()
        self.eps = arch.eps
        self.linear = nn.Linear(arch.dim, arch.in_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(arch.dim, 2 * arch.dim))

    def forward(self, x: Tensor, vec: Tensor, grid: Grid) -> Tensor:
        """`vec` [B, D] has been through the SiLU already."""
        dtype = dtype_of(self.linear)
        shift, scale = self.adaLN_modulation[1](vec.to(dtype))[:, None].float().chunk(2, dim=-1)
        patches = project(modulated_norm(x, shift, scale, self.eps, dtype), self.linear)[0].float()
        pixels = patches.unflatten(1, grid[1:]).unflatten(-1, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5)
        return pixels.flatten(4, 5).flatten(2, 3)[:, :, None]


class FluxDiT(nn.Module):
    """Predicts the flow (noise minus data) of image latents. It runs on one device and knows nothing of features."""

    fp32_names = ("*_norm.scale", "final_layer.*")
    once = ("txt_in", "time_in", "vector_in", "guidance_in")
    time_signal = False

    def __init__(self, arch: FluxArch) -> None:
        super().__init__()
        self.arch = arch
        self.img_in = nn.Linear(arch.in_dim, arch.dim)
        self.time_in = Embedder(arch.freq_dim, arch.dim)
        self.vector_in = Embedder(arch.pooled_dim, arch.dim)
        self.guidance_in = Embedder(arch.freq_dim, arch.dim) if arch.guidance else None
        self.txt_in = nn.Linear(arch.text_dim, arch.dim)
        double = arch.num_layers
        self.double_blocks = nn.ModuleList(DoubleBlock(arch, index) for index in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(arch, double + i) for i in range(arch.num_single_layers))
        self.final_layer = FinalLayer(arch)
        self._rope: dict[tuple[int, tuple[Grid, ...], torch.device], Rope] = {}

    @property
    def blocks(self) -> list[nn.Module]:
        """The double-stream blocks, then the single-stream ones."""
        return [*self.double_blocks, *self.single_blocks]

    def attention_parts(self) -> Iterator[AttentionPart]:
        """Every attention of the model."""
        for index, block in enumerate(self.blocks):
            assert isinstance(block, DoubleBlock | SingleBlock)
            yield AttentionPart(index, "self", block.joint)

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding:
        """Timesteps [S] in 0..1000 to [S, D]; what the pooled text and the guidance add comes in `embed`."""
        time = self.time_in(timestep_embedding(timesteps, self.arch.freq_dim))
        return TimeEmbedding(time, time)

    def prepare(self, conditions: Conditions) -> Prepared:
        """Text and reference image tokens in the model's own width, and what is added to the time embedding."""
        if conditions.pooled is None:
            raise ConfigError("conditions", "the pooled text is missing")
        pooled = self.vector_in(conditions.pooled)
        if self.guidance_in is not None:
            if conditions.guidance is None:
                raise ConfigError("sampling.guidance", "is missing: this model takes it as an input")
            scale = torch.tensor([1000.0 * conditions.guidance], device=pooled.device)
            pooled = pooled + self.guidance_in(timestep_embedding(scale, self.arch.freq_dim))
        text = self.txt_in(conditions.text.to(dtype_of(self.txt_in)))
        latent = conditions.latent
        image = None if latent is None else self._image_tokens(latent)
        return Prepared(text, image, latent, pooled)

    def embed(
        self, latents: Tensor, time: TimeEmbedding, prepared: Prepared, *, step: int = 0, branch: Branch = "cond"
    ) -> tuple[Stream, StepContext]:
        """Latents [B, C, 1, h, w] to tokens, and what the blocks read."""
        assert prepared.pooled is not None
        x, grids = self._image_tokens(latents), [self._grid(latents)]
        if prepared.image is not None and prepared.latent is not None:
            x = torch.cat([x, prepared.image.expand(x.shape[0], -1, -1)], dim=1)
            grids.append(self._grid(prepared.latent))
        text = prepared.text
        vec = F.silu(time.head + prepared.pooled)
        rope = self._rope_for(text.shape[1], tuple(grids), latents.device)
        context = StepContext(TimeEmbedding(vec, vec.to(text.dtype)), rope, prepared, grids[0], step, branch)
        return Stream(x.float(), text.float()), context

    def signal(self, stream: Stream, context: StepContext) -> Tensor:
        """The modulated image tokens that enter the first block, [B, L, D] in the compute dtype."""
        vec = context.time.blocks
        shift, scale = self.double_blocks[0].img_mod(vec)[:2]  # type: ignore[operator]
        return tensor_of(modulated_norm(stream.x, shift, scale, self.arch.eps, vec.dtype))

    def head(self, stream: Stream, context: StepContext) -> Tensor:
        """The tokens of the image to latents; those of a reference image are left out."""
        _, height, width = context.grid
        latents: Tensor = self.final_layer(stream.x[:, : height * width], context.time.head, context.grid)
        return latents

    def forward(self, latents: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """One evaluation at timestep [B]: [B, C, 1, h, w] -> the same shape, float32."""
        stream, context = self.embed(latents, self.embed_time(timestep), self.prepare(conditions))
        return self.head(run_blocks(self, stream, context), context)

    def _grid(self, latents: Tensor) -> Grid:
        return 1, latents.shape[3] // 2, latents.shape[4] // 2

    def _image_tokens(self, latents: Tensor) -> Tensor:
        """[B, C, 1, h, w] to tokens [B, L, D] of 2 x 2 latents each, the channel first within a patch."""
        channels = self.arch.in_dim // 4
        if latents.shape[1:3] != (channels, 1):
            raise ConfigError("latents", f"shape {list(latents.shape)}", allowed=f"[B, {channels}, 1, h, w]")
        patches = latents[:, :, 0].unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
        return self.img_in(patches.flatten(3).flatten(1, 2).to(dtype_of(self.img_in)))

    def _rope_for(self, text: int, grids: tuple[Grid, ...], device: torch.device) -> Rope:
        key = (text, grids, device)
        if key not in self._rope:
            with torch.inference_mode(False):  # a table made in inference mode could not be used in training later
                cos, sin = rope_table(self.arch.axes, text, grids)
                self._rope = {key: (cos.to(device), sin.to(device))}
        return self._rope[key]
