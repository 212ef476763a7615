"""What a reader does not understand is refused by name, before a weight is read wherever headers tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightx2v.errors import CheckpointError
from tests.interop import stored

Change = Callable[[dict[str, Tensor], dict[str, str], dict[str, Any]], None]
Q = "blocks.0.attn1.to_q"


def retyped(name: str, dtype: torch.dtype) -> Change:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]) -> None:
        tensors[name] = tensors[name].to(dtype)

    return change


def without(name: str) -> Change:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]) -> None:
        del tensors[name]

    return change


def cut(name: str, rows: int) -> Change:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]) -> None:
        tensors[name] = tensors[name][:rows]

    return change


def filled(name: str, value: float) -> Change:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]) -> None:
        tensors[name] = torch.full_like(tensors[name], value)

    return change


def state(**said: Any) -> Change:
    """bitsandbytes' description of a layer with other values; None takes one out."""

    def change(tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]) -> None:
        name = f"{Q}.weight.quant_state.bitsandbytes__nf4"
        described = json.loads(bytes(tensors[name].tolist())) | said
        text = json.dumps({key: value for key, value in described.items() if value is not None})
        tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def described(**said: Any) -> Change:
    """torchao's description of a weight with other values."""

    def change(tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]) -> None:
        entry = json.loads(metadata[f"{Q}.weight"])
        metadata[f"{Q}.weight"] = json.dumps({**entry, **{k: v for k, v in said.items() if k.startswith("_")},
                                              "_data": entry["_data"] | said.get("data", {})})  # fmt: skip

    return change


def quantization(**said: Any) -> Change:
    return lambda tensors, metadata, config: config["quantization_config"].update(said)


PER_TENSOR_STATIC = {"_type": "QuantizeTensorToInt8Kwargs", "_data": {"granularity": {"_type": "PerTensor"}}}
ASYMMETRIC = {"_data": {"granularity": {"_type": "PerRow"}, "mapping_type": {"_data": "ASYMMETRIC"}}}


def group(**said: Any) -> Change:
    """The one group of compressed-tensors with other entries."""
    return lambda tensors, metadata, config: config["quantization_config"]["config_groups"]["group_0"].update(said)


def ordered(tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]) -> None:
    tensors[f"{Q}.weight_g_idx"] = torch.arange(64, dtype=torch.int32)


FIVE_BITS = {"num_bits": 5, "type": "int", "strategy": "group", "group_size": 32}
OF_ALL = ("llm_int8_threshold 4", "with config_groups")
"""What is wrong with a whole file, not with a layer."""
AFFINE_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": False, "dynamic": True}
FROM_HEADERS: list[tuple[str, str, Change, str]] = [
    ("quanto", "int8", retyped(f"{Q}.weight._data", torch.uint8), "is U8"),
    ("quanto", "float8", retyped(f"{Q}.weight._data", torch.float8_e5m2), "is F8_E5M2"),
    ("quanto", "int8", without(f"{Q}.weight._scale"), "_scale' is missing"),
    ("quanto", "int4", without(f"{Q}.weight._shift"), "_shift' is missing"),
    ("quanto", "int4", cut(f"{Q}.weight._data._data", 20), "has 20 rows for 64 scales"),
    ("quanto", "int4", without(f"{Q}.bias"), "may be of groups or whole"),
    ("bitsandbytes", "nf4", state(quant_type="nf5"), "says type 'nf5'"),
    ("bitsandbytes", "nf4", state(blocksize=32), "says blocks of 32"),
    ("bitsandbytes", "nf4", state(shape=[64]), "does not describe a weight"),
    ("bitsandbytes", "nf4", state(nested_blocksize=128, nested_offset=0.1), "and of 128 scales"),
    ("bitsandbytes", "nf4", without(f"{Q}.weight.absmax"), "absmax' is missing"),
    ("bitsandbytes", "nf4", cut(f"{Q}.weight", 100), "has 100 bytes"),
    ("bitsandbytes", "int8", filled(f"{Q}.weight_format", 2), "is 2, an order of codes"),
    ("bitsandbytes", "int8", quantization(llm_int8_threshold=4.0), "llm_int8_threshold 4"),
    ("torchao", "int8-dynamic", described(_type="Int4Tensor"), "is a Int4Tensor of torchao"),
    ("torchao", "int8-dynamic", described(data={"block_size": [2, 32]}), "with scales of blocks [2, 32]"),
    ("torchao", "int8-dynamic", described(data={"act_quant_kwargs": ASYMMETRIC}), "with ASYMMETRIC inputs"),
    ("torchao", "int8-dynamic", described(data={"act_quant_kwargs": PER_TENSOR_STATIC}), "with tensor inputs"),
    ("torchao", "int8-dynamic", without(f"{Q}._weight_scale"), "_weight_scale' is missing"),
    ("compressed_tensors", "int4-g32", group(format="marlin-24"), "(marlin-24) is not read"),
    ("compressed_tensors", "int4-g32", group(weights=FIVE_BITS), "has 5 bits per group"),
    ("compressed_tensors", "int4-g32", group(targets=["re:.*ffn.*"]), "no group of quantization_config is for"),
    ("compressed_tensors", "int4-g32", ordered, "has a 'weight_g_idx'"),
    ("compressed_tensors", "int4-g32", without(f"{Q}.weight_shape"), "lacks 'weight_shape'"),
    ("compressed_tensors", "int4-g32", cut(f"{Q}.weight_packed", 60), "has packed codes [60, 8] for a weight [64, 64]"),
    ("compressed_tensors", "int8-channel", group(input_activations=AFFINE_INPUTS), "has inputs with zero points"),
    ("compressed_tensors", "nvfp4-weight-only", without(f"{Q}.weight_global_scale"), "lacks 'weight_global_scale'"),
    ("compressed_tensors", "int8-channel", quantization(config_groups=None), "with config_groups"),
    ("angelslim", "wan", retyped(f"{Q}.weight", torch.bfloat16), "has a scale and has a weight of BF16"),
]


