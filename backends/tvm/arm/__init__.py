"""ARM: cores, cross linking, kernels on NEON registers, and the bare form without a runtime."""
