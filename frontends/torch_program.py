"""Captures a program that `torch.export` has made: the object, or the file that it was saved to.

    captured = TorchProgram().capture("model.pt2")

Nothing is traced again, so nodes keep the modules that they come from, and dims that were dynamic stay so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.utils._pytree as pytree
from torch.export.graph_signature import InputKind

from netlathe.diagnostics import Diagnostic, InputError
from netlathe.frontends.torch_export import listening, translate
from netlathe.frontends.torch_module import check_weights, finish_export
from netlathe.pipeline.interfaces import Captured, Frontend

SUFFIX = ".pt2"

_TRAINING = ("train", "training")  # arguments of operators that do something else then


class TorchProgram(Frontend):
    """An ``ExportedProgram``, or a ``.pt2`` file that ``torch.export.save`` wrote.

    ``args`` and ``kwargs`` are example inputs in place of those that the program brings along; without
    either they are made up, in the shapes at which it was exported (floats at random, ones). Graph
    inputs and outputs are named as :class:`TorchModule`'s, dynamic dims after the inputs that have them
    (``batch``, ``input_ids_dim1``), as a program has no names for them. torch unpickles parts of such a
    file: give only files from a source that you trust.
    """

    name: ClassVar[str] = "torch_program"

    def __init__(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})

    @classmethod
    def accepts(cls, source: Any) -> bool:
        """An ``ExportedProgram``, or a path with the suffix ``.pt2``."""
        if isinstance(source, str | Path):
            return Path(source).suffix == SUFFIX
        return isinstance(source, torch.export.ExportedProgram)

    def sources(self, source: Any) -> Mapping[str, Path] | None:
        """The file, if it is one.

        Raises:
            InputError: there is no such file.
        """
        return {Path(source).name: _existing(source)} if isinstance(source, str | Path) else None

    def capture(self, source: str | Path | torch.export.ExportedProgram) -> Captured:
        """Capture ``source``.

        Raises:
            InputError: the file cannot be read, the program was exported to be trained or for another device,
                a weight is not finite, or there are no example inputs that fit.
            CaptureError: the program cannot be expressed, or the graph is not the same function.
        """
        program = source if isinstance(source, torch.export.ExportedProgram) else _load(source)
        what = "the program" if program is source else str(source)
        args, kwargs = self.args, self.kwargs
        if not args and not kwargs:
            args, kwargs = program.example_inputs or _made_up(program, what)
        _check_use(program, what)
        state = {**program.state_dict, **program.constants}
        check_weights(state, program.graph_signature.parameters, what)
        return finish_export(
            translate(program, args, kwargs, what=what), source=what, frontend=self.name
        )


def _existing(source: str | Path) -> Path:
    path = Path(source)
    if not path.is_file():
        raise InputError(Diagnostic("torch.missing", "there is no such file", at=str(path)))
    return path


def _load(source: str | Path) -> torch.export.ExportedProgram:
    path = _existing(source)
    with listening() as noise:
        try:
            return torch.export.load(path)
        except Exception as error:  # a deserializer meets whatever a file holds
            failure = error
    raise InputError(
        Diagnostic(
            "torch.program",
            f"torch {torch.__version__} cannot load it: {type(failure).__name__}: {failure}",
            at=str(path),
            notes=tuple(f"torch: {line}" for line in noise[-2:]),
            help="give a file that torch.export.save wrote, best with this release of torch",
        )
    ) from failure


def _made_up(program: torch.export.ExportedProgram, what: str) -> Any:
    """Positional and named inputs of the shapes at which a program was exported that brings none along.

    Raises:
        InputError: it does not say how large they are.
    """
    rng = torch.Generator().manual_seed(0)
    leaves = []
    for spec, node in zip(program.graph_signature.input_specs, program.graph.nodes, strict=False):
        if spec.kind is not InputKind.USER_INPUT:
            continue
        value = node.meta.get("val", getattr(spec.arg, "value", None))
        if torch.is_tensor(value):
            shape = [_known(size) for size in value.shape]
            if None in shape:
                raise InputError(
                    Diagnostic(
                        "torch.example",
                        f"{what} brings no example inputs along, and does not say how large"
                        f" {node.name!r} was",
                        help="give args=(...) and kwargs={...} as you would call it",
                    )
                )
            filled = torch.ones(shape, dtype=value.dtype)
            value = filled.normal_(generator=rng) if value.is_floating_point() else filled
        leaves.append(_known(value) if isinstance(value, torch.SymInt) else value)
    into = program.call_spec.in_spec
    assert into is not None  # every exported program has one
    return pytree.tree_unflatten(leaves, into)


def _known(size: Any) -> Any:
    """A size as it was when the program was exported; None where that is not known."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _argument(node: torch.fx.Node, name: str) -> Any:
    """What an operator is called with as ``name``; None where it has no such argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for place, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return node.args[place] if place < len(node.args) else node.kwargs.get(name)
    return None


def _check_use(program: torch.export.ExportedProgram, what: str) -> None:
    """Refuse a program that is made for training, or for another device than the CPU."""
    for name, tensor in (*program.state_dict.items(), *program.constants.items()):
        if torch.is_tensor(tensor) and tensor.device.type != "cpu":
            raise InputError(
                Diagnostic(
                    "torch.device",
                    f"{name!r} of {what} lies on {tensor.device}",
                    help="export the module on the CPU, or move the program with"
                    " torch.export.passes.move_to_device_pass",
                )
            )
    for node in program.graph.nodes:
        if any(_argument(node, name) is True for name in _TRAINING):
            raise InputError(
                Diagnostic(
                    "torch.training",
                    f"{what} was exported in training mode",
                    at=f"{node.name} = {node.target}",
                    help="call the module's eval() before torch.export.export",
                )
            )
