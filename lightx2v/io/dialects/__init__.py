"""Readers of the formats of other packages: each turns a checkpoint into one with the tensors of this engine."""
