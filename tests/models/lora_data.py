"""Random LoRAs for tiny models: written in every style, merged by hand, and put on a model as the engine does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightx2v.features.lora.attach import Loras
from lightx2v.features.lora.plan import LoraPlan, plan_loras
from lightx2v.features.lora.source import LoraSource
from lightx2v.io.weights import stream_into
from lightx2v.mm.fused import fuse_projections
from lightx2v.mm.linear import swap_linears
from lightx2v.mm.lowrank import LowRankLinear
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import plan_layer
from lightx2v.models.spec import FamilySpec
from lightx2v.models.wan.spec import WAN
from lightx2v.platform import select_device

CPU = torch.device("cpu")
LAYERS = (*(f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"), "ffn.0", "ffn.2")
PEFT = (".lora_A.weight", ".lora_B.weight")
Rename = Callable[[str], str]


@dataclass(frozen=True)
class Pair:
    """The factors of one layer, and its alpha."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def product(self) -> Tensor:
        scale = 1.0 if self.alpha is None else self.alpha / self.down.shape[0]
        return scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))


@dataclass(frozen=True)
class Request:
    """As `LoraConfig`."""

    path: str
    strength: float = 1.0
    name: str | None = None
    alpha: float | None = None


class DictSource:
    """Tensors in memory as the checkpoint of a model."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.asked: list[str] = []

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors if names is None else names:
            self.asked.append(name)
            yield name, self.tensors[name]

    def locate(self, name: str) -> None:
        return None


def random_pairs(
    model: nn.Module, layers: Iterable[str] = LAYERS, rank: int = 4, alpha: float | None = None, seed: int = 0
) -> dict[str, Pair]:
    """Pairs for `layers` of every block, as large as the weights themselves, so that they cannot be overlooked."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for index in range(len(model.blocks)):  # type: ignore[arg-type]
        for name in layers:
            layer: Any = model.get_submodule(f"blocks.{index}.{name}")
            down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
            up = torch.randn(layer.out_features, rank, generator=generator) * 0.5 / rank**0.5
            pairs[f"blocks.{index}.{name}"] = Pair(down, up, alpha)
    return pairs


def write_lora(
    path: Path,
    pairs: Mapping[str, Pair],
    suffixes: tuple[str, str] = PEFT,
    rename: Rename = str,
    dtype: torch.dtype = torch.float32,
    **more: Tensor,
) -> Request:
    """A file with `pairs`, layers called as `rename` says."""
    tensors = dict(more)
    for layer, pair in pairs.items():
        tensors[rename(layer) + suffixes[0]] = pair.down.to(dtype)
        tensors[rename(layer) + suffixes[1]] = pair.up.to(dtype)
        if pair.alpha is not None:
            tensors[f"{rename(layer)}.alpha"] = torch.tensor(pair.alpha)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return Request(str(path))


def merged_by_hand(state: Mapping[str, Tensor], *loras: tuple[Mapping[str, Pair], float]) -> dict[str, Tensor]:
    """`state` in float32 with every pair times its strength added."""
    result = {name: tensor.float().clone() for name, tensor in state.items()}
    for pairs, strength in loras:
        for layer, pair in pairs.items():
            result[f"{layer}.weight"] += strength * pair.product.view(result[f"{layer}.weight"].shape)
    return result


def plan_for(
    family: FamilySpec, arch: Any, requests: Iterable[Request], mm_type: str = "Default", **options: Any
) -> LoraPlan:
    """The plan of LoRAs for a DiT of `arch` with the linears of its blocks in `mm_type`."""
    with torch.device("meta"):
        module = family.build_dit(arch)
    quantized = [name for name in mm_plans(family, module, mm_type) if parse(mm_type).weight is not None]
    return plan_loras(list(requests), module, family.aliases, quantized=quantized, **options)


def mm_plans(family: FamilySpec, module: nn.Module, mm_type: str) -> dict[str, Any]:
    return {
        name: plan_layer(
            name,
            mm_type,
            parse(mm_type),
            layer.out_features,
            layer.in_features,
            device=select_device("cpu"),
            fallback=False,
        )
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and any(fnmatchcase(name, glob) for glob in family.quantized)
    }


def empty_model(family: FamilySpec, arch: Any, mm_type: str = "Default", dtype: torch.dtype = torch.float32) -> Any:
    """A DiT on meta, whose linears quantize what they are given."""
    with torch.device("meta"):
        module = family.build_dit(arch)
    swap_linears(module, mm_plans(family, module, mm_type), dtype, auto_quant=True)
    return module.eval()


def load_model(
    family: FamilySpec,
    arch: Any,
    state: Mapping[str, Tensor],
    plan: LoraPlan | None = None,
    mm_type: str = "Default",
    dtype: torch.dtype = torch.float32,
    fuse: bool = True,
    uniform: bool = False,
) -> tuple[Any, Loras]:
    """A DiT loaded from `state`, which is quantized on the way, with the LoRAs of `plan`."""
    module = empty_model(family, arch, mm_type, dtype)
    source = LoraSource(DictSource(state), plan or LoraPlan(), CPU)

    def dtype_of(name: str) -> torch.dtype:
        return torch.float32 if any(fnmatchcase(name, glob) for glob in module.fp32_names) else dtype

    stream_into(module, source.read(), device=CPU, dtype_of=dtype_of, where="state")
    if fuse:
        fuse_projections(module)
    loras = Loras(source, dtype, uniform)
    loras.attach(module)
    return module, loras


plan_wan, load_wan = partial(plan_for, WAN), partial(load_model, WAN)


def branches(model: nn.Module) -> list[LowRankLinear]:
    return [module for module in model.modules() if isinstance(module, LowRankLinear)]
