"""Every setting, its type and its default. Frozen; an unknown key is an error. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lightx2v.config.calibration import CalibrationConfig
from lightx2v.config.features import AttentionConfig, AttentionRule, CacheConfig, LoraConfig, OffloadConfig, VaeConfig
from lightx2v.config.section import Fraction, Numbers, Path, PositiveFloat, PositiveInt, Section


class VideoConfig(Section):
    """Size and rate of the result. What is left out comes from the family and the task."""

    height: PositiveInt | None = Field(default=None, description="Height in pixels.")
    width: PositiveInt | None = Field(default=None, description="Width in pixels.")
    frames: PositiveInt | None = Field(default=None, description="Number of frames.")
    fps: PositiveInt | None = Field(default=None, description="Frames per second of the written file.")


class SamplingConfig(Section):
    """The denoising loop. What is left out comes from the family and the task."""

    steps: PositiveInt | None = Field(default=None, description="Number of denoising steps.")
    shift: PositiveFloat | None = Field(
        default=None, description="Shift of the noise schedule; above 1 spends more steps on high noise."
    )
    guidance: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Scale of classifier-free guidance."
    )
    cfg: bool | None = Field(default=None, description="Whether to run classifier-free guidance (two passes per step).")
    solver: Literal["unipc", "euler", "dpm++"] | None = Field(
        default=None, description="Solver of the flow's differential equation."
    )
    true_guidance: Annotated[float, Field(ge=1)] | None = Field(
        default=None,
        description="Scale of classifier-free guidance for models that take `guidance` as an input; 1 is none.",
    )
    cfg_schedule: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Steps that run classifier-free guidance, as a slice such as ':20'; null means all."
    )
    denoising_step_list: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="Timesteps of a step-distilled model, from noise to data, such as [1000, 750, 500]."
    )
    strength: Fraction | None = Field(
        default=None, description="How far an input image is noised, for i2i; 1 forgets it."
    )
    changing_resolution: bool = Field(default=False, description="Denoise the first steps at a lower resolution.")
    resolution_rate: PositiveFloat | Numbers | None = Field(
        default=None, description="Sizes of those steps over the full one."
    )
    changing_resolution_steps: PositiveInt | Annotated[tuple[PositiveInt, ...], Field(strict=False)] | None = Field(
        default=None, description="Steps at which the resolution changes."
    )


class MMRule(Section):
    """One exception to `mm_config.mm_type`."""

    match: Annotated[str, Field(min_length=1)] = Field(
        description="Glob on a linear layer's full name, or 're:' and a regular expression."
    )
    mm_type: str = Field(description="The mm_type of the layers that match.")


class MMConfig(Section):
    """Quantization and kernels of the DiT."""

    mm_type: str = Field(default="Default", description="Quantization scheme and kernel library, by name.")
    weight_auto_quant: bool = Field(default=False, description="Quantize floating-point weights while they load.")
    fallback: bool = Field(
        default=False, description="Permit the same scheme on another library if the named one is missing."
    )
    rules: Annotated[tuple[MMRule, ...], Field(strict=False)] = Field(
        default=(), description="Exceptions by layer name, in order; the last match wins."
    )


class EncoderConfig(Section):
    """Quantization of one encoder."""

    quantized: bool = Field(default=False, description="Whether the encoder's linear layers are quantized.")
    quant_scheme: str | None = Field(default=None, description="Scheme, for example 'int8', 'fp8' or 'int8-torchao'.")
    quantized_ckpt: Path | None = Field(default=None, description="File of the quantized weights.")

    @model_validator(mode="after")
    def _scheme_is_named(self) -> EncoderConfig:
        if self.quantized and self.quant_scheme is None:
            raise PydanticCustomError("scheme", "'quantized' is true, so 'quant_scheme' must name a scheme")
        return self


class Config(Section):
    """All settings of one run."""

    schema_: str | None = Field(default=None, alias="$schema", description="For editors: where this schema is.")
    model_cls: str = Field(default="wan2.1", description="Model family.")
    task: Literal["t2v", "i2v", "t2i", "i2i"] = Field(
        default="t2v", description="What is made of what: t text, i image, v video."
    )
    model_path: Path | None = Field(
        default=None, description="Directory of the checkpoint; null runs the embedded tiny-wan."
    )
    device: str = Field(
        default="auto", description="'auto', a kind of device ('cpu'), or a kind and an index ('xpu:1')."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Dtype that the DiT computes in."
    )
    prompt: str = Field(default="", description="What to show.")
    negative_prompt: str = Field(default="", description="What to keep away from, with classifier-free guidance.")
    image_path: str | None = Field(default=None, description="First frame for i2v, or the image to change for i2i.")
    seed: int = Field(default=42, ge=0, lt=2**63, description="Seed of the initial noise.")
    save_result_path: Path | None = Field(
        default=None, description="Where the result goes: .mp4, .gif, .webp, .png, or a folder that ends in '/'."
    )
    video: VideoConfig = Field(default=VideoConfig(), description="Size and rate of the result.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="The denoising loop.")
    text_len: PositiveInt | None = Field(default=None, description="Tokens that the prompt is padded to.")
    mm_config: MMConfig = Field(default=MMConfig(), description="How the DiT's matrix multiplications are computed.")
    calibration: CalibrationConfig = Field(
        default=CalibrationConfig(), description="How `lightx2v calibrate --output` makes quantized weights."
    )
    dit_quantized_ckpt: Path | None = Field(
        default=None, description="Directory or file of the DiT's quantized weights."
    )
    t5: EncoderConfig = Field(default=EncoderConfig(), description="Quantization of the text encoder.")
    clip: EncoderConfig = Field(default=EncoderConfig(), description="Quantization of the image encoder.")
    vae: VaeConfig = Field(default=VaeConfig(), description="Decoding of latents to pixels.")
    attention: AttentionConfig = Field(default=AttentionConfig(), description="The attention kernel.")
    cache: CacheConfig = Field(default=CacheConfig(), description="Reuse of what an earlier step made.")
    offload: OffloadConfig = Field(default=OffloadConfig(), description="Weights kept off the device.")
    lora: Annotated[tuple[LoraConfig, ...], Field(strict=False)] = Field(
        default=(), description="LoRAs to apply, together."
    )
    lora_dynamic: bool | None = Field(
        default=None,
        description="Compute LoRAs beside the weights (true) or merge them into the weights (false); null: merge where"
        " the weights are unquantized.",
    )
    compile: bool = Field(default=False, description="Compile the blocks of the DiT with torch.compile.")
    pipeline_args: dict[str, Any] = Field(
        default={}, description="For model_cls diffusers: further arguments of the pipeline's call, by its names."
    )
    graphs: bool = Field(default=False, description="Record the DiT as a graph of the device, and replay it.")
    warmup: bool = Field(default=False, description="Serve the request once before it counts, to compile and record.")
    unload_modules: bool = Field(
        default=False, description="Load each component just before its use and free it right after."
    )
    max_memory_gb: PositiveFloat | None = Field(
        default=None, description="Refuse a plan that needs more GiB than this; null means what the device has free."
    )

    @field_validator("image_path")
    @classmethod
    def _empty_is_none(cls, value: str | None) -> str | None:
        return value or None  # LightX2V's scripts pass an empty --image_path for t2v


def _inner_types(annotation: Any) -> set[Any]:
    """The plain types inside unions and `Annotated`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _inner_types(get_args(annotation)[0])
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin in (Union, types.UnionType):
        return set().union(*(_inner_types(part) for part in get_args(annotation)))
    return {annotation}


