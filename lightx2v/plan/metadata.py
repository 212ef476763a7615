"""What a result carries about how it was made."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Protocol

import lightx2v
from lightx2v.config.schema import Config
from lightx2v.request import Request


class Made(Protocol):
    """A plan: of one of our own models, or of a pipeline of diffusers."""

    @property
    def config(self) -> Config: ...

    @property
    def hash(self) -> str: ...


def result_metadata(plan: Made, request: Request) -> dict[str, str]:
    """What is written into a result: prompt, seed, the request and configuration, plan hash, versions."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": str(request.seed),
        "request": json.dumps(request.to_json()),
        "config": plan.config.model_dump_json(exclude_defaults=True),
        "plan": plan.hash,
        "lightx2v": lightx2v.__version__,
        "versions": json.dumps({name: version(name) for name in ("torch", "diffusers", "transformers")}),
    }
