"""Stored checkpoints of other packages, loaded as the engine loads them, beside what the packages made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightx2v.components import empty_dit, fill_dit
from lightx2v.config.schema import Config
from lightx2v.io.source import CheckpointSource
from lightx2v.models.base import Conditions
from lightx2v.models.spec import FAMILIES, FamilySpec
from lightx2v.plan.dit import plan_dit
from lightx2v.plan.layers import ComponentPlan
from lightx2v.platform import DeviceInfo

DATA = Path(__file__).parents[1] / "data" / "interop"
CPU = DeviceInfo("cpu", 0, "a CPU", None, 1, 1)
GUIDANCE = 3.5
BFLOAT16_GUIDANCE = 3.504
"""What diffusers' FLUX embeds of it in bfloat16: 1000 times 3.5 is rounded there."""
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Loaded:
    """A DiT with the weights of a stored checkpoint, and its plan."""

    plan: ComponentPlan
    model: Any
    source: CheckpointSource


def variants(package: str) -> list[str]:
    """Names of its stored folders; none where no stored file is of the package's own making."""
    folders = (DATA / package).iterdir() if (DATA / package).is_dir() else ()
    return sorted(folder.name for folder in folders if folder.is_dir())


def family_of(folder: Path) -> FamilySpec:
    config = json.loads((folder / "config.json").read_text())
    return FAMILIES["flux" if config["_class_name"].startswith("Flux") else "wan2.1"]


def model_dir(folder: Path, root: Path) -> Path:
    """A model directory of diffusers with the stored folder as its transformer, a copy."""
    family = family_of(folder)
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, root / "transformer", dirs_exist_ok=True)
    pipeline = "FluxPipeline" if family.name == "flux" else "WanPipeline"
    (root / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return root


def plan(root: Path, **mm_config: Any) -> tuple[FamilySpec, Any, ComponentPlan]:
    """Family, files and plan of the DiT in a model directory, its mm_type "auto" unless one is given."""
    family = family_of(root / "transformer")
    files = family.detect(root, family.tasks[0])
    settings = {"mm_type": "auto", **mm_config}
    config = Config(model_cls=family.name, model_path=str(root), dtype="float32", mm_config=settings)  # type: ignore[arg-type]
    with torch.device("meta"):
        module = family.build_dit(files.arch)
    return family, files, plan_dit(module, config, family, files, CPU)


def load(root: Path, **mm_config: Any) -> Loaded:
    """The DiT of a model directory."""
    family, files, planned = plan(root, **mm_config)
    checkpoint = family.open(planned.checkpoint)
    source = CheckpointSource(checkpoint, family.original_name, family.is_unused, planned.read_raw())
    model = empty_dit(family, files.arch, planned.by_name(), torch.float32, planned.auto_quant)
    fill_dit(model, source.read(), torch.device("cpu"), torch.float32, str(planned.checkpoint))
    return Loaded(planned, model.eval(), source)


def edit(root: Path, change: Callable[[dict[str, Tensor], dict[str, str], dict[str, Any]], None]) -> None:
    """Change tensors, metadata and config.json of the transformer in a model directory."""
    path, config_path = root / "transformer" / WEIGHTS, root / "transformer" / "config.json"
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    tensors, config = load_file(path), json.loads(config_path.read_text())
    change(tensors, metadata, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    config_path.write_text(json.dumps(config))


def example(folder: Path) -> dict[str, Tensor]:
    """Inputs, and what the package made of them."""
    return load_file(folder.with_name(f"{folder.name}.example.safetensors"))


@torch.no_grad()
def run(model: nn.Module, stored: dict[str, Tensor], guidance: float = GUIDANCE) -> Tensor:
    """The model on the inputs of an example."""
    pooled = stored.get("pooled")
    conditions = Conditions(text=stored["text"], pooled=pooled, guidance=guidance if pooled is not None else None)
    output: Tensor = model(stored["latents"], stored["timestep"], conditions)
    return output


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
