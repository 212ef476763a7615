"""One request with every default filled in: family defaults < checkpoint defaults < config."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightx2v.config.schema import Config


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. Sizes in pixels, `fps` in frames a second."""

    task: str
    prompt: str
    negative_prompt: str
    image_path: str | None
    seed: int
    height: int
    width: int
    frames: int
    fps: int
    steps: int
    shift: float | None
    """None: as the checkpoint's schedule has it for this size."""
    guidance: float
    """The scale that the user turns: of classifier-free guidance, or the model's input where it takes one."""
    true_guidance: float
    """Scale of classifier-free guidance for models that take `guidance` as an input."""
    embedded_guidance: bool
    """Whether the model takes `guidance` as an input."""
    cfg_enabled: bool
    solver: str
    strength: float | None = None
    """How far the image of an image-to-image request is noised; None: it is seen in another way."""
    step_list: tuple[int, ...] | None = None
    """Timesteps of a step-distilled model."""

    @property
    def cfg_scale(self) -> float:
        """Scale of classifier-free guidance."""
        return self.true_guidance if self.embedded_guidance else self.guidance

    @property
    def cfg(self) -> bool:
        """Whether the unconditional branch runs; with a scale of 1 it would have no weight."""
        return self.cfg_enabled and self.cfg_scale != 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cfg": self.cfg}


def build_request(config: Config, defaults: dict[str, Any], embedded_guidance: bool = False) -> Request:
    """Fill what `config` leaves open from `defaults`, which has all of the keys below."""
    chosen: dict[str, Any] = {
        "height": config.video.height,
        "width": config.video.width,
        "frames": config.video.frames,
        "fps": config.video.fps,
        "steps": config.sampling.steps,
        "shift": config.sampling.shift,
        "guidance": config.sampling.guidance,
        "solver": config.sampling.solver,
        "strength": config.sampling.strength,
        "step_list": config.sampling.denoising_step_list,
    }
    if chosen["step_list"] is not None:
        defaults = defaults | {"steps": len(chosen["step_list"]), "solver": "euler"}
    filled = {key: defaults[key] if value is None else value for key, value in chosen.items()}
    return Request(
        task=config.task,
        prompt=config.prompt,
        negative_prompt=config.negative_prompt,
        image_path=config.image_path,
        seed=config.seed,
        true_guidance=config.sampling.true_guidance or 1.0,
        embedded_guidance=embedded_guidance,
        cfg_enabled=config.sampling.cfg is None or config.sampling.cfg,
        **filled,
    )
