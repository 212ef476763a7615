"""Finds the parts of a FLUX.1 checkpoint on disk: from file names, small JSON files, and headers where those lack.

diffusers layout: `model_index.json` and the folders `transformer`, `text_encoder`, `tokenizer`, `text_encoder_2`,
`tokenizer_2`, `vae`, `scheduler`. Original layout: `flux1-*.safetensors`, `ae.safetensors`, `clip_l.safetensors`,
`t5xxl_*.safetensors` and tokenizer folders at the root. The two mix, as they do in the published directories: a part
that is in no folder is looked for among the files. A file of ComfyUI may hold all of them but for the tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightx2v.errors import CheckpointError
from lightx2v.io.headers import read_header
from lightx2v.io.weights import Checkpoint
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.flux.checkpoint import shapes

Variant = Literal["dev", "schnell", "kontext"]
Part = Literal["dit", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "vae", "tiny_vae"]

_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline")
_MODEL = "FluxTransformer2DModel"
_ENDINGS = (".safetensors", ".gguf")
_QUANTIZED = ("int8", "fp8", "int4", "nvfp4", "mxfp", "nf4", "q2_", "q3_", "q4_", "q5_", "q6_", "q8_")
_FILES: Mapping[Part, tuple[str, ...]] = {
    "vae": ("ae", "vae", "flux_vae", "flux1_vae"),
    "text_encoder": ("clip_l",),
    "text_encoder_2": ("t5xxl", "t5-v1_1-xxl", "t5_xxl"),
}
"""How the names of files begin that hold one of the other parts."""
_IN_ONE: Mapping[Part, str] = {
    "vae": "vae.",
    "text_encoder": "text_encoders.clip_l.",
    "text_encoder_2": "text_encoders.t5xxl.",
}
"""The prefix of a part in a file of ComfyUI that holds several."""
_WANTED: Mapping[Part, str] = {
    "dit": "the DiT's weights: transformer/, or flux1-*.safetensors",
    "text_encoder": "the CLIP text encoder: text_encoder/, or clip_l.safetensors",
    "tokenizer": "CLIP's tokenizer: tokenizer/",
    "text_encoder_2": "the T5 text encoder: text_encoder_2/, or t5xxl_*.safetensors",
    "tokenizer_2": "T5's tokenizer: tokenizer_2/",
    "vae": "the VAE: vae/, or ae.safetensors",
    "tiny_vae": "the tiny autoencoder: a folder taef1; vae.tae_path names one that is elsewhere",
}
_DYNAMIC: Mapping[str, Any] = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""The schedule of dev and Kontext where no scheduler_config.json tells; schnell's has no shift."""


@dataclass(frozen=True)
class FluxFiles:
    """Where each part is: a file or a folder of weights; None for a part that is not there."""

    root: Path
    layout: Literal["original", "diffusers"]
    variant: Variant
    arch: FluxArch
    dit: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    text_encoder_2: Path | None
    tokenizer_2: Path | None
    vae: Path | None
    tiny_vae: Path | None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """The content of diffusers' scheduler_config.json, or what it says in the published model."""

    def require(self, part: Part) -> Path:
        """The path of `part`. Raises CheckpointError, which says what was looked for, when it is absent."""
        path: Path | None = getattr(self, part)
        if path is None:
            raise CheckpointError(str(self.root), f"lacks {_WANTED[part]}", do="complete the download")
        return path


def detect(model_path: str | Path, task: str) -> FluxFiles:
    """Find the parts of the checkpoint at `model_path`, a directory or the DiT's file in one, for `task`.

    Raises CheckpointError for a path that is missing or holds no model, and for another family.
    """
    given = Path(model_path).expanduser()
    if not given.exists():
        raise CheckpointError(str(given), "no such file or directory", do="give --model_path a FLUX.1 model")
    root = given if given.is_dir() else given.parent
    if given.is_file() and given.suffix not in _ENDINGS:
        raise CheckpointError(str(given), f"has the ending '{given.suffix}'", allowed=", ".join(_ENDINGS))
    pipeline = _pipeline(root)
    dit = given if given.is_file() else _dit(root)
    if dit is None:
        there = ", ".join(sorted(entry.name for entry in root.iterdir())[:8])
        raise CheckpointError(
            str(root),
            f"lacks {_WANTED['dit']}; it holds {there}" if there else "the directory is empty",
            do="give --model_path a FLUX.1 model, in the original or the diffusers layout",
        )
    in_folder = dit.parent == root / "transformer"
    arch = _folder_arch(dit.parent) if in_folder else FluxArch.from_shapes(shapes(Checkpoint.open(dit)), str(dit))
    variant = _variant(pipeline, root, dit, arch)
    parts: dict[Part, Path | None] = {part: _other(root, part, dit) for part in _FILES}
    folders: dict[Part, Path | None] = {part: _folder(root / part) for part in ("tokenizer", "tokenizer_2")}
    return FluxFiles(
        root=root,
        layout="diffusers" if in_folder else "original",
        variant=variant,
        arch=arch,
        dit=dit,
        tiny_vae=_folder(root / "taef1"),
        scheduler=_scheduler(root, variant),
        **parts,
        **folders,
    )


