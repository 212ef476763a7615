"""`resolve`: config, device and checkpoint headers in; a frozen Plan out, or an error that says what does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError
from lightx2v.families.base import Part
from lightx2v.features.offload.choose import Placement
from lightx2v.io.dtypes import DTYPE_BYTES
from lightx2v.io.media import check_result_path, read_image
from lightx2v.mm.together import CPU_ROWS
from lightx2v.models.spec import FAMILIES, FamilySpec
from lightx2v.plan.conflicts import check_together
from lightx2v.plan.dit import check_attention, plan_dit
from lightx2v.plan.encoders import plan_encoder
from lightx2v.plan.features import check_compilers, place_weights, plan_cache, plan_lora
from lightx2v.plan.layers import FLOAT_DTYPES, ComponentPlan
from lightx2v.plan.memory import MemoryEstimate, check_fits, estimate
from lightx2v.plan.plan import Plan, plan_attention
from lightx2v.plan.sampling import plan_sampler
from lightx2v.platform import DeviceInfo
from lightx2v.request import Request, build_request

EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny-wan"


def _memory(
    config: Config,
    files: Any,
    request: Request,
    family: FamilySpec,
    components: Mapping[str, ComponentPlan],
    kept: float,
    extra: int,
    device: DeviceInfo,
) -> Callable[[Placement], MemoryEstimate]:
    """What the run takes, by where the DiT's weights are. `kept` are the tensors of the size of the stream of tokens
    that a cache keeps for each branch, `extra` the bytes of what is computed beside the weights."""
    _, t, h, w = family.latent_shape(request.height, request.width, request.frames)
    tokens = t * h * w // math.prod(family.patch_size) + family.surroundings.more_tokens(files, request)
    weights = {name: planned.loop_bytes for name, planned in components.items()}
    kinds: dict[str, str] = {"dit": "dit"}
    vae_dim = 0
    for part in _parts(family, config):
        kinds[part.name] = part.kind
        if part.kind == "vae":
            vae = part.open(part.find(config, files), False)
            numbers = sum(math.prod(i.shape) for i in vae.tensors.values() if i.dtype in FLOAT_DTYPES)
            weights[part.name] = numbers * (4 if part.name == "tae" else DTYPE_BYTES[config.vae.dtype])
            first = ("encoder.conv1.weight", "encoder.conv_in.weight")
            vae_dim = max(vae_dim, next((i.shape[0] for n, i in vae.tensors.items() if n.endswith(first)), 64))
    away = {"text_encoder": config.offload.text_encoder, "image_encoder": config.offload.image_encoder}
    away["vae"] = config.offload.vae
    idle = {name: 0 for name, kind in kinds.items() if away.get(kind) and device.kind != "cpu"}
    element = DTYPE_BYTES[config.dtype]
    branches = 2 if request.cfg else 1
    remembered = family.surroundings.kept(files.arch, request) + int(kept * tokens * files.arch.dim)

    def with_dit(placed: Placement) -> MemoryEstimate:
        return estimate(
            weights | {"dit": placed.device + extra},
            kinds,
            idle=idle | {"dit": placed.idle + extra},
            once=sum(planned.once_bytes for planned in components.values()),
            tokens=tokens,
            dim=files.arch.dim,
            ffn_dim=files.arch.ffn_dim,
            remembered=remembered * branches * element,
            ffn_rows=CPU_ROWS if device.kind == "cpu" else None,
            dtype_bytes=element,
            frames=request.frames,
            frame_pixels=request.height * request.width,
            vae_dim=vae_dim,
            vae_bytes=DTYPE_BYTES[config.vae.dtype],
            unload=config.unload_modules,
        )

    return with_dit


def _parts(family: FamilySpec, config: Config) -> list[Part]:
    """The models beside the DiT that a run needs."""
    return [part for part in family.surroundings.parts if part.needed(config)]


def resolve(config: Config, device: DeviceInfo) -> Plan:
    """Decide everything that can be decided without weights. Raises a UserError for whatever does not fit."""
    family = FAMILIES[config.model_cls]
    if config.task not in family.tasks:
        raise ConfigError("task", f"'{config.task}' is not a task of {family.name}", allowed=", ".join(family.tasks))
    check_together(config)
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
    with torch.device("meta"):
        module: Any = family.build_dit(files.arch)
    components = {"dit": plan_dit(module, config, family, files, device)}
    for part in _parts(family, config):
        if part.shapes is not None:
            components[part.name] = plan_encoder(part, config, files, device)
    check_compilers(config, device, components["dit"])
    slots = tuple((part.layer, part.part) for part in module.attention_parts())
    attention = plan_attention(config, device, slots, request, family, files.arch)
    check_attention(module, attention, family, components["dit"], files.arch.num_heads)
    plan_sampler(config, family, files, request)
    cache = plan_cache(module, config, family, files, request)
    loras = plan_lora(module, config, family, components["dit"])
    keep_first: int = getattr(cache, "first_blocks", 0)
    extra = loras.branch_bytes(DTYPE_BYTES[config.dtype])
    kept = 0.0 if cache is None else cache.kept_streams(len(module.blocks))
    memory = _memory(config, files, request, family, components, kept, extra, device)
    offload = place_weights(
        module, config, components["dit"], device, peak=lambda placed: memory(placed).peak, keep_first=keep_first
    )
    check_fits(memory(offload), device, config.max_memory_gb)
    return Plan(
        config, family, device, files, request, components, slots, attention, cache, loras, offload, memory(offload)
    )
