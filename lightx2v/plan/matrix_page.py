"""`python -m lightx2v.plan.matrix_page > docs/features.md`: the matrix as a page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from lightx2v.errors import ConfigError
from lightx2v.plan.matrix import AXES, RUNS, Axis, Value, goes_with, refusal

_TITLES = {"wan2.1": "Wan2.1", "flux": "FLUX.1"}

_TOP = """\
# Features together

Made by `python -m lightx2v.plan.matrix_page > docs/features.md` from `lightx2v/plan/matrix.py`; change that, not
this.

Features attach to a model from outside, so two of them combine unless there is a reason why they cannot. `resolve`
accepts or refuses a configuration before weights are read, and says why. The tables below hold every pair: *yes*, or
what is refused, with the number of the reason.

`tests/e2e/test_matrix.py` runs every accepted pair on tiny-wan and on a tiny random FLUX.1, in float32, {steps} steps
with guidance, and compares the latents with those of the plain run. Where nothing approximate is on, they are
bit-equal. Else the root mean square of the difference, over that of the latents, is within the sum of what both
features are stated to change, in the first table. Where a feature asks for another result, such as another solver,
the plain run has it too; a LoRA is compared with the model whose weights have it in them. Every refused pair is
refused with the same words. Graphs are recorded by a stand-in there, since a CPU records none. What the VAE makes of
the latents, in tiles or whole, is not in these numbers. Many features in one configuration (quantization, 8-bit
attention, cache, offload, LoRA as a branch, compile) are within the sum of their errors as well.

What the pair alone does not decide comes on top: a library or a device that is missing (`lightx2v doctor`), a cache
without coefficients for a model (`lightx2v calibrate --cache`), a LoRA to be merged into a checkpoint that holds
codes ([lora.md](lora.md)), what a pipeline of diffusers does not offer ([diffusers.md](diffusers.md)).
"""

_ERRORS = """\
## What each one changes

At most, and about twice what was measured: tiny models with few steps are far more sensitive than large ones with many.
*0* is bit-equal.
"""


class _Reasons:
    """Numbers for reasons, from 1 on, as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, error: ConfigError) -> int:
        text = f"`{error.where}`: {error.what}"
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def _table(rows: Iterable[Sequence[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def _settings(value: Value) -> str:
    return ", ".join(f"`{key}` {json.dumps(entry)}" for key, entry in value.settings.items())


def _error(value: Value, family: str) -> str:
    return "another result" if value.redefines else f"{value.errors.get(family, 0):g}"


def _cell(family: str, value: Value, own: Axis, axis: Axis, reasons: _Reasons) -> str:
    """How `value` goes with the values of `axis`."""
    if axis is own or not goes_with(own, axis):
        return ""
    refused = {other.name: error for other in axis.values if (error := refusal(family, value, other)) is not None}
    if not refused:
        return "yes"
    numbers = {name: reasons.number(error) for name, error in refused.items()}
    if len(refused) == len(axis.values):
        return f"no [{', '.join(map(str, sorted(set(numbers.values()))))}]"
    return "not " + ", ".join(f"{name} [{number}]" for name, number in numbers.items())


def _family(family: str, reasons: _Reasons) -> str:
    rows = [["", *(axis.name for axis in AXES)]]
    for own in AXES:
        for value in own.values:
            name = own.name if own.name == value.name else f"{own.name}: {value.name}"
            rows.append([f"**{name}**", *(_cell(family, value, own, axis, reasons) for axis in AXES)])
    return f"## {_TITLES[family]}\n\n{_table(rows)}\n"


def page() -> str:
    """The text of docs/features.md."""
    steps = {run["sampling.steps"] for run in RUNS.values()}
    changes = [["feature", "form", "settings", *_TITLES.values()]]
    for axis in AXES:
        for value in axis.values:
            changes.append([axis.name, value.name, _settings(value), *(_error(value, family) for family in _TITLES)])
    reasons = _Reasons()
    tables = [_family(family, reasons) for family in RUNS]
    why = "\n".join(f"{number}. {text}" for number, text in enumerate(reasons.texts, 1))
    parts = [_TOP.format(steps=steps.pop()), f"{_ERRORS}\n{_table(changes)}\n", *tables, f"## Reasons\n\n{why}\n"]
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
