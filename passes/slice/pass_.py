"""The pass: which bases, how many directions of each, and the account of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis import linear
from netlathe.diagnostics import Diagnostic, OptionError, missing_extra
from netlathe.ir import edit
from netlathe.passes.slice import bases, budget
from netlathe.passes.slice.narrow import narrow
from netlathe.passes.slice.segments import Edge, Layout, Segment, insert, lay_out, stretch_at
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import (
    ChoosingPass,
    Context,
    Equivalent,
    Exactness,
    Lossy,
    Pass,
    Reference,
    Result,
    option,
    options,
)
from netlathe.pipeline.verification import tolerance

if TYPE_CHECKING:
    from netlathe.passes.slice.statistics import Seen
    from netlathe.passes.slice.widths import Measure, Missed, Plan

Matrix = npt.NDArray[np.float64]
# In float32 every weight is rounded once more, and sums run in another order, in another basis. Either is
# like one of the roundings of a sum: of n = 8192 terms 84 ulp of its RMS at the largest of 10^5 (as in
# fold_norms).
TOLERANCE = 84 * 2.0**-23
_MEASURED_SAMPLES = 4  # on which widths are tried


@options
class Slice(ChoosingPass):
    """Rotate residual streams to axes of their own and delete the least important (SliceGPT).

    ``ratio`` is the share of the width that goes, ``parameters`` the share of the model's parameters,
    what adapters add being counted. ``ratio=0`` only rotates, which is exact. With ``cut`` the two
    parts of a stream have bases and widths of their own, where that loses less than one. Norms must be
    RMSNormalization without a scale of its own: run ``fold_norms`` before.
    """

    name: ClassVar[str] = "slice"
    keeps_operators: ClassVar[bool] = True
    exactness: ClassVar[Exactness] = Lossy()

    ratio: float | None = option(
        default=None, ge=0, lt=1, help="share of the residual width to remove (default 0.25)"
    )
    parameters: float | None = option(
        default=None, gt=0, lt=1, help="share of the parameters to remove, adapters counted"
    )
    basis: Literal["pca", "loss", "hadamard"] = option(
        default="pca",
        help="pca: principal axes of the signal; loss: weighed by gradients of the loss;"
        " hadamard: random, for ratio=0",
    )
    adapters: bool = option(
        default=False,
        help="a basis for every block, with a matrix on every skip, as in the paper;"
        " else one for the whole stream",
    )
    cut: bool = option(
        default=False,
        help="with parameters and basis='loss': cut the stream in two by one adapter, where that loses"
        " less",
    )
    full: Literal["none", "embedding", "head", "both"] = option(
        default="none", help="with adapters: the ends of the stream that keep all directions"
    )
    refit: bool = option(
        default=False, help="fit the layers that read the stream to what they read before"
    )
    round_to: int = option(
        default=8, ge=1, help="keep widths a multiple of this; the target may ask for more"
    )

    def __post_init__(self) -> None:
        """Check options that exclude each other."""
        problem = ""
        if self.ratio is not None and self.parameters is not None:
            problem = "ratio and parameters both say how much goes: give one"
        elif self.full != "none" and not self.adapters:
            problem = f"full={self.full!r} needs adapters=True: one basis has one width"
        elif self.basis == "hadamard" and (self.ratio != 0 or self.parameters is not None):
            problem = "a Hadamard basis has no least important directions: give ratio=0"
        elif self.cut and (self.parameters is None or self.basis != "loss" or self.adapters):
            problem = (
                "a cut is chosen under parameters=, by basis='loss', and without adapters=True"
            )
        if problem:
            raise OptionError(Diagnostic("slice.options", problem))

    def cannot_follow(self, earlier: Pass) -> str:
        """Codes and zeros do not turn; and where every block has a basis, there is no other to find."""
        if earlier.name == "quantize":
            return "weights are codes by then, which take in no basis"
        if earlier.name == "sparsify":
            return "zeros of weights would be turned into other numbers"
        if earlier.name == "slice" and earlier.option_values()["adapters"]:
            return "every block has a basis of its own by then, and every skip a matrix"
        return ""

    def needs_data(self) -> str:
        """Principal axes are those of data, and a fit is to it; a random basis cuts nothing off to fit to."""
        return "" if self.basis == "hadamard" else f"basis={self.basis!r}"

    # -- choosing ---------------------------------------------------------------------------------

    def choose(self, model: ir.Model, ctx: Context) -> list[Entry]:
        """Solve a basis for every segment of every residual stream.

        Raises:
            PassError: no width fits what is asked for, or adapters add more than is saved; there is
                no calibration data.
        """
        layout = lay_out(model, cut=self.adapters)
        refused = [Entry(name, "refused", why, where) for name, why, where in layout.refused]
        if not layout.segments:
            reason = "the model has no residual stream that norms read"
            return refused or [Entry("(the model)", "skipped", reason)]
        multiple = math.lcm(self.round_to, ctx.target.width_multiple if ctx.target else 1)
        named = _named(layout)
        kept: dict[str, int] = {}
        plan = None
        if not self.cut:
            kept = self._widths(layout, named, multiple)
            budget.check_net(
                self, named, kept, budget.total(layout), budget.left(layout, named, kept)
            )
        seen = self._observe(model, layout, ctx)
        if self.cut:
            plan = self._plan(model, layout, seen, multiple, ctx)
            layout = lay_out(model, cut=plan.cut)
            named = _named(layout)
            kept = {name: plan.kept[name] for name in named}
        before, after = budget.total(layout), budget.left(layout, named, kept)
        solved, rows = self._solve(model, named, kept, seen, plan.missed if plan else {}, ctx)
        fits, left = self._fit(model, named, kept, solved, ctx)
        entries = []
        for name, segment in named.items():
            entry = self._entry(name, segment, layout, kept[name], solved[name], rows)
            fitted = {norm: fits[norm] for norm in segment.norms if norm in fits}
            detail = {
                **entry.detail,
                "fitted": list(fitted),
                "not_fitted": {norm: left[norm] for norm in segment.norms if norm in left},
            }
            arrays = {**entry.arrays, **fitted}
            entries.append(dataclasses.replace(entry, detail=detail, arrays=arrays))
        entries[0].detail["parameters"].update(before=before, after=after)
        return [*entries, *refused]

    def _entry(
        self,
        name: str,
        segment: Segment,
        layout: Layout,
        kept: int,
        basis: Matrix,
        rows: int | None,
    ) -> Entry:
        width = segment.group.size
        edges = [[e.reader, e.operand] for e in layout.edges] if name == _first(layout) else []
        detail: dict[str, Any] = {
            "width": width,
            "kept": kept,
            "points": segment.points,
            "norms": segment.norms,
            "adapters": edges,
            "basis": self.basis,
            "parameters": {},
        }
        verb = f"{width} directions cut to {kept}" if kept < width else f"{width} rotated"
        reason = f"{verb}; {self.basis} basis for {len(segment.points)} places"
        if rows is not None:
            detail["rows"] = rows
            if rows < width:
                reason += f"; only {rows} tokens for {width} directions: damped, rank-deficient"
        array = basis[:, :kept] if kept < width else basis
        return Entry(name, "applied", reason, segment.where, detail, arrays={"basis": array})

    def _fit(
        self,
        model: ir.Model,
        named: Mapping[str, Segment],
        kept: Mapping[str, int],
        solved: Mapping[str, Matrix],
        ctx: Context,
    ) -> tuple[dict[str, Matrix], dict[str, str]]:
        """The fit for each norm, and why others have none."""
        cut = {name for name, segment in named.items() if kept[name] < segment.group.size}
        if not self.refit or not cut:
            return {}, {}
        from netlathe.passes.slice import refit

        makers = {node.outputs[0].name: node for node in model.graph}
        found = {norm: refit.readers(makers[norm]) for s in named.values() for norm in s.norms}
        norms = [norm for norm, layers in found.items() if not isinstance(layers, str)]
        projections = {}
        for name in cut:
            basis = solved[name][:, : kept[name]].astype(np.float64)
            projections.update(dict.fromkeys(named[name].points, basis @ basis.T))
        fits = refit.fit(model, projections, norms, ctx, str(self))
        return fits, {norm: why for norm, why in found.items() if isinstance(why, str)}

    def _observe(self, model: ir.Model, layout: Layout, ctx: Context) -> Seen | None:
        """What bases and widths by the loss are made of."""
        if self.basis == "hadamard":
            return None
        try:
            import torch  # noqa: F401  # statistics are collected by it

            from netlathe.passes.slice import statistics
        except ModuleNotFoundError as error:
            raise missing_extra("torch", "torch", f"{self.name} by calibration data") from error
        if self.basis == "pca":
            return None
        norms = [norm for segment in layout.segments for norm in segment.norms]
        return statistics.observe(model, list(dict.fromkeys(norms)), ctx, str(self))

    def _plan(
        self, model: ir.Model, layout: Layout, seen: Seen | None, multiple: int, ctx: Context
    ) -> Plan:
        """Where to cut, and all widths."""
        from netlathe.passes.slice.widths import Widths

        assert seen is not None and self.parameters is not None
        before = budget.total(layout)
        goal = (1 - self.parameters) * before
        widths = Widths(model, seen, multiple, ctx.device)
        plan = widths.plan(goal, self._measure(model, ctx))
        if plan is None:
            raise budget.out_of_reach(goal, before)
        return plan

    def _measure(self, model: ir.Model, ctx: Context) -> Measure:
        """The loss on some of the data with some points projected: KL, or where there is none MSE."""
        from netlathe.passes.drop.scores import ByOutput
        from netlathe.pipeline.loss import kind_of

        kinds = {kind_of(value) for value in model.graph.outputs}
        score: Literal["kl", "mse"] = "mse" if kinds == {"values"} else "kl"
        judge = ByOutput(model, score, ctx, _MEASURED_SAMPLES, self)

        def change(columns: Mapping[str, Matrix]) -> Callable[[ir.Graph], None]:
            def project(graph: ir.Graph) -> None:
                taken = edit.names_in(graph)
                values = {v.name: v for node in graph for v in node.outputs}
                for point, basis in columns.items():
                    _multiply(graph, values[point], basis @ basis.T, taken)

            return project

        return lambda variants: judge.after([change(columns) for columns in variants], "at widths")

    def _widths(
        self, layout: Layout, named: Mapping[str, Segment], multiple: int
    ) -> dict[str, int]:
        names, whole = list(named), set[str]()
        if self.full in ("embedding", "both"):
            whole.add(names[0])
        if self.full in ("head", "both"):
            whole.add(names[-1])
        if self.parameters is not None:
            return budget.by_parameters(layout, named, whole, self.parameters, multiple)
        ratio = 0.25 if self.ratio is None else self.ratio
        return budget.by_ratio(named, whole, ratio, multiple)

    def _solve(
        self,
        model: ir.Model,
        named: Mapping[str, Segment],
        kept: Mapping[str, int],
        seen: Seen | None,
        missed: Missed,
        ctx: Context,
    ) -> tuple[dict[str, Matrix], int | None]:
        if self.basis == "hadamard":
            found = {
                name: bases.hadamard(segment.group.size, ctx.rng("slice", name))
                for name, segment in named.items()
            }
            return found, None
        from netlathe.passes.slice import statistics

        rows: list[int] = []

        def principal(name: str, moment: Matrix, count: int) -> Matrix:
            rows.append(count)
            return bases.principal(moment, ctx.device)

        if self.basis == "pca":
            places = {name: segment.points for name, segment in named.items()}
            solved = statistics.solve(model, places, ctx, principal, kept, str(self))
            return solved, min(rows, default=None)
        assert seen is not None
        return statistics.solve_by_loss(seen, named, kept, missed, ctx), seen.rows

    # -- editing ----------------------------------------------------------------------------------

    def edit(self, model: ir.Model, chosen: Sequence[Entry], ctx: Context) -> Result:
        """Put adapters in, let weights take in the bases, and delete what is not kept."""
        applied = [entry for entry in chosen if entry.status == "applied"]
        if not applied:
            return Result(False, list(chosen))
        from netlathe.analysis.axes import analyse

        edges = [Edge(*pair) for entry in applied for pair in entry.detail["adapters"]]
        _take_in(model, applied)
        known = {v.name for node in model.graph for v in node.outputs}
        insert(model, edges)
        axes = analyse(model)
        values = {v.name: v for node in model.graph for v in node.outputs}
        turned = []
        for entry in applied:
            point = values[entry.detail["points"][0]]
            assert point.shape is not None
            stretch = stretch_at(axes, point, len(point.shape) - 1)
            turned.append((stretch, entry.arrays["basis"]))
        renamed: dict[str, str | None] = {}
        for stretch, _ in turned:
            for value, _ in stretch.exponents:
                name = str(value.name)
                if name in known:
                    renamed[name] = None
        narrow(Layout(model, axes, edges), turned, ctx.device)
        counts = applied[0].detail["parameters"]
        statistics = {f"parameters_{key}": float(count) for key, count in counts.items()}
        return Result(True, list(chosen), renamed, statistics)

    def simulate(self, before: ir.Model, chosen: Sequence[Entry]) -> Reference:
        """The model at its original shapes in which every point is projected on what is kept."""
        graph = before.graph
        taken = edit.names_in(graph)
        values = {v.name: v for node in graph for v in node.outputs}
        for entry in chosen:
            if entry.status != "applied" or entry.detail["kept"] == entry.detail["width"]:
                continue
            basis = entry.arrays["basis"].astype(np.float64)
            projection = basis @ basis.T
            for name in entry.detail["points"]:
                _multiply(graph, values[name], projection, taken)
            for norm in entry.detail["fitted"]:
                _multiply(graph, values[norm], entry.arrays[norm], taken)
        return Reference(before, tolerance(Equivalent(TOLERANCE), before), reordered=True)


def _multiply(graph: ir.Graph, value: ir.Value, by: Matrix, taken: set[str]) -> None:
    """Let everything that reads a value read it times a matrix."""
    assert value.dtype is not None
    array = ir.tensor(by.astype(value.dtype.numpy()))
    matrix = edit.constant(graph, array, f"{value.name}/matrix", taken)
    uses = list(value.uses())
    node = edit.node("MatMul", [value, matrix], dtype=value.dtype, shape=value.shape)
    node.outputs[0].name = edit.unique_name(graph, f"{value.name}/times", taken)
    maker = value.producer()
    assert maker is not None
    graph.insert_after(maker, node)
    for reader, index in uses:
        reader.replace_input_with(index, node.outputs[0])


def _take_in(model: ir.Model, applied: Sequence[Entry]) -> None:
    """Let the layers behind each norm that was fitted take its matrix in."""
    if not any(entry.detail["fitted"] for entry in applied):
        return
    from netlathe.passes.slice import refit

    graph, taken = model.graph, edit.names_in(model.graph)
    makers = {node.outputs[0].name: node for node in graph}
    for entry in applied:
        for norm in entry.detail["fitted"]:
            matrix = entry.arrays[norm]

            def change(array: Any, axis: int, matrix: Matrix = matrix) -> Any:
                wide = np.tensordot(matrix.astype(np.float64), array, axes=(1, axis))
                return np.moveaxis(wide, 0, axis)

            layers = refit.readers(makers[norm])
            assert not isinstance(layers, str)  # it was fitted for them
            for weight in layers:
                linear.change(graph, weight, change, f"{weight.value.name}_fitted", taken)


def _named(layout: Layout) -> dict[str, Segment]:
    return {segment.points[0]: segment for segment in layout.segments}


def _first(layout: Layout) -> str:
    return layout.segments[0].points[0]
