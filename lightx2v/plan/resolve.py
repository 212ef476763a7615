"""`resolve`: config, device and checkpoint headers in; a frozen Plan out, or an error that says what does not fit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightx2v.attention.base import AttentionFn, select_attention
from lightx2v.config.schema import Config, EncoderConfig
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.families.base import Part
from lightx2v.features.once import once_names
from lightx2v.io.media import check_result_path, read_image
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import parse
from lightx2v.mm.together import CPU_ROWS
from lightx2v.models.spec import FAMILIES, FamilySpec
from lightx2v.plan.layers import FLOAT_DTYPES, ComponentPlan, plan_component
from lightx2v.plan.memory import MemoryEstimate, check_fits, estimate
from lightx2v.plan.render import render
from lightx2v.platform import DeviceInfo, compiler_for
from lightx2v.request import Request, build_request

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny-wan"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything decided before weights are read."""

    config: Config
    family: FamilySpec
    device: DeviceInfo
    files: Any
    """Where the parts of the checkpoint are, as the family's `detect` found them."""
    request: Request
    components: Mapping[str, ComponentPlan]
    """`dit`, and the encoders by the names of the family's parts."""
    attention: AttentionFn
    attention_name: str
    attention_reason: str
    memory: MemoryEstimate

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, which `hash` and `lightx2v explain --json` read."""
        return {
            "model_cls": self.family.name,
            "task": self.request.task,
            "model_path": str(self.files.root),
            "layout": self.files.layout,
            "device": asdict(self.device) | {"free_memory": None},
            "dtype": self.config.dtype,
            "request": self.request.to_json(),
            "components": {
                name: {
                    "checkpoint": str(part.checkpoint),
                    "weight_bytes": part.loop_bytes,
                    "read_once_bytes": part.once_bytes,
                    "quantized_at_load": part.auto_quant,
                    "layers": [
                        {
                            "name": layer.name,
                            "mm_type": layer.mm_type,
                            "library": layer.library,
                            "reason": layer.reason,
                            "shape": [layer.out_features, layer.in_features],
                        }
                        for layer in part.layers
                    ],
                    "rules_without_match": [rule.match for rule in part.unused_rules],
                }
                for name, part in self.components.items()
            },
            "attention": {"backend": self.attention_name, "reason": self.attention_reason},
            "features": {"compile": self.config.compile, "unload_modules": self.config.unload_modules},
            "memory": {**self.memory.stages, "peak": self.memory.peak},
        }

    @property
    def hash(self) -> str:
        """Twelve hex digits that two runs share when all that decides their result is the same."""
        content = self.to_json()
        for part in content["components"].values():
            for layer in part["layers"]:
                del layer["reason"]  # it has measured times in it
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]

    def render(self) -> str:
        """The plan as `lightx2v explain` prints it."""
        return render(self.to_json(), self.device)


def linear_shapes(module: nn.Module, family: FamilySpec) -> dict[str, tuple[int, int]]:
    """(N, K) of the linears of a DiT that `mm_type` applies to, by full name."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and any(fnmatchcase(name, glob) for glob in family.quantized)
        and not any(fnmatchcase(name, glob) for glob in family.keep)
    }


def _check_dit_tensors(module: nn.Module, checkpoint: Checkpoint, rename: Callable[[str], str], where: str) -> None:
    """Every parameter of the DiT must be in the header with its shape; a weight's shape alone tells most mix-ups."""
    found = {rename(name): info for name, info in checkpoint.tensors.items()}
    wanted = dict(module.named_parameters())
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(
            where,
            f"{len(missing)} of {len(wanted)} tensors of the model are missing, such as '{missing[0]}'",
            do="check that the file belongs to this family, size and task, and that it is whole",
        )
    for name, parameter in wanted.items():
        if name.endswith(".weight") and found[name].dtype in ("U8", "I32"):
            continue  # packed codes; whether they are as the layer's mm_type reads them is looked at with it
        if found[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                where,
                f"'{name}' has shape {found[name].shape}, the model of config.json wants {tuple(parameter.shape)}",
                do="check that the file belongs to this family, size and task",
            )


