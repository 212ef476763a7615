"""The files beside the weights: config.json in the layout of the output, and the rest as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from loguru import logger

from lightx2v.convert.planning import Plan
from lightx2v.errors import CheckpointError
from lightx2v.io.files import whole_file
from lightx2v.models.wan.arch import WanArch

_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".gguf", ".index.json")


def write_config(plan: Plan) -> None:
    """Write the config.json of a DiT in the layout of the output, when the source has one."""
    if plan.options.model_type != "wan_dit":
        return
    if plan.config is None:
        logger.warning("{} has no config.json beside the weights, so none was written", plan.options.source)
        return
    try:
        config = json.loads(plan.config.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(plan.config), f"cannot be read as JSON: {error}") from error
    if plan.source_layout != plan.layout:
        arch = WanArch.from_config(config, str(plan.config))
        config = to_diffusers(arch) if plan.layout == "diffusers" else to_original(arch)
    with whole_file(plan.options.output / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
        "image_dim": arch.image_dim,
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


def copy_other_files(source: Path, output: Path) -> None:
    """Copy what is not weights, and is not there yet, from the directory of the source. Hidden files stay behind."""
    folder = source if source.is_dir() else source.parent
    target = output.resolve()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        inside = target == path.resolve() or target in path.resolve().parents
        if path.is_file() and not hidden and not inside and not path.name.endswith(_WEIGHTS):
            copy = output / relative
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
