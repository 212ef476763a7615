"""What a cache did to one request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from lightx2v.features.base import StackFeature
from lightx2v.models.base import Branch


@dataclass
class CacheReport:
    """Forwards of one request by branch, and the memory that was kept between them."""

    method: str
    computed: dict[Branch, int] = field(default_factory=dict)
    """Forwards in which everything was computed."""
    recalled: dict[Branch, int] = field(default_factory=dict)
    """Forwards in which something was recalled."""
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """For methods that recall parts of blocks: how often each kind was computed, and recalled."""
    kept_bytes: int = 0
    """The most memory that was kept at once."""
    saved_bytes: int = 0
    """What fp8 saved beside that, against the compute dtype."""

    def count(self, branch: Branch, computed: bool) -> None:
        """One forward more."""
        counts = self.computed if computed else self.recalled
        counts[branch] = counts.get(branch, 0) + 1

    def count_part(self, kind: str, computed: bool) -> None:
        """One part of a block more."""
        there, recalled = self.parts.get(kind, (0, 0))
        self.parts[kind] = (there + 1, recalled) if computed else (there, recalled + 1)

    def kept(self, nbytes: int, plain_bytes: int) -> None:
        """So much is kept now, which without fp8 would be `plain_bytes`."""
        if nbytes > self.kept_bytes:
            self.kept_bytes, self.saved_bytes = nbytes, plain_bytes - nbytes

    @property
    def forwards(self) -> int:
        return sum(self.computed.values()) + sum(self.recalled.values())

    @property
    def computed_forwards(self) -> int:
        return sum(self.computed.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "forwards": self.forwards,
            "computed": dict(self.computed),
            "recalled": dict(self.recalled),
            "parts": {
                kind: {"computed": computed, "recalled": again} for kind, (computed, again) in self.parts.items()
            },
            "kept_bytes": self.kept_bytes,
            "saved_bytes": self.saved_bytes,
        }

    def line(self) -> str:
        """The report for the log."""
        names = sorted({*self.computed, *self.recalled})
        shares = (
            f"{self.computed.get(n, 0)} of {self.computed.get(n, 0) + self.recalled.get(n, 0)} {n}" for n in names
        )
        saved = f", fp8 saved {self.saved_bytes / 2**20:.1f}" if self.saved_bytes else ""
        return f"{self.method}: computed {', '.join(shares)}; kept {self.kept_bytes / 2**20:.1f} MiB{saved}"


class Cache(StackFeature, Protocol):
    """A method, alone or several in one."""

    @property
    def method(self) -> str:
        """Its name in the configuration."""
        ...

    @property
    def report(self) -> CacheReport:
        """Of the latest request."""
        ...

    def kept_streams(self, blocks: int) -> float:
        """How many tensors of the size of the stream of tokens it keeps for each branch, with so many blocks."""
        ...
