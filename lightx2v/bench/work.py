"""The models that are measured, how much there is to compute, and random weights for them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightx2v.attention.base import AttentionFn
from lightx2v.components import dtype_of, empty_dit, fill_dit
from lightx2v.config.features import OffloadConfig
from lightx2v.errors import ConfigError, suggestion
from lightx2v.features.compile import compile_blocks
from lightx2v.features.offload.attach import Offloaded
from lightx2v.features.offload.load import load_offloaded
from lightx2v.io.source import FileSpan
from lightx2v.io.weights import stream_into
from lightx2v.mm.scheme import parse
from lightx2v.mm.select import LayerPlan, plan_layer
from lightx2v.models.base import DiT, set_attention
from lightx2v.models.spec import FAMILIES, FamilySpec
from lightx2v.models.wan.arch import WanArch
from lightx2v.plan.dit import linear_shapes
from lightx2v.plan.resolve import EMBEDDED
from lightx2v.platform import DeviceInfo

DTYPE = torch.bfloat16
IMAGE_TOKENS = 257
"""Of Wan2.1's image encoder: a class token and 16 x 16 patches."""

_PUBLISHED = {
    "wan-1.3b": WanArch(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan-14b": WanArch(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan-14b-i2v": WanArch(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, model_type="i2v"),
}
MODELS = ("tiny", *_PUBLISHED)
FAMILY = "wan2.1"


def family() -> FamilySpec:
    """The family that all MODELS belong to."""
    return FAMILIES[FAMILY]


def arch_of(model: str) -> WanArch:
    """The architecture called `model`. Raises ConfigError with the closest name."""
    if model == "tiny":
        return WanArch.from_config(json.loads((EMBEDDED / "config.json").read_text("utf-8")))
    if model not in _PUBLISHED:
        raise ConfigError("--model", f"unknown model '{model}'{suggestion(model, MODELS)}", allowed=", ".join(MODELS))
    return _PUBLISHED[model]


def forward_flops(arch: WanArch, tokens: int) -> float:
    """Floating-point operations of one forward pass with batch 1, two for each multiply-add.

    Counted are the linears of the blocks, attention, the embeddings of patches and text, and the head. The time
    embedding is left out: less than one part in ten thousand.
    """
    d, text = arch.dim, arch.text_len
    image = IMAGE_TOKENS if arch.model_type == "i2v" else 0
    block = tokens * (6 * d * d + 2 * d * arch.ffn_dim) + (text + image) * 2 * d * d
    attention = 2 * tokens * (tokens + text + image) * d
    patch = math.prod(arch.patch_size)
    embed = tokens * d * patch * (arch.in_dim + arch.out_dim) + text * (arch.text_dim * d + d * d)
    embed += image * (arch.image_dim**2 + arch.image_dim * d)
    return 2.0 * (arch.num_layers * (block + attention) + embed)


def random_tensor(name: str, shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    """Random values for the parameter `name`, the same wherever that name and shape occur; bfloat16 on `device`.

    Weights are normal with a variance of one over their inputs, so that activations keep their size; norms are 1.
    """
    # A CPU's generator takes 32 bits of a seed.
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    values = torch.empty(shape, dtype=DTYPE, device=device)
    if len(shape) > 1:
        return values.normal_(std=math.prod(shape[1:]) ** -0.5, generator=generator)
    return values.normal_(std=0.02, generator=generator) if name.endswith("bias") else values.fill_(1.0)


def random_tensors(
    shapes: Mapping[str, torch.Size], device: torch.device, seed: int, rename: Callable[[str], str] = str
) -> Iterator[tuple[str, Tensor]]:
    """Random values for each parameter, one at a time. `rename` gives the name that the values are drawn for."""
    return ((name, random_tensor(rename(name), shape, device, seed)) for name, shape in shapes.items())


def materialize(
    model: nn.Module,
    shapes: Mapping[str, torch.Size],
    device: torch.device,
    seed: int,
    *,
    rename: Callable[[str], str] = str,
    is_fp32: Callable[[str], bool] = lambda name: False,
) -> nn.Module:
    """Give a model on meta random parameters. `shapes` are those it was built with.

    `rename` gives the name that a parameter's values are drawn for. What `is_fp32` names is kept in float32.
    """
    stream_into(
        model,
        random_tensors(shapes, device, seed, rename),
        device=device,
        dtype_of=lambda name: torch.float32 if is_fp32(name) else DTYPE,
        where="random weights",
    )
    return model.eval()


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of each parameter by name."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def read_types(text: str) -> list[str]:
    """ "int8,fp8" -> ["int8", "fp8"]. Raises ConfigError with the closest name for an mm_type that does not exist."""
    names = list(dict.fromkeys(text.split(",")))
    return [name for name in names if parse(name)]


def plan_layers(shapes: Mapping[str, tuple[int, int]], mm_type: str, device: DeviceInfo) -> dict[str, LayerPlan]:
    """A plan for each linear (name -> (N, K)). Raises ConfigError when `mm_type` cannot be computed on `device`."""
    scheme = parse(mm_type)
    return {
        name: plan_layer(name, mm_type, scheme, n, k, device=device, fallback=False) for name, (n, k) in shapes.items()
    }


def dit_shapes(arch: WanArch) -> tuple[dict[str, torch.Size], dict[str, tuple[int, int]]]:
    """Of the DiT of `arch`: the shapes of all parameters, and (N, K) of the linears that mm_type applies to."""
    with torch.device("meta"):
        module = family().build_dit(arch)
    return parameter_shapes(module), linear_shapes(module, family())


class RandomSource:
    """Random weights, drawn when they are asked for: an `io.source.Source` in the place of a checkpoint."""

    def __init__(self, shapes: dict[str, torch.Size], device: torch.device, seed: int = 0) -> None:
        self.shapes, self.device, self.seed = shapes, device, seed

    @property
    def names(self) -> Collection[str]:
        return self.shapes

    def read(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        for name in self.shapes if names is None else names:
            yield name, random_tensor(name, self.shapes[name], self.device, self.seed)

    def locate(self, name: str) -> FileSpan | None:
        return None


def random_dit(
    arch: WanArch, plans: Mapping[str, LayerPlan], device: DeviceInfo, seed: int, attention: AttentionFn, compiled: bool
) -> nn.Module:
    """The engine's DiT with random weights, which its layers quantize one by one as they arrive."""
    shapes, _ = dit_shapes(arch)
    place = torch.device(device.torch_name)
    model = empty_dit(family(), arch, plans, DTYPE, auto_quant=True)
    fill_dit(model, random_tensors(shapes, place, seed), place, DTYPE, "random weights")
    set_attention(cast(DiT, model), attention)
    if compiled:
        compile_blocks(cast(DiT, model))
    return model.eval()


def offloaded_dit(
    arch: WanArch,
    plans: Mapping[str, LayerPlan],
    device: DeviceInfo,
    seed: int,
    attention: AttentionFn,
    settings: OffloadConfig,
) -> tuple[nn.Module, Offloaded]:
    """The same model with its weights off the device, and what brings them while it runs."""
    shapes, _ = dit_shapes(arch)
    model = empty_dit(family(), arch, plans, DTYPE, auto_quant=True)
    source = RandomSource(shapes, torch.device(device.torch_name), seed)
    held = dtype_of(model, DTYPE)
    offloaded = load_offloaded(model, source, settings, device=device, dtype_of=held, where="random weights")
    set_attention(cast(DiT, model), attention)
    return model.eval(), offloaded


def held_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of `model` as they lie in memory, in tensor classes of any library."""
    seen = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(_bytes(tensor) for tensor in seen.values())


def _bytes(tensor: Any) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass that wraps other tensors and reports its float shape
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return 0 if tensor.is_meta else int(tensor.numel() * tensor.element_size())
