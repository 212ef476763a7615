"""What a plan reads from headers: the format of each layer, its bytes on the device, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightx2v.errors import CheckpointError
from lightx2v.features.once import once_names
from lightx2v.io.dtypes import HEADER_NAMES
from lightx2v.io.headers import TensorInfo
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import parse
from lightx2v.models.spec import FAMILIES
from lightx2v.models.wan.arch import WanArch
from lightx2v.models.wan.dit import WanDiT
from lightx2v.models.wan.keymap import to_original
from lightx2v.plan.dit import linear_shapes
from lightx2v.plan.layers import ComponentPlan, plan_component
from lightx2v.platform import DeviceInfo
from lightx2v.quant.formats import quantize_leaves, written_leaves
from lightx2v.quant.packing import swap_halves
from tests.unit.test_gguf_files import write

CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
N, K = 128, 256
SHAPES = {"a": (N, K), "b": (N, K)}
TYPES = (
    "int8 fp8 fp8-b128 fp8-pertensor mxfp8 mxfp6-mxfp8 mxfp4 nvfp4 int4-g128 nf4-double int4-g128-asym int2-g64".split()
)


def stored(mm_type: str, layer: str = "a") -> dict[str, Tensor]:
    spec = parse(mm_type).weight
    assert spec is not None
    leaves = written_leaves(quantize_leaves(torch.randn(N, K), spec), spec)
    return {f"{layer}.{leaf}": tensor for leaf, tensor in leaves.items()}


def checkpoint(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Checkpoint:
    path = Path("w.safetensors")
    infos = {
        name: TensorInfo(name, HEADER_NAMES[tensor.dtype], tuple(tensor.shape), path, tensor.nbytes)
        for name, tensor in tensors.items()
    }
    return Checkpoint(path, (path,), infos, metadata or {})


def plan(
    opened: Checkpoint,
    mm_type: str = "auto",
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    auto_quant: bool = False,
    rename: object = None,
    once: Sequence[str] = (),
) -> ComponentPlan:
    return plan_component(
        "dit",
        opened,
        opened.path,
        shapes,
        rename=rename,  # type: ignore[arg-type]
        mm_type=mm_type,
        rules=(),
        auto_quant=auto_quant,
        fallback=False,
        device=CPU,
        dtype_bytes=2,
        once=once,
    )


@pytest.mark.parametrize("mm_type", TYPES)
def test_auto_is_what_each_layer_is_stored_as(mm_type: str) -> None:
    opened = checkpoint({**stored(mm_type), "b.weight": torch.randn(N, K), "a.bias": torch.ones(N)})
    planned = plan(opened)
    assert [layer.mm_type for layer in planned.layers] == [mm_type, "Default"]
    for other in TYPES:
        # fp8-pertensor has scales of channels too: what differs is how its inputs are quantized.
        if other != mm_type and (mm_type, other) != ("fp8", "fp8-pertensor"):
            with pytest.raises(CheckpointError, match=f"not as mm_type '{other}' reads it: .*a\\."):
                plan(opened, other, {"a": (N, K)})
    assert plan(opened, mm_type, {"a": (N, K)}).layers[0].mm_type == mm_type


def test_layers_of_one_file_may_differ() -> None:
    planned = plan(checkpoint({**stored("nvfp4"), **stored("fp8", "b")}))
    assert [layer.mm_type for layer in planned.layers] == ["nvfp4", "fp8"]


def test_a_missing_or_odd_tensor_is_named() -> None:
    tensors = stored("nvfp4")
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("global_scale")}
    one = {"a": (N, K)}
    with pytest.raises(CheckpointError, match="its tensors are weight, weight_scale; wanted are"):
        plan(checkpoint(without), "nvfp4", one)
    with pytest.raises(CheckpointError, match=r"tensor 'a\.what' is not part of it"):
        plan(checkpoint({**tensors, "a.what": torch.ones(1)}), "nvfp4", one)
    with pytest.raises(CheckpointError, match=r"'a\.weight_scale' has shape \[128, 4\], wanted is \[128, 16\]"):
        plan(checkpoint({**tensors, "a.weight_scale": tensors["a.weight_scale"][:, :4]}), "nvfp4", one)
    with pytest.raises(CheckpointError, match=r"'a\.weight_scale' is U8, wanted is F8_E4M3"):
        plan(checkpoint({**tensors, "a.weight_scale": tensors["a.weight_scale"].view(torch.uint8)}), "nvfp4", one)
    with pytest.raises(CheckpointError, match=r"missing: a\.weight_scale"):
        plan(checkpoint({"a.weight": tensors["a.weight"]}), "mxfp4", one)
    with pytest.raises(CheckpointError, match="mm_type 'Default' reads float ones"):
        plan(checkpoint(tensors), "Default", one)
    with pytest.raises(CheckpointError, match="set weight_auto_quant"):
        plan(checkpoint({"a.weight": torch.randn(N, K)}), "mxfp8", one)
    with pytest.raises(CheckpointError, match=r"llama\.cpp's tools"):
        plan(checkpoint({"a.weight": torch.randn(N, K)}), "gguf-Q4_K_M", one, auto_quant=True)


def test_comfyui_says_its_formats_in_the_metadata() -> None:
    tensors = stored("nvfp4")
    comfy = {"a.weight": swap_halves(tensors["a.weight"]), "a.weight_scale": tensors["a.weight_scale"]}
    comfy["a.weight_scale_2"] = 1 / tensors["a.weight_global_scale"]
    metadata = {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "nvfp4"}}})}
    assert plan(checkpoint(comfy, metadata), shapes={"a": (N, K)}).layers[0].mm_type == "nvfp4"
    with pytest.raises(CheckpointError, match="is no list of layers"):
        plan(checkpoint(comfy, {"_quantization_metadata": "[]"}), shapes={"a": (N, K)})


def test_modelopts_order_is_not_taken_for_comfyuis() -> None:
    """The same names and shapes, but under diffusers' names of the layers, and no mark."""
    name, theirs = "blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"
    tensors = stored("nvfp4", theirs)
    tensors[f"{theirs}.weight_scale_2"] = 1 / tensors.pop(f"{theirs}.weight_global_scale")
    with pytest.raises(CheckpointError, match="as NVIDIA ModelOpt exports it"):
        plan(checkpoint(tensors), shapes={name: (N, K)}, rename=to_original)


