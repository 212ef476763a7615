"""Runs of tiny models with the features of `lightx2v.plan.matrix`: the latents alone, each made once."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightx2v import components, denoising, platform
from lightx2v.components import Components, LoadedDiT, load_dit
from lightx2v.config.load import load_config
from lightx2v.config.schema import Config
from lightx2v.denoising import denoise_request
from lightx2v.io import pickles
from lightx2v.models.base import Branch, Conditions, StepContext, Stream, run_blocks
from lightx2v.plan import Plan, resolve
from lightx2v.plan import features as plan_features
from lightx2v.plan.matrix import Value, settings
from lightx2v.plan.resolve import EMBEDDED
from lightx2v.platform import select_device
from lightx2v.timing import StageTimer
from tests.e2e import flux_dirs
from tests.models.lora_data import Pair, write_lora

CPU = select_device("cpu")
plan_resolve = importlib.import_module("lightx2v.plan.resolve")  # a function has the name in lightx2v.plan
DIT = {"wan2.1": "diffusion_pytorch_model.safetensors", "flux": "flux1-dev.safetensors"}
TEXT_TOKENS = 7
LOADED = 12
"""Models that are kept."""


@dataclass
class Repeated:
    """Stands for a graph of a device: replaying repeats the work on the tensors that it was recorded with."""

    work: Callable[[], object] = lambda: None
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


@dataclass
class Recorder:
    """Makes such graphs of a stack of blocks."""

    graphs: list[Repeated] = field(default_factory=list)
    recording: bool = False

    @contextmanager
    def record(self) -> Iterator[Repeated]:
        self.graphs.append(Repeated())
        self.recording = True
        yield self.graphs[-1]
        self.recording = False

    def stack(self, model: Any, stream: Stream, context: StepContext) -> Stream:
        out = run_blocks(model, stream, context)
        if self.recording:

            def again() -> None:
                new = run_blocks(model, stream, context)
                out.x.copy_(new.x)
                if out.txt is not None and new.txt is not None:
                    out.txt.copy_(new.txt)

            self.graphs[-1].work = again
        return out


def use_stand_ins(monkeypatch: Any, recorder: Recorder, counter: Any) -> None:
    """A CPU that records graphs; and compilation that traces, and leaves the rest to torch."""
    for module in (platform, plan_features):
        monkeypatch.setattr(module, "graph_recorder", lambda device: recorder.record)
    monkeypatch.setattr(denoising, "run_blocks", recorder.stack)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    # A test session has piled up what takes seconds to go through.
    monkeypatch.setattr(components, "gc", SimpleNamespace(collect=lambda: None))
    # Most settings that differ from run to run decide nothing about these.
    monkeypatch.setattr(pickles, "describe", functools.lru_cache(pickles.describe))
    for name, reads in (("plan_encoder", ()), ("plan_dit", ("mm_config", "dtype"))):
        monkeypatch.setattr(plan_resolve, name, _remembered(getattr(plan_resolve, name), reads))


def _remembered(function: Callable[..., Any], reads: tuple[str, ...]) -> Callable[..., Any]:
    """`function` of a part or module, a config, files and more; of the config it goes by `reads`."""
    made: dict[Any, Any] = {}

    @functools.wraps(function)
    def remembering(subject: Any, *args: Any) -> Any:
        config = next(arg for arg in args if isinstance(arg, Config))
        key = getattr(subject, "name", ""), config.model_path, *(repr(getattr(config, name)) for name in reads)
        if key not in made:
            made[key] = function(subject, *args)
        return made[key]

    return remembering


@dataclass
class Runs:
    """Those of one family. `folder` gets its files."""

    family: str
    folder: Path
    plans: dict[Any, Plan] = field(default_factory=dict)
    loaded: dict[Any, LoadedDiT] = field(default_factory=dict)
    made: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plain, self.merged, self.lora = (self.folder / name for name in ("plain", "merged", "lora.safetensors"))
        if self.family == "flux":
            for path in (self.plain, self.merged):
                flux_dirs.write_model(path, "dev", "original")
        else:
            self.plain = EMBEDDED
            self.merged.mkdir()
            for path in EMBEDDED.iterdir():
                (self.merged / path.name).symlink_to(path)
        weights = self.merged / DIT[self.family]
        state = {name: tensor.float() for name, tensor in load_file(weights).items()}
        pairs = lora_pairs(empty_model(self.plan()))
        write_lora(self.lora, pairs)
        for name, pair in pairs.items():
            state[f"{name}.weight"] += 0.8 * pair.product
        weights.unlink()
        save_file(state, weights)

    def plan(self, *values: Value, merged: bool = False, **more: Any) -> Plan:
        """The plan of a run; `merged`: of the model with the LoRA in its weights."""
        given = settings(self.family, *values) | {"model_path": str(self.merged if merged else self.plain)} | more
        if "lora" in given:
            given["lora"] = [{**entry, "path": str(self.lora)} for entry in given["lora"]]
        return resolve(load_config(None, given), CPU)

    def model(self, plan: Plan) -> LoadedDiT:
        """What a plan loads, kept for the next plan that loads the same."""
        config = plan.config
        parts = ("model_path", "dtype", "mm_config", "offload", "lora", "lora_dynamic", "compile", "graphs")
        key = (*(repr(getattr(config, name)) for name in parts), plan.keep_first)
        if key not in self.loaded:
            if len(self.loaded) == LOADED:
                del self.loaded[next(iter(self.loaded))]
            self.loaded[key] = load_dit(plan)
        return self.loaded[key]

    def latents(self, *values: Value, merged: bool = False) -> Tensor:
        """Of the request of `plan.matrix` with `values`, float32."""
        key = (frozenset(value.name for value in values), merged)
        if key not in self.made:
            self.plans[key] = self.plan(*values, merged=merged)
            self.made[key] = self.run(self.plans[key])
        return self.made[key]

    @torch.inference_mode()
    def run(self, plan: Plan) -> Tensor:
        """The request of `plan`."""
        if not plan.config.unload_modules:
            return self.request(plan, self.model(plan))
        held = Components(plan)
        for _ in range(2):
            with held.use("dit", StageTimer(CPU)) as loaded:
                made = self.request(plan, loaded)
        return made

    def request(self, plan: Plan, loaded: LoadedDiT) -> Tensor:
        return denoise_request(plan, loaded, plan.request, conditions(plan), quiet=True)


def conditions(plan: Plan) -> dict[Branch, Conditions]:
    """Random ones for both branches."""
    generator = torch.Generator().manual_seed(5)
    arch, dtype = plan.files.arch, getattr(torch, plan.config.dtype)
    pooled = getattr(arch, "pooled_dim", None)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    branches: tuple[Branch, ...] = ("cond", "uncond")
    return {
        branch: Conditions(
            draw(1, TEXT_TOKENS, arch.text_dim),
            pooled=None if pooled is None else draw(1, pooled),
            guidance=None if pooled is None else 3.5,
        )
        for branch in branches
    }


def empty_model(plan: Plan) -> nn.Module:
    """The DiT of a plan on meta."""
    with torch.device("meta"):
        return plan.family.build_dit(plan.files.arch)


def lora_pairs(model: Any, rank: int = 4) -> Mapping[str, Pair]:
    """Pairs for every linear of the blocks, which change the latents by a sixth or more."""
    generator = torch.Generator().manual_seed(0)
    names = {module: name for name, module in model.named_modules()}
    pairs = {}
    for block in model.blocks:
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear):
                down = torch.randn(rank, layer.in_features, generator=generator) / layer.in_features**0.5
                up = torch.randn(layer.out_features, rank, generator=generator) * 0.4 / rank**0.5
                pairs[f"{names[block]}.{name}"] = Pair(down, up)
    return pairs


def error(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of `wanted`."""
    return float((found - wanted).norm() / wanted.norm())
