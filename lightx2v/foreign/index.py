"""A diffusers pipeline directory, from its JSON files alone: the classes of its parts and where their weights are."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightx2v.errors import CheckpointError, suggestion

INDEX = "model_index.json"
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)"
    r"(?P<index>\.index\.json)?"
)


@dataclass(frozen=True)
class ModelPart:
    """A neural network of the pipeline that runs on our layers."""

    name: str
    cls: type[Any]
    folder: Path
    config: Mapping[str, Any]
    """Its config.json."""

    @property
    def weights(self) -> Path:
        """The file of its weights, or the index of them. Raises CheckpointError where there is none."""
        found = weights_in(self.folder)
        if found is None:
            raise CheckpointError(str(self.folder), "has no weights", do="complete the download")
        return found[0]


@dataclass(frozen=True)
class PipelineFiles:
    """What is in the directory."""

    root: Path
    cls: type[Any]
    """The class of the pipeline that model_index.json names."""
    denoisers: tuple[ModelPart, ...]
    """Its transformers or UNets."""
    text_encoders: tuple[ModelPart, ...]
    others: Mapping[str, Path]
    """Folders of the other parts that have weights, which diffusers loads."""
    variant: str | None
    """What stands before the ending of the files of weights, as in `model.fp16.safetensors`."""

    @property
    def layout(self) -> str:
        return "diffusers"

    @property
    def models(self) -> tuple[ModelPart, ...]:
        return (*self.denoisers, *self.text_encoders)


def read_pipeline(model_path: str | Path) -> PipelineFiles:
    """Read a directory in the layout of diffusers.

    Raises CheckpointError for one that is none, that has code of its own, that the installed diffusers or transformers
    has no class for, and that has no transformer or UNet.
    """
    root = Path(model_path).expanduser()
    if not (root / INDEX).is_file():
        what = f"has no {INDEX}" if root.is_dir() else "is a file" if root.exists() else "no such directory"
        raise CheckpointError(
            str(root), what, do="give --model_path the directory of a diffusers pipeline, as save_pretrained writes it"
        )
    content = read_json(root / INDEX)
    cls = _class("diffusers", content.get("_class_name"), root)
    parts = {name: value for name, value in content.items() if _names_a_class(value)}
    models: dict[str, ModelPart] = {}
    others: dict[str, Path] = {}
    for name, (library, class_name) in parts.items():
        part_class = _class(library, class_name, root)
        folder = root / name
        if name.startswith(("transformer", "unet", "text_encoder")) and (folder / "config.json").is_file():
            models[name] = ModelPart(name, part_class, folder, read_json(folder / "config.json"))
        elif weights_in(folder):
            others[name] = folder
    denoisers = tuple(part for name, part in models.items() if not name.startswith("text_encoder"))
    if not denoisers:
        raise CheckpointError(
            str(root), f"'{cls.__name__}' has no transformer or UNet here", allowed=f"it has {', '.join(parts)}"
        )
    encoders = tuple(part for name, part in models.items() if name.startswith("text_encoder"))
    for part in encoders:
        _refuse_quantized(part)
    found = [weights_in(folder) for folder in (*(part.folder for part in models.values()), *others.values())]
    variants = {variant for _, variant in filter(None, found) if variant}
    if len(variants) > 1:
        raise CheckpointError(str(root), f"has weights of several variants only: {', '.join(sorted(variants))}")
    return PipelineFiles(root, cls, denoisers, encoders, others, next(iter(variants), None))


def read_model(folder: Path) -> ModelPart:
    """A model of diffusers in a folder of its own, by its config.json. Raises CheckpointError."""
    config = read_json(folder / "config.json")
    if "_class_name" not in config:
        raise CheckpointError(str(folder), "is no model of diffusers", do="give a folder transformer or unet")
    return ModelPart(folder.name, _class("diffusers", config["_class_name"], folder), folder, config)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(str(path), f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(str(path), "is not a JSON object")
    return content


def weights_in(folder: Path) -> tuple[Path, str | None] | None:
    """What to open for the weights in `folder`, and the variant in its name, if any.

    Names without a variant come first, safetensors before pickles, and an index before a file of the same name.
    """
    found = [
        (match["variant"] or "", match["kind"] == "bin", match["index"] is None, entry)
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if (match := _WEIGHTS.fullmatch(entry.name))
    ]
    if not found:
        return None
    variant, _, _, path = min(found)
    return path, variant or None


def _names_a_class(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)


def _class(library: str, name: object, root: Path) -> type[Any]:
    """A class of diffusers, of transformers, or of the folder of one of diffusers' pipelines."""
    import diffusers

    if isinstance(name, list) or (root / f"{library}.py").is_file():
        raise CheckpointError(
            str(root), f"comes with code of its own for {name}, which is not run", do="use it with diffusers itself"
        )
    if library in ("diffusers", "transformers"):
        module: Any = importlib.import_module(library)
    elif (module := getattr(diffusers.pipelines, library, None)) is None:
        raise CheckpointError(
            str(root),
            f"a part is a {name} of '{library}'",
            allowed="parts of diffusers and of transformers; code that comes with a model is not run",
        )
    found = getattr(module, str(name), None)
    if not isinstance(found, type) or str(name) == "AutoModel":
        version = importlib.import_module(library if library == "transformers" else "diffusers").__version__
        raise CheckpointError(
            str(root),
            f"needs a {name}, which {library} {version} does not have{suggestion(str(name), dir(module))}",
            do=f"pip install -U {library if library == 'transformers' else 'diffusers'}",
        )
    return found


def _refuse_quantized(part: ModelPart) -> None:
    """Text encoders are loaded by transformers, without the libraries that have quantized them."""
    described = part.config.get("quantization_config")
    if described:
        method = described.get("quant_method", "another library") if isinstance(described, dict) else described
        raise CheckpointError(
            str(part.folder),
            f"holds weights that {method} has quantized",
            do="give the unquantized pipeline: mm_type with weight_auto_quant quantizes it as it loads",
        )
