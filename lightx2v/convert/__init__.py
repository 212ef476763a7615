"""Conversion of checkpoints: quantization, layouts, LoRA merging, splitting and joining."""
