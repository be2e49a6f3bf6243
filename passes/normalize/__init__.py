"""Passes that bring a captured graph into the IR's normal form and raise fused operators."""

from netlathe.passes.normalize.raising import raise_operators

__all__ = ["raise_operators"]
