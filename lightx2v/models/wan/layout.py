"""Finds the parts of a Wan2.1 checkpoint on disk, from file names and small JSON files alone.

Original layout (also LightX2V's): `config.json` and the DiT's weights at the root or in `original/`,
`models_t5_*`, `google/umt5-xxl/`, `Wan2.1_VAE.*`, `models_clip_*`; each task may have its DiT in a folder of its name.
diffusers layout: `model_index.json` and the folders `transformer`, `text_encoder`, `tokenizer`, `vae`, ...
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightx2v.errors import CheckpointError
from lightx2v.models.wan.arch import WanArch

_PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
_MODELS = ("WanModel", "WanTransformer3DModel")
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
_QUANTIZED = ("int8", "fp8", "int4", "nvfp4", "mxfp")
_NOT_DIT = ("models_t5", "models_clip", "wan2.1_vae", "taew", "lighttae", "lightvae", "mg-lightvae")
_WANTED = {
    "dit": "the DiT's weights: *.safetensors beside its config.json",
    "text_encoder": "the text encoder: models_t5_*.pth or .safetensors, or text_encoder/",
    "tokenizer": "the tokenizer: google/umt5-xxl/, or tokenizer/",
    "vae": "the VAE: Wan2.1_VAE.pth or .safetensors, or vae/",
    "image_encoder": "the image encoder: models_clip_*.pth or .safetensors, or image_encoder/",
    "tiny_vae": "the tiny autoencoder: taew2_1.pth or lighttaew2_1.pth; vae.tae_path names one that is elsewhere",
}

Part = Literal["dit", "text_encoder", "tokenizer", "vae", "image_encoder", "tiny_vae"]


@dataclass(frozen=True)
class WanFiles:
    """Where each part is: a file or a folder of weights; None for a part that is not there."""

    root: Path
    layout: Literal["original", "diffusers"]
    arch: WanArch
    config: Path
    """The DiT's `config.json`."""
    dit: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    vae: Path | None
    image_encoder: Path | None
    tiny_vae: Path | None
    image_processor: Path | None
    clip_num_heads: int | None
    """Heads of an image encoder that is not ViT-H/14, where `config.json` says."""

    @property
    def model_type(self) -> str:
        return self.arch.model_type

    def require(self, part: Part) -> Path:
        """The path of `part`. Raises CheckpointError, which says what was looked for, when it is absent."""
        path: Path | None = getattr(self, part)
        if path is not None:
            return path
        hint = ""
        if part == "dit":
            converted = [entry.name for entry in sorted(self.config.parent.iterdir()) if _is_converted(entry)]
            hint = f"give one of {', '.join(converted)} as dit_quantized_ckpt" if converted else ""
        raise CheckpointError(str(self.root), f"lacks {_WANTED[part]}", do=hint or "complete the download")


def detect(model_path: str | Path, task: str) -> WanFiles:
    """Find the parts of the checkpoint in `model_path` that serve `task` ("t2v" or "i2v").

    Raises CheckpointError for a path that is missing or holds no model, another family, or a DiT of the other task.
    """
    root = Path(model_path).expanduser()
    if not root.is_dir():
        what = "is a file; a model directory is wanted" if root.exists() else "no such directory"
        raise CheckpointError(str(root), what, do="give --model_path the directory of a Wan2.1 model")
    diffusers = (root / "model_index.json").is_file() or (root / "transformer" / "config.json").is_file()
    files = _diffusers(root) if diffusers else _original(root, task)
    _check_task(files, task)
    return files


def detect_distilled(model_path: str | Path, task: str) -> WanFiles:
    """As `detect`, with the DiT of LightX2V's folder `distill_models` where there is one."""
    files = detect(model_path, task)
    distilled = _dit_weights(files.root / "distill_models")
    return files if distilled is None else replace(files, dit=distilled)


def _diffusers(root: Path) -> WanFiles:
    if (root / "model_index.json").is_file():
        index = _read_json(root / "model_index.json")
        name = index.get("_class_name")
        if name not in _PIPELINES:
            raise CheckpointError(str(root), f"holds a {name}, not Wan2.1", allowed=", ".join(_PIPELINES))
        if any(index.get("transformer_2") or ()):
            raise CheckpointError(str(root), "holds Wan2.2 (two DiTs), not Wan2.1", do="give a Wan2.1 model")
    config = root / "transformer" / "config.json"

    def folder(name: str) -> Path | None:
        return root / name if (root / name).is_dir() else None

    return WanFiles(
        root=root,
        layout="diffusers",
        arch=_read_arch(config),
        config=config,
        dit=_dit_weights(root / "transformer"),
        text_encoder=folder("text_encoder"),
        tokenizer=folder("tokenizer"),
        vae=folder("vae"),
        image_encoder=folder("image_encoder"),
        tiny_vae=_named(root, "taew2_1") or _named(root, "lighttaew2_1"),
        image_processor=folder("image_processor"),
        clip_num_heads=None,
    )


