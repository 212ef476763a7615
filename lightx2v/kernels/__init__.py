"""Kernels in Triton for NVIDIA GPUs. Its modules import triton, so they are imported on use, after `platform.probe`.

Shapes: M rows (tokens), N output channels, K input channels; B batch, L tokens, D width, H heads of width Dh.
`ops` has every kernel as an operator of torch. Triton's interpreter runs all of them on a CPU (`TRITON_INTERPRET=1`).
"""
