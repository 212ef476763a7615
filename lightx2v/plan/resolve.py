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
from lightx2v.encoders import clip_vision, umt5
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.io.media import check_result_path, read_image
from lightx2v.io.weights import Checkpoint
from lightx2v.mm.scheme import parse
from lightx2v.mm.together import CPU_ROWS
from lightx2v.models.spec import FAMILIES, FamilySpec
from lightx2v.plan.layers import FLOAT_DTYPES, ComponentPlan, plan_component
from lightx2v.plan.memory import MemoryEstimate, check_fits, estimate
from lightx2v.plan.render import render
from lightx2v.plan.request import Request, build_request
from lightx2v.platform import DeviceInfo, compiler_for

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
CLIP_TOKENS = 257
"""Tokens of the image encoder: 16 x 16 patches and one for the whole."""
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
    """`dit`, `t5` and, for image-to-video, `clip`."""
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
                    "weight_bytes": part.weight_bytes,
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
    )


def _quantized_encoder(name: str, encoder: EncoderConfig, files: Any, original: Path) -> tuple[Path, str]:
    """Checkpoint and mm_type of an encoder. Without a path, LightX2V's two conventional places are looked at.

    "auto" looks there for int8 and fp8, and takes the one that is there.
    """
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
    july = {"t5": "models_t5_umt5-xxl-enc", "clip": "clip"}[name]
    head = {"t5": "models_t5_umt5-xxl-enc", "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14"}[name]
    places = {kind: [files.root / kind / f"{july}-{kind}.pth", files.root / f"{head}-{kind}.pth"] for kind in kinds}
    found = [there[0] for of_kind in places.values() if (there := [place for place in of_kind if place.exists()])]
    if len(found) == 1:
        return found[0], scheme
    if found:
        raise ConfigError(
            f"{name}.quantized_ckpt",
            "is not set, and several files could be meant: " + ", ".join(map(str, found)),
            do=f"set it, or name the scheme as {name}.quant_scheme",
        )
    raise ConfigError(
        f"{name}.quantized_ckpt",
        "is not set, and no converted file lies in its usual places: "
        + ", ".join(str(place) for of_kind in places.values() for place in of_kind),
        do=f"convert one: lightx2v convert --quantized --model_type wan_{name} ...",
    )


def _plan_encoder(
    name: str, encoder: EncoderConfig, config: Config, files: Any, original: Path, device: DeviceInfo
) -> ComponentPlan:
    path, mm_type = _quantized_encoder(name, encoder, files, original)
    checkpoint = Checkpoint.open(path)
    shapes = {"t5": umt5.linear_shapes, "clip": clip_vision.linear_shapes}[name](checkpoint)
    # Quantized encoders come in the original layout; diffusers' own files are checked by name as they load.
    original_names = all(f"{layer}.weight" in checkpoint.tensors for layer in shapes)
    return plan_component(
        name,
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


def _remembered(config: Config, arch: Any, request: Request) -> int:
    """Bytes of the keys and values of the conditions, which are kept for all steps."""
    tokens = arch.text_len + (CLIP_TOKENS if request.task == "i2v" else 0)
    branches = 2 if request.cfg else 1
    return int(branches * arch.num_layers * tokens * arch.dim * 2 * DTYPE_BYTES[config.dtype])


def _memory(
    config: Config,
    files: Any,
    request: Request,
    family: FamilySpec,
    parts: Mapping[str, ComponentPlan],
    device: DeviceInfo,
) -> MemoryEstimate:
    _, t, h, w = family.latent_shape(request.height, request.width, request.frames)
    patch = family.patch_size
    vae = Checkpoint.open(files.require("vae"))
    first = next(
        (i for n, i in vae.tensors.items() if n.endswith(("encoder.conv1.weight", "encoder.conv_in.weight"))), None
    )
    weights = {name: part.weight_bytes for name, part in parts.items()}
    weights["vae"] = sum(math.prod(info.shape) * 4 for info in vae.tensors.values() if info.dtype in FLOAT_DTYPES)
    return estimate(
        weights,
        tokens=t * h * w // math.prod(patch),
        dim=files.arch.dim,
        ffn_dim=files.arch.ffn_dim,
        remembered=_remembered(config, files.arch, request),
        ffn_rows=CPU_ROWS if device.kind == "cpu" else None,
        dtype_bytes=DTYPE_BYTES[config.dtype],
        frames=request.frames,
        frame_pixels=request.height * request.width,
        vae_dim=first.shape[0] if first is not None else 96,
        unload=config.unload_modules,
    )


def resolve(config: Config, device: DeviceInfo) -> Plan:
    """Decide everything that can be decided without weights. Raises a UserError for whatever does not fit."""
    family = FAMILIES[config.model_cls]
    if config.task not in family.tasks:
        raise ConfigError("task", f"'{config.task}' is not a task of {family.name}", allowed=", ".join(family.tasks))
    if config.save_result_path is not None:
        check_result_path(config.save_result_path)
    files = family.detect(config.model_path if config.model_path is not None else EMBEDDED, config.task)
    request = build_request(config, family.load_defaults(files, config.task))
    family.check_size(request.height, request.width, request.frames)
    limit = files.arch.text_len
    if config.text_len is not None and config.text_len > limit:
        raise ConfigError("text_len", f"{config.text_len} is more than this model reads", allowed=f"at most {limit}")
    if config.task == "i2v" and request.image_path is not None:
        read_image(request.image_path)
    components = {"dit": _plan_dit(config, family, files, device)}
    components["t5"] = _plan_encoder("t5", config.t5, config, files, files.require("text_encoder"), device)
    if config.task == "i2v":
        components["clip"] = _plan_encoder("clip", config.clip, config, files, files.require("image_encoder"), device)
    if config.compile and (missing := compiler_for(device)):
        raise ConfigError("compile", f"is true, but {missing}", do="install it, or set compile to false")
    attention, name, reason = select_attention(
        config.attention.type, device, fallback=config.attention.fallback, dtype=config.dtype
    )
    memory = _memory(config, files, request, family, components, device)
    check_fits(memory, device, config.max_memory_gb)
    return Plan(config, family, device, files, request, components, attention, name, reason, memory)