def _original(root: Path, task: str) -> WanFiles:
    if (root / "high_noise_model").is_dir():
        raise CheckpointError(str(root), "holds Wan2.2 (high_noise_model/), not Wan2.1", do="give a Wan2.1 model")
    folders = [folder for folder in (root / task, root, root / "original") if (folder / "config.json").is_file()]
    if not folders:
        there = ", ".join(sorted(entry.name for entry in root.iterdir())[:8])
        raise CheckpointError(
            str(root),
            f"no model_index.json and no config.json; it holds {there}" if there else "the directory is empty",
            do="give --model_path the directory of a Wan2.1 model, in the original or the diffusers layout",
        )
    config = folders[0] / "config.json"
    heads = (_read_json(folder / "config.json").get("clip_num_heads") for folder in folders)
    weights = [found for found in map(_dit_weights, (folders[0], root / "original")) if found]
    tokenizers = [folder for folder in (*sorted(root.glob("google/*")), root / "tokenizer") if folder.is_dir()]
    return WanFiles(
        root=root,
        layout="original",
        arch=_read_arch(config),
        config=config,
        dit=weights[0] if weights else None,
        text_encoder=_named(root, "models_t5"),
        tokenizer=next(iter(tokenizers), None),
        vae=_named(root, "wan2.1_vae"),
        image_encoder=_named(root, "models_clip"),
        tiny_vae=_named(root, "taew2_1") or _named(root, "lighttaew2_1"),
        image_processor=None,
        clip_num_heads=next(filter(None, heads), None),
    )


def _dit_weights(folder: Path) -> Path | None:
    """What to open for the DiT in `folder`: an index, a single file, or the folder itself when it holds parts."""
    indices = sorted(folder.glob("*.index.json")) if folder.is_dir() else []
    if indices:
        return indices[0]
    files = [file for file in _weights_in(folder) if not file.name.lower().startswith(_NOT_DIT)]
    plain = [file for file in files if not any(mark in file.name.lower() for mark in _QUANTIZED)]
    named = [file for file in plain if file.name.startswith("diffusion_pytorch_model")]
    safetensors = [file for file in named or plain if file.suffix == ".safetensors"]
    if len(safetensors) > 1:
        return folder
    return next(iter(safetensors or plain), None)


def _named(root: Path, prefix: str) -> Path | None:
    """The weights file at the root whose name begins with `prefix`; a quantized one does not count."""
    files = [file for file in _weights_in(root) if file.name.lower().startswith(prefix)]
    return next((file for file in files if not any(mark in file.name.lower() for mark in _QUANTIZED)), None)


def _weights_in(folder: Path) -> list[Path]:
    """Files of weights in `folder`, safetensors first."""
    files = [file for file in folder.iterdir() if file.suffix in _WEIGHTS and file.is_file()] if folder.is_dir() else []
    return sorted(files, key=lambda file: (_WEIGHTS.index(file.suffix), file.name))


def _is_converted(entry: Path) -> bool:
    """Whether `entry` looks like a quantized DiT: a file named so, or a folder of weights."""
    if entry.is_dir():
        return any(file.suffix == ".safetensors" for file in _weights_in(entry))
    named = any(mark in entry.name.lower() for mark in _QUANTIZED) and entry.suffix in _WEIGHTS
    return (named or entry.suffix == ".gguf") and not entry.name.lower().startswith(_NOT_DIT)


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


def _read_arch(path: Path) -> WanArch:
    config = _read_json(path)
    name = config.get("_class_name", _MODELS[0])
    if name not in _MODELS:
        raise CheckpointError(str(path), f"is the config of a {name}, not of Wan2.1", allowed=", ".join(_MODELS))
    return WanArch.from_config(config, str(path))


def _check_task(files: WanFiles, task: str) -> None:
    arch = files.arch
    wanted = arch.out_dim if arch.model_type == "t2v" else 2 * arch.out_dim + 4
    if arch.in_dim != wanted:
        raise CheckpointError(
            str(files.config),
            f"in_dim {arch.in_dim} in a model of type {arch.model_type} with out_dim {arch.out_dim}",
            allowed=f"in_dim {wanted}; other variants of Wan are other families",
        )
    if arch.model_type != task:
        what = {"t2v": "text-to-video", "i2v": "image-to-video"}[arch.model_type]
        raise CheckpointError(
            str(files.config.parent),
            f"holds a {what} DiT (in_dim {arch.in_dim}), and the task is {task}",
            do=f"give --task {arch.model_type}, or the directory of a model for {task}",
        )
