"""Tiny models as nunchaku stores its own, packed here, and what their layers compute, by the formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.interop import nunchaku_files as files

SHIFT, RANKS = 0.171875, 16
Tensors = dict[str, Tensor]


class Formula(nn.Module):
    """y = quantized(x / smooth) R^T + x D^T U^T + b; x / smooth as it is where inputs stay floats."""

    def __init__(self, weight: Tensor, smooth: Tensor, branch: Tensor, bias: Tensor, quantized: bool) -> None:
        super().__init__()
        self.tensors = tuple(tensor.double() for tensor in (weight, smooth, branch, bias))
        self.quantized = quantized

    def forward(self, x: Tensor) -> Tensor:
        weight, smooth, branch, bias = self.tensors
        groups = (x.double() / smooth).unflatten(-1, (-1, 64))
        if self.quantized:
            step = groups.abs().amax(dim=-1, keepdim=True) / 7
            groups = (groups / step.clamp(min=1e-30)).round() * step
        return (groups.flatten(-2) @ weight.t() + x.double() @ branch.t() + bias).to(x.dtype)


class Writer:
    """Tensors of a file, and layers of the model in diffusers that they are of."""

    def __init__(self, old_names: bool) -> None:
        self.tensors: Tensors = {}
        self.layers: dict[str, nn.Module] = {}
        self.generator = torch.Generator().manual_seed(0)
        old = {"smooth_factor": "smooth", "smooth_factor_orig": "smooth_orig", "proj_down": "lora_down"}
        self.leaf: Callable[[str], str] = lambda leaf: (
            ({**old, "proj_up": "lora_up"}).get(leaf, leaf) if old_names else leaf
        )

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def w4a4(
        self, stored: str, layers: list[nn.Linear], names: list[str], unsigned: bool, smooth: Tensor | None
    ) -> None:
        """Projections of one input as the layer `stored`; `names` are those of the model."""
        weight = torch.cat([layer.weight for layer in layers]).detach()
        bias = torch.cat([layer.bias for layer in layers]).detach()
        n, k = weight.shape
        smooth = (self.random(k).abs() + 0.5).bfloat16() if smooth is None else smooth
        down, up = (self.random(RANKS, k) / 64).bfloat16(), (self.random(n, RANKS) / 64).bfloat16()
        codes, scale = files.int4_weight((weight - up.float() @ down.float()) * smooth.float())
        rest = codes.double() * scale.double().repeat_interleave(64, dim=1)
        moved = rest / smooth.double() @ torch.full((k,), SHIFT, dtype=torch.float64) if unsigned else 0.0
        held = (bias.double() - moved).bfloat16()
        leaves = {
            "qweight": files.packed_codes(codes & 15),
            "wscales": files.packed_scales(scale),
            "bias": files.packed_vector(held),
            "smooth_factor": files.packed_vector(smooth),
            "smooth_factor_orig": files.packed_vector(smooth),
            "proj_down": files.packed_lowrank(down, down=True),
            "proj_up": files.packed_lowrank(up, down=False),
        }
        self.tensors |= {f"{stored}.{self.leaf(leaf)}": tensor for leaf, tensor in leaves.items()}
        branch, start = up.double() @ down.double(), 0
        for layer, name in zip(layers, names, strict=True):
            rows = slice(start, start := start + layer.out_features)
            whole = held.double() + moved
            self.layers[name] = Formula(rest[rows], smooth, branch[rows], whole[rows], not unsigned)

    def modulation(self, name: str, layer: nn.Linear, vectors: int) -> None:
        """Rows in turns, and 1 in the bias of scales."""
        n, k = layer.weight.shape
        groups = layer.weight.detach().unflatten(1, (-1, 64))
        low, high = groups.aminmax(dim=2, keepdim=True)
        scale, zero = ((high - low) / 15).bfloat16(), low.bfloat16()
        codes = ((groups - zero.float()) / scale.float()).round().clamp(0, 15).int()
        values = (codes.double() * scale.double() + zero.double()).flatten(1)
        held = layer.bias.detach().view(vectors, -1).clone()
        held[[1] if vectors == 3 else [1, 4]] += 1
        stored = [held.t().reshape(-1).bfloat16()]
        stored += [
            tensor.reshape(vectors, n // vectors, -1).transpose(0, 1).reshape(n, -1) for tensor in (codes, scale, zero)
        ]
        self.tensors[f"{name}.bias"], self.tensors[f"{name}.qweight"] = stored[0], files.packed_awq(stored[1])
        self.tensors[f"{name}.wscales"], self.tensors[f"{name}.wzeros"] = (part.t().contiguous() for part in stored[2:])
        bias = held.bfloat16().double()
        bias[[1] if vectors == 3 else [1, 4]] -= 1
        ones = torch.ones(k)
        self.layers[name] = Formula(values, ones, torch.zeros(n, k), bias.flatten(), quantized=False)

    def finish(self, model: nn.Module, renamed: Callable[[str], str] = lambda name: name) -> None:
        """Keep the tensors of all other layers, under their names in the file, and exchange those that were written."""
        for name, tensor in model.state_dict().items():
            if name.rpartition(".")[0] not in self.layers:
                self.tensors[renamed(name)] = tensor.contiguous()
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)


class Halves(nn.Module):
    """proj_out of a single block: two layers of parts of its input, whose results are added."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.second, self.width = first, second, width

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.first(x[..., : self.width].contiguous())
        second: Tensor = self.second(x[..., self.width :].contiguous())
        return first + second


