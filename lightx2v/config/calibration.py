"""Settings of `lightx2v calibrate --output`: how a model's weights are quantized with its inputs in view. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lightx2v.config.section import Count, Fraction, Name, PositiveInt, Section

Observer = Literal["minmax", "percentile", "mse", "histogram", "mix"]
Smooth = Literal["none", "smoothquant", "awq", "iterative", "flexible", "svdquant"]
Solver = Literal["nearest", "gptq", "hqq"]


class CalibrationConfig(Section):
    """How `lightx2v calibrate` finds the weights and scales of the mm_types that `mm_config` names."""

    observer: Observer = Field(
        default="minmax", description="How the range of an input is found from its histogram, for static mm_types."
    )
    percent: Annotated[float, Field(gt=50, le=100)] = Field(
        default=99.99, description="Observer percentile: how many of a hundred values are within the range."
    )
    smooth: Smooth = Field(default="none", description="How channels of inputs and weights are balanced (multipliers).")
    alpha: Fraction | None = Field(
        default=None, description="Exponent of the input's range in the multipliers; null: the method's own."
    )
    beta: Fraction | None = Field(
        default=None, description="Method svdquant, flexible: exponent of the weight's range; null: searched."
    )
    smooth_layers: Annotated[tuple[Name, ...], Field(strict=False)] = Field(
        default=("*",), description="Globs of the layers that are smoothed."
    )
    fold: bool = Field(default=True, description="Put multipliers into the norm before a layer where there is one.")
    rotation: PositiveInt | Literal["auto"] | None = Field(
        default=None, description="Channels that a Hadamard rotation mixes, a power of two; 'auto': as many as fit."
    )
    rank: Count = Field(default=0, description="Rank of a branch in 16 bits beside each weight (SVDQuant); 0: none.")
    iterations: PositiveInt = Field(default=100, description="Most refinements of that branch.")
    solver: Solver = Field(default="nearest", description="How weights are rounded.")
    act_order: bool = Field(default=False, description="Solver gptq: columns with the largest inputs first.")
    attention: bool = Field(default=False, description="Find static scales of queries, keys and values too.")
    step_groups: PositiveInt = Field(
        default=1, description="mm_type int8-timestep: into how many groups the static steps fall."
    )
    dynamic_share: Fraction = Field(
        default=0.5, description="mm_type int8-timestep: share of the steps, at the start, with scales for each token."
    )
    sensitive: Name = Field(
        default="int8",
        description="mm_type, where that of mm_config has fewer than 8 bits, of the layers that a family calls"
        " sensitive; 'none': as the others.",
    )
    candidates: Annotated[tuple[Name, ...], Field(strict=False, min_length=2)] = Field(
        default=("Default", "int8", "int4-g64-asym", "nf4-double", "int3-g128-asym", "int2-g128-asym"),
        description="mm_types that --target chooses from.",
    )
    checks: PositiveInt = Field(default=4, description="Clips that --target measures a choice with.")
    margin: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Standard errors of the mean of those clips that --target stays above a PSNR."
    )
    forwards: PositiveInt = Field(
        default=32, description="Forwards of the model, spread over steps, branches and prompts, that are looked at."
    )
    rows: PositiveInt = Field(default=256, description="Tokens of each layer that searches and errors go by.")
