"""Interfaces of other quantization packages on this engine, for models that stay in their own libraries."""
