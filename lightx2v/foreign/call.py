"""From our request to the arguments of a pipeline's `__call__`, and from what it returns to frames."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lightx2v.config.schema import Config
from lightx2v.errors import ConfigError, LightX2VError, suggestion
from lightx2v.foreign.index import PipelineFiles, read_json
from lightx2v.foreign.schedule import default_shift, scheduler_config, shift_key, solver_class
from lightx2v.io.media import read_image
from lightx2v.request import Request, build_request

_OURS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "image": "image_path",
    "height": "video.height",
    "width": "video.width",
    "num_frames": "video.frames",
    "fps": "video.fps",
    "frame_rate": "video.fps",
    "num_inference_steps": "sampling.steps",
    "guidance_scale": "sampling.guidance",
    "true_cfg_scale": "sampling.true_guidance",
    "strength": "sampling.strength",
    "max_sequence_length": "text_len",
    "generator": "seed",
    "output_type": "save_result_path",
    "return_dict": "save_result_path",
    "callback": "the callback of generate",
    "callback_steps": "the callback of generate",
    "callback_on_step_end": "the callback of generate",
}
"""Arguments of pipelines that settings of our own stand for."""
_IMAGE_FPS, _VIDEO_FPS = 1, 16


def parameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """What the `__call__` of a pipeline class takes by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(cls.__call__).parameters.items()
    return {name: parameter for name, parameter in found if parameter.kind in kinds and name != "self"}


def class_for(files: PipelineFiles, task: str) -> type[Any]:
    """The pipeline class that serves `task` with the parts of the directory. Raises ConfigError."""
    cls = files.cls
    takes = parameters(cls)
    makes_video = "num_frames" in takes
    if "output_type" not in takes or not {"prompt", "image"} & set(takes):
        raise ConfigError("model_path", f"'{cls.__name__}' does not make pictures of a prompt or an image")
    if makes_video != task.endswith("v"):
        kind = "videos" if makes_video else "images"
        raise ConfigError(
            "task", f"is {task}, and '{cls.__name__}' makes {kind}", allowed="t2v, i2v" if makes_video else "t2i, i2i"
        )
    if task == "i2i" and "image" not in takes:
        cls = _image_to_image(cls)
        takes = parameters(cls)
    wanted = "image" if task.startswith("i") else "prompt"
    if wanted not in takes:
        raise ConfigError("task", f"is {task}, and '{cls.__name__}' takes no {wanted}", do="give another task or model")
    return cls


def _image_to_image(cls: type[Any]) -> type[Any]:
    """The sibling of a text-to-image pipeline that starts from an image, on the same parts."""
    from diffusers.pipelines import auto_pipeline

    kinds = {made: kind for kind, made in auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items()}
    sibling = auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING.get(kinds.get(cls, ""))
    if sibling is None:
        raise ConfigError("task", f"is i2i, and '{cls.__name__}' takes no image", allowed="t2i")
    found: type[Any] = sibling
    return found


def build(config: Config, files: PipelineFiles, cls: type[Any]) -> Request:
    """The request, with the pipeline's own defaults where the configuration gives nothing. Raises ConfigError."""
    takes = parameters(cls)
    image = task_image(config.task, config.image_path)
    size = _default_size(files, takes, image)
    for side, edge in zip(size, ("height", "width"), strict=True):
        if side is None and getattr(config.video, edge) is None:
            raise ConfigError(f"video.{edge}", f"is missing, and '{cls.__name__}' tells no default", do="set it")
    scheduler = scheduler_config(files)
    solver = solver_class(scheduler, config.sampling.solver)
    if config.sampling.shift is not None and shift_key(scheduler) is None:
        raise ConfigError("sampling.shift", f"is set, and the scheduler {solver} has none", do="remove it")
    frames = _default(takes, "num_frames") or files.denoisers[0].config.get("sample_frames")
    if "num_frames" not in takes:
        frames = 1
        if config.video.frames not in (None, 1):
            raise ConfigError("video.frames", f"is {config.video.frames}, and '{cls.__name__}' makes one image")
    elif frames is None and config.video.frames is None:
        raise ConfigError("video.frames", f"is missing, and '{cls.__name__}' tells no default", do="set it")
    guidance = _default(takes, "guidance_scale")
    fps = _default(takes, "frame_rate") or _default(takes, "fps")
    defaults = {
        "height": size[0],
        "width": size[1],
        "frames": frames,
        "fps": int(fps or (_VIDEO_FPS if "num_frames" in takes else _IMAGE_FPS)),
        "steps": _default(takes, "num_inference_steps") or 50,
        "shift": default_shift(scheduler),
        "guidance": guidance if isinstance(guidance, int | float) else 1.0,
        "solver": solver,
        "strength": _default(takes, "strength"),
        "step_list": None,
    }
    request = build_request(config, defaults, embedded_guidance="true_cfg_scale" in takes)
    true_guidance = config.sampling.true_guidance or _default(takes, "true_cfg_scale") or 1.0
    request = replace(request, solver=solver, true_guidance=float(true_guidance))
    check(request, config, cls)
    return request


def _default(takes: Mapping[str, inspect.Parameter], name: str) -> Any:
    found = takes[name].default if name in takes else None
    return None if found is inspect.Parameter.empty else found


