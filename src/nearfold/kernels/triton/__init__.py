"""Kernels for CUDA devices, written in Triton; imported only where such a device is at hand, or by their tests."""
