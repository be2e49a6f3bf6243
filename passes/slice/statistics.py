"""What the bases are made of: second moments of the normalized signal, and gradients of the loss.

Bases are solved in the order of the graph, on the already sliced prefix (SliceGPT, arXiv 2401.15024,
section 3.3): one sweep runs the model with a projection at every point of the stream that is read, and
each segment's projection is solved before any sample goes past its first point. A segment with several
points is solved from all of them, so those after its first are seen without its own projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, types, weights
from netlathe.passes.slice import bases
from netlathe.passes.slice.segments import Segment
from netlathe.pipeline.pass_ import Context, Feeds

if TYPE_CHECKING:
    import torch

Matrix = npt.NDArray[np.float64]
# Gradients of 64 windows of 512 tokens give a basis within 3 % of the KL of all 128.
GRADIENT_ROWS = 1 << 15


class Projections:
    """A copy of a model in which chosen points are multiplied by matrices that come later.

    ``columns`` maps a name to the ``[d, k]`` basis Q of what is kept; a point is multiplied by QQ', and
    left as it is where the name is missing.
    """

    def __init__(self, model: ir.Model, points: Mapping[str, str], device: str = "cpu") -> None:
        """``points`` maps the name of each value to the name of its matrix, made on ``device``."""
        self.model = model.clone()
        self.device = device
        self.columns: dict[str, Matrix] = {}
        self.precision: dict[str, np.dtype[Any]] = {}  # float64 for a model in it, else float32
        self.signals: dict[str, str] = {}  # point -> its normalized signal, before the projection
        graph, taken = self.model.graph, edit.names_in(self.model.graph)
        values = {v.name: v for node in graph for v in node.outputs}
        for point, name in points.items():
            value = values[point]
            width, dtype = channels(value), value.dtype
            assert dtype is not None
            one = ir.tensor(np.ones((), dtype.numpy()))
            self.precision[name] = precision(dtype)
            tensor = weights.derived(
                one, self._reader(name, width), dtype, [width, width], f"{point}/projection"
            )
            matrix = edit.constant(graph, tensor, f"{point}/projection", taken)
            uses = list(value.uses())
            node = edit.node("MatMul", [value, matrix], dtype=dtype, shape=value.shape)
            node.outputs[0].name = edit.unique_name(graph, f"{point}/projected", taken)
            unit = edit.constant(graph, np.ones(width, dtype.numpy()), f"{point}/unit", taken)
            settings = {"axis": -1, "epsilon": 1e-5, "stash_type": 1}
            if dtype == ir.DataType.DOUBLE:
                settings["stash_type"] = int(dtype)
            norm = edit.node(
                "RMSNormalization", [value, unit], settings, dtype=dtype, shape=value.shape
            )
            norm.outputs[0].name = edit.unique_name(graph, f"{point}/signal", taken)
            self.signals[point] = norm.outputs[0].name
            maker = value.producer()
            assert maker is not None
            graph.insert_after(maker, [norm, node])
            for reader, index in uses:
                reader.replace_input_with(index, node.outputs[0])

    def _reader(self, name: str, width: int) -> Callable[[npt.NDArray[np.float64]], Matrix]:
        def read(one: npt.NDArray[np.float64]) -> Matrix:
            held = self.columns.get(name)
            if held is None:
                return np.eye(width, dtype=one.dtype)
            return _product(held, self.device).astype(one.dtype)

        return read


def _product(columns: Matrix, device: str) -> Matrix:
    """QQ', on the device: for 3072 of 4096 directions a CPU takes as long as a layer takes a GPU."""
    if device == "cpu":
        return np.asarray(columns @ columns.T)
    from netlathe.execute.torch_ops.storage import from_numpy

    held = from_numpy(columns, device)
    made: Matrix = (held @ held.T).cpu().numpy()
    return made


def precision(dtype: ir.DataType) -> np.dtype[Any]:
    """What a basis is kept in: rounding it is like rounding the weights that it turns."""
    return np.dtype(np.float64 if dtype == ir.DataType.DOUBLE else np.float32)


