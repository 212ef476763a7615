"""The files beside the weights: config.json in the layout of the output, and the rest as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightx2v.convert.naming import Layout
from lightx2v.errors import CheckpointError
from lightx2v.io.files import whole_file
from lightx2v.models.flux.arch import FluxArch
from lightx2v.models.wan.arch import WanArch

INDEX = "diffusion_pytorch_model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf", ".index.json")


def output_config(config: Path, source: Layout, output: Layout) -> dict[str, Any]:
    """The config.json for an output, from the source's. Raises CheckpointError for one that cannot be translated."""
    content = _read(config)
    if source == output:
        return content
    arch = WanArch.from_config(content, str(config))
    return to_diffusers(arch) if output == "diffusers" else to_original(arch)


def _read(config: Path) -> dict[str, Any]:
    """Its content, less what another package says there of its own files."""
    try:
        content = json.loads(config.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(config), f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(config), "is not a JSON object")
    content.pop("quantization_config", None)
    return content


def flux_config(config: Path | None, source: Layout, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The config of diffusers' FluxTransformer2DModel: the source's, or what the `shapes` of the original names say."""
    if config is not None and source == "diffusers":
        return _read(config)
    arch = FluxArch.from_shapes(shapes, str(config))
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": arch.head_dim,
        "axes_dims_rope": list(arch.axes),
        "guidance_embeds": arch.guidance,
        "in_channels": arch.in_dim,
        "joint_attention_dim": arch.text_dim,
        "num_attention_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "num_single_layers": arch.num_single_layers,
        "out_channels": None,
        "patch_size": 1,
        "pooled_projection_dim": arch.pooled_dim,
    }


def to_diffusers(arch: WanArch) -> dict[str, Any]:
    """The config of diffusers' WanTransformer3DModel."""
    image = arch.model_type == "i2v"
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": arch.dim if image else None,
        "attention_head_dim": arch.head_dim,
        "cross_attn_norm": arch.cross_attn_norm,
        "eps": arch.eps,
        "ffn_dim": arch.ffn_dim,
        "freq_dim": arch.freq_dim,
        "image_dim": arch.image_dim if image else None,
        "in_channels": arch.in_dim,
        "num_attention_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "out_channels": arch.out_dim,
        "patch_size": list(arch.patch_size),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads" if arch.qk_norm else None,
        "rope_max_seq_len": 1024,
        "text_dim": arch.text_dim,
    }


def to_original(arch: WanArch) -> dict[str, Any]:
    """The config of the original WanModel."""
    return {
        "_class_name": "WanModel",
        "cross_attn_norm": arch.cross_attn_norm,
        "dim": arch.dim,
        "eps": arch.eps,
        "ffn_dim": arch.ffn_dim,
        "freq_dim": arch.freq_dim,
        **({"image_dim": arch.image_dim} if arch.model_type == "i2v" else {}),
        "in_dim": arch.in_dim,
        "model_type": arch.model_type,
        "num_heads": arch.num_heads,
        "num_layers": arch.num_layers,
        "out_dim": arch.out_dim,
        "patch_size": list(arch.patch_size),
        "qk_norm": arch.qk_norm,
        "text_dim": arch.text_dim,
        "text_len": arch.text_len,
    }


def copy_other_files(folder: Path, output: Path) -> None:
    """Copy what is not weights, and is not there yet, from the folder of the source. Hidden files stay behind."""
    target = output.resolve()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        inside = target in path.resolve().parents
        if path.is_file() and not hidden and not inside and not path.name.endswith(_WEIGHTS):
            copy = output / relative
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    """The index of a folder's files: the file of each tensor, and the bytes of all."""
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, content)
