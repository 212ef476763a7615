"""Pipelines of diffusers whose linear layers, attention and caches are ours: `model_cls: diffusers`."""

from lightx2v.foreign.plan import MODEL_CLS, PipelinePlan, resolve
from lightx2v.foreign.runner import PipelineRunner

__all__ = ["MODEL_CLS", "PipelinePlan", "PipelineRunner", "resolve"]