def _pipeline(root: Path) -> str | None:
    """The class in model_index.json, where there is one."""
    path = root / "model_index.json"
    if not path.is_file():
        return None
    name = _read_json(path).get("_class_name")
    if name not in _PIPELINES:
        raise CheckpointError(str(root), f"holds a {name}, not FLUX.1", allowed=", ".join(_PIPELINES))
    return str(name)


def _dit(root: Path) -> Path | None:
    """What to open for the DiT: diffusers' index or file, else the one file of the root that can be it."""
    folder = root / "transformer"
    indices = sorted(folder.glob("*.index.json")) if folder.is_dir() else []
    if indices:
        return indices[0]
    inside = _weights_in(folder)
    plain = [file for file in inside if not _is_quantized(file)]
    if plain or inside:
        return (plain or inside)[0]
    others = tuple(prefix for prefixes in _FILES.values() for prefix in prefixes)
    files = [file for file in _weights_in(root) if not file.name.lower().startswith(others)]
    if len(files) > 1:
        named = [file for file in files if "flux" in file.name.lower()]
        files = [file for file in named if not _is_quantized(file)] or named or files
    if len(files) > 1:
        listed = ", ".join(file.name for file in files)
        raise CheckpointError(
            str(root), f"any of these could be the DiT: {listed}", do="give the path of one as --model_path"
        )
    return next(iter(files), None)


def _other(root: Path, part: Part, dit: Path) -> Path | None:
    """The folder or the file of one of the other models, or the DiT's file when that holds it too."""
    if folder := _folder(root / part):
        return folder
    files = [file for file in _weights_in(root) if file.name.lower().startswith(_FILES[part])]
    plain = [file for file in files if not _is_quantized(file)]
    if plain or files:
        return (plain or files)[0]
    if dit.suffix == ".safetensors" and dit.parent == root:
        infos, _ = read_header(dit)
        return dit if any(info.name.startswith(_IN_ONE[part]) for info in infos) else None
    return None


def _folder_arch(folder: Path) -> FluxArch:
    config = _read_json(folder / "config.json")
    name = config.get("_class_name", _MODEL)
    if name != _MODEL:
        raise CheckpointError(str(folder), f"holds a {name}, not FLUX.1", allowed=_MODEL)
    return FluxArch.from_config(config, str(folder / "config.json"))


def _variant(pipeline: str | None, root: Path, dit: Path, arch: FluxArch) -> Variant:
    """schnell takes no guidance; dev and Kontext are of one shape, and only names tell them apart."""
    if not arch.guidance:
        return "schnell"
    in_name = "kontext" in dit.name.lower() or "kontext" in root.name.lower()
    return "kontext" if in_name or pipeline == "FluxKontextPipeline" else "dev"


def _scheduler(root: Path, variant: Variant) -> Mapping[str, Any]:
    path = root / "scheduler" / "scheduler_config.json"
    if path.is_file():
        return _read_json(path)
    return {} if variant == "schnell" else _DYNAMIC


def _folder(path: Path) -> Path | None:
    return path if path.is_dir() else None


def _is_quantized(file: Path) -> bool:
    return file.suffix == ".gguf" or any(mark in file.name.lower() for mark in _QUANTIZED)


def _weights_in(folder: Path) -> list[Path]:
    """Files of weights in `folder`, safetensors first."""
    files = [file for file in folder.iterdir() if file.suffix in _ENDINGS and file.is_file()] if folder.is_dir() else []
    return sorted(files, key=lambda file: (_ENDINGS.index(file.suffix), file.name))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(str(path), "is missing", do="complete the download")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(path), "is not a JSON object")
    return content
