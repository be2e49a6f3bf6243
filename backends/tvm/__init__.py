"""The TVM backend: the IR as kernels of our own, scheduled by us, in a library that TVM's runtime loads.

Nothing in this package imports TVM before :mod:`netlathe.backends.tvm.toolchain` has checked its version.
"""
