"""The results of a benchmark as plain data, as text, and as a section of a Markdown file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightx2v.bench.host import describe
from lightx2v.bench.measure import Entry, Measured
from lightx2v.errors import ConfigError
from lightx2v.io.files import whole_file


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of each entry in a table."""

    title: str
    of: Callable[[Entry], str]


def fact(title: str, key: str, style: str, scale: float = 1.0) -> Column:
    """A column of the numbers that entries hold as the fact `key`, times `scale`; empty where one has none."""

    def cell(entry: Entry) -> str:
        value = entry.facts.get(key)
        return "" if value is None else style.format(value * scale)

    return Column(title, cell)


@dataclass(frozen=True, slots=True)
class Case:
    """One piece of work that all entries did. `baseline` names the entry that the others are held against."""

    title: str
    work: Mapping[str, Any]
    measured: Measured
    columns: tuple[Column, ...]

    @property
    def baseline(self) -> Entry:
        """The first entry: plain torch, or the engine without quantization, where they were measured."""
        return self.measured.entries[0]

    def ratio(self, entry: Entry) -> float:
        """Seconds of `entry` over those of the baseline, medians both."""
        return entry.median / self.baseline.median

    def peer_ratios(self) -> dict[str, dict[str, float]]:
        """For each peer, its seconds over those of each entry of the engine: above 1 the engine is faster."""
        ours = [entry for entry in self.measured.entries if entry.kind == "lightx2v"]
        peers = [entry for entry in self.measured.entries if entry.kind == "peer"]
        return {peer.name: {our.name: peer.median / our.median for our in ours} for peer in peers}

    def to_json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "work": dict(self.work),
            "baseline": self.baseline.name,
            "entries": [
                {
                    "name": entry.name,
                    "kind": entry.kind,
                    "seconds": list(entry.seconds),
                    "calls_per_sample": entry.calls,
                    "median_s": entry.median,
                    "min_s": entry.best,
                    "ratio_to_baseline": self.ratio(entry),
                    **entry.facts,
                    **({"stages": {name: list(v) for name, v in entry.stages.items()}} if entry.stages else {}),
                }
                for entry in self.measured.entries
            ],
            "order": list(self.measured.order),
            "peer_over_lightx2v": self.peer_ratios(),
            "skipped": [{"name": one.name, "reason": one.reason} for one in self.measured.skipped],
        }

    def rows(self) -> list[list[str]]:
        """The table of the entries, its heading first."""
        head = ["", *(column.title for column in self.columns), f"/ {self.baseline.name}"]
        body = [
            [entry.name, *(column.of(entry) for column in self.columns), f"{self.ratio(entry):.3f}"]
            for entry in self.measured.entries
        ]
        return [head, *body]

    def ratio_rows(self) -> list[list[str]]:
        """The table of peers over the engine, its heading first; empty without a peer or without an engine's entry."""
        ratios = self.peer_ratios()
        ours = list(next(iter(ratios.values()), {}))
        if not ours:
            return []
        return [["", *ours], *([peer, *(f"{found[our]:.3f}" for our in ours)] for peer, found in ratios.items())]


RATIO_TITLE = "seconds of the row over seconds of the column (above 1: the column is faster)"


@dataclass(frozen=True, slots=True)
class Report:
    """One run of `lightx2v bench`."""

    bench: str
    argv: tuple[str, ...]
    """The command's words after `lightx2v bench`, without where to report."""
    title: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    """What holds for all cases: seed, repeats, the measured peak, and so on."""
    notes: tuple[str, ...]
    cases: tuple[Case, ...]

    @property
    def command(self) -> str:
        return shlex.join(["lightx2v", "bench", *self.argv])

    def to_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "command": self.command,
            "title": self.title,
            "hardware": dict(self.hardware),
            "versions": dict(self.versions),
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "cases": [case.to_json() for case in self.cases],
        }

    def _about(self) -> list[str]:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [describe(dict(self.hardware)), versions, *self.notes]

    def text(self) -> str:
        """What the command prints."""
        lines = self._about()
        for case in self.cases:
            lines += ["", case.title, *_plain(case.rows())]
            if ratios := case.ratio_rows():
                lines += ["", RATIO_TITLE, *_plain(ratios)]
            lines += [f"not measured: {one.name}: {one.reason}" for one in case.measured.skipped]
        return "\n".join(lines)

    def markdown(self) -> str:
        """A section with the command, the hardware, the versions and the tables."""
        lines = [f"### {self.title}", "", *(f"- {_escaped(line)}" for line in self._about())]
        lines += ["", "```bash", self.command, "```"]
        for case in self.cases:
            lines += ["", f"**{_escaped(case.title)}**", "", *_piped(case.rows())]
            if ratios := case.ratio_rows():
                lines += ["", f"{RATIO_TITLE[0].upper()}{RATIO_TITLE[1:]}:", "", *_piped(ratios)]
            if case.measured.skipped:
                lines += ["", *(f"- not measured: {one.name}: {_escaped(one.reason)}" for one in case.measured.skipped)]
        return "\n".join(lines) + "\n"


def write_markdown(path: Path, report: Report) -> None:
    """Put the report into the file, in place of the section of the same title, else at its end.

    Two HTML comments mark a section, so that text around it stays. Raises ConfigError for a file that cannot be read.
    """
    try:
        old = path.read_text("utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--markdown", f"{path} cannot be read: {error}") from error
    name = re.sub(r"[^a-z0-9.]+", "-", report.title.lower()).strip("-")
    begin, end = f"<!-- bench {name} -->", f"<!-- /bench {name} -->"
    section = f"{begin}\n{report.markdown()}{end}"
    marked = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if marked.search(old):
        new = marked.sub(lambda _: section, old, count=1)
    else:
        new = f"{old.rstrip()}\n\n{section}\n".lstrip()
    with whole_file(path, error=ConfigError) as temporary:
        temporary.write_text(new, "utf-8")


def _plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]


def _piped(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = ([_escaped(cell) for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *body)]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
