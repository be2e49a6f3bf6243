"""Captures an `nn.Module` with `torch.export`, and checks the graph against the module itself.

    captured = TorchModule(args=(x,), dynamic={"x": {0: "batch"}}).capture(module)

The module is captured in eval mode and left as it was. Its parameters are bound, not copied: the
captured graph sees later in-place changes of the weights, so capture again after training on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch

from netlathe.execute.torch_ops import storage
from netlathe.frontends.compare import Original
from netlathe.frontends.finish import finish
from netlathe.frontends.finite import check_finite
from netlathe.frontends.torch_export import Exported, export
from netlathe.frontends.torch_signature import DynamicDims
from netlathe.pipeline.interfaces import Captured, Frontend


class TorchModule(Frontend):
    """An ``nn.Module`` with example inputs.

    ``args`` and ``kwargs`` are what the module is called with; tensors among them become graph
    inputs named after ``forward``'s parameters (nested ones as ``name.key``), everything else is
    fixed. ``dynamic`` names dims that may vary: ``{"input_ids": {0: "batch", 1: "sequence"}}``;
    None infers them, which the ledger lists; ``{}`` fixes every shape. Outputs are named by the
    module's dict keys or dataclass fields, else ``output`` or ``output_0``, ``output_1``, ...
    """

    name: ClassVar[str] = "torch_module"

    def __init__(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        dynamic: DynamicDims | None = None,
    ) -> None:
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        self.dynamic = dynamic

    @classmethod
    def accepts(cls, source: Any) -> bool:
        """Any ``nn.Module`` that is not a graph already."""
        return isinstance(source, torch.nn.Module) and not isinstance(source, torch.fx.GraphModule)

    def capture(self, source: torch.nn.Module) -> Captured:
        """Capture ``source``.

        Raises:
            InputError: the example inputs or dynamic dims do not fit, or a weight is not finite.
            CaptureError: the module cannot be exported, or the graph is not the same function.
        """
        what = type(source).__name__
        parameters = dict(source.named_parameters(remove_duplicate=False))
        check_weights(source.state_dict(keep_vars=True), parameters, what)
        exported = export(source, self.args, self.kwargs, self.dynamic, what=what)
        return finish_export(exported, source=what, frontend=self.name)


def check_weights(state: Mapping[str, Any], parameters: Collection[str], what: str) -> None:
    """Look at every float tensor of ``state``; those that are no ``parameters`` may hold -inf, as masks do.

    Raises:
        InputError: see :func:`check_finite`.
    """
    floats = [(n, t) for n, t in state.items() if torch.is_tensor(t) and t.is_floating_point()]
    masks = frozenset(name for name, _ in floats if name not in parameters)
    check_finite(((name, storage.to_numpy(t)) for name, t in floats), what, allow=masks)


def finish_export(exported: Exported, *, source: str, frontend: str, **extra: Any) -> Captured:
    """The common tail for everything that came through `torch.export`."""
    original = Original(
        run=exported.run,
        moved=exported.moved,
        intermediates=exported.intermediates,
        example=exported.example,
        bounds=exported.bounds,
    )
    return finish(
        exported.model,
        original,
        source=source,
        frontend=frontend,
        dynamic=exported.dynamic,
        entries=exported.entries,
        **extra,
    )
