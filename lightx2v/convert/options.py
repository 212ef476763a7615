"""What the user of the converter can choose, checked before any file is opened. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightx2v.errors import ConfigError
from lightx2v.quant.spec import FP8_BLOCK128, FP8_CHANNEL, INT8_CHANNEL, QSpec

LINEAR_TYPES: Mapping[str, QSpec] = {"int8": INT8_CHANNEL, "fp8": FP8_CHANNEL, "fp8-b128": FP8_BLOCK128}
"""Names of the weight schemes that can be written."""
LINEAR_DTYPES: Mapping[str, str] = {"torch.int8": "int8", "torch.float8_e4m3fn": "fp8"}
"""The older way to name a scheme: by the dtype of its codes."""
FLOAT_DTYPES: Mapping[str, str] = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
"""Float dtypes by their torch name, and the name that a safetensors header has for them."""


@dataclass(frozen=True)
class LayerRule:
    """Which tensors are quantized: 2-D `.weight`s whose dotted component `key_idx` is one of `target_keys`."""

    key_idx: int
    target_keys: tuple[str, ...]
    ignore_keys: tuple[str, ...] = ()
    """Tensors whose name contains one of these are left out of the output."""
    ignore_quant_keys: tuple[str, ...] = ()
    """Tensors whose name contains one of these are not quantized."""

    def component(self, name: str) -> str:
        """The component of a name that decides; "" for a name that has too few."""
        parts = name.split(".")
        return parts[self.key_idx] if len(parts) > self.key_idx else ""

    def drops(self, name: str) -> bool:
        return any(key in name for key in self.ignore_keys)

    def quantizes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor of this original name and shape is the weight of a linear layer to quantize."""
        chosen = self.component(name) in self.target_keys and not any(key in name for key in self.ignore_quant_keys)
        return chosen and len(shape) == 2 and name.endswith(".weight")


MODEL_TYPES: Mapping[str, LayerRule] = {
    "wan_dit": LayerRule(2, ("self_attn", "cross_attn", "ffn")),
    "wan_t5": LayerRule(2, ("attn", "ffn")),
    "wan_clip": LayerRule(3, ("attn", "mlp"), ignore_keys=("textual",)),
}


@dataclass(frozen=True)
class LoraOption:
    """One LoRA to merge. `alpha` is for files that do not hold theirs."""

    path: Path
    strength: float = 1.0
    alpha: float | None = None


@dataclass(frozen=True)
class Options:
    """The flags of the converter; the defaults of the command line are the ones here."""

    source: Path
    output: Path
    output_name: str = "converted"
    output_ext: str = ".safetensors"
    direction: str | None = None
    model_type: str = "wan_dit"
    chunk_size: int = 100
    save_by_block: bool = False
    single_file: bool = False
    quantized: bool = False
    bits: int = 8
    linear_type: str | None = None
    non_linear_dtype: str | None = None
    """None: float32 when quantizing, the dtype of the source otherwise."""
    loras: tuple[LoraOption, ...] = ()
    lora_key_convert: str = "auto"
    key_idx: int | None = None
    target_keys: tuple[str, ...] = ()
    ignore_keys: tuple[str, ...] = ()
    ignore_quant_keys: tuple[str, ...] = ()
    copy_no_weight_files: bool = False
    device: str = "cpu"
    parallel: bool = True
    verify: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError for values, and combinations of them, that make no sense."""
        if self.bits != 8:
            raise ConfigError("--bits", f"{self.bits} is not supported", allowed="8")
        if self.chunk_size < 1:
            raise ConfigError(
                "--chunk-size",
                f"{self.chunk_size} tensors per file",
                allowed="1 or more",
                do="use --single_file for one",
            )
        if self.save_by_block and self.single_file:
            raise ConfigError("--save_by_block", "contradicts --single_file", do="give one of the two")
        if self.save_by_block and self.pickled:
            raise ConfigError("--save_by_block", "writes .safetensors only", do="leave out one of it and -o_e .pth")
        if Path(self.output_name).name != self.output_name or not self.output_name:
            raise ConfigError("--output_name", f"'{self.output_name}' is not a plain file name")
        self._check_quantization()

    def _check_quantization(self) -> None:
        if self.quantized and self.linear_type is None:
            raise ConfigError("--quantized", "no scheme is given", do=f"add --linear_type {'|'.join(LINEAR_TYPES)}")
        given = {
            "--linear_type": self.linear_type,
            "--key-idx": self.key_idx,
            "--target-keys": self.target_keys,
            "--ignore-quant-keys": self.ignore_quant_keys,
        }
        idle = [flag for flag, value in given.items() if value not in (None, ())]
        if idle and not self.quantized:
            raise ConfigError(", ".join(idle), "has an effect only with --quantized", do="add --quantized")
        if self.key_idx is not None and self.key_idx < 0:
            raise ConfigError("--key-idx", f"{self.key_idx}", allowed="0 or more")

    @property
    def pickled(self) -> bool:
        return self.output_ext == ".pth"

    @property
    def spec(self) -> QSpec | None:
        return LINEAR_TYPES[self.linear_type] if self.quantized and self.linear_type else None

    @property
    def float_dtype(self) -> str | None:
        """Safetensors' name of the dtype of float tensors that are not quantized; None keeps the source's."""
        if self.non_linear_dtype is not None:
            return FLOAT_DTYPES[self.non_linear_dtype]
        return "F32" if self.quantized else None

    @property
    def rule(self) -> LayerRule:
        """The rule of the model type with what the flags change in it."""
        usual = MODEL_TYPES[self.model_type]
        return LayerRule(
            usual.key_idx if self.key_idx is None else self.key_idx,
            self.target_keys or usual.target_keys,
            usual.ignore_keys + self.ignore_keys,
            self.ignore_quant_keys,
        )
