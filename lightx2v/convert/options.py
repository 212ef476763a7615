"""What the user of the converter can choose, checked before any file is opened. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightx2v.errors import ConfigError
from lightx2v.quant.spec import (
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_TENSOR,
    INT4_G128,
    INT8_CHANNEL,
    MXFP4,
    MXFP6,
    MXFP8,
    NVFP4,
    QSpec,
)

LINEAR_TYPES: Mapping[str, QSpec] = {
    "int8": INT8_CHANNEL,
    "fp8": FP8_CHANNEL,
    "fp8-b128": FP8_BLOCK128,
    "fp8-pertensor": FP8_TENSOR,
    "mxfp8": MXFP8,
    "mxfp6": MXFP6,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "int4-g128": INT4_G128,
}
"""Names of the weight schemes that can be written."""
_OF_ENCODERS = ("int8", "fp8", "fp8-b128")
_ENCODERS = ("wan_t5", "wan_clip", "flux_t5")
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
    layers: frozenset[str] | None = None
    """The layers by full name, where the model itself tells them: no component decides then."""

    def component(self, name: str) -> str:
        """The component of a name that decides; "" for a name that has too few."""
        parts = name.split(".")
        return parts[self.key_idx] if len(parts) > self.key_idx else ""

    def drops(self, name: str) -> bool:
        return any(key in name for key in self.ignore_keys)

    def quantizes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor of this original name and shape is the weight of a linear layer to quantize."""
        if self.layers is None:
            chosen = self.component(name) in self.target_keys
        else:
            chosen = name.removesuffix(".weight") in self.layers
        chosen = chosen and not any(key in name for key in self.ignore_quant_keys)
        return chosen and len(shape) == 2 and name.endswith(".weight")


DIFFUSERS = "diffusers"
"""A transformer or UNet of diffusers, of any class: its config.json says which layers it has."""
MODEL_TYPES: Mapping[str, LayerRule] = {
    "wan_dit": LayerRule(2, ("self_attn", "cross_attn", "ffn")),
    "wan_t5": LayerRule(2, ("attn", "ffn")),
    "wan_clip": LayerRule(3, ("attn", "mlp"), ignore_keys=("textual",)),
    "flux_dit": LayerRule(0, ("double_blocks", "single_blocks")),
    "flux_t5": LayerRule(5, ("SelfAttention", "DenseReluDense"), ignore_quant_keys=("relative_attention_bias",)),
    DIFFUSERS: LayerRule(0, ()),
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
    bits: int | None = None
    linear_type: str | None = None
    non_linear_dtype: str | None = None
    """None: float32 when quantizing, the dtype of the source otherwise."""
    loras: tuple[LoraOption, ...] = ()
    lora_key_convert: str = "auto"
    key_idx: int | None = None
    target_keys: tuple[str, ...] = ()
    ignore_keys: tuple[str, ...] = ()
    ignore_quant_keys: tuple[str, ...] = ()
    comfyui_mode: bool = False
    copy_no_weight_files: bool = False
    device: str = "cpu"
    parallel: bool = True
    verify: bool = False
    to: str | None = None
    """The package whose files are written, of `exports.registry`; None: this engine's."""
    layers: frozenset[str] | None = None
    """`LayerRule.layers`, which planning fills in."""

    def __post_init__(self) -> None:
        """Raises ConfigError for values, and combinations of them, that make no sense."""
        if self.chunk_size < 1:
            raise ConfigError(
                "--chunk-size",
                f"{self.chunk_size} tensors per file",
                allowed="1 or more",
                do="use --single_file for one",
            )
        if self.save_by_block and self.single_file:
            raise ConfigError("--save_by_block", "contradicts --single_file", do="give one of the two")
        if self.direction is not None and self.model_type == DIFFUSERS:
            raise ConfigError("--direction", f"has no meaning for model_type {DIFFUSERS}", do="leave it out")
        if self.save_by_block and self.pickled:
            raise ConfigError("--save_by_block", "writes .safetensors only", do="leave out one of it and -o_e .pth")
        if Path(self.output_name).name != self.output_name or not self.output_name:
            raise ConfigError("--output_name", f"'{self.output_name}' is not a plain file name")
        self._check_quantization()
        self._check_export()

    def _check_quantization(self) -> None:
        if self.quantized and self.linear_type is None:
            raise ConfigError("--quantized", "no scheme is given", do=f"add --linear_type {'|'.join(LINEAR_TYPES)}")
        given = {
            "--linear_type": self.linear_type,
            "--key-idx": self.key_idx,
            "--target-keys": self.target_keys,
            "--ignore-quant-keys": self.ignore_quant_keys,
        }
        given |= {"--bits": self.bits, "--comfyui_mode": self.comfyui_mode or None}
        idle = [flag for flag, value in given.items() if value not in (None, ())]
        if idle and not self.quantized:
            raise ConfigError(", ".join(idle), "has an effect only with --quantized", do="add --quantized")
        if self.model_type in _ENCODERS and self.linear_type not in (None, *_OF_ENCODERS):
            raise ConfigError("--linear_type", f"{self.linear_type} is for the DiT", allowed=", ".join(_OF_ENCODERS))
        if self.quantized and self.direction == "forward" and self.model_type == "flux_dit":
            raise ConfigError(
                "--direction", "forward takes layers of flux_dit apart that are quantized whole", do="leave one out"
            )
        if self.comfyui_mode and self.linear_type not in (None, "fp8", "fp8-pertensor"):
            raise ConfigError("--comfyui_mode", f"writes no {self.linear_type}", allowed="--linear_type fp8")
        spec = self.spec
        # LightX2V's --bits is 8 whatever the type.
        if spec is not None and self.bits not in (None, 8, spec.bits):
            allowed = "8" if spec.bits == 8 else f"{spec.bits:g} (or 8, which LightX2V has for every type)"
            raise ConfigError("--bits", f"{self.bits} with --linear_type {self.linear_type}", allowed=allowed)
        if self.key_idx is not None and self.key_idx < 0:
            raise ConfigError("--key-idx", f"{self.key_idx}", allowed="0 or more")

    def _check_export(self) -> None:
        """Codes are copied for another package, and its files are as it has them."""
        if self.to is None:
            return
        idle = {
            "--quantized": self.quantized,
            "--lora_path": self.loras,
            "--non_linear_dtype": self.non_linear_dtype,
            "--ignore-keys": self.ignore_keys,
            "--save_by_block": self.save_by_block,
            "--output_ext": self.pickled,
            "--verify": self.verify,
        }
        if given := [flag for flag, value in idle.items() if value]:
            raise ConfigError(
                ", ".join(given),
                f"has no effect with --to {self.to}, which copies codes into the package's own files",
                do="convert first, then give the output to --to",
            )
        if self.direction is not None and self.model_type != "wan_dit":
            raise ConfigError("--direction", "renames wan_dit alone with --to", do="leave it out: names stay")

    @property
    def pickled(self) -> bool:
        return self.output_ext == ".pth"

    @property
    def spec(self) -> QSpec | None:
        if not self.quantized or self.linear_type is None:
            return None
        return FP8_TENSOR if self.comfyui_mode else LINEAR_TYPES[self.linear_type]

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
            usual.ignore_quant_keys + self.ignore_quant_keys,
            None if self.target_keys or self.key_idx is not None else self.layers,
        )
