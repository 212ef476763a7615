"""Measures what a feature needs to know of a model: `lightx2v calibrate`."""