def flux(model: Any) -> Tensors:
    """The tensors of a FLUX of diffusers as nunchaku has them; `model` computes with what they hold afterwards."""
    made = Writer(old_names=True)
    for number, block in enumerate(model.transformer_blocks):
        name = f"transformer_blocks.{number}"
        attn = block.attn
        made.modulation(f"{name}.norm1.linear", block.norm1.linear, 6)
        made.modulation(f"{name}.norm1_context.linear", block.norm1_context.linear, 6)
        qkv, added = [attn.to_q, attn.to_k, attn.to_v], [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        for stored, layers, names, unsigned in (
            ("qkv_proj", qkv, [f"attn.to_{one}" for one in "qkv"], False),
            ("qkv_proj_context", added, [f"attn.add_{one}_proj" for one in "qkv"], False),
            ("out_proj", [attn.to_out[0]], ["attn.to_out.0"], False),
            ("out_proj_context", [attn.to_add_out], ["attn.to_add_out"], False),
            ("mlp_fc1", [block.ff.net[0].proj], ["ff.net.0.proj"], False),
            ("mlp_fc2", [block.ff.net[2]], ["ff.net.2"], True),
            ("mlp_context_fc1", [block.ff_context.net[0].proj], ["ff_context.net.0.proj"], False),
            ("mlp_context_fc2", [block.ff_context.net[2]], ["ff_context.net.2"], True),
        ):
            made.w4a4(f"{name}.{stored}", layers, [f"{name}.{one}" for one in names], unsigned, None)
    for number, block in enumerate(model.single_transformer_blocks):
        name = f"single_transformer_blocks.{number}"
        attn, width = block.attn, block.attn.to_q.in_features
        made.modulation(f"{name}.norm.linear", block.norm.linear, 3)
        smooth = (made.random(width).abs() + 0.5).bfloat16()
        qkv = [attn.to_q, attn.to_k, attn.to_v]
        made.w4a4(f"{name}.qkv_proj", qkv, [f"{name}.attn.to_{one}" for one in "qkv"], False, smooth)
        made.w4a4(f"{name}.mlp_fc1", [block.proj_mlp], [f"{name}.proj_mlp"], False, smooth)
        whole = block.proj_out
        halves = []
        for stored, columns, unsigned in (("out_proj", slice(0, width), False), ("mlp_fc2", slice(width, None), True)):
            part = nn.Linear(len(range(*columns.indices(whole.in_features))), whole.out_features)
            part.weight.data = whole.weight.data[:, columns]
            part.bias.data = whole.bias.data if unsigned else torch.zeros_like(whole.bias)
            made.w4a4(f"{name}.{stored}", [part], ["half"], unsigned, None)
            half = made.layers.pop("half")
            assert isinstance(half, Formula)
            half.quantized = False  # the engine has one layer for both, whose input stays floats
            halves.append(half)
        made.layers[f"{name}.proj_out"] = Halves(*halves, width)
    made.finish(model, lambda name: name.replace(".attn.norm_", ".norm_"))
    return made.tensors


def qwen(model: Any) -> Tensors:
    """The same of a Qwen-Image of diffusers."""
    made = Writer(old_names=False)
    for number, block in enumerate(model.transformer_blocks):
        name, attn = f"transformer_blocks.{number}", block.attn
        made.modulation(f"{name}.img_mod.1", block.img_mod[1], 6)
        made.modulation(f"{name}.txt_mod.1", block.txt_mod[1], 6)
        qkv, added = [attn.to_q, attn.to_k, attn.to_v], [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        for stored, layers, names, unsigned in (
            ("attn.to_qkv", qkv, [f"attn.to_{one}" for one in "qkv"], False),
            ("attn.add_qkv_proj", added, [f"attn.add_{one}_proj" for one in "qkv"], False),
            ("attn.to_out.0", [attn.to_out[0]], ["attn.to_out.0"], False),
            ("attn.to_add_out", [attn.to_add_out], ["attn.to_add_out"], False),
            ("img_mlp.net.0.proj", [block.img_mlp.net[0].proj], ["img_mlp.net.0.proj"], False),
            ("img_mlp.net.2", [block.img_mlp.net[2]], ["img_mlp.net.2"], True),
            ("txt_mlp.net.0.proj", [block.txt_mlp.net[0].proj], ["txt_mlp.net.0.proj"], False),
            ("txt_mlp.net.2", [block.txt_mlp.net[2]], ["txt_mlp.net.2"], True),
        ):
            made.w4a4(f"{name}.{stored}", layers, [f"{name}.{one}" for one in names], unsigned, None)
    made.finish(model)
    return made.tensors
