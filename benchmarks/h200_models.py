"""Sections of h200.py: forward passes, what the fast path does to videos, offload, the VAE and the encoders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from h200_common import ONCE, Bench, Row
from torch import nn

from lightx2v.attention.base import ATTENTION
from lightx2v.bench import work
from lightx2v.bench.inputs import Size, make_inputs
from lightx2v.bench.peers.base import choose
from lightx2v.bench.trace import trace
from lightx2v.config.features import OffloadConfig, VaeConfig
from lightx2v.platform import peak_memory, reset_peak_memory

TARGETS = {("wan-1.3b", 480): "0.36 s", ("wan-14b-i2v", 480): "2.0 s", ("wan-14b-i2v", 720): "7.6 s"}
GIB = 2**30


def _fast(bench: Bench) -> tuple[str, str]:
    """mm_type and attention of the fast path; on a CPU the references, whose arithmetic is the same."""
    return ("fp8-triton", "triton_8bit") if bench.device.capability else ("fp8", "sage_ref_int8_fp8")


def _row(model: str, size: Size) -> str:
    return f"{model}, {size.width}x{size.height}, {size.frames} frames"


def _dit(bench: Bench, model: str, mm_type: str, attention: str) -> nn.Module:
    arch = work.arch_of(model)
    plans = work.plan_layers(work.dit_shapes(arch)[1], mm_type, bench.device)
    return work.random_dit(arch, plans, bench.device, 0, ATTENTION[attention].fn, compiled=False)


def _given(bench: Bench, model: str, size: Size) -> tuple[Any, ...]:
    inputs = make_inputs(work.arch_of(model), size, torch.device(bench.device.torch_name), 0)
    return inputs.latents, inputs.timestep, inputs.conditions


@torch.inference_mode()
def forwards(bench: Bench) -> Iterator[Row]:
    """One forward pass with random weights: by the fast path, and without quantization."""
    for model, sizes in bench.sizes.models:
        for mm_type, attention in (_fast(bench), ("Default", "torch_sdpa")):
            dit = _dit(bench, model, mm_type, attention)
            for size in sizes:
                given = _given(bench, model, size)
                taken = bench.seconds(lambda dit=dit, given=given: dit(*given), bench.sizes.long)
                target = "" if mm_type == "Default" else TARGETS.get((model, size.height), "")
                yield Row("forward", f"{_row(model, size)}: {mm_type}, {attention}", taken, "s", target=target)
                if size == sizes[0] and mm_type != "Default":
                    for kind, seconds in trace(lambda dit=dit, given=given: dit(*given), bench.device).items():
                        yield Row("forward", f"{_row(model, size)}: {mm_type}, profiled: {kind}", seconds, "s")
            del dit


@torch.inference_mode()
def peers(bench: Bench) -> Iterator[Row]:
    """The same by other packages, the most important first: the time may not be enough for all."""
    model, (size, *_) = bench.sizes.models[0]
    arch, device = work.arch_of(model), torch.device(bench.device.torch_name)
    inputs = make_inputs(arch, size, device, 0)
    tensors = (inputs.latents, inputs.timestep, inputs.text, inputs.image)
    found = {choice.name: choice for choice in choose("diffusers,diffusers-compile,torchao-fp8-compile", "dit")}
    for name in ("diffusers-compile", "torchao-fp8-compile", "diffusers"):
        choice = found[name]
        if (obstacle := choice.obstacle("dit")) is not None or (bench.sizes.dry and choice.compiled):
            print(f"  {name}: {obstacle or 'left out of a dry run'}", flush=True)
            continue
        from lightx2v.bench.peers import diffusers

        peer = diffusers.random_transformer(arch, choice, device, 0)
        taken = bench.seconds(lambda p=peer: diffusers.predict(p, *tensors), bench.sizes.long)
        target = "1.6x of the fast path" if name == "diffusers-compile" else ""
        yield Row("peers", f"{_row(model, size)}: {name}", taken, "s", target=target)
        del peer


def quality(bench: Bench) -> Iterator[Row]:
    """Clips of tiny-wan by the fast path against unquantized ones."""
    from lightx2v import LightX2VPipeline
    from lightx2v.config.load import load_config
    from lightx2v.eval.metrics import psnr
    from lightx2v.eval.prompts import draw_prompts

    mm_type, attention = _fast(bench)
    settings: dict[str, object] = {"device": bench.device.torch_name, "sampling.steps": bench.sizes.steps}
    fast = {"mm_config.mm_type": mm_type, "mm_config.weight_auto_quant": True, "attention.type": attention}
    pipes = [LightX2VPipeline.from_config(load_config(None, {**settings, **more})) for more in ({}, fast)]
    found = []
    for case in draw_prompts(bench.sizes.prompts, 0):
        plain, quick = (pipe.generate(case.prompt, seed=case.seed, quiet=True) for pipe in pipes)
        found.append(psnr(quick, plain))
    what = f"tiny-wan, {len(found)} prompts, {mm_type} and {attention} against Default"
    yield Row("quality", f"{what}: mean", sum(found) / len(found), "dB", target="28 dB")
    yield Row("quality", f"{what}: lowest", min(found), "dB")


@torch.inference_mode()
def offload(bench: Bench) -> Iterator[Row]:
    """The fast path with its blocks in host memory, over the same in memory; and what hides the copies."""
    model, (size, *_) = bench.sizes.models[0]
    mm_type, attention = _fast(bench)
    row, given = f"{_row(model, size)}: {mm_type}", _given(bench, model, size)
    resident = _dit(bench, model, mm_type, attention)
    before = bench.seconds(partial(resident, *given), bench.sizes.long)
    yield Row("offload", f"{row}, in memory", before, "s")
    del resident
    arch = work.arch_of(model)
    plans = work.plan_layers(work.dit_shapes(arch)[1], mm_type, bench.device)
    fn, settings = ATTENTION[attention].fn, OffloadConfig(enabled=True)
    dit, moving = work.offloaded_dit(arch, plans, bench.device, 0, fn, settings)
    reset_peak_memory(bench.device)
    with moving.running():
        taken = bench.seconds(lambda: dit(*given), bench.sizes.long)
        moved = trace(lambda: dit(*given), bench.device)
    yield Row("offload", f"{row}, by blocks", taken, "s")
    yield Row("offload", f"{row}, by blocks over in memory", taken / before, "x", target="1.05x")
    yield Row("offload", f"{row}, peak memory of the device", peak_memory(bench.device) / GIB, "GiB")
    if copied := moved.get("from the host"):
        yield Row("offload", f"{row}, copies beside work", moved["of that beside work"] / copied, "of their time")


WAYS = (
    VaeConfig(dtype="bfloat16"),
    VaeConfig(dtype="bfloat16", channels_last=True),
    VaeConfig(dtype="bfloat16", channels_last=True, tiling=True),
    VaeConfig(),
    VaeConfig(dtype="bfloat16", channels_last=True, compile=True),
)
"""Ways to decode; the last takes a minute to compile."""


@torch.inference_mode()
def vae(bench: Bench) -> Iterator[Row]:
    """Wan's VAE with random weights: one decoding of a whole clip. Each way but the plainest, for every size."""
    from diffusers import AutoencoderKLWan

    from lightx2v.vae.settings import set_up

    device = torch.device(bench.device.torch_name)
    first = bench.sizes.clips[0]
    ways = [way for way in WAYS if not (way.compile and bench.sizes.dry)]
    cases = [(way, size) for way in ways for size in bench.sizes.clips if size == first or not way.compile]
    cases.sort(key=lambda case: case[0].dtype == "float32" and case[1] != first)  # the slowest last
    for settings, size in cases:
        dtype = getattr(torch, settings.dtype)
        with torch.device(device):
            module = nn.Module.to(AutoencoderKLWan(base_dim=bench.sizes.vae_channels).eval(), dtype)
        set_up(module, settings)
        grid = work.family().latent_shape(size.height, size.width, size.frames)
        latents = torch.randn(1, *grid, device=device, dtype=dtype)
        decode = partial(module.decode, latents, return_dict=False)
        taken = bench.seconds(lambda decode=decode: decode()[0], ONCE)
        words = " ".join(f"{name} {value}" for name, value in settings.model_dump(exclude_defaults=True).items())
        yield Row("vae", f"decode {size.width}x{size.height}, {size.frames} frames: {words or 'defaults'}", taken, "s")


