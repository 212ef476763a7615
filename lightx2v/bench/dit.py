"""`lightx2v bench dit`: one forward pass of a diffusion transformer of a named size, with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
from loguru import logger
from torch import nn

from lightx2v.attention.base import AttentionFn, select_attention
from lightx2v.bench import work
from lightx2v.bench.inputs import Inputs, Size, make_inputs, token_count
from lightx2v.bench.measure import Candidate, Facts, Timing, Work, allow_many_compilations, measure
from lightx2v.bench.peers.base import Choice
from lightx2v.bench.report import Case, Column, fact
from lightx2v.bench.trace import trace
from lightx2v.config.features import OffloadConfig
from lightx2v.errors import ConfigError, ResourceError
from lightx2v.features.compile import compile_blocks
from lightx2v.features.offload.attach import Offloaded
from lightx2v.mm.select import LayerPlan, code_bytes
from lightx2v.models.base import DiT
from lightx2v.models.wan.arch import WanArch
from lightx2v.plan.memory import estimate
from lightx2v.platform import DeviceInfo
from lightx2v.units import human_bytes


@dataclass(frozen=True, slots=True)
class Transformer:
    """Every way to compute one forward pass of a transformer of `arch`."""

    arch: WanArch
    inputs: Inputs
    device: DeviceInfo
    seed: int
    use_compile: bool
    traced: bool
    plans: Mapping[str, Mapping[str, LayerPlan]]
    """By mm_type, the plan of each layer; an mm_type that cannot be computed here is not among them."""

    def engine(self, mm_type: str, refused: Mapping[str, ConfigError], offload: str | None = None) -> Candidate:
        """The engine's own, with its layers by `mm_type`; offloaded in units of `offload`, "block" or "phase"."""

        def build() -> tuple[Work, Facts]:
            if mm_type in refused:
                raise refused[mm_type]
            plans = self.plans[mm_type]
            attention, name, _ = select_attention("auto", self.device)
            dit, moving = self._dit(plans, attention, offload)
            libraries = ", ".join(sorted({plan.library for plan in plans.values()}))
            facts = {"mm_type": mm_type, "library": libraries, "attention": name, **_held(dit)}
            latents, timestep, conditions = self.inputs.latents, self.inputs.timestep, self.inputs.conditions

            # Entered once, as for the steps of a request, and left when this candidate is given up.
            running = moving.running() if moving else nullcontext()
            running.__enter__()

            def call(running: object = running) -> torch.Tensor:
                out: torch.Tensor = dit(latents, timestep, conditions)
                return out

            if self.traced:
                with torch.inference_mode():
                    call()
                    facts["trace"] = trace(call, self.device)
            return call, facts

        words = (" compiled" if self.use_compile else "") + (f" offload {offload}" if offload else "")
        return Candidate(mm_type + words, "lightx2v", build)

    def _dit(
        self, plans: Mapping[str, LayerPlan], attention: AttentionFn, offload: str | None
    ) -> tuple[nn.Module, Offloaded | None]:
        if offload is None:
            return work.random_dit(self.arch, plans, self.device, self.seed, attention, self.use_compile), None
        settings = OffloadConfig.model_validate({"enabled": True, "granularity": offload})
        model, offloaded = work.offloaded_dit(self.arch, plans, self.device, self.seed, attention, settings)
        if self.use_compile:
            compile_blocks(cast(DiT, model))
        return model, offloaded

    def peer(self, choice: Choice) -> Candidate:
        """diffusers' model of the same architecture and weights, quantized by the peer."""

        def build() -> tuple[Work, Facts]:
            choice.check("dit")
            from lightx2v.bench.peers import diffusers

            device = torch.device(self.device.torch_name)
            model = diffusers.random_transformer(self.arch, choice, device, self.seed)
            given = (self.inputs.latents, self.inputs.timestep, self.inputs.text, self.inputs.image)
            facts = {"library": choice.peer.modules[0], "how": choice.peer.words, **_held(model)}
            return lambda: diffusers.predict(model, *given), facts

        return Candidate(choice.name, "peer", build)


def _held(model: nn.Module) -> dict[str, int]:
    return {"weight_bytes": work.held_bytes(model)}


def check_memory(needs: Mapping[str, int], arch: WanArch, tokens: int, device: DeviceInfo) -> int:
    """Bytes that all models together need at once, since they take turns; ResourceError when they do not fit.

    `needs` are the bytes of each one's weights.
    """
    found = estimate(
        needs,
        dict.fromkeys(needs, "dit"),
        tokens=tokens,
        dim=arch.dim,
        ffn_dim=arch.ffn_dim,
        dtype_bytes=work.DTYPE.itemsize,
        frames=0,
        frame_pixels=0,
        vae_dim=0,
        unload=False,
    ).stages["denoise"]
    if found > device.free_memory:
        each = ", ".join(f"{name} {human_bytes(size)}" for name, size in needs.items())
        raise ResourceError(
            "memory",
            f"models that take turns are in memory together: about {human_bytes(found)} ({each}, and the activations);"
            f" {human_bytes(device.free_memory)} are free on {device.name}",
            do="measure fewer of them at a time, shorten the model with --layers, or take a smaller --model",
        )
    return found


