"""The scales of queries, keys and values for `fa3_int8_static_ref`, found while a DiT runs.

msModelSlim's rule: of each call the shortest window that holds 0.9999 of a head's values (all of them for V), and over
the calls the lowest and the highest end; the scale is the larger absolute end over 127.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lightx2v.attention.fa3 import prepared
from lightx2v.attention.policy import Watched
from lightx2v.attention.scales import SCALES, child_of, named_parts, scale_tensors
from lightx2v.errors import LightX2VError
from lightx2v.models.base import DiT
from lightx2v.quant.calibration.histogram import Histogram
from lightx2v.quant.calibration.ranges import histogram_window, recall_scale
from lightx2v.quant.hadamard import rotation_size

RATIOS: Mapping[str, float] = {"q": 0.9999, "k": 0.9999, "v": 1.0}
"""Share of the values that a window holds; msModelSlim's."""


class AttentionObserver:
    """The windows of every attention that it looks at: the lowest and highest ends [H] so far, by tensor name."""

    def __init__(self, rotated: bool, smoothed: bool) -> None:
        self.rotated, self.smoothed = rotated, smoothed
        self._sizes: dict[str, int] = {}
        self._windows: dict[str, tuple[Tensor, Tensor]] = {}

    def see(self, holder: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take note of a call with q [B, L, H, Dh], k and v [B, S, H, Dh]; `holder` is where its scales will be."""
        size = self._sizes[holder] = rotation_size(q.shape[-1]) if self.rotated else 0
        with torch.no_grad():
            q, k = prepared(q, k, size, self.smoothed)
            for leaf, x in zip(SCALES, (q, k, v), strict=True):
                self._widen(f"{holder}.{leaf}", *_window(x, RATIOS[leaf]))

    def scales(self) -> dict[str, Tensor]:
        """The tensors to write into the checkpoint, by name, as `attention.scales` reads them.

        Raises LightX2VError when no attention was called.
        """
        if not self._sizes:
            raise LightX2VError("calibration", "no attention was called", do="run the model while it is observed")
        found: dict[str, Tensor] = {}
        for holder, size in self._sizes.items():
            of_heads = {leaf: recall_scale(*self._windows[f"{holder}.{leaf}"]) for leaf in SCALES}
            tensors = scale_tensors(of_heads, size, self.smoothed)
            found |= {f"{holder}.{leaf}": tensor for leaf, tensor in tensors.items()}
        return found

    def state(self) -> dict[str, Tensor]:
        """Everything that was seen, as tensors that can be stored."""
        ends = {name: torch.stack(window) for name, window in self._windows.items()}
        return ends | {f"{holder}.rotation": torch.tensor(size) for holder, size in self._sizes.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state`, as if its calls had been seen here."""
        for name, tensor in state.items():
            holder, _, leaf = name.rpartition(".")
            if leaf in SCALES:
                self._widen(name, tensor[0], tensor[1])
            else:
                self._sizes[holder] = int(tensor)

    @contextmanager
    def watching(self, dit: DiT, names: Sequence[str] = ("*",)) -> Iterator[AttentionObserver]:
        """Inside the block, see every call of the attentions of `dit` whose modules match one of the globs `names`.

        What the calls give is not touched, and the backends may change meanwhile. Raises LightX2VError where no module
        matches.
        """
        parts = list(dit.attention_parts())
        places = zip(parts, named_parts(cast(nn.Module, dit), parts), strict=True)
        chosen = [
            (part, f"{module}.{child_of(attribute)}")
            for part, (module, attribute) in places
            if any(fnmatchcase(module, glob) for glob in names)
        ]
        if not chosen:
            raise LightX2VError("calibration", f"no attention of the model is named {' or '.join(names)}")
        for part, holder in chosen:
            setattr(part.module, part.name, Watched(getattr(part.module, part.name), partial(self.see, holder)))
        try:
            yield self
        finally:
            for part, _ in chosen:
                setattr(part.module, part.name, getattr(part.module, part.name).function)

    def _widen(self, name: str, low: Tensor, high: Tensor) -> None:
        low, high = low.cpu(), high.cpu()
        if name in self._windows:
            before = self._windows[name]
            low, high = torch.minimum(before[0], low), torch.maximum(before[1], high)
        self._windows[name] = low, high


def observe_attention(
    dit: DiT, names: Sequence[str] = ("*",), *, rotated: bool = True, smoothed: bool = True
) -> AbstractContextManager[AttentionObserver]:
    """A context in which every call of some attentions of `dit` is seen: `AttentionObserver.watching`.

    `rotated` and `smoothed`: what is done to queries and keys before they are rounded (`attention.fa3`); the scales
    hold for that alone.
    """
    return AttentionObserver(rotated, smoothed).watching(dit, names)


def _window(x: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """The window of each head of x [B, L, H, Dh]: its ends [H], float32."""
    values = x.float().permute(2, 0, 1, 3).flatten(1)
    if ratio == 1:
        return values.aminmax(dim=1)
    histogram = Histogram(channels=len(values))
    histogram.update(values)
    return histogram_window(histogram, ratio)