def _dit_checkpoint(config: Config, files: Any) -> Path:
    """The DiT's weights: the quantized checkpoint, LightX2V's usual place for one, or the model's own."""
    if config.dit_quantized_ckpt is not None:
        return Path(config.dit_quantized_ckpt)
    mm = config.mm_config
    spec = None if mm.mm_type == "auto" or mm.weight_auto_quant else parse(mm.mm_type).weight
    if spec is not None and (folder := files.root / spec.dtype).is_dir():
        return Path(folder)
    return Path(files.require("dit"))


def _plan_dit(config: Config, family: FamilySpec, files: Any, device: DeviceInfo) -> ComponentPlan:
    mm = config.mm_config
    with torch.device("meta"):
        module = family.build_dit(files.arch)
    path = _dit_checkpoint(config, files)
    checkpoint = Checkpoint.open(path)
    rename = family.original_name
    _check_dit_tensors(module, checkpoint, rename, str(path))
    return plan_component(
        "dit",
        checkpoint,
        path,
        linear_shapes(module, family),
        rename=rename,
        mm_type=mm.mm_type,
        rules=mm.rules,
        auto_quant=mm.weight_auto_quant,
        fallback=mm.fallback,
        device=device,
        dtype_bytes=DTYPE_BYTES[config.dtype],
        once=once_names(module),
    )


def _quantized_encoder(part: Part, encoder: EncoderConfig, files: Any, original: Path) -> tuple[Path, str]:
    """Checkpoint and mm_type of an encoder. Without a path, LightX2V's conventional places are looked at.

    "auto" looks there for int8 and fp8, and takes the one that is there.
    """
    name = part.config
    if not encoder.quantized:
        if encoder.quantized_ckpt is not None:
            raise ConfigError(
                f"{name}.quantized_ckpt", f"is set while {name}.quantized is false", do=f"set {name}.quantized to true"
            )
        return original, "Default"
    scheme = encoder.quant_scheme
    if scheme is None:
        raise ConfigError(
            f"{name}.quant_scheme", f"is missing while {name}.quantized is true", allowed="int8, fp8, fp8-b128, ..."
        )
    if encoder.quantized_ckpt is not None:
        return Path(encoder.quantized_ckpt), scheme
    spec = None if scheme == "auto" else parse(scheme).weight
    kinds = ("int8", "fp8") if scheme == "auto" else (spec.dtype if spec else scheme,)
    places = {kind: [files.root / place.format(kind=kind) for place in part.converted] for kind in kinds}
    found = [there[0] for of_kind in places.values() if (there := [place for place in of_kind if place.exists()])]
    if len(found) == 1:
        return found[0], scheme
    if found:
        raise ConfigError(
            f"{name}.quantized_ckpt",
            "is not set, and several files could be meant: " + ", ".join(map(str, found)),
            do=f"set it, or name the scheme as {name}.quant_scheme",
        )
    looked = ", ".join(str(place) for of_kind in places.values() for place in of_kind)
    raise ConfigError(
        f"{name}.quantized_ckpt",
        "is not set" + (f", and no converted file lies in its usual places: {looked}" if looked else ""),
        do=f"convert one: lightx2v convert --quantized --model_type {part.model_type} ...",
    )