def _is_text(annotation: Any) -> bool:
    """Whether a value is text, and nothing that JSON writes in another way."""
    kinds = _inner_types(annotation)
    return str in kinds and not kinds & {bool, int, float}


def _settings() -> dict[str, bool]:
    """Every dotted key, and whether its value is text."""
    keys: dict[str, bool] = {}
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner = field.annotation.model_fields
            keys |= {f"{name}.{key}": _is_text(f.annotation) for key, f in inner.items()}
        else:
            keys[field.alias or name] = _is_text(field.annotation)
    return keys


SETTINGS: dict[str, bool] = _settings()
"""Every dotted key ("sampling.steps"), and whether its value is text."""
SECTIONS: frozenset[str] = frozenset(key.partition(".")[0] for key in SETTINGS if "." in key)


def schema_text() -> str:
    """The JSON Schema of `Config`, as the text of configs/schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def settings_page() -> str:
    """The text of docs/config.md: a table of every setting."""
    rows = [
        "# Settings",
        "",
        "Every key of the JSON configuration and of `--set`, by `lightx2v schema --markdown`. A default of - comes",
        "from the model family, the task or the method. LightX2V's flat keys are translated, with a warning.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
    ]
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            rows.append(_row(field.alias or name, field))
            continue
        rows += [_row(f"{name}.{key}", inner) for key, inner in kind.model_fields.items()]
    for title, kind in (("lora", LoraConfig), ("attention.rules", AttentionRule), ("mm_config.rules", MMRule)):
        rows += ["", f"Each entry of `{title}`:", "", "| key | default | meaning |", "|---|---|---|"]
        rows += [_row(key, inner) for key, inner in kind.model_fields.items()]
    return "\n".join(rows) + "\n"


def _row(key: str, field: Any) -> str:
    default = "required" if field.is_required() else json.dumps(field.default, default=list)
    return f"| `{key}` | {'-' if default == 'null' else default} | {field.description} |"


def config_hash(config: Config) -> str:
    """12 hex digits that name what determines the result: every setting that differs from its default, but for where
    the result goes."""
    settings = config.model_dump(mode="json", exclude_defaults=True, exclude={"schema_", "save_result_path"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]
