"""Passes that break exactly one law each; the honest ones they are made from keep all."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from netlathe import (
    ChoosingPass,
    Context,
    Entry,
    Exact,
    Lossy,
    Pass,
    Reference,
    Result,
    option,
    options,
)
from netlathe.ir import edit, normal, weights


def relus(model: ir.Model) -> list[ir.Node]:
    """What the passes below are for."""
    return [node for node in model.graph if node.op_type == "Relu"]


def to_max(graph: ir.Graph, node: ir.Node, taken: set[str]) -> None:
    """Write a Relu as Max(x, 0)."""
    value = node.inputs[0]
    assert value is not None and value.dtype is not None
    zero = edit.constant(graph, np.zeros((), value.dtype.numpy()), "zero", taken)
    made = edit.node("Max", [value, zero], dtype=value.dtype, shape=value.shape)
    edit.replace(node, [made], {node.outputs[0]: made.outputs[0]}, "to_max")


def rewrite(model: ir.Model) -> Result:
    """Write every Relu as Max(x, 0)."""
    found, taken, entries = relus(model), edit.names_in(model.graph), []
    for node in found:
        entries.append(Entry(node.outputs[0].name or "", "applied", "written as Max"))
        to_max(model.graph, node, taken)
    normal.normalize(model)
    return Result(bool(found), entries)


@options
class Honest(Pass):
    """Write every Relu as Max(x, 0)."""

    name = "honest"
    exactness = Exact()
    tries: int = option(default=1, ge=0, help="how often to look")
    words: tuple[str, ...] = option(default=(), help="words of no meaning")

    def run(self, model: ir.Model, ctx: Context) -> Result:
        return rewrite(model)


def set_weight(model: ir.Model, name: str, array: np.ndarray) -> None:
    """Give an initializer another tensor."""
    value = model.graph.initializers[name]
    value.const_value = ir.tensor(np.array(array, order="C"), name=name)


@options
class Mute(ChoosingPass):
    """Let the last rows of every product's weight be zero."""

    name = "mute"
    exactness = Lossy()
    count: int = option(default=1, ge=0, help="how many rows")

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        entries = []
        for node in model.graph:
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            if weight is None or not weights.is_weight(weight):
                continue
            if len(weight.uses()) > 1:
                entries.append(Entry(weight.name or "", "refused", "something else reads it"))
                continue
            detail = {"weight": weight.name, "rows": self.count}
            output = node.outputs[0].name
            detail["output"] = output
            entries.append(Entry(weight.name or "", "applied", "its last rows go", detail=detail))
        return entries

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        applied = [entry for entry in chosen if entry.status == "applied"]
        for entry in applied:
            self.mute(model, entry)
        return Result(bool(applied), list(chosen))

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        for entry in chosen:
            if entry.status == "applied":
                self.mute(before, entry)
        return Reference(before, 1e-6)

    def mute(self, model: ir.Model, entry: Entry) -> None:
        """Zero the rows of one weight."""
        name = entry.detail["weight"]
        array = weights.array(model.graph.initializers[name]).copy()
        array[len(array) - entry.detail["rows"] :] = 0
        set_weight(model, name, array)


# -- about the pass itself --------------------------------------------------------------------------


@options
class Nameless(Honest):
    """Has a name that no pipeline's text can hold; it never gets into one."""

    name = "honest"
    version = 0


@dataclass(frozen=True)
class Plain(Pass):
    """Is a frozen dataclass, and takes whatever it is given."""

    name = "plain"
    exactness = Exact()
    tries: int = option(default=1, help="how often to look")

    def __post_init__(self) -> None:
        if not isinstance(self.tries, int):  # what option() leaves when nobody reads it
            object.__setattr__(self, "tries", 1)

    def run(self, model: ir.Model, ctx: Context) -> Result:
        return rewrite(model)

    def __str__(self) -> str:
        return self.name if self.tries == 1 else f"{self.name}(tries={self.tries})"


@options
class Forgetful(Honest):
    """Leaves its options out of its text."""

    def __str__(self) -> str:
        return self.name


@options
class Counts(Honest):
    """Names something else in its options than what it was made with."""

    def option_values(self) -> dict[str, Any]:
        return {**super().option_values(), "words": ["other"]}


# -- about what it does -----------------------------------------------------------------------------


@options
class Crashes(Honest):
    """Knows no If."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        if any(node.op_type == "If" for node in model.graph):
            raise KeyError("If")
        return rewrite(model)


@options
class Lazybones(Honest):
    """Looks and does nothing."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        return Result(False, [Entry("(the model)", "skipped", "too tired")])


@options
class EditsWhileChoosing(Mute):
    """Leaves a mark on what it chose."""

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        for node in model.graph:
            node.metadata_props["seen"] = "yes"
        return super().choose(model, ctx)

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        for node in model.graph:
            node.metadata_props.pop("seen", None)
        return super().edit(model, chosen, ctx)