@torch.inference_mode()
def encoders(bench: Bench) -> Iterator[Row]:
    """UMT5-XXL on 512 tokens, and CLIP's ViT-H on a picture, with random weights in bfloat16."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

    from lightx2v.encoders.t5_stack import meta_stack

    device, layers = torch.device(bench.device.torch_name), bench.sizes.encoder_layers
    small = {"vocab_size": 256, "d_model": 64, "d_ff": 64, "num_heads": 2, "d_kv": 32} if bench.sizes.dry else {}
    large = {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "d_kv": 64}
    umt5 = UMT5Config(**(small or large), num_layers=layers, feed_forward_proj="gated-gelu")
    text = _random(meta_stack(UMT5EncoderModel, umt5), device)
    ids = torch.ones(1, 512, dtype=torch.long, device=device)
    encode = partial(text, input_ids=ids, attention_mask=ids)
    taken = bench.seconds(lambda encode=encode: encode().last_hidden_state)
    yield Row("encoders", f"UMT5, {layers} layers, 512 tokens", taken, "s")
    del text, encode
    width = 64 if bench.sizes.dry else 1280
    heads = {"num_attention_heads": width // 64 if bench.sizes.dry else 16, "num_hidden_layers": min(layers + 7, 31)}
    clip = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, patch_size=14, hidden_act="gelu", **heads)
    with torch.device("meta"):
        tower = CLIPVisionModel(clip).eval()
    image = _random(tower, device)
    tower.embeddings.position_ids = torch.arange(tower.embeddings.num_positions, device=device)[None]
    pixels = torch.randn(1, 3, 224, 224, device=device, dtype=work.DTYPE)
    taken = bench.seconds(lambda: image(pixel_values=pixels).last_hidden_state)
    yield Row("encoders", f"CLIP, {clip.num_hidden_layers} layers, a picture of 224x224", taken, "s")


def _random(module: nn.Module, device: torch.device) -> Any:
    return work.materialize(module, work.parameter_shapes(module), device, 0)
