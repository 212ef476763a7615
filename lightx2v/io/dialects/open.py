"""Opens checkpoints of any package: the one place where a format is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightx2v.errors import CheckpointError
from lightx2v.io.dialects.base import Dialect, Found, Wanted, read_json
from lightx2v.io.gguf import ENDING as GGUF
from lightx2v.io.weights import Checkpoint
from lightx2v.registry import Registry

DIALECTS: Registry[Dialect] = Registry("dialect")
DIALECTS.add("quanto", "lightx2v.io.dialects.quanto:DIALECT")
DIALECTS.add("bitsandbytes", "lightx2v.io.dialects.bitsandbytes:DIALECT")
DIALECTS.add("torchao", "lightx2v.io.dialects.torchao:DIALECT")
DIALECTS.add("angelslim", "lightx2v.io.dialects.angelslim:DIALECT")
DIALECTS.add("compressed_tensors", "lightx2v.io.dialects.compressed_tensors:DIALECT")
DIALECTS.add("lightcompress", "lightx2v.io.dialects.lightcompress:DIALECT")
DIALECTS.add("msmodelslim", "lightx2v.io.dialects.msmodelslim:DIALECT")
DIALECTS.add("nunchaku_lite", "lightx2v.io.dialects.nunchaku:DIALECT")


def open_any(path: str | Path, wanted: Wanted) -> Checkpoint:
    """The checkpoint in `path`, whoever wrote it, with the tensors of `quant.layouts`.

    As `Checkpoint.open` for what is in this engine's own formats and in ComfyUI's and llama.cpp's, which are read as
    they are. Raises CheckpointError, too, for formats that are known and not understood.
    """
    checkpoint = Checkpoint.open(path)
    found = Found(checkpoint, _quantization_config(checkpoint.files[0].parent), wanted)
    names = [name for name in DIALECTS if DIALECTS[name].detect(found)]
    if len(names) > 1:
        raise CheckpointError(str(path), f"looks like files of {' and of '.join(names)}", do="give one checkpoint")
    if names:
        return DIALECTS[names[0]].translate(found).finish()
    _refuse_unread(found)
    return checkpoint


def _refuse_unread(found: Found) -> None:
    """A config.json that names a package, beside tensors that are not its: only this engine writes others there."""
    method = found.config.get("quant_method")
    ours = found.checkpoint.metadata.get("tool", "").startswith("lightx2v") or found.checkpoint.path.suffix == GGUF
    if method is None or ours:
        return
    said = f"config.json says that {method} has quantized the weights"
    if str(method).replace("-", "_") in DIALECTS:
        raise found.refuse(f"{said}, and they are not as it stores them", do="check that the download is whole")
    raise found.refuse(
        f"{said}, whose files are not read",
        allowed=", ".join(DIALECTS),
        do="give the unquantized model: mm_type with weight_auto_quant quantizes it as it loads",
    )


def _quantization_config(folder: Path) -> Mapping[str, Any]:
    """What the config.json beside the weights says of their quantization."""
    said = (read_json(folder / "config.json") or {}).get("quantization_config")
    return said if isinstance(said, dict) else {}
