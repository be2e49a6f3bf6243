"""CUDA: the same IR and op table as kernels for NVIDIA GPUs, compiled by nvcc where there is no GPU."""
