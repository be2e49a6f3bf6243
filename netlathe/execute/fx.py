"""The IR as a ``torch.fx.GraphModule``: the same calls as the executor's, as a module to fine-tune.

Weights keep their names: ``encoder.layer.0.ffn.weight`` is ``module.encoder.layer.0.ffn.weight``, so a
``state_dict`` exchanges with the original's. A tied weight is one parameter. The module takes the
graph's inputs by name or position and returns a dict of its outputs.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from netlathe.execute.plan import Program, Slot, Step, plan
from netlathe.execute.torch_ops import storage
from netlathe.ir.provenance import MODULE, SOURCE, module_path

# Inputs that hold statistics or tables: no training changes them.
_NOT_TRAINED = {"BatchNormalization": (3, 4), "RotaryEmbedding": (1, 2)}


def to_fx(model: ir.Model) -> torch.fx.GraphModule:
    """A module computing what ``model`` computes, on the CPU, in evaluation mode.

    Floating-point initializers of rank 1 and more are parameters; scalars, integers, constants of
    nodes, batch statistics and rotary tables are buffers. An input with a default value is a weight,
    not an input.

    Raises:
        LowerError: with every node that has no row in the table.
    """
    program = plan(model)
    return _Emitter({}).emit(program, names=program.output_names).eval()


def weights_of(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Every name in the ``state_dict`` of :func:`to_fx`'s module, with the tensor of the IR behind it.

    No weight is read. A tensor that several bodies read has several names.

    Raises:
        LowerError: with every node that has no row in the table.
    """
    program = plan(model)
    emitter = _Emitter({}, load=_without_contents)
    module = emitter.emit(program, names=program.output_names)
    read = {id(emitter.tensors[key]): tensor for key, tensor in emitter.read.items()}
    state = module.state_dict(keep_vars=True)
    return {name: read[id(tensor)] for name, tensor in state.items()}


def argument_name(name: str) -> str:
    """The argument for the graph input ``name``: what Python cannot spell becomes ``_``."""
    text = re.sub(r"\W", "_", name)
    return text if text and not text[0].isdigit() else f"_{text}"


class _Emitter:
    """Emits one program; ``tensors`` holds the weights emitted so far, bodies included.

    ``load`` makes them of the IR's tensors; ``read`` are those, under the same keys.
    """

    def __init__(
        self,
        tensors: dict[int, torch.Tensor],
        load: Callable[[ir.TensorProtocol], torch.Tensor] = storage.load,
        read: dict[int, ir.TensorProtocol] | None = None,
    ) -> None:
        self.tensors = tensors
        self.load = load
        self.read = {} if read is None else read
        self.root = nn.Module()
        self.graph = torch.fx.Graph()
        self.nodes: dict[Slot, torch.fx.Node] = {}
        self.bodies = 0

    def emit(self, program: Program, names: list[str] | None = None) -> torch.fx.GraphModule:
        """``names``: return a dict with these keys; without them, a tuple, as bodies do."""
        for slot in (*program.inputs, *program.captured):
            if slot not in program.weights:
                self.nodes[slot] = self.graph.placeholder(argument_name(slot.name))
        held = fixed(program)
        for step in program.steps:
            self.step(program, step, held)
        outputs = [self.slot(program, slot, held) for slot in program.outputs]
        if names is None:
            self.graph.output(tuple(outputs))
        else:
            self.graph.output(dict(zip(names, outputs, strict=True)))
        self.graph.lint()
        return torch.fx.GraphModule(self.root, self.graph)

    def step(self, program: Program, step: Step, fixed: set[Slot]) -> None:
        """One call, and one item of its result for each output that the node names."""
        args = tuple(self.argument(program, arg, fixed) for arg in step.args)
        kwargs = {name: self.argument(program, arg, fixed) for name, arg in step.kwargs.items()}
        call = self.graph.call_function(step.function, args, kwargs)
        for key in (MODULE, SOURCE):
            if text := step.node.metadata_props.get(key):
                call.meta[key] = text
        call.meta.setdefault(MODULE, module_path(step.node))
        if not step.returns_tuple:
            (slot,) = step.outputs
            if slot is not None:
                self.nodes[slot] = call
            return
        for index, slot in enumerate(step.outputs):
            if slot is not None:
                self.nodes[slot] = self.graph.call_function(operator.getitem, (call, index))

    def argument(self, program: Program, arg: Any, fixed: set[Slot]) -> Any:
        """An argument as fx takes it: a node, or a literal."""
        if isinstance(arg, Slot):
            return self.slot(program, arg, fixed)
        if isinstance(arg, Program):
            name = f"body_{self.bodies}"
            self.bodies += 1
            body = _Emitter(self.tensors, self.load, self.read)
            self.root.add_module(name, body.emit(arg))
            return self.graph.get_attr(name)
        return arg

    def slot(self, program: Program, slot: Slot, fixed: set[Slot]) -> torch.fx.Node:
        """The node of a slot; a weight is attached when it is first used."""
        if slot not in self.nodes:
            tensor = program.weights[slot]
            if id(tensor) not in self.tensors:
                self.read[id(tensor)] = tensor
                self.tensors[id(tensor)] = _weight(
                    self.load(tensor), trained=slot.trained and slot not in fixed
                )
            target = _attach(self.root, slot.name, self.tensors[id(tensor)])
            self.nodes[slot] = self.graph.get_attr(target)
        return self.nodes[slot]


def fixed(program: Program) -> set[Slot]:
    """Weights that some node reads as statistics or tables."""
    return {
        step.args[position]
        for step in program.steps
        for position in _NOT_TRAINED.get(step.node.op_type, ())
        if position < len(step.args) and isinstance(step.args[position], Slot)
    }


def _without_contents(tensor: ir.TensorProtocol) -> torch.Tensor:
    shape = tensor.shape.numpy()
    return torch.empty(shape, dtype=storage.TORCH_DTYPE[tensor.dtype], device="meta")


def _weight(tensor: torch.Tensor, trained: bool) -> torch.Tensor:
    differentiable = tensor.is_floating_point() and tensor.dtype not in storage.FLOAT8
    return nn.Parameter(tensor) if trained and differentiable and tensor.dim() > 0 else tensor


def _attach(root: nn.Module, name: str, tensor: torch.Tensor) -> str:
    """Put ``tensor`` at the dotted ``name`` below ``root`` and return where it went.

    A part that is empty, taken by something else, or a name that every module has, gets an underscore.
    """
    *path, last = [part or "_" for part in name.split(".")]
    module, taken = root, []
    for part in path:
        while hasattr(module, part) and not isinstance(getattr(module, part), nn.Module):
            part += "_"
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
        taken.append(part)
    while hasattr(module, last):
        last += "_"
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(last, tensor)
    else:
        module.register_buffer(last, tensor)
    return ".".join([*taken, last])
