"""Quantized checkpoints as the files of other packages: codes are copied, and what a package cannot hold is refused."""
