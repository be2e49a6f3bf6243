"""A small captured model, and small passes that do what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from netlathe.execute import samples
from netlathe.ir import edit, normal, provenance, weights
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Equivalent,
    Exact,
    Lossy,
    Pass,
    Reference,
    Result,
    option,
    options,
)
from tests.ir.onnx_text import matrix, model

WIDTH, HIDDEN = 6, 8


def captured_of(made: ir.Model, name: str = "toy") -> Captured:
    """``made`` in normal form, as a frontend hands it over."""
    normal.normalize(made)
    return Captured(
        model=made,
        source=name,
        frontend="onnx_file",
        dynamic=samples.dynamic_dims(made),
        sample=lambda sizes, seed: samples.synthesize(made, sizes, seed),
    )


def mlp() -> Captured:
    """y = relu(x @ up + bias) @ down + x, with a dynamic batch and module paths."""
    made = model(
        f"float[batch,{WIDTH}] x",
        "float y",
        "h = MatMul(x, up)  b = Add(h, bias)  r = Relu(b)  d = MatMul(r, down)  y = Add(d, x)",
        up=matrix(WIDTH, HIDDEN),
        bias=matrix(HIDDEN, seed=1),
        down=matrix(HIDDEN, WIDTH, seed=2),
    )
    for node in made.graph:
        path = "residual" if node.outputs[0].name == "y" else "mlp"
        provenance.mark(node, module=path)
    for name, value in made.graph.initializers.items():  # into memory, which can be written to
        set_weight(made, name, weights.array(value).copy())
    return captured_of(made)


def find(model: ir.Model, name: str) -> ir.Node:
    """The node that makes a value."""
    (found,) = [n for n in model.graph if name in [v.name for v in n.outputs]]
    return found


def set_weight(model: ir.Model, name: str, array: np.ndarray) -> None:
    """Give an initializer another tensor."""
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=name)
    value.shape = ir.Shape(array.shape)


def did(*candidates: str) -> list[Entry]:
    """Ledger entries of applied candidates."""
    return [Entry(name, "applied", "done") for name in candidates]


@options
class ReluToMax(Pass):
    """Writes every Relu as Max(x, 0)."""

    name = "relu_to_max"
    exactness = Exact()

    def run(self, model: ir.Model, ctx: Context) -> Result:
        found = [node for node in model.graph if node.op_type == "Relu"]
        for node in found:
            zero = edit.constant(model.graph, np.zeros((), np.float32), "zero")
            made = edit.node("Max", [node.inputs[0], zero])
            edit.replace(node, [made], {node.outputs[0]: made.outputs[0]}, self.name)
        return Result(bool(found), did(*(str(n.name) for n in found)))


@options
class Balance(Pass):
    """Scales up by a factor what it scales down by it behind the Relu."""

    name = "balance"
    exactness = Equivalent(1e-5)
    factor: float = option(default=3.0, gt=0, help="the factor")

    def run(self, model: ir.Model, ctx: Context) -> Result:
        for name, scale in (("up", self.factor), ("bias", self.factor), ("down", 1 / self.factor)):
            value = model.graph.initializers[name]
            assert value.const_value is not None and value.shape is not None
            value.const_value = weights.derived(
                value.const_value,
                lambda a, scale=scale: (a * np.float32(scale)).astype(np.float32),
                ir.DataType.FLOAT,
                [int(str(d)) for d in value.shape],
                name,
            )
        return Result(True, did("mlp"), {name: None for name in "hbr"})


@options
class Cut(ChoosingPass):
    """Removes the last hidden channels."""

    name = "cut"
    exactness = Lossy()
    count: int = option(default=2, ge=0, lt=HIDDEN, help="how many channels to remove")
    side: Literal["last", "first"] = option(default="last", help="from which side")

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """The channels at one side go."""
        if not self.count or "down" not in model.graph.initializers:
            return []
        shape = model.graph.initializers["down"].shape
        assert shape is not None
        width = int(str(shape[0]))
        gone = range(self.count) if self.side == "first" else range(width - self.count, width)
        keep = [i for i in range(width) if i not in gone]
        return [Entry("mlp", "applied", f"removes {self.count}", detail={"keep": keep})]

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Slice the three weights."""
        for entry in chosen:
            keep = entry.detail["keep"]
            for name, axis in (("up", 1), ("bias", 0), ("down", 0)):
                array = weights.array(model.graph.initializers[name])
                set_weight(model, name, np.take(array, keep, axis))
        return Result(bool(chosen), list(chosen))

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The old graph with zeros in ``down`` at the removed channels; float32 sums of 8 terms."""
        for entry in chosen:
            down = weights.array(before.graph.initializers["down"]).copy()
            gone = np.ones(len(down), bool)
            gone[entry.detail["keep"]] = False
            down[gone] = 0
            set_weight(before, "down", down)
        return Reference(before, 1e-6)
