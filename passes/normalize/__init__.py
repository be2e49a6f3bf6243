"""Passes that bring a captured graph into the IR's normal form and raise fused operators."""
