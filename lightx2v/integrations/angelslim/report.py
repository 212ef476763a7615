"""What a conversion did with each linear layer of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from loguru import logger

from lightx2v.mm.select import LayerPlan

_SHOWN = 5


@dataclass(frozen=True)
class Report:
    """Converted and skipped linear layers by full name, and scales that belong to none."""

    quant_type: str
    matched: Mapping[str, LayerPlan]
    """What computes each quantized layer, and why that."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Why each of the others stays as it is."""
    unused: tuple[str, ...] = ()
    """Names of given scales that no layer took."""

    def __str__(self) -> str:
        lines = [f"{self.quant_type}: {len(self.matched)} linear layers quantized, {len(self.skipped)} not"]
        for reason, count in Counter(f"{plan.library}, {plan.reason}" for plan in self.matched.values()).items():
            lines.append(f"  {count} by {reason}")
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, why in self.skipped.items() if why == reason]
            lines.append(f"  not {_listed(names)}: {reason}")
        return "\n".join(lines)

    def log(self) -> None:
        """Log the summary, and warn of what can hardly be meant."""
        logger.info("{}", self)
        if not self.matched:
            logger.warning("{}: no linear layer was quantized", self.quant_type)
        if self.unused:
            logger.warning("{}: scales of no quantized layer: {}", self.quant_type, _listed(self.unused))


def _listed(names: list[str] | tuple[str, ...]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
