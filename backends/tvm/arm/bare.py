"""A lowered model as kernels that take plain pointers, and the calls that make it.

TVM's packed calls, its argument checks, its thread pool and its workspace are all left out: a kernel
becomes a C function of its tensors and of its scratch buffers, which get a place in the arena like any
tensor. What was parallel runs in order. This is what runs in the worker process.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, tirx

from netlathe.backends.tvm import build
from netlathe.backends.tvm.arm.plan import Place, Program, Span, Step, place
from netlathe.backends.tvm.lowering import Lowered, Lowering
from netlathe.backends.tvm.machine import Machine
from netlathe.diagnostics import Diagnostic, LowerError


def program(model: ir.Model, machine: Machine, prefix: str, *, only_plan: bool) -> Program:
    """Lower, plan and compile ``model``, whose sizes are all numbers and whose weights are not read.

    Names of kernels begin with ``prefix``. With ``only_plan`` there is no code.

    Raises:
        LowerError: with every node that has no form here, or a size that only data decides.
    """
    lowered = Lowering(model, machine, in_place=False).run()
    _check_sizes(lowered.module["main"])
    kernels = {
        variable.name_hint: _Kernel(function, f"{prefix}_{variable.name_hint}")
        for variable, function in lowered.module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    calls = _Calls(kernels, lowered)
    calls.read(lowered.module["main"])
    spans = [tensor.span for tensor in calls.tensors if tensor.span is not None]
    arena = place(spans)
    return Program(
        calls.steps(),
        lowered.parameters,
        arena,
        sum(span.size for span in spans),
        b"" if only_plan else _compiled([k.function for k in kernels.values()], machine),
        lowered.kernels,
    )


def _compiled(functions: Sequence[Any], machine: Machine) -> bytes:
    """One object file."""
    target = build.target(machine)
    named = {str(function.attrs["global_symbol"]): function for function in functions}
    passes = tirx.transform
    module = tvm.ir.transform.Sequential(
        [
            passes.BindTarget(target.with_host(target)),
            passes.VectorizeLoop(True),
            passes.LowerTVMBuiltin(),
            passes.LowerIntrin(),
        ]
    )(tvm.IRModule({name: named[name] for name in sorted(named)}))
    generate: Any = tvm.get_global_func("target.build.llvm")
    with tempfile.TemporaryDirectory(prefix="netlathe-") as folder:
        path = Path(folder) / "kernels.o"
        generate(module, target).write_to_file(str(path), "o")
        return path.read_bytes()


def _check_sizes(main: Any) -> None:
    """Let every binding be a call of a kernel or another view: then all sizes are numbers.

    Raises:
        LowerError: with every binding that looks at data for a size.
    """
    gaps = [
        Diagnostic(
            "tvm.bare.size",
            f"{binding.var.name} has sizes that are decided by data, and a static memory plan"
            " needs numbers",
            help="build with form='library'",
        )
        for block in main.body.blocks
        for binding in block.bindings
        if not isinstance(binding, relax.VarBinding) or not _is_planned(binding.value)
    ]
    if gaps:
        raise LowerError(gaps)


def _is_planned(value: Any) -> bool:
    if isinstance(value, relax.TupleGetItem):
        return True
    name = _operator(value)
    return name == "relax.reshape" or (name == "relax.call_tir" and len(value.args) == 2)


def _operator(value: Any) -> str:
    return str(getattr(getattr(value, "op", None), "name", ""))


class _Kernel:
    """A PrimFunc rewritten to take pointers; ``scratch`` has the bytes of each buffer it works in."""

    def __init__(self, function: Any, name: str) -> None:
        self.name = name
        self.scratch: list[int] = []
        self._scratch: list[Any] = []
        body = self._walked(function.body)
        pointers = [_pointer(parameter, parameter.name) for parameter in function.params]
        declared = [
            tirx.DeclBuffer(parameter, data=pointer)
            for parameter, pointer in zip(function.params, pointers, strict=True)
        ]
        made = tirx.PrimFunc([*pointers, *self._scratch], tirx.SeqStmt([*declared, body]))
        self.function = made.with_attr({"global_symbol": name, "tirx.noalias": True})

    def _walked(self, part: Any) -> Any:
        if isinstance(part, tirx.SeqStmt):
            return tirx.SeqStmt([self._walked(item) for item in part.seq])
        if isinstance(part, tirx.For):
            serial = int(part.kind) == int(tirx.ForKind.PARALLEL)
            kind = tirx.ForKind.SERIAL if serial else part.kind
            return tirx.For(part.loop_var, part.min, part.extent, kind, self._walked(part.body))
        if isinstance(part, tirx.IfThenElse):
            other = None if part.else_case is None else self._walked(part.else_case)
            return tirx.IfThenElse(part.condition, self._walked(part.then_case), other)
        if isinstance(part, tirx.While):
            return tirx.While(part.condition, self._walked(part.body))
        if isinstance(part, tirx.AllocBuffer) and _type(part.buffer).storage_scope == "global":
            pointer = _pointer(part.buffer, f"scratch{len(self._scratch)}")
            self._scratch.append(pointer)
            self.scratch.append(_bytes(part.buffer.ty))
            return tirx.DeclBuffer(part.buffer, data=pointer)
        return part


def _type(buffer: Any) -> Any:
    return buffer.ty


def _pointer(buffer: Any, name: str) -> Any:
    return tirx.Var(name, tvm.ir.PointerType(buffer.ty.dtype))


def _bytes(type_: Any) -> int:
    shape = [_number(dim) for dim in type_.shape]
    dtype = str(type_.dtype)
    return math.prod(shape) * (1 if dtype == "bool" else np.dtype(dtype).itemsize)


def _number(dim: Any) -> int:
    found = tvm.sym.Analyzer().simplify(dim)
    assert isinstance(found, tirx.IntImm), f"{dim} is no number"
    return int(found.value)


@dataclass(eq=False)
class _Tensor:
    """A tensor of the program: at a fixed place, or with a span in the arena."""

    size: int
    fixed: Place | None = None
    span: Span | None = None

    @property
    def place(self) -> Place:
        if self.fixed is not None:
            return self.fixed
        assert self.span is not None
        return Place("arena", self.span.offset)


@dataclass
class _Calls:
    """Reads the bindings of the Relax function in order."""

    kernels: dict[str, _Kernel]
    lowered: Lowered
    tensors: list[_Tensor] = field(default_factory=list)
    _values: dict[Any, list[_Tensor]] = field(default_factory=dict)  # relax variable -> its tensors
    _calls: list[tuple[str, list[_Tensor], int]] = field(default_factory=list)

    def read(self, main: Any) -> None:
        """Collect the calls, and decide which tensors need memory and how long."""
        constants = len(self.lowered.parameters)
        inputs = len(main.params) - constants
        for index, variable in enumerate(main.params):
            where = Place("input", index) if index < inputs else Place("weight", index - inputs)
            self._values[variable] = [_Tensor(0, where)]
        for block in main.body.blocks:
            for binding in block.bindings:
                self._bind(binding)
        results = [tensor for item in main.body.body.fields for tensor in self._values[item]]
        for index, tensor in enumerate(results):
            where = Place("output", index)
            if tensor.fixed is None:
                tensor.fixed, tensor.span = where, None
            else:
                self._calls.append(("", [_Tensor(tensor.size, where), tensor], tensor.size))

    def steps(self) -> tuple[Step, ...]:
        """The calls, once every span has its offset."""
        return tuple(
            Step(
                self.kernels[kernel].name if kernel else "",
                tuple(tensor.place for tensor in tensors),
                size,
            )
            for kernel, tensors, size in self._calls
        )

    def _bind(self, binding: Any) -> None:
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            self._values[binding.var] = [self._values[value.tuple_value][int(value.index)]]
            return
        if _operator(value) == "relax.reshape":
            self._values[binding.var] = self._values[value.args[0]]
            return
        at = len(self._calls)
        name = value.args[0].name_hint
        arguments = [self._values[item][0] for item in value.args[1].fields]
        for tensor in arguments:
            if tensor.span is not None:
                tensor.span.last = at
        type_: Any = value.ty
        types = list(type_.fields) if hasattr(type_, "fields") else [type_]
        made = [self._tensor(_relax_bytes(item), at) for item in types]
        scratch = [self._tensor(size, at) for size in self.kernels[name].scratch]
        self._values[binding.var] = made
        self._calls.append((name, [*arguments, *made, *scratch], 0))

    def _tensor(self, size: int, at: int) -> _Tensor:
        tensor = _Tensor(size, None, Span(size, at, at))
        self.tensors.append(tensor)
        return tensor


def _relax_bytes(type_: Any) -> int:
    shape = [_number(dim) for dim in type_.shape.values]
    dtype = str(type_.dtype)
    return math.prod(shape) * (1 if dtype == "bool" else np.dtype(dtype).itemsize)