def channels(value: ir.Value) -> int:
    """The number of channels of a value of a stream: its last dim."""
    assert value.shape is not None
    width = value.shape[-1]
    assert isinstance(width, int)
    return width


def solve(
    model: ir.Model,
    segments: Mapping[str, Sequence[str]],
    ctx: Context,
    basis: Callable[[str, Matrix, int], Matrix],
    kept: Mapping[str, int],
    needed_by: str,
) -> dict[str, Matrix]:
    """The kept columns of a basis for each segment, which is a name and its points, in order.

    ``basis`` makes one of the summed second moment and the number of rows it was collected from.
    """
    from netlathe.execute.statistics import Covariance, StatisticResult  # torch is an extra

    points = {point: name for name, held in segments.items() for point in held}
    projected = Projections(model, points, ctx.device)
    wanted = {Covariance(signal): point for point, signal in projected.signals.items()}
    found: dict[str, Matrix] = {}
    # A segment of several points is solved from the model as it is, in a sweep of its own.
    late = {p for held in segments.values() for p in held if len(held) > 1}
    sums: dict[str, tuple[Matrix, int]] = {}

    def solved(name: str) -> None:
        moment, rows = sums.pop(name)

        def compute() -> dict[str, npt.NDArray[Any]]:
            square = basis(name, moment, rows)
            return {"basis": square[:, : kept[name]].astype(projected.precision[name])}

        found[name] = ctx.once(f"basis {name}", compute)["basis"]
        if kept[name] < len(moment):
            projected.columns[name] = found[name]

    def take(result: StatisticResult) -> None:
        assert isinstance(result.statistic, Covariance)
        name = points[wanted[result.statistic]]
        moment, rows = sums.get(name, (None, 0))
        sums[name] = (
            result.array if moment is None else moment + result.array,
            max(rows, result.count),
        )
        if len(segments[name]) == 1:
            solved(name)

    joint = [s for s, point in wanted.items() if point in late]
    if joint:
        for result in ctx.collect(projected.model, joint, needed_by=needed_by):
            take(result)
        for name in [name for name, held in segments.items() if len(held) > 1]:
            solved(name)
    alone = [s for s, point in wanted.items() if point not in late]
    if alone:
        ctx.collect(projected.model, alone, needed_by=needed_by, settle=take)
    return found


@dataclass(frozen=True)
class Seen:
    """Second moments C of signals and Fisher matrices G, by the names of norms, over so many rows.

    ``levels`` are the logarithms of the mean square of what each norm reads, averaged over rows: how loud the
    stream is there. What enters it early is the smaller a part of it the louder it gets.
    """

    moments: Mapping[str, Matrix]
    gradients: Mapping[str, Matrix]
    levels: Mapping[str, float]
    rows: int


def observe(model: ir.Model, norms: Sequence[str], ctx: Context, needed_by: str) -> Seen:
    """C and G at the outputs of ``norms``, and the levels of what they read."""
    from netlathe.execute.statistics import Covariance, LogMeanSquare

    makers = {node.outputs[0].name: node for node in model.graph}
    read = {norm: value.name or "" for norm in norms if (value := makers[norm].inputs[0])}
    wanted = [*map(Covariance, norms), *map(LogMeanSquare, dict.fromkeys(read.values()))]
    found = {r.statistic: r for r in ctx.collect(model, wanted, needed_by=needed_by)}
    moments = {norm: found[Covariance(norm)].array for norm in norms}
    levels = {norm: found[LogMeanSquare(read[norm])].scalar for norm in norms}
    gradients = fisher(model, norms, ctx, ctx.calibration)
    return Seen(moments, gradients, levels, min(result.count for result in found.values()))