def test_gguf(tmp_path: Path) -> None:
    mixed = {"a.weight": (torch.randn(N, K), "Q4_0"), "b.weight": (torch.randn(N, K), "F16")}
    opened = Checkpoint.open(write(tmp_path / "w.gguf", mixed))
    planned = plan(opened)
    assert [layer.mm_type for layer in planned.layers] == ["gguf-Q4_0", "Default"]
    assert planned.read_raw() == {"a.weight"}
    assert planned.weight_bytes == N * K * 18 // 32 + N * K * 2
    named = plan(opened, "gguf-Q4_0")
    assert named.read_raw() == {"a.weight", "b.weight"}, "float blocks of such a file are blocks as well"
    with pytest.raises(CheckpointError, match=r"has blocks of F16, Q4_0, mm_type 'gguf-Q8_0' names others"):
        plan(opened, "gguf-Q8_0")
    with pytest.raises(CheckpointError, match=r"not as mm_type 'int8' reads it: 'a\.weight' is Q4_0"):
        plan(opened, "int8", {"a": (N, K)})
    with pytest.raises(CheckpointError, match=r"has shape \(128, 256\), the model wants \(128, 512\)"):
        plan(opened, "gguf-Q4_0", {"a": (N, 512)})


@pytest.fixture(scope="module")
def large() -> nn.Module:
    """Wan2.1-T2V-14B, without its values."""
    arch = WanArch(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, model_type="t2v")
    with torch.device("meta"):
        return WanDiT(arch)


#: mm_type: most bytes against bfloat16, of the quantized layers, and of the whole DiT in its loop.
RATIOS = {
    "int8": (0.501, 0.51),
    "fp8-reference": (0.501, 0.51),
    "fp8-pertensor": (0.5001, 0.51),
    "mxfp8": (0.516, 0.53),
    "mxfp6-mxfp8": (0.391, 0.405),
    "mxfp4": (0.266, 0.28),
    "int4-g128": (0.266, 0.28),
    "nvfp4": (0.2813, 0.29),
    "gguf-Q4_0": (0.2813, 0.29),
    "gguf-Q8_0": (0.532, 0.545),
}


@pytest.mark.parametrize("mm_type", RATIOS)
def test_bytes_of_the_largest_model(large: nn.Module, mm_type: str) -> None:
    shapes = linear_shapes(large, FAMILIES["wan2.1"])
    tensors = {name: torch.empty(p.shape, dtype=torch.bfloat16, device="meta") for name, p in large.named_parameters()}
    opened = checkpoint(tensors)
    once = once_names(large)
    plain = plan(opened, "Default", shapes, once=once)
    packed = plan(opened, mm_type, shapes, auto_quant=True, once=once)
    linears = sum(2 * n * k for n, k in shapes.values())
    assert plain.weight_bytes == 2 * sum(p.numel() for p in large.parameters())
    of_layers, of_all = RATIOS[mm_type]
    rest = plain.weight_bytes - linears
    assert packed.weight_bytes - rest <= of_layers * linears
    assert packed.loop_bytes <= of_all * plain.weight_bytes
    assert packed.once_bytes == plain.once_bytes == 2 * sum(large.get_parameter(name).numel() for name in once)
