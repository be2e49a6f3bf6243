"""What the weights that sum over a pruned width make up for: arrays that stand in the ledger.

For a product y = x W with x of positions K that stay and P that go:

* ``bias`` (FLAP, arXiv 2312.11983, section 3): y gets E[x_P] W_P, what the removed positions add on average.
* ``least_squares``: W_K becomes W_K + (C_KK + l I)^-1 C_KP W_P, the weights that are closest to y in mean
  square over the calibration data (C = E[x^T x]), with a ridge l that holds them to what they were. Without
  the ridge this is C_KK^-1 C_K: W, the same as the update of Optimal Brain Surgeon for all of P at once
  (Hassibi and Stork, 1992; for structures ZipLM, arXiv 2302.04089, section 3).

A weight that is read by products of different inputs, or moved other than by a transpose, or a convolution's,
keeps its numbers: the ledger names those that were changed. Solved in float64, one weight at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.linear import add_to_output
from netlathe.diagnostics import missing_extra
from netlathe.ir import edit, weights
from netlathe.passes.prune.candidates import Candidate, Positions
from netlathe.pipeline.pass_ import Context

if TYPE_CHECKING:
    from netlathe.execute.statistics import Statistic

Float64 = npt.NDArray[np.float64]
Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Compensation = Literal["none", "bias", "least_squares"]

WEIGHT, BIAS = "weight:", "bias:"  # prefixes of the names of arrays in an entry

# The ridge, as a share of the mean of C's diagonal: see docs/pruning-quality.md for what others give.
RIDGE = 1.0
_MOST_HELD = 1 << 27  # elements of second moments held at a time: 1 GiB, or one that is larger


@dataclass(frozen=True, eq=False)
class Reader:
    """A product whose weight loses rows: all candidates together say which ones stay."""

    weight: ir.Value  # the initializer [k, n]; [n, k] where ``dim`` is 1
    dim: int
    node: ir.Node  # the MatMul
    activation: str
    kept: npt.NDArray[np.bool_]  # [k]
    owner: Candidate  # the first candidate, in whose entry the arrays stand

    @property
    def rows(self) -> Float64:
        """The weight as ``[k, n]`` in float64."""
        array = weights.array(self.weight).astype(np.float64)
        return array if self.dim == 0 else array.T


def readers(kept: Mapping[Candidate, Positions]) -> list[Reader]:
    """The products that can make up for what goes, in the order of the candidates."""
    masks: dict[tuple[ir.Value, int], npt.NDArray[np.bool_]] = {}
    at: dict[tuple[ir.Value, int], list[tuple[Candidate, ir.Node, str]]] = defaultdict(list)
    for candidate, positions in kept.items():
        stays = np.zeros(candidate.size + 1, bool)  # the last one is for rows of no position: -1
        stays[positions] = stays[-1] = True
        for part in candidate.readers:
            key = part.value, part.dim
            mask = stays[part.index]
            masks[key] = masks[key] & mask if key in masks else mask
            activation = "" if part.activation is None else part.activation.name or ""
            at[key].append((candidate, part.node, activation))
    found = []
    for (weight, dim), uses in at.items():
        owner, node, activation = uses[0]
        alike = {(node, activation) for _, node, activation in uses}
        if len(alike) == 1 and activation and _is_plain(weight, dim, node):
            found.append(Reader(weight, dim, node, activation, masks[weight, dim], owner))
    return found


def _is_plain(weight: ir.Value, dim: int, node: ir.Node) -> bool:
    """Whether a MatMul reads the weight as ``[k, n]``, as it is or transposed, and nothing else does."""
    if node.op_type != "MatMul" or weight.shape is None or len(weight.shape) != 2:
        return False
    read = node.inputs[1]
    if read is not weight:
        maker = None if read is None else read.producer()
        if maker is None or maker.op_type != "Transpose" or maker.inputs[0] is not weight:
            return False
        if read is not None and len(read.uses()) != 1:
            return False
    return len(weight.uses()) == 1 and not weight.is_graph_output()


def solve(
    how: Compensation, kept: Mapping[Candidate, Positions], model: ir.Model, ctx: Context
) -> dict[Candidate, dict[str, npt.NDArray[Any]]]:
    """The arrays of each candidate's entry: ``weight:NAME`` at its full shape, ``bias:OUTPUT``.

    Of a new weight the rows that go are zero.

    Raises:
        PassError: there is no calibration data.
    """
    found: dict[Candidate, dict[str, npt.NDArray[Any]]] = {c: {} for c in kept}
    if how == "none":
        return found
    try:
        from netlathe.execute.statistics import Covariance, Mean
    except ModuleNotFoundError as error:
        raise missing_extra("torch", "torch", f"prune(compensate={how!r})") from error
    kind = Mean if how == "bias" else Covariance
    for some in _batches(readers(kept)):
        wanted: list[Statistic] = [kind(reader.activation) for reader in some]
        results = ctx.collect(model, wanted, needed_by=f"prune(compensate={how!r})")
        for reader, result in zip(some, results, strict=True):
            name, solved = f"{WEIGHT}{reader.weight.name}", partial(_refitted, reader)
            if how == "bias":
                name, solved = f"{BIAS}{reader.node.outputs[0].name}", partial(_added, reader)
            made = ctx.once(name, partial(solved, result.array))
            found[reader.owner][name] = made["array"]
    return found


def _batches(of: Sequence[Reader]) -> Iterator[list[Reader]]:
    """Readers whose second moments are held together: each batch is a sweep of its own."""
    batch: list[Reader] = []
    sizes: dict[str, int] = {}
    for reader in of:
        size = len(reader.kept) ** 2
        if batch and sum(sizes.values()) + size > _MOST_HELD and reader.activation not in sizes:
            yield batch
            batch, sizes = [], {}
        batch.append(reader)
        sizes[reader.activation] = size
    if batch:
        yield batch


def _added(reader: Reader, statistic: Float64) -> Arrays:
    return {"array": _rounded(reader, bias(reader.rows, statistic, reader.kept))}


def _refitted(reader: Reader, statistic: Float64) -> Arrays:
    new = refit(reader.rows, statistic, reader.kept)
    return {"array": _rounded(reader, new if reader.dim == 0 else new.T)}


def _rounded(reader: Reader, array: Float64) -> npt.NDArray[Any]:
    """In the weight's own dtype."""
    return array.astype(weights.array(reader.weight).dtype)


