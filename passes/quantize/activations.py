"""Which activations are quantized, on which grids, and why others are not: the ledger's view of them.

A form says what becomes of them: ``integer`` computes in integers (`integer`, `token`), ``qdq`` writes
QuantizeLinear and DequantizeLinear pairs (`qdq`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, PassError
from netlathe.ir import weights
from netlathe.ir.provenance import module_path
from netlathe.passes.quantize import integer, ledger, qdq, token
from netlathe.passes.quantize.number import NUMBERS, Number
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context

Array = npt.NDArray[Any]
NumberName = Literal["float32", "int8", "uint8", "float8e4m3fn"]
Scales = Literal["static", "token", "tensor"]
Form = Literal["integer", "qdq"]
How = Literal["minmax", "percentile", "mse"]

_PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"})


@dataclass(frozen=True)
class Settings:
    """The options of `quantize` that are about activations."""

    number: NumberName
    scales: Scales
    form: Form
    how: How
    percentile: float

    def problem(self) -> str:
        """Why these contradict each other; empty if they do not."""
        if self.number == "float32":
            return ""
        if self.scales == "tensor" and self.number != "uint8":
            return "activation_scales='tensor' makes uint8 (DynamicQuantizeLinear): activations='uint8'"
        if self.form == "integer" and self.scales != "tensor" and self.number != "int8":
            return (
                f"activation_form='integer' computes with int8: activations={self.number!r} needs"
                " activation_form='qdq'"
            )
        if self.form == "qdq" and self.scales == "token" and self.number == "uint8":
            return "a scale per token is symmetric: activations='int8' or 'float8e4m3fn'"
        return ""


def choose(
    settings: Settings, model: ir.Model, chosen: Sequence[Entry], ctx: Context, needed_by: str
) -> list[Entry]:
    """An entry for every activation that products read, and for what else gets a grid.

    ``chosen`` are the entries of the weights.

    Raises:
        PassError: static scales, and no calibration data, or none that reaches a value.
    """
    if settings.form == "qdq":
        made = list(_pairs(settings, model, chosen, ctx, needed_by))
    elif settings.scales == "static":
        made = _static(settings, model, chosen, ctx, needed_by)
    else:
        made = _dynamic(settings, model, chosen)
    return made + list(_left(settings, model, made, chosen))


# -- integers -----------------------------------------------------------------------------------------


def _static(
    settings: Settings, model: ir.Model, chosen: Sequence[Entry], ctx: Context, needed_by: str
) -> list[Entry]:
    values = integer.plan(model, integer_weights(chosen)).measured()
    grids = _grids(settings, model, values, ctx, needed_by)
    entries = []
    for value in values:
        scale, zero = grids[value]
        reason = f"int8, scale {scale:.3g}, zero point {zero}"
        detail = {"activation": value.name, "scale": scale, "zero": zero, **ledger.FOLLOWS}
        entries.append(Entry(value.name or "", "applied", reason, module_path(value), detail))
    return entries


def _dynamic(settings: Settings, model: ir.Model, chosen: Sequence[Entry]) -> list[Entry]:
    readers: dict[str, tuple[ir.Value, list[str]]] = {}
    for node in token.products(model, integer_weights(chosen)):
        x, weight = node.inputs
        assert x is not None and weight is not None
        readers.setdefault(x.name or "", (x, []))[1].append(weight.name or "")
    each = "for all tokens at once" if settings.scales == "tensor" else "per token"
    return [
        Entry(
            name,
            "applied",
            f"{settings.number}, one scale {each}",
            module_path(x),
            {"token": name, "weights": read, "scales": settings.scales, **ledger.FOLLOWS},
        )
        for name, (x, read) in readers.items()
    ]


def operands(settings: Settings, model: ir.Model) -> set[str]:
    """The weights that integer operators read if they are symmetric integers, by channel or tensor."""
    if settings.number == "float32" or settings.form != "integer":
        return set()
    names = list(model.graph.initializers)
    if settings.scales == "static":
        return {layer.weight.name or "" for layer in integer.plan(model, names).layers.values()}
    products = token.products(model, names)
    return {node.inputs[1].name or "" for node in products if node.inputs[1] is not None}


def integer_weights(chosen: Sequence[Entry]) -> list[str]:
    """Weights that integer products can take as they are: bytes, with scales above 0."""
    return [
        entry.detail["value"]
        for entry in chosen
        if entry.status == "applied"
        and (entry.detail.get("weights") == "int8" or "operand" in entry.detail)
        and entry.detail["symmetric"]
        and not entry.detail["block_size"]
    ]


# -- pairs --------------------------------------------------------------------------------------------


def _pairs(
    settings: Settings, model: ir.Model, chosen: Sequence[Entry], ctx: Context, needed_by: str
) -> Iterator[Entry]:
    static, number = settings.scales == "static", NUMBERS[settings.number]
    found = places(settings.scales, model, chosen)
    values = [v for v in found.values if v not in found.moved]
    grids = _grids(settings, model, values, ctx, needed_by) if static else {}
    for value in found.values:
        name = value.name or ""
        readers = None if value in found.whole else [_first(n) for n in found.inputs[value]]
        detail: dict[str, Any] = {
            "pair": name,
            "number": settings.number,
            "scales": settings.scales,
            "readers": readers,
            **ledger.FOLLOWS,
        }
        reason = f"{settings.number}, one scale per token"
        if settings.scales == "tensor":
            reason = f"{settings.number}, one scale for all, found as it comes"
        if static:
            detail["scale"], detail["zero"] = grids[found.grid_of(value)]
            reason = f"{settings.number}, scale {detail['scale']:.3g}"
            reason += "" if number.is_float else f", zero point {detail['zero']}"
            if value in found.moved:
                reason += f", as {found.grid_of(value).name}"
        if readers is not None:
            reason += f"; for {', '.join(readers)}"
        yield Entry(name, "applied", reason, module_path(value), detail)
    if static and not number.is_float:
        yield from _biases(found, grids, chosen)


def _biases(
    found: qdq.Places, grids: Mapping[ir.Value, tuple[float, int]], chosen: Sequence[Entry]
) -> Iterator[Entry]:
    plain = set(integer_weights(chosen))
    for node, bias in found.biases.items():
        x, weight, name = node.inputs[0], node.inputs[1], bias.name or ""
        assert x is not None and weight is not None
        if weight.name in plain:
            scale, _ = grids[found.grid_of(x)]
            detail = {"bias": name, "weight": weight.name, "scale": scale, **ledger.FOLLOWS}
            reason = f"int32, in units of the scales of {x.name} and {weight.name}"
            yield Entry(name, "applied", reason, module_path(node), detail)


def places(scales: Scales, model: ir.Model, chosen: Sequence[Entry]) -> qdq.Places:
    """Where pairs go for the weights that are quantized to integers or small floats."""
    named = [e.detail["value"] for e in chosen if e.status == "applied" and "value" in e.detail]
    found = qdq.places(model, named, static=scales == "static")
    if scales == "token":  # a convolution has no tokens, and others none of a fixed width
        for value, readers in list(found.inputs.items()):
            products = [node for node in readers if node.op_type == "MatMul"]
            fixed = value.shape is not None and isinstance(value.shape[-1], int)
            found.inputs[value] = products
            if not products or not fixed:
                del found.inputs[value]
    return found


# -- ranges -------------------------------------------------------------------------------------------


def _grids(
    settings: Settings, model: ir.Model, values: Sequence[ir.Value], ctx: Context, needed_by: str
) -> dict[ir.Value, tuple[float, int]]:
    """Scale and zero point of every value, from calibration data.

    Raises:
        PassError: there is none, or a value is always 0 in it, which is no range; but not one that no
            data changes.
    """
    from netlathe.execute.statistics import MinMax  # torch is an extra
    from netlathe.passes.quantize.activation_ranges import Histogram, range_of

    if not values:
        return {}
    number: Number = NUMBERS[settings.number]
    kind: Any = MinMax if settings.how == "minmax" else Histogram
    wanted = [kind(v.name or "", _channels(v)) for v in values]
    found = ctx.collect(model, wanted, needed_by=needed_by)
    grids: dict[ir.Value, tuple[float, int]] = {}
    problems = []
    for value, result in zip(values, found, strict=True):
        if settings.how == "minmax":
            low, high = float(result.array[0].min()), float(result.array[1].max())
        else:
            low, high = range_of(result.array, settings.how, number, settings.percentile)
        if low == high == 0 and _is_fed(value):
            problems.append(
                Diagnostic(
                    "quantize.calibration",
                    f"calibration data never reaches {value.name}: it is always 0, so its range is unknown",
                    where=module_path(value),
                    help="give data that does, or leave out the weights that read it with ignore",
                )
            )
        grids[value] = number.grid(low, high)
    if problems:
        raise PassError(problems)
    return grids


def _is_fed(value: ir.Value) -> bool:
    """Whether numbers of the inputs reach ``value``: what is made of constants and sizes is always the same.

    A recurrence that is unrolled starts from a state of zeros, and they are zeros in any grid.
    """
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        current = stack.pop()
        node = current.producer()
        if current in seen or current.is_initializer():
            continue
        if node is None or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()):
            return True
        seen.add(current)
        if node.op_type not in ("Shape", "Size"):
            stack += [read for read in node.inputs if read is not None]
    return False


def _channels(value: ir.Value) -> int:
    """An image's channels are at axis 1, those of anything else come last.

    All of them get one grid, so where that size is dynamic any other that is fixed will do.
    """
    shape = list(value.shape or ())
    first = 1 if len(shape) == 4 else -1
    fixed = [axis for axis, dim in enumerate(shape) if isinstance(dim, int)]
    return fixed[-1] if fixed and not isinstance(shape[first], int) else first


# -- the rest -----------------------------------------------------------------------------------------


def _left(
    settings: Settings, model: ir.Model, made: Sequence[Entry], chosen: Sequence[Entry]
) -> Iterator[Entry]:
    """Activations that a product reads as floats, and why."""
    done = {entry.candidate for entry in made}
    stored = {e.detail["value"]: e for e in chosen if "value" in e.detail and e.status == "applied"}
    found: dict[str, tuple[ir.Value, dict[str, None]]] = {}
    for node in model.graph:
        if node.op_type not in _PRODUCTS or node.domain:
            continue
        for value in _activations(node):
            if value.name in done or value.dtype != ir.DataType.FLOAT:
                continue
            reason = _why(settings, node, stored)
            found.setdefault(value.name or "", (value, {}))[1][reason] = None
    for name, (value, reasons) in found.items():
        text = "; ".join(reasons)
        yield Entry(name, "skipped", text, module_path(value), left_out=True)
    if not done and not found:
        yield Entry("(activations)", "skipped", "no product reads an activation", left_out=True)


def _activations(node: ir.Node) -> Iterator[ir.Value]:
    for value in node.inputs:
        if value is not None and not weights.is_weight(value):
            maker = value.producer()
            moved = maker is not None and maker.op_type == "Transpose" and not maker.domain
            if not (moved and maker is not None and weights.is_weight(maker.inputs[0])):
                yield value


def _why(settings: Settings, node: ir.Node, stored: Mapping[str, Entry]) -> str:
    what = f"{node.op_type} {_first(node)}"
    if node.op_type in ("Attention", "Einsum", "Gemm"):
        return f"{what} stays in floating point"
    weight = node.inputs[1]
    maker = weight.producer() if weight is not None else None
    behind = maker.inputs[0] if maker is not None and maker.op_type == "Transpose" else weight
    if behind is None or not weights.is_weight(behind):
        return f"{what} multiplies it with an activation or with a moved weight"
    if behind.name not in stored:
        return f"{what} multiplies it with {behind.name}, which is not quantized"
    if settings.form == "integer":
        own = ledger.layout_of(stored[behind.name or ""])
        if own.axis is not None and own.block < own.stored[own.axis] and own.block:
            return (
                f"{what} stays in floating point: {behind.name} has scales of groups of {own.block}, and a"
                " sum of integers has one scale: give it group_size=0"
            )
        other = "" if settings.scales == "static" else ", in a matrix product"
        return (
            f"{what} computes in integers only with symmetric integer weights, by channel or tensor,"
            f" that nothing else reads{other}"
        )
    return f"{what} has no tokens of a fixed width"


def _first(node: ir.Node) -> str:
    return node.outputs[0].name or ""


# -- back from the ledger -----------------------------------------------------------------------------


def integer_grids(applied: Sequence[Entry]) -> dict[str, integer.Grid]:
    """The static grids of the integer form."""
    details = [entry.detail for entry in applied if "activation" in entry.detail]
    return {d["activation"]: integer.Grid(d["scale"], d["zero"]) for d in details}


def rewrite_pairs(
    model: ir.Model, applied: Sequence[Entry], scales_of: Mapping[str, Array]
) -> None:
    """Write the pairs that a ledger lists; ``scales_of`` gives the scales of weights by name."""
    listed = [entry.detail for entry in applied if "pair" in entry.detail]
    if not listed:
        return
    found = places(listed[0]["scales"], model, applied)
    pairs = {
        d["pair"]: qdq.Pair(d["number"], d["scales"], d.get("scale", 1.0), d.get("zero", 0))
        for d in listed
    }
    steps = {}
    for detail in (entry.detail for entry in applied if "bias" in entry.detail):
        if detail["weight"] not in scales_of:
            continue
        scales = scales_of[detail["weight"]].astype(np.float64).reshape(-1)
        channels = model.graph.initializers[detail["bias"]].shape
        assert channels is not None
        made = np.broadcast_to(detail["scale"] * scales, channels.numpy())
        steps[detail["bias"]] = made.astype(np.float32)
    qdq.Rewriter(model, found, pairs).run(steps)
