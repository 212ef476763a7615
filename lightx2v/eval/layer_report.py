"""The errors of linears by themselves, as `layers` found them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerError:
    """One linear: ||y - y_ref|| / ||y_ref|| of its output, over all tokens of the steps that were looked at."""

    name: str
    mm_type: str
    reference_mm_type: str
    out_features: int
    in_features: int
    weight_bytes: int | None
    """Of the tested layer's weight with its scales; None where it is not quantized."""
    error: float
    by_step: Mapping[int, float]
    """The same by step; a layer whose output the model remembers is seen at the first alone."""

    @property
    def kind(self) -> str:
        """The name without the number of the block: what the layers in the same place of every block share."""
        return re.sub(r"(^|\.)\d+\.", r"\1", self.name, count=1)

    @property
    def block(self) -> str:
        """The number of the block, after the name of the list for models with several."""
        found = re.match(r"(.*?)\.?(\d+)\.", self.name)
        return f"{found[1]}.{found[2]}" if found else ""


@dataclass(frozen=True)
class LayerErrors:
    """The errors of all layers that differ, the largest first."""

    layers: tuple[LayerError, ...]
    steps: tuple[int, ...]
    cases: int
    others: tuple[str, ...] = ()
    """Parameters outside of these layers that differ as well: the inputs of the layers behind them are then not those
    that they were made for, and their errors say little."""

    def kinds(self) -> dict[str, tuple[int, float, float]]:
        """Number of layers, mean and largest error by kind, the largest mean first."""
        found: dict[str, list[float]] = {}
        for layer in self.layers:
            found.setdefault(layer.kind, []).append(layer.error)
        rows = {kind: (len(errors), statistics.fmean(errors), max(errors)) for kind, errors in found.items()}
        return dict(sorted(rows.items(), key=lambda row: -row[1][1]))

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "cases": self.cases,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "mm_type": layer.mm_type,
                    "reference_mm_type": layer.reference_mm_type,
                    "shape": [layer.out_features, layer.in_features],
                    "weight_bytes": layer.weight_bytes,
                    "error": layer.error,
                    "by_step": {str(step): error for step, error in layer.by_step.items()},
                }
                for layer in self.layers
            ],
            "kinds": [
                {"kind": kind, "layers": count, "mean": mean, "max": largest}
                for kind, (count, mean, largest) in self.kinds().items()
            ],
            "other_parameters_that_differ": list(self.others),
        }
