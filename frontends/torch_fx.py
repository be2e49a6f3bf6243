"""Captures a `torch.fx.GraphModule`, symbolically traced or an exported program's `.module()`.

Provenance survives where the graph's nodes carry it (`nn_module_stack`); a traced graph has
at least the paths of the submodules it calls.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from netlathe.frontends.torch_module import TorchModule


class TorchFx(TorchModule):
    """A ``torch.fx.GraphModule`` with example inputs; settings as in :class:`TorchModule`."""

    name: ClassVar[str] = "torch_fx"

    @classmethod
    def accepts(cls, source: Any) -> bool:
        """Any ``torch.fx.GraphModule``."""
        return isinstance(source, torch.fx.GraphModule)