def _default_size(
    files: PipelineFiles, takes: Mapping[str, inspect.Parameter], image: Image.Image | None
) -> tuple[int | None, int | None]:
    """Height and width in pixels that the pipeline takes by itself: what its denoiser was trained on, usually."""
    if "height" not in takes:
        return (image.height, image.width) if image is not None else (None, None)
    if _default(takes, "height") and _default(takes, "width"):
        return _default(takes, "height"), _default(takes, "width")
    config, vae = files.denoisers[0].config, files.others.get("vae")
    square = config.get("sample_size")
    height, width = square if isinstance(square, list | tuple) else (square, square)
    height, width = config.get("sample_height", height), config.get("sample_width", width)
    described = read_json(vae / "config.json") if vae else {}
    stages = described.get("block_out_channels") or described.get("encoder_block_out_channels")
    if not (height and width and stages):
        return None, None
    scale = 2 ** (len(stages) - 1)
    return height * scale, width * scale


def task_image(task: str, path: str | None) -> Image.Image | None:
    """The picture that a request starts from. Raises ConfigError where the task wants one and none is named."""
    if not task.startswith("i"):
        return None
    if not path:
        raise ConfigError("image_path", f"is missing: task {task} starts from a picture", do="give --image_path FILE")
    return read_image(path)


def check(request: Request, config: Config, cls: type[Any]) -> None:
    """Raise ConfigError for a request that lacks what the pipeline needs, and for arguments that it does not have."""
    takes = parameters(cls)
    for name in config.pipeline_args:
        if name in _OURS:
            raise ConfigError(f"pipeline_args.{name}", "is what another setting stands for", do=f"set {_OURS[name]}")
        if name not in takes:
            allowed = sorted(set(takes) - set(_OURS))
            raise ConfigError(
                f"pipeline_args.{name}",
                f"'{cls.__name__}' has no such argument{suggestion(name, allowed)}",
                allowed=", ".join(allowed),
            )
    for setting, value, argument in (
        ("text_len", config.text_len, "max_sequence_length"),
        ("sampling.strength", config.sampling.strength, "strength"),
        ("sampling.true_guidance", config.sampling.true_guidance, "true_cfg_scale"),
    ):
        if value is not None and argument not in takes:
            raise ConfigError(setting, f"is set, and '{cls.__name__}' has no {argument}", do="remove it")
    given = set(arguments(request, config, cls, None)) | set(config.pipeline_args)
    given |= {"image"} if request.task.startswith("i") else set()
    missing = [name for name, found in takes.items() if found.default is inspect.Parameter.empty and name not in given]
    if missing:
        do = f"give task {'i2v' if request.task == 't2v' else 'i2i'}" if missing == ["image"] else "set pipeline_args"
        raise ConfigError("task", f"{request.task} gives no '{missing[0]}', which '{cls.__name__}' needs", do=do)


def arguments(request: Request, config: Config, cls: type[Any], image: Image.Image | None) -> dict[str, Any]:
    """What to call the pipeline with. Empty prompts to keep away from are left to the pipeline.

    The noise is drawn on the CPU, so that a seed means the same on every device.
    """
    takes = parameters(cls)
    if image is not None and "height" not in takes:
        image = image.resize((request.width, request.height), Image.Resampling.LANCZOS)
    guidance: float | None = request.guidance
    if not request.embedded_guidance and not request.cfg_enabled:
        guidance = 1.0
    elif config.sampling.guidance is None and not isinstance(_default(takes, "guidance_scale"), int | float):
        guidance = None  # a pipeline that takes none by default means something else by it
    values: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or None,
        "image": image,
        "height": request.height,
        "width": request.width,
        "num_frames": request.frames,
        "fps": request.fps,
        "frame_rate": request.fps,
        "num_inference_steps": request.steps,
        "guidance_scale": guidance,
        "true_cfg_scale": request.true_guidance if request.cfg else 1.0,
        "strength": request.strength,
        "max_sequence_length": config.text_len,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "np",
    }
    given = {name: value for name, value in values.items() if name in takes and value is not None}
    return given | dict(config.pipeline_args)


def step_callback(cls: type[Any], told: Callable[[Any], None]) -> dict[str, Any]:
    """Arguments with which a pipeline calls `told` with the latents after every step; none where it cannot."""

    def at_step_end(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        told(values.get("latents"))
        return values

    takes = parameters(cls)
    if "callback_on_step_end" in takes:
        return {"callback_on_step_end": at_step_end}
    if "callback" in takes and "callback_steps" in takes:
        return {"callback": lambda step, timestep, latents: told(latents), "callback_steps": 1}
    return {}


def frames_of(result: Any) -> NDArray[np.uint8]:
    """The first picture or video of what a pipeline returned, uint8 [T, H, W, 3]."""
    found = getattr(result, "frames", None)
    found = result.images if found is None else found
    pixels = np.asarray(found[0], dtype=np.float32)
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if not np.isfinite(pixels).all():
        raise LightX2VError("generate", "the pixels are not finite", do="use another dtype, or another mm_type")
    made: NDArray[np.uint8] = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return made


def latent_tokens(request: Request, patch: int, scale: int) -> int:
    """Tokens of one sequence, where a token stands for `patch` x `patch` latents of `scale` x `scale` pixels."""
    frames = math.ceil(request.frames / 4)
    return max(1, frames * (request.height // (scale * patch)) * (request.width // (scale * patch)))
