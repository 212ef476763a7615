"""Which backend each attention of a model calls at each step: `attention.type`, `cross`, `cross_image` and `rules`.

`resolve_policy` is pure; `PolicySwitch` puts the functions into a model, and between two steps only those that change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lightx2v.attention.base import ANYTHING, ATTENTION, AttentionFn, Backend, Grid, Needs, Part, select_attention
from lightx2v.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from lightx2v.config.features import AttentionConfig
    from lightx2v.platform import DeviceInfo

Slot = tuple[int, Part]
"""One attention of a model: the index of its block, and which one of the block's it is."""

Table = Mapping[Slot, str]
"""The backend of every attention at one step."""

PARTS: tuple[Part, ...] = ("self", "cross", "image")


class ModelPart(Protocol):
    """One attention of a model; `module` has its function as attribute `name`."""

    @property
    def layer(self) -> int: ...
    @property
    def part(self) -> Part: ...
    @property
    def module(self) -> Any: ...
    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class AttentionPolicy:
    """What `resolve_policy` decided."""

    tables: tuple[Table, ...]
    """Each differs from the others."""
    by_step: tuple[int, ...]
    """For every step the index of its table."""
    functions: Mapping[str, AttentionFn]
    """By the backend's registered name."""
    reasons: Mapping[str, str]
    """Why each is used, by name."""
    unused: tuple[str, ...] = ()
    """The rules that cover nothing, in words."""

    def at(self, step: int) -> Table:
        """The backends of step `step`."""
        return self.tables[self.by_step[step]]

    @property
    def backends(self) -> Mapping[str, Backend]:
        return {name: ATTENTION[name] for name in self.functions}

    @property
    def exact(self) -> bool:
        """Whether nothing but rounding sets the result apart from `torch_sdpa`'s."""
        return all(backend.exact for backend in self.backends.values())

    def function(self, name: str, part: ModelPart, grid: Grid | None = None) -> AttentionFn:
        """The function of a backend for one attention of a model, of video tokens on `grid`."""
        backend = ATTENTION[name]
        if backend.for_module is not None:
            return backend.for_module(part.module, part.name)
        return self.functions[name] if backend.for_grid is None or grid is None else backend.for_grid(grid)

    def static_slots(self) -> dict[Slot, str]:
        """The attentions that read scales of the checkpoint at some step, each with its backend."""
        reading = {name for name, backend in self.backends.items() if backend.for_module is not None}
        return {slot: name for table in self.tables for slot, name in table.items() if name in reading}

    def load(self) -> None:
        """Fetch the kernels that are downloaded on first use. Raises LightX2VError."""
        for backend in self.backends.values():
            if backend.load is not None:
                backend.load()

    def describe(self) -> dict[str, Any]:
        """For the plan: which backend where, why, and the rules that cover nothing."""
        rows = [
            {"part": part, "steps": f"{first}:{last}", "layers": layers, "backend": name}
            for part in PARTS
            for first, last, table in self._spans(part)
            for layers, name in _layers(table)
        ]
        return {"where": rows, "why": dict(self.reasons), "unused_rules": list(self.unused)}

    def _spans(self, part: Part) -> list[tuple[int, int, dict[int, str]]]:
        """Runs of steps, from the first to before the last, that have the same backends of `part`, by layer."""
        spans: list[tuple[int, int, dict[int, str]]] = []
        for step in range(len(self.by_step)):
            table = {layer: name for (layer, which), name in sorted(self.at(step).items()) if which == part}
            if spans and spans[-1][2] == table:
                spans[-1] = (spans[-1][0], step + 1, table)
            elif table:
                spans.append((step, step + 1, table))
        return spans


def _layers(table: Mapping[int, str]) -> list[tuple[str, str]]:
    """Runs of layers with the same backend, as slices."""
    runs: list[list[Any]] = []
    for layer, name in table.items():
        if runs and runs[-1][2] == name and runs[-1][1] == layer:
            runs[-1][1] = layer + 1
        else:
            runs.append([layer, layer + 1, name])
    return [(f"{first}:{last}", name) for first, last, name in runs]