@options
class Untidy(Honest):
    """Leaves an Identity where the Relu was."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        for node in [n for n in model.graph if n.op_type == "Max"]:
            source = node.inputs[0]
            same = edit.node("Identity", [source], name=f"{node.outputs[0].name}_same")
            model.graph.insert_before(node, same)
            same.outputs[0].type, same.outputs[0].shape = source.type, source.shape  # type: ignore[union-attr]
            node.replace_input_with(0, same.outputs[0])
        return result


@options
class Renames(Honest):
    """Calls an output as it likes."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        if result.changed:
            model.graph.outputs[0].name = "mine"
        return result


@options
class Wordless(Honest):
    """Gives no reasons."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        result.entries = [Entry(e.candidate, e.status, "") for e in result.entries]
        return result


@options
class Restless(Honest):
    """Signs models that it does nothing to."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        if not result.changed:
            model.metadata_props["looked_at_by"] = self.name
        return result


@options
class Scribbles(Honest):
    """Rounds a bias in the array that other models read, and puts it back in its own."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        for value in model.graph.initializers.values():
            array = weights.array(value)
            if result.changed and array.ndim == 1 and array.flags.writeable:
                copy = array.copy()
                array += 1
                set_weight(model, value.name or "", copy)
        return result


@options
class Loads(Honest):
    """Reads every weight into memory."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        if result.changed:
            for name, value in model.graph.initializers.items():
                set_weight(model, name, weights.array(value).copy())
        return result


def signs(sign: Callable[[], str]) -> Callable[[Honest, ir.Model, Context], Result]:
    """A run that writes something into the model."""

    def run(self: Honest, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        if result.changed:
            model.metadata_props["by"] = sign()
        return result

    return run


@options
class Dices(Honest):
    """Depends on the global generator, which it leaves as it was."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        state = random.getstate()
        sign = str(random.random())
        random.setstate(state)
        return signs(lambda: sign)(self, model, ctx)


@options
class Hashes(Honest):
    """Depends on the seed of Python's hashes."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        return signs(lambda: str(hash("relu") ^ int(os.environ.get("NOTHING", "0"))))(
            self, model, ctx
        )


@options
class Seeds(Honest):
    """Seeds the global generator of numpy."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        np.random.seed(0)
        return rewrite(model)


@options
class Swaps(Honest):
    """Negates what a Relu's Max gives, twice, and gives the name to the one in the middle."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        for node in [n for n in model.graph if n.op_type == "Max"]:
            value = node.outputs[0]
            if value.is_graph_output():
                continue
            name, readers = value.name, list(value.uses())
            value.name = f"{name}_right"
            minus = edit.node("Mul", [value, _number(model, value, -2.0)])
            back = edit.node("Mul", [minus.outputs[0], _number(model, value, -0.5)])
            minus.outputs[0].name, back.outputs[0].name = name, f"{name}_back"
            model.graph.insert_after(node, [minus, back])
            for reader, index in readers:
                reader.replace_input_with(index, back.outputs[0])
        normal.normalize(model)
        return result


def _number(model: ir.Model, like: ir.Value, number: float) -> ir.Value:
    assert like.dtype is not None
    return edit.constant(model.graph, np.array(number, like.dtype.numpy()), "number")


@options
class SimulatesByEdit(Mute):
    """Is its own judge."""

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        self.edit(before, chosen, Context())
        return Reference(before, 1e-6)


@options
class Leaky(Honest):
    """Says that Max(x, 0.01) is Relu."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        for node in [n for n in model.graph if n.op_type == "Max"]:
            zero = node.inputs[1]
            if zero is not None and not node.outputs[0].is_graph_output():
                node.replace_input_with(1, _number(model, node.outputs[0], 0.5))
                name = node.outputs[0].name
                node.outputs[0].name = f"{name}_leaky"
                result.renamed[name or ""] = None
        edit.remove_dead(model.graph)
        normal.normalize(model)
        _forget_names(model, result)
        return result


def _forget_names(model: ir.Model, result: Result) -> None:
    """Give every inner value another name, and say so."""
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output() and value.name and not value.name.endswith("_leaky"):
                result.renamed[value.name] = None
                value.name = f"{value.name}_leaky"


@options
class WrongRows(Mute):
    """Zeroes the first rows and says that it were the last."""

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        result = super().edit(model, chosen, ctx)
        for entry in chosen:
            if entry.status == "applied" and entry.detail["rows"]:
                name = entry.detail["weight"]
                array = weights.array(model.graph.initializers[name]).copy()
                set_weight(model, name, array[::-1])
        _forget_names(model, result)
        return result


@options
class Hungry(Honest):
    """Looks at data, and does not say so beforehand."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        ctx.collect(model, [], needed_by=self.name)
        return rewrite(model)


@options
class OnlyByItself(Honest):
    """Does something else inside a pipeline of onnx_ir."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        return ir.passes.PassResult(model, self.run(model, Context()).changed or "yes")  # type: ignore[arg-type]

    def bind(self, ctx: Context) -> Any:
        made = super().bind(ctx)
        made.pass_ = Lazybones()
        return made


@options
class Infinite(Honest):
    """Counts up to infinity."""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        result = rewrite(model)
        result.statistics["relus"] = float("inf")
        return result
