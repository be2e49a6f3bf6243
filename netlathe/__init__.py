"""NetLathe: graph passes that make neural networks smaller, checked after every pass."""

__version__ = "0.1.0"
