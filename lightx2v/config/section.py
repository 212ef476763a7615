"""What every group of settings is made of. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(min_length=1)]
Path = Annotated[str, Field(min_length=1)]
Numbers = Annotated[tuple[float, ...], Field(strict=False)]
"""A list of numbers in JSON."""


class Section(BaseModel):
    """Base of every group of settings: frozen, strict types, no unknown keys, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
