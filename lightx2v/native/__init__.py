"""C++ kernels for CPUs, compiled for the machine on first use: quantized linears, attention, and elementwise passes."""
