"""From a config to a plan: what will run, on what, and why. Reads headers only; no weights, no GPU needed."""

from lightx2v.plan.plan import Plan
from lightx2v.plan.resolve import resolve

__all__ = ["Plan", "resolve"]