def weight_needs(
    shapes: Mapping[str, torch.Size],
    plans: Mapping[str, Mapping[str, LayerPlan]],
    peers: Sequence[Choice],
    device: DeviceInfo,
) -> dict[str, int]:
    """Bytes of each model's weights. A peer counts as bfloat16, which it is before it is quantized."""
    plain = sum(shape.numel() for shape in shapes.values()) * work.DTYPE.itemsize

    def packed(layers: Mapping[str, LayerPlan]) -> int:
        saved = 0.0
        for name, layer in layers.items():
            if layer.scheme.weight is not None:
                saved += shapes[f"{name}.weight"].numel() * (work.DTYPE.itemsize - code_bytes(layer, device))
        return int(plain - saved)

    return {mm_type: packed(layers) for mm_type, layers in plans.items()} | {choice.name: plain for choice in peers}


def plan_types(
    linears: Mapping[str, tuple[int, int]], mm_types: Sequence[str], device: DeviceInfo
) -> tuple[dict[str, dict[str, LayerPlan]], dict[str, ConfigError]]:
    """The plans of each mm_type that this device permits, and why not for the others. Unknown names: ConfigError."""
    plans: dict[str, dict[str, LayerPlan]] = {}
    refused: dict[str, ConfigError] = {}
    for mm_type in mm_types:
        try:
            plans[mm_type] = work.plan_layers(linears, mm_type, device)
        except ConfigError as error:
            refused[mm_type] = error
    return plans, refused


def run_dit(
    model: str,
    size: Size,
    layers: int | None,
    mm_types: Sequence[str],
    peers: Sequence[Choice],
    *,
    device: DeviceInfo,
    seed: int,
    use_compile: bool,
    timing: Timing,
    traced: bool = False,
    offload: str | None = None,
) -> tuple[Case, Facts, list[str]]:
    """The case, what holds for the whole run, and notes. `traced`: the engine's are profiled as well. `offload`:
    each mm_type also with its weights off the device, "block" by block or "phase" by phase."""
    arch = work.arch_of(model)
    if layers is not None:
        if not 1 <= layers <= arch.num_layers:
            raise ConfigError("--layers", f"{layers}", allowed=f"1 to {arch.num_layers} for {model}")
        arch = replace(arch, num_layers=layers)
    tokens = token_count(size)
    shapes, linears = work.dit_shapes(arch)
    plans, refused = plan_types(linears, mm_types, device)
    there = [choice for choice in peers if choice.obstacle("dit") is None]
    memory = check_memory(weight_needs(shapes, plans, there, device), arch, tokens, device)
    if use_compile or any(choice.compiled for choice in peers):
        allow_many_compilations()
    inputs = make_inputs(arch, size, torch.device(device.torch_name), seed)
    transformer = Transformer(arch, inputs, device, seed, use_compile, traced, plans)
    candidates = [transformer.engine(mm_type, refused) for mm_type in mm_types]
    candidates += [transformer.engine(mm_type, refused, offload) for mm_type in mm_types if offload]
    candidates += [transformer.peer(choice) for choice in peers]
    logger.info("{} candidates, about {} in all", len(candidates), human_bytes(memory))
    measured = measure(candidates, device, timing)
    flops = work.forward_flops(arch, tokens)
    entries = tuple(
        replace(entry, facts={**entry.facts, "flops_per_s": flops / entry.median}) for entry in measured.entries
    )
    title = f"{model}, {size.width}x{size.height}, {size.frames} frames, {arch.num_layers} layers"
    amount = {
        "model": model,
        "width": size.width,
        "height": size.height,
        "frames": size.frames,
        "layers": arch.num_layers,
        "tokens": tokens,
        "text_tokens": arch.text_len,
        "flops": flops,
    }
    notes = [
        f"one forward pass: {tokens} video tokens, {arch.text_len} text tokens, {flops / 1e12:.4g} TFLOP",
        "random weights, the same for all; error is the distance from the result of the first row over its length",
    ]
    for entry in entries:
        if "trace" in entry.facts:
            parts = ", ".join(f"{kind} {value:.4g} s" for kind, value in entry.facts["trace"].items())
            notes.append(f"{entry.name}, one call profiled: {parts}")
    return Case(title, amount, replace(measured, entries=entries), COLUMNS), {"memory_estimate_bytes": memory}, notes


COLUMNS = (
    Column("library", lambda entry: str(entry.facts["library"])),
    Column("s", lambda entry: f"{entry.median:.4g}"),
    Column("min s", lambda entry: f"{entry.best:.4g}"),
    fact("TFLOP/s", "flops_per_s", "{:.3f}", 1e-12),
    Column("weights", lambda entry: human_bytes(entry.facts["weight_bytes"])),
    fact("error", "error", "{:.2g}"),
)
