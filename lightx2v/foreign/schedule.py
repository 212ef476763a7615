"""The scheduler of a pipeline: its own, or another of diffusers' that it is compatible with; and its shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightx2v.errors import ConfigError
from lightx2v.foreign.index import PipelineFiles, read_json
from lightx2v.request import Request

_SOLVERS = {
    "euler": ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"),
    "unipc": ("UniPCMultistepScheduler",),
    "dpm++": ("DPMSolverMultistepScheduler",),
}
"""diffusers' classes of our solvers."""


def scheduler_config(files: PipelineFiles) -> dict[str, Any]:
    """What the directory says of its scheduler; empty where it has none."""
    path = files.root / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.is_file() else {}


_DYNAMIC = "use_dynamic_shifting"
"""Whether the pipeline gives a shift that goes by the size."""


def shift_key(config: Mapping[str, Any]) -> str | None:
    """What the scheduler calls the shift of its noise levels; None where it has none."""
    return next((key for key in ("flow_shift", "shift") if config.get(key) is not None), None)


def default_shift(config: Mapping[str, Any]) -> float | None:
    """The shift of the pipeline as it is: 1 where there is none, None where it goes by the size."""
    key = shift_key(config)
    return None if config.get(_DYNAMIC) else 1.0 if key is None else float(config[key])


def solver_class(config: Mapping[str, Any], solver: str | None) -> str:
    """The name of the class for `solver`, or the pipeline's own for None. Raises ConfigError."""
    import diffusers

    own = str(config.get("_class_name", "the pipeline's own"))
    if solver is None:
        return own
    compatible = {own, *getattr(getattr(diffusers, own, None), "_compatibles", ())}
    found = next((name for name in _SOLVERS[solver] if name in compatible), None)
    if found is None:
        allowed = [name for name, classes in _SOLVERS.items() if compatible & set(classes)]
        raise ConfigError(
            "sampling.solver", f"'{solver}' does not go with {own}, the scheduler of this pipeline",
            allowed=", ".join(allowed) or "null: the scheduler as it is",
        )  # fmt: skip
    return found


def scheduler_for(scheduler: Any, request: Request) -> Any:
    """`scheduler` with the solver and the shift of `request`: itself where it has them."""
    import diffusers

    if scheduler is None:
        return None
    cls = type(scheduler)
    if request.solver != cls.__name__:
        cls = getattr(diffusers, request.solver)
    changed: dict[str, Any] = {}
    if request.shift != default_shift(scheduler.config):
        key = shift_key(scheduler.config)
        if key is None or request.shift is None:
            raise ConfigError("shift", f"is {request.shift}, and {cls.__name__} has none", do="leave it out")
        changed = {key: request.shift} | ({_DYNAMIC: False} if scheduler.config.get(_DYNAMIC) else {})
    return cls.from_config(scheduler.config, **changed) if changed or cls is not type(scheduler) else scheduler
