"""Kernel templates: each writes the loops of one family of operators, with their schedule."""
