"""The overlay in Amaranth: one file a unit; :mod:`netlathe.backends.fpga.core.top` connects them."""