def resolve_policy(
    config: AttentionConfig,
    device: DeviceInfo,
    slots: Iterable[Slot],
    steps: int,
    dtype: str = "bfloat16",
    needs: Needs = ANYTHING,
) -> AttentionPolicy:
    """Decide for a model with attentions `slots`, run for `steps` steps. No weights are read.

    Raises ConfigError for an unknown name, a backend that cannot do its part, and a range that is malformed or begins
    beyond the model or the run. `needs.part` and `needs.allow_download` are filled in here.
    """
    slots = sorted(set(slots))
    layers = 1 + max(layer for layer, _ in slots)
    chooser = _Chooser(device, dtype, config.fallback, needs._replace(allow_download=config.allow_download))
    present = [part for part in PARTS if any(which == part for _, which in slots)]
    base = {part: _named(config, part, chooser) for part in present}
    grid: list[dict[Slot, str]] = [{slot: base[slot[1]] for slot in slots} for _ in range(steps)]
    unused = []
    for index, rule in enumerate(config.rules):
        where = f"attention.rules[{index}]"
        chosen_steps = indices(rule.steps, steps, f"{where}.steps", "steps")
        chosen_layers = set(indices(rule.layers, layers, f"{where}.layers", "blocks"))
        covered = [slot for slot in slots if slot[0] in chosen_layers and rule.part in (None, slot[1])]
        if not covered or not chosen_steps:
            unused.append(f"{where}: {rule.type} for {_scope(rule)} covers nothing")
            continue
        if rule.part is None:  # a backend for video tokens leaves the text's attention as it is
            covered = [slot for slot in covered if not chooser.skips(rule.type, slot[1])] or covered
        names = {part: chooser.choose(f"{where}.type", rule.type, part) for part in {slot[1] for slot in covered}}
        for step in chosen_steps:
            grid[step].update({slot: names[slot[1]] for slot in covered})
    tables = list({tuple(table.items()): table for table in grid}.values())
    used = {name for table in tables for name in table.values()}
    return AttentionPolicy(
        tuple(tables),
        tuple(tables.index(table) for table in grid),
        {name: chooser.functions[name] for name in sorted(used)},
        {name: chooser.reasons[name] for name in sorted(used)},
        tuple(unused),
    )


def _named(config: AttentionConfig, part: Part, chooser: _Chooser) -> str:
    """The backend of a part where no rule covers it."""
    key, name = "attention.type", config.type
    if part != "self" and config.cross is not None:
        key, name = "attention.cross", config.cross
    if part == "image" and config.cross_image is not None:
        key, name = "attention.cross_image", config.cross_image
    if key == "attention.type" and chooser.skips(name, part):
        name = "auto"
    return chooser.choose(key, name, part)


@dataclass
class _Chooser:
    """Chooses backends, each once, and keeps their functions and reasons."""

    device: DeviceInfo
    dtype: str
    fallback: bool
    needs: Needs
    functions: dict[str, AttentionFn] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def skips(self, name: str, part: Part) -> bool:
        """Whether `name` is a backend for the attention of video tokens to themselves, and `part` another one."""
        return part != "self" and name in ATTENTION and ATTENTION[name].self_only

    def choose(self, where: str, name: str, part: Part) -> str:
        try:
            function, chosen, reason = select_attention(
                name, self.device, self.fallback, self.dtype, self.needs._replace(part=part)
            )
        except ConfigError as error:
            raise ConfigError(where, error.what, allowed=error.allowed, do=error.do) from error
        self.functions[chosen] = function
        self.reasons.setdefault(chosen, reason)
        return chosen


def indices(text: str | None, count: int, where: str, what: str) -> Sequence[int]:
    """The indices of `count` things that `text` names: numbers and Python slices with commas; None names all.

    Raises ConfigError where it is malformed, or begins beyond the last of them.
    """
    if text is None:
        return range(count)
    chosen: list[int] = []
    for part in text.split(","):
        try:
            bounds = [int(bound) if bound.strip() else None for bound in part.split(":")]
            single = len(bounds) == 1
            span = slice(bounds[0], None if bounds[0] == -1 else (bounds[0] or 0) + 1) if single else slice(*bounds)
            if (single and bounds[0] is None) or len(bounds) > 3 or span.step == 0:
                raise ValueError
        except (ValueError, TypeError):
            raise ConfigError(
                where, f"'{text}' is malformed", allowed="numbers and slices with commas, such as '0,3:7' or '4:'"
            ) from None
        if span.start is not None and not -count <= span.start < count:
            raise ConfigError(where, f"'{text}' begins beyond the last of {count} {what}", allowed=f"0 to {count - 1}")
        chosen += range(count)[span]
    return sorted(set(chosen))


def _scope(rule: Any) -> str:
    scope = [f"{key} {value}" for key in ("steps", "layers", "part") if (value := getattr(rule, key)) is not None]
    return ", ".join(scope) or "everything"


class Watched:
    """An attention function that is looked at: it stays where it is while the function behind it is exchanged."""

    def __init__(self, function: AttentionFn, see: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self.function, self.see = function, see

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        self.see(q, k, v)
        return self.function(q, k, v, mask=mask, scale=scale)


class PolicySwitch:
    """Puts a policy's functions into a model, step by step."""

    def __init__(self, parts: Iterable[ModelPart], policy: AttentionPolicy) -> None:
        self._parts, self._policy = tuple(parts), policy
        self._now: tuple[int, Grid | None] | None = None

    def at(self, step: int, grid: Grid | None = None) -> None:
        """Make the model ready for `step`. `grid` is that of the video tokens, which some backends must know.

        Does nothing where the backends and the grid are those of the step before.
        """
        now = (self._policy.by_step[step], grid)
        if now == self._now:
            return
        table = self._policy.at(step)
        for part in self._parts:
            function = self._policy.function(table[part.layer, part.part], part, grid)
            held = getattr(part.module, part.name)
            if isinstance(held, Watched):
                held.function = function
            elif held is not function:
                setattr(part.module, part.name, function)
        self._now = now
