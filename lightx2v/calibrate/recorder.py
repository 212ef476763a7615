"""What a cache needs to know of a model, measured while requests run in full."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightx2v.features.base import Predict, RunInfo, Schedule, Stack
from lightx2v.features.cache.stack import relative_change
from lightx2v.models.base import Branch, DiT, StepContext, Stream


@dataclass
class Track:
    """One branch of one request, step after step from the second on."""

    signals: dict[str, list[float]] = field(default_factory=dict)
    """Relative L1 changes of TeaCache's signals: "head" and "blocks", or "head" alone."""
    outputs: list[float] = field(default_factory=list)
    """Relative L1 changes of the model's output."""
    ratios: list[float] = field(default_factory=list)
    """Means over tokens of |r_t| / |r_t-1|, r being what the stack adds to a token."""


class Recorder:
    """Computes everything, and keeps a `Track` for each branch of each request."""

    def __init__(self) -> None:
        self.tracks: list[dict[Branch, Track]] = []
        self.run: RunInfo | None = None
        """The latest request."""

    def schedule(self, run: RunInfo) -> Schedule | None:
        return None

    def begin(self, run: RunInfo, inner: Stack) -> Stack:
        self.run = run
        tracks: dict[Branch, Track] = {branch: Track() for branch in run.branches}
        self.tracks.append(tracks)
        before: dict[Branch, tuple[dict[str, Tensor], Tensor]] = {}

        def stack(model: DiT, stream: Stream, context: StepContext) -> Stream:
            signals = _signals(model, stream, context)
            out = inner(model, stream, context)
            sizes = (out.x - stream.x).float().norm(dim=-1)
            if context.branch in before:
                track = tracks[context.branch]
                old_signals, old_sizes = before[context.branch]
                for name, signal in signals.items():
                    change = float(relative_change(signal, old_signals[name]))
                    track.signals.setdefault(name, []).append(change)
                track.ratios.append(float((sizes / old_sizes).mean()))
            before[context.branch] = signals, sizes
            return out

        return stack

    def around(self, run: RunInfo, predict: Predict) -> Predict:
        before: dict[Branch, Tensor] = {}

        def forward(latents: Tensor, timestep: Tensor, step: int, branch: Branch) -> Tensor:
            out = predict(latents, timestep, step, branch)
            if branch in before:
                self.tracks[-1][branch].outputs.append(float(relative_change(out, before[branch])))
            before[branch] = out
            return out

        return forward


def _signals(model: DiT, stream: Stream, context: StepContext) -> dict[str, Tensor]:
    if model.time_signal:
        return {"head": context.time.head, "blocks": context.time.blocks}
    return {"head": model.signal(stream, context)}