def _plan_encoder(part: Part, config: Config, files: Any, device: DeviceInfo) -> ComponentPlan:
    assert part.shapes is not None
    encoder: EncoderConfig = getattr(config, part.config) if part.config else EncoderConfig()
    path, mm_type = _quantized_encoder(part, encoder, files, files.require(part.file))
    checkpoint = Checkpoint.open(path)
    shapes = part.shapes(checkpoint)
    # Quantized encoders come in the original layout; diffusers' own files are checked by name as they load.
    original_names = all(f"{layer}.weight" in checkpoint.tensors for layer in shapes)
    return plan_component(
        part.name,
        checkpoint,
        path,
        shapes,
        check=original_names or mm_type != "Default",
        rename=None,
        mm_type=mm_type,
        rules=(),
        auto_quant=False,
        fallback=config.mm_config.fallback,
        device=device,
        dtype_bytes=DTYPE_BYTES[config.dtype],
    )


def _memory(
    config: Config,
    files: Any,
    request: Request,
    family: FamilySpec,
    components: Mapping[str, ComponentPlan],
    device: DeviceInfo,
) -> MemoryEstimate:
    _, t, h, w = family.latent_shape(request.height, request.width, request.frames)
    weights = {name: planned.loop_bytes for name, planned in components.items()}
    kinds: dict[str, str] = {"dit": "dit"}
    vae_dim = 0
    for part in _parts(family, request.task):
        kinds[part.name] = part.kind
        if part.kind == "vae":
            vae = Checkpoint.open(files.require(part.file))
            weights[part.name] = sum(math.prod(i.shape) * 4 for i in vae.tensors.values() if i.dtype in FLOAT_DTYPES)
            first = ("encoder.conv1.weight", "encoder.conv_in.weight")
            vae_dim = next((i.shape[0] for name, i in vae.tensors.items() if name.endswith(first)), 96)
    element = DTYPE_BYTES[config.dtype]
    return estimate(
        weights,
        kinds,
        once=sum(planned.once_bytes for planned in components.values()),
        tokens=t * h * w // math.prod(family.patch_size),
        dim=files.arch.dim,
        ffn_dim=files.arch.ffn_dim,
        remembered=family.surroundings.kept(files.arch, request) * (2 if request.cfg else 1) * element,
        ffn_rows=CPU_ROWS if device.kind == "cpu" else None,
        dtype_bytes=element,
        frames=request.frames,
        frame_pixels=request.height * request.width,
        vae_dim=vae_dim,
        unload=config.unload_modules,
    )


def _parts(family: FamilySpec, task: str) -> list[Part]:
    """The models beside the DiT that `task` needs."""
    return [part for part in family.surroundings.parts if part.tasks is None or task in part.tasks]


def resolve(config: Config, device: DeviceInfo) -> Plan:
    """Decide everything that can be decided without weights. Raises a UserError for whatever does not fit."""
    family = FAMILIES[config.model_cls]
    if config.task not in family.tasks:
        raise ConfigError("task", f"'{config.task}' is not a task of {family.name}", allowed=", ".join(family.tasks))
    if config.save_result_path is not None:
        check_result_path(config.save_result_path)
    files = family.detect(config.model_path if config.model_path is not None else EMBEDDED, config.task)
    request = build_request(config, family.load_defaults(files, config.task), family.embedded_guidance)
    family.check_size(request.height, request.width, request.frames)
    limit = files.arch.text_len
    if config.text_len is not None and config.text_len > limit:
        raise ConfigError("text_len", f"{config.text_len} is more than this model reads", allowed=f"at most {limit}")
    if config.task.startswith("i") and request.image_path is not None:
        read_image(request.image_path)
    components = {"dit": _plan_dit(config, family, files, device)}
    for part in _parts(family, config.task):
        if part.shapes is not None:
            components[part.name] = _plan_encoder(part, config, files, device)
    if config.compile and (missing := compiler_for(device)):
        raise ConfigError("compile", f"is true, but {missing}", do="install it, or set compile to false")
    attention, name, reason = select_attention(
        config.attention.type, device, fallback=config.attention.fallback, dtype=config.dtype
    )
    memory = _memory(config, files, request, family, components, device)
    check_fits(memory, device, config.max_memory_gb)
    return Plan(config, family, device, files, request, components, attention, name, reason, memory)
