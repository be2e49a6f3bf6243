"""Fits what reads a norm to what it read before the slicing, in closed form.

With n the normalized signal at a norm of the dense model, n' the one of the sliced model for the same
tokens, and R the ridge regression of n on n',

    R = argmin E |n' R - n|^2 + e |R - I|^2        e: a hundredth of the mean of E n' n''

every layer W behind the norm becomes R W: it is given the best linear guess of what it was made for. Norms
are fitted in the order of the graph, each behind those that were. That is one sweep over a graph that
holds both models side by side; they share their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from netlathe.analysis import linear
from netlathe.analysis.linear import Weight
from netlathe.execute.statistics import Accumulator, Covariance, Statistic, StatisticResult
from netlathe.ir import edit, weights
from netlathe.pipeline.pass_ import Context

Matrix = npt.NDArray[np.float64]
# Between 1e-2 and 1e-4 the KL moves by less than a hundredth of itself.
RIDGE = 1e-2


@dataclass(frozen=True)
class CrossCovariance(Statistic):
    """Mean over rows of a b^T: ``[channels, channels]``."""

    a: str
    b: str

    @property
    def values(self) -> tuple[str, ...]:
        """Both values."""
        return (self.a, self.b)

    def start(self) -> Accumulator:
        """An empty sum."""
        return _Cross()


class _Cross(Accumulator):
    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None

    def add(self, *rows: torch.Tensor) -> None:
        a, b = rows
        product = a.T @ b
        self._sum = product if self._sum is None else self._sum + product
        self.count += a.shape[0]

    def result(self) -> torch.Tensor:
        assert self._sum is not None
        return self._sum / self.count


def readers(norm: ir.Node) -> list[Weight] | str:
    """The layers that take in a fit behind a norm, or why they cannot."""
    output = norm.outputs[0]
    assert output.shape is not None
    found = linear.readers(output, len(output.shape) - 1)
    if isinstance(found, str):
        return found
    for weight in found:
        if not weight.is_alone:
            return f"{weight.value.name} is read by {weight.other_reader()} too"
        if _ends(weight.node):
            return f"{weight.node.outputs[0].name} is what the model gives: a fit would shrink it"
    return found or "nothing reads it"


def _ends(node: ir.Node) -> bool:
    """Whether the output of a layer, with its bias, is an output of the model."""
    output = node.outputs[0]
    behind = [reader.outputs[0] for reader, _ in output.uses() if reader.op_type == "Add"]
    return any(value.is_graph_output() for value in (output, *behind))


def fit(
    model: ir.Model,
    projections: Mapping[str, Matrix],
    norms: list[str],
    ctx: Context,
    needed_by: str,
) -> dict[str, Matrix]:
    """R for each norm, by the name of its output; ``projections`` are those of the points of the stream."""
    made: dict[str, Matrix] = {}
    pairs = _Pair(model, projections, norms, made)
    wanted: list[Statistic] = []
    owner: dict[Statistic, str] = {}
    for norm, twin in pairs.norms.items():
        for statistic in (Covariance(twin), CrossCovariance(twin, norm)):
            wanted.append(statistic)
            owner[statistic] = norm
    seen: dict[str, list[Matrix]] = {}

    def take(result: StatisticResult) -> None:
        norm = owner[result.statistic]
        arrays = seen.setdefault(norm, [None, None])  # type: ignore[list-item]
        arrays[isinstance(result.statistic, CrossCovariance)] = result.array
        if all(array is not None for array in arrays):
            moment, cross = seen.pop(norm)
            held = ctx.once(f"fit {norm}", lambda: {"fit": ridge(moment, cross, ctx.device)})
            made[norm] = held["fit"]

    ctx.collect(pairs.model, wanted, needed_by=needed_by, settle=take)
    return made


def ridge(moment: Matrix, cross: Matrix, device: str = "cpu") -> Matrix:
    """R of the regression, drawn towards the identity."""
    size = len(moment)
    damped = torch.from_numpy(moment).to(device)
    damped = damped + RIDGE * damped.diagonal().mean() * torch.eye(
        size, dtype=torch.float64, device=device
    )
    factor = torch.linalg.cholesky(damped)
    moved: Matrix = (
        torch.cholesky_solve(torch.from_numpy(cross - moment).to(device), factor).cpu().numpy()
    )
    return np.eye(size) + moved


class _Pair:
    """A copy of a model beside which its sliced twin stands, in the same graph."""

    def __init__(
        self,
        model: ir.Model,
        projections: Mapping[str, Matrix],
        norms: list[str],
        fits: Mapping[str, Matrix],
    ) -> None:
        self.model = model.clone()
        self.norms: dict[str, str] = {}  # a norm's output -> its twin's
        graph = self.model.graph
        self.graph, self.taken = graph, edit.names_in(graph)
        twins: dict[ir.Value, ir.Value] = {}
        for node in list(graph):
            last = node
            if any(value in twins for value in node.inputs if value is not None):
                last = self._twin(node, twins)
            for value in node.outputs:
                name = value.name or ""
                if name in projections:
                    last = self._times(last, twins, value, "projected", projections.get, name)
                if name in norms and value in twins:
                    self.norms[name] = twins[value].name or ""
                    last = self._times(last, twins, value, "fitted", fits.get, name)

    def _twin(self, node: ir.Node, twins: dict[ir.Value, ir.Value]) -> ir.Node:
        inputs = [None if value is None else twins.get(value, value) for value in node.inputs]
        twin = ir.node(
            node.op_type,
            inputs,
            {name: attribute.value for name, attribute in node.attributes.items()},
            domain=node.domain,
            num_outputs=len(node.outputs),
        )
        for before, after in zip(node.outputs, twin.outputs, strict=True):
            after.type, after.shape = before.type, before.shape
            after.name = edit.unique_name(self.graph, f"{before.name}/sliced", self.taken)
            twins[before] = after
        self.graph.insert_after(node, twin)
        return twin

    def _times(
        self,
        behind: ir.Node,
        twins: dict[ir.Value, ir.Value],
        value: ir.Value,
        what: str,
        matrices: Callable[[str], Matrix | None],
        key: str,
    ) -> ir.Node:
        """Let the twin of a value be multiplied by a matrix, which may come later."""
        source = twins.get(value, value)
        assert value.dtype is not None and value.shape is not None
        width = value.shape[-1]
        assert isinstance(width, int)

        def read(one: npt.NDArray[np.float64]) -> Matrix:
            held = matrices(key)
            return np.eye(width, dtype=one.dtype) if held is None else held.astype(one.dtype)

        name = edit.unique_name(self.graph, f"{value.name}/{what}", self.taken)
        one = ir.tensor(np.ones((), value.dtype.numpy()))
        tensor = weights.derived(one, read, value.dtype, [width, width], name)
        constant = edit.constant(self.graph, tensor, f"{name}_by", self.taken)
        node = edit.node("MatMul", [source, constant], dtype=value.dtype, shape=value.shape)
        node.outputs[0].name = name
        self.graph.insert_after(behind, node)
        twins[value] = node.outputs[0]
        return node