def solve_by_loss(
    seen: Seen,
    segments: Mapping[str, Segment],
    kept: Mapping[str, int],
    missed: Mapping[str, Sequence[tuple[Matrix, Matrix]]],
    ctx: Context,
) -> dict[str, Matrix]:
    """A square basis for each segment, by what its removal costs the loss.

    ``missed`` are more C and G of segments: of what is missing behind them.
    """
    found = {}
    for name, segment in segments.items():
        norms = list(dict.fromkeys(segment.norms))

        def compute(name: str = name, norms: Sequence[str] = norms) -> dict[str, Matrix]:
            if not norms:  # nothing normalizes it: no place to weigh at
                return {"basis": np.eye(segments[name].group.size)}
            covariances = [seen.moments[norm] for norm in norms]
            weighed = [seen.gradients[norm] for norm in norms]
            for moment, gradient in missed.get(name, ()):
                covariances.append(moment)
                weighed.append(gradient)
            basis = bases.loss_weighted(covariances, weighed, kept[name], ctx.device)
            return {"basis": basis}

        found[name] = ctx.once(f"basis {name}", compute)["basis"]
    return found


def fisher(
    model: ir.Model, values: Sequence[str], ctx: Context, feeds: Sequence[Feeds]
) -> dict[str, Matrix]:
    """Second moments over rows of the gradients of a log-likelihood with respect to ``values``.

    The log-likelihood is that of outputs drawn from the model itself: classes from the softmax of the
    logits, so that the moment is the Fisher matrix, which needs no labels. Outputs that are not logits
    count as means of Gaussians of unit variance.
    """
    import torch

    from netlathe.execute.executor import Executor
    from netlathe.execute.fx import argument_name
    from netlathe.pipeline.loss import kind_of

    probed = model.clone()
    graph = probed.graph
    made = {v.name: v for node in graph for v in node.outputs}
    outputs = [v for v in graph.outputs if v.dtype is not None and v.dtype.is_floating_point()]
    kinds = [kind_of(v) for v in outputs]
    graph.outputs[:] = [*outputs, *(made[name] for name in values if made[name] not in outputs)]
    types.annotate(probed)
    module = Executor(probed, ctx.device).module()
    seed = int(ctx.rng("fisher").integers(2**62))
    generator = torch.Generator(ctx.device).manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    rows = 0
    for sample in ctx.progress.track(list(feeds), "gradients", len(feeds)):
        if rows >= GRADIENT_ROWS:
            break
        with torch.enable_grad():
            fed = {n: torch.from_numpy(np.asarray(a)).to(ctx.device) for n, a in sample.items()}
            found = module(**{argument_name(n): t for n, t in fed.items()})
            score = torch.zeros((), device=ctx.device)
            for value, kind in zip(outputs, kinds, strict=True):
                rows_of = _counted(found[value.name or ""], fed.get("attention_mask"))
                score = score + _likelihood(rows_of, kind, generator)
            gradients = torch.autograd.grad(score, [found[name] for name in values])
        for name, gradient in zip(values, gradients, strict=True):
            flat = gradient.reshape(-1, gradient.shape[-1]).to(torch.float64)
            product = flat.T @ flat
            sums[name] = product if name not in sums else sums[name] + product
        rows += gradients[0].numel() // gradients[0].shape[-1]
    return {name: (total / rows).cpu().numpy() for name, total in sums.items()}


def _counted(output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The rows of an output ``[b, t, d]`` that are no padding, behind a cache if there is one."""
    rows = output.reshape(-1, output.shape[-1])
    if mask is None or mask.dim() != 2 or output.dim() != 3 or len(output) != len(mask):
        return rows
    kept = mask[:, -output.shape[1] :] != 0
    return rows[kept.reshape(-1)] if kept.shape == output.shape[:2] else rows


def _likelihood(rows: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """The log-likelihood of a draw from what the model says, without the constants."""
    import torch

    if kind == "values":
        drawn = torch.randn(rows.shape, generator=generator, device=rows.device, dtype=rows.dtype)
        return (rows * drawn).sum()
    logs = torch.log_softmax(rows, -1) if kind == "logits" else rows.clamp(min=1e-30).log()
    drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
    return logs.gather(-1, drawn).sum()