@pytest.mark.parametrize(("package", "variant", "change", "says"), FROM_HEADERS)
def test_headers_tell(package: str, variant: str, change: Change, says: str, tmp_path: Path) -> None:
    root = stored.model_dir(stored.DATA / package / variant, tmp_path)
    stored.edit(root, change)
    with pytest.raises(CheckpointError) as refused:
        stored.plan(root)
    assert says in str(refused.value)
    assert "blocks.0." in str(refused.value) or "condition_embedder." in str(refused.value) or says in OF_ALL


FROM_VALUES: list[tuple[str, str, Change, str]] = [
    ("bitsandbytes", "nf4", filled(f"{Q}.weight.quant_map", 0.5), "holds other values than those of nf4"),
    ("torchao", "int8-dynamic", filled(f"{Q}._weight_zero_point", 3), "with zero points"),
]


@pytest.mark.parametrize(("package", "variant", "change", "says"), FROM_VALUES)
def test_values_tell(package: str, variant: str, change: Change, says: str, tmp_path: Path) -> None:
    root = stored.model_dir(stored.DATA / package / variant, tmp_path)
    stored.edit(root, change)
    with pytest.raises(CheckpointError, match=says):
        stored.load(root)


@pytest.mark.parametrize("name", ["quantization_map.json", "quanto_qmap.json"])
def test_quanto_s_map_names_types(name: str, tmp_path: Path) -> None:
    root = stored.model_dir(stored.DATA / "quanto" / "int8", tmp_path)
    (root / "transformer" / "quantization_map.json").unlink()
    path = root / "transformer" / name
    path.write_text(json.dumps({Q: {"weights": "qint8", "activations": "qint8"}}))
    with pytest.raises(CheckpointError, match=f"'{Q}' has activations of type 'qint8'"):
        stored.plan(root)
    path.write_text(json.dumps({Q: {"weights": "qint3", "activations": "none"}}))
    with pytest.raises(CheckpointError, match="weights of type 'qint3'"):
        stored.plan(root)


@pytest.mark.parametrize(
    ("package", "variant", "asked", "fits"),
    [
        ("quanto", "int8", "nf4", "int8-weight-only"),
        ("quanto", "int2", "int4-g128", "int2-channel-asym"),
        ("bitsandbytes", "nf4", "int8", "nf4"),
        ("torchao", "float8-weight-only", "Default", "fp8-weight-only"),
    ],
)
def test_a_wrong_mm_type_is_refused_with_the_one_that_fits(
    package: str, variant: str, asked: str, fits: str, tmp_path: Path
) -> None:
    root = stored.model_dir(stored.DATA / package / variant, tmp_path)
    with pytest.raises(CheckpointError) as refused:
        stored.plan(root, mm_type=asked)
    assert f"mm_type '{fits}'" in str(refused.value)


def test_a_package_without_a_reader_is_named(tmp_path: Path) -> None:
    root = stored.model_dir(stored.DATA / "bitsandbytes" / "nf4", tmp_path)

    def change(tensors: dict[str, Tensor], metadata: dict[str, str], config: dict[str, Any]) -> None:
        config["quantization_config"] = {"quant_method": "sdnq"}
        for name in [name for name in tensors if "bitsandbytes__" in name]:
            del tensors[name]

    stored.edit(root, change)
    with pytest.raises(CheckpointError, match="sdnq has quantized the weights, whose files are not read"):
        stored.plan(root)
