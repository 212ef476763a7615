"""`resolve` for a diffusers pipeline: what will run, on what, and why, from JSON files and headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lightx2v.attention.policy import AttentionPolicy
from lightx2v.config.schema import Config
from lightx2v.errors import CheckpointError, ConfigError
from lightx2v.foreign import call
from lightx2v.foreign.attention import plan_attention
from lightx2v.foreign.build import empty_model, unplaced
from lightx2v.foreign.caches import CacheChoice, choose_cache
from lightx2v.foreign.index import ModelPart, PipelineFiles, read_json, read_pipeline, weights_in
from lightx2v.foreign.layers import quantizable
from lightx2v.io.dialects.base import Wanted
from lightx2v.io.dialects.open import open_any
from lightx2v.io.dtypes import DTYPE_BYTES, FLOAT_NAMES, HEADER_NAMES
from lightx2v.io.headers import TensorInfo
from lightx2v.io.media import check_result_path
from lightx2v.io.weights import Checkpoint
from lightx2v.plan.dit import check_dit_tensors
from lightx2v.plan.layers import ComponentPlan, plan_component
from lightx2v.plan.memory import MemoryEstimate, check_fits, estimate
from lightx2v.plan.render import plan_hash, render
from lightx2v.platform import DeviceInfo, compiler_for
from lightx2v.request import Request

MODEL_CLS = "diffusers"
"""The `model_cls` that this package serves."""


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """Everything decided before weights are read; the same to its users as `plan.Plan`."""

    config: Config
    device: DeviceInfo
    files: PipelineFiles
    cls: type[Any]
    """The class of the pipeline that is called."""
    request: Request
    components: Mapping[str, ComponentPlan]
    """The transformers or UNets and the text encoders, by diffusers' names."""
    attention: AttentionPolicy
    cache: CacheChoice | None
    memory: MemoryEstimate

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, with the keys of `Plan.to_json`."""
        return {
            "model_cls": f"{MODEL_CLS} {self.cls.__name__}",
            "task": self.request.task,
            "model_path": str(self.files.root),
            "layout": self.files.layout,
            "device": asdict(self.device) | {"free_memory": None},
            "dtype": self.config.dtype,
            "request": self.request.to_json(),
            "components": {name: part.to_json() for name, part in self.components.items()},
            "attention": self.attention.describe(),
            "features": {
                "compile": self.config.compile,
                "vae tiling": self.config.vae.tiling,
                "cache": None if self.cache is None else self.cache.name,
            },
            "pipeline_args": self.config.pipeline_args,
            "memory": {**self.memory.stages, "peak": self.memory.peak},
        }

    @property
    def attention_name(self) -> str:
        """The attention backends in one line."""
        return ", ".join(self.attention.functions)

    @property
    def hash(self) -> str:
        """Twelve hex digits that two runs share when all that decides their result is the same."""
        return plan_hash(self.to_json())

    def render(self) -> str:
        """The plan as `lightx2v explain` prints it."""
        return render(self.to_json(), self.device)


def resolve(config: Config, device: DeviceInfo) -> PipelinePlan:
    """Decide everything that can be decided without weights. Raises a UserError for whatever does not fit."""
    if config.model_path is None:
        raise ConfigError("model_path", "is missing", do="give the directory of a diffusers pipeline")
    _refuse_settings(config)
    if config.save_result_path is not None:
        check_result_path(config.save_result_path)
    files = read_pipeline(config.model_path)
    cls = call.class_for(files, config.task)
    request = call.build(config, files, cls)
    dtype = getattr(torch, config.dtype)
    models = {part.name: empty_model(part, dtype) for part in files.models}
    components = {part.name: _plan_denoiser(part, models[part.name], config, device) for part in files.denoisers}
    components |= {part.name: _plan_encoder(part, models[part.name], config, device) for part in files.text_encoders}
    if config.compile and (missing := compiler_for(device)):
        raise ConfigError("compile", f"is true, but {missing}", do="install it, or set compile to false")
    attention = plan_attention(config, device, request.steps)
    if (config.cache.type != "none" or config.attention.rules) and not call.step_callback(cls, lambda latents: None):
        key = "attention.rules" if config.cache.type == "none" else "cache.type"
        raise ConfigError(key, f"is set, and '{cls.__name__}' tells nobody of its steps", do="remove it")
    cache = choose_cache(config, request, {part.name: models[part.name] for part in files.denoisers})
    memory = _memory(files, request, components, DTYPE_BYTES[config.dtype])
    check_fits(memory, device, config.max_memory_gb)
    return PipelinePlan(config, device, files, cls, request, components, attention, cache, memory)


def _refuse_settings(config: Config) -> None:
    """What works on our own models only must not be ignored."""
    set_values = {
        "offload.enabled": config.offload.enabled,
        "offload.text_encoder": config.offload.text_encoder,
        "offload.image_encoder": config.offload.image_encoder,
        "offload.vae": config.offload.vae,
        "lora": config.lora,
        "vae.tae": config.vae.tae,
        "vae.path": config.vae.path,
        "vae.dtype": config.vae.dtype != "float32",
        "vae.channels_last": config.vae.channels_last,
        "vae.compile": config.vae.compile,
        "graphs": config.graphs,
        "unload_modules": config.unload_modules,
        "clip.quantized": config.clip.quantized,
        "t5.quantized_ckpt": config.t5.quantized_ckpt,
        "attention.cross": config.attention.cross,
        "attention.cross_image": config.attention.cross_image,
        "attention.rules with layers or part": any(rule.layers or rule.part for rule in config.attention.rules),
        "sampling.denoising_step_list": config.sampling.denoising_step_list,
        "sampling.cfg_schedule": config.sampling.cfg_schedule,
        "sampling.changing_resolution": config.sampling.changing_resolution,
    }
    for key, value in set_values.items():
        if value:
            raise ConfigError(
                key,
                f"is set, and model_cls '{MODEL_CLS}' runs the loop of diffusers, which has no place for it",
                do="remove it, or use a model_cls of this engine",
            )


def _plan_denoiser(part: ModelPart, model: torch.nn.Module, config: Config, device: DeviceInfo) -> ComponentPlan:
    mm = config.mm_config
    path = part.weights
    if config.dit_quantized_ckpt is not None:
        path = Path(config.dit_quantized_ckpt)
        path = path / part.name if (path / part.name).is_dir() else path
    shapes = quantizable(model)
    checkpoint = open_any(path, Wanted(shapes.__contains__, sizes=shapes))
    check_dit_tensors(model, checkpoint, lambda name: name, str(path))
    planned = plan_component(
        part.name,
        checkpoint,
        path,
        shapes,
        rename=None,
        mm_type=mm.mm_type,
        rules=mm.rules,
        auto_quant=mm.weight_auto_quant,
        fallback=mm.fallback,
        device=device,
        dtype_bytes=DTYPE_BYTES[config.dtype],
    )
    of_layers = {f"{name}.": plan for name, plan in planned.quantized().items()}
    strange = [name for name in unplaced(model, checkpoint) if not name.startswith(tuple(of_layers))]
    codes = [name for name in strange if checkpoint.tensors[name].dtype not in FLOAT_NAMES]
    if codes:
        raise CheckpointError(
            str(path),
            f"'{codes[0]}' belongs to no layer that mm_type quantizes",
            do="use the mm_type of the checkpoint",
        )
    return planned


def _plan_encoder(part: ModelPart, model: torch.nn.Module, config: Config, device: DeviceInfo) -> ComponentPlan:
    """Of a text encoder, described as transformers will have loaded it: its files may have names of older versions."""
    Checkpoint.open(part.weights)
    tensors = {
        name: TensorInfo(name, HEADER_NAMES[p.dtype], tuple(p.shape), part.weights, p.numel() * p.element_size())
        for name, p in model.named_parameters()
    }
    scheme = config.t5.quant_scheme if config.t5.quantized else None
    return plan_component(
        part.name,
        Checkpoint(part.weights, (part.weights,), tensors, {}),
        part.weights,
        quantizable(model),
        rename=None,
        mm_type=scheme or "Default",
        rules=(),
        auto_quant=scheme is not None,
        fallback=config.mm_config.fallback,
        device=device,
        dtype_bytes=DTYPE_BYTES[config.dtype],
    )


def _memory(
    files: PipelineFiles, request: Request, components: Mapping[str, ComponentPlan], element: int
) -> MemoryEstimate:
    """What a run takes; diffusers has every part in memory throughout, and both branches of the guidance in a batch."""
    weights = {name: part.weight_bytes for name, part in components.items()}
    kinds = {part.name: "dit" for part in files.denoisers} | {part.name: "text_encoder" for part in files.text_encoders}
    for name, folder in files.others.items():
        found = weights_in(folder)
        assert found is not None
        tensors = Checkpoint.open(found[0]).tensors.values()
        weights[name], kinds[name] = sum(math.prod(info.shape) for info in tensors) * element, "vae"
    vae = read_json(files.others["vae"] / "config.json") if "vae" in files.others else {}
    stages = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [128]
    config = files.denoisers[0].config
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    if "block_out_channels" in config:  # a UNet works at the full size of the latents
        dim, patch = config["block_out_channels"][0], 1
    else:
        whole = heads * width if isinstance(heads, int) and isinstance(width, int) else 0
        dim, patch = config.get("hidden_size") or config.get("dim") or whole or 2048, 2
    return estimate(
        weights,
        kinds,
        tokens=call.latent_tokens(request, patch, 2 ** (len(stages) - 1)) * (2 if request.cfg else 1),
        dim=dim,
        ffn_dim=4 * dim,
        dtype_bytes=element,
        frames=request.frames,
        frame_pixels=request.height * request.width,
        vae_dim=stages[0],
        unload=False,
    )