def bias(rows: Float64, mean: Float64, kept: npt.NDArray[np.bool_]) -> Float64:
    """E[x_P] W_P of ``rows`` W [k, n]: ``[n]``."""
    return np.asarray(mean[~kept] @ rows[~kept])


def refit(
    rows: Float64, covariance: Float64, kept: npt.NDArray[np.bool_], ridge: float = RIDGE
) -> Float64:
    """W_K + (C_KK + l I)^-1 C_KP W_P in the kept rows of ``[k, n]``, zero in the others.

    A channel that is always zero, or the multiple of another, is no trouble: the ridge decides.
    """
    stays, goes = np.flatnonzero(kept), np.flatnonzero(~kept)
    made = np.where(kept[:, None], rows, 0.0)
    level = ridge * float(np.mean(np.diag(covariance)))
    if not len(goes) or not len(stays) or level == 0.0:
        return made
    system = covariance[np.ix_(stays, stays)] + level * np.eye(len(stays))
    made[stays] += np.linalg.solve(system, covariance[np.ix_(stays, goes)] @ rows[goes])
    return made


# -- applying it --------------------------------------------------------------------------------------


def edit_weights(model: ir.Model, arrays: Sequence[Arrays]) -> None:
    """Give weights the numbers that ``arrays`` tell under ``weight:NAME``."""
    for name, array in _under(WEIGHT, arrays).items():
        value = model.graph.initializers[name]
        value.const_value = ir.Tensor(np.ascontiguousarray(array), dtype=value.dtype, name=name)


def edit_biases(model: ir.Model, arrays: Sequence[Arrays], created_by: str) -> None:
    """Add to outputs what ``arrays`` tell under ``bias:OUTPUT``, into a bias that is there already."""
    taken = edit.names_in(model.graph)
    named = _under(BIAS, arrays)
    for node in list(model.graph):
        array = named.get(node.outputs[0].name or "") if node.op_type == "MatMul" else None
        if array is not None:
            name = f"{node.outputs[0].name}/bias"
            vector = partial(np.asarray, array.astype(np.float64))
            add_to_output(model.graph, node, array.size, vector, name, taken, created_by)


def _under(prefix: str, arrays: Sequence[Arrays]) -> Arrays:
    """What there is under a prefix, by the name behind it."""
    return {
        name.removeprefix(prefix): array
        for one in arrays
        for name, array in one.items()
        if name.startswith(prefix)
    }
