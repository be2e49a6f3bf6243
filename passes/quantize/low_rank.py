"""Two thin matrices beside a product that give back part of what rounding takes from its weight.

    y = MatMul(x, w)    ->    y = Add(MatMul(x, w'), MatMul(MatMul(x, a), b))        a: [k, r], b: [r, n]

With E = W - W' [k, n], a b is the matrix of rank r that is nearest

* to E itself (basis ``error``: LoRC, ZeroQuant-V2, arXiv 2303.08302, sec. 4): with E = U S V^T,
  a = U_r S_r^1/2 and b = S_r^1/2 V_r^T;
* to E as inputs see it (basis ``input``: EoRA, arXiv 2410.21271, sec. 3.2): with H = E[x^T x] = Q L Q^T and
  L^1/2 Q^T E = U S V^T, a = Q L^-1/2 U_r S_r^1/2 and b = S_r^1/2 V_r^T, which leaves the least
  tr(D^T H D) for D = E - a b. Directions without input get nothing.

a and b are stored as float16, or as int8 with a scale per column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.ir import edit, types
from netlathe.passes.quantize import rounding
from netlathe.passes.quantize.candidates import Candidate
from netlathe.passes.quantize.graph import Editor, as_codes
from netlathe.passes.quantize.layout import Layout, layout
from netlathe.passes.quantize.scheme import Scheme
from netlathe.pipeline.ledger import Entry

if TYPE_CHECKING:  # an extra
    import torch

Array = npt.NDArray[Any]
Basis = Literal["error", "input"]
Stored = Literal["float16", "int8"]
CREATED_BY = "quantize"
_NEVER_FED = 1e-12  # as a share of the largest eigenvalue


@dataclass(frozen=True)
class Branch:
    """What is added beside a weight: its rank, what it is nearest to, and how it is stored."""

    rank: int
    basis: Basis
    stored: Stored

    @property
    def scheme(self) -> Scheme:
        """How both matrices are stored."""
        return Scheme(weights=self.stored, scales="float16")

    def num_bytes(self, rows: int, columns: int) -> int:
        """Bytes on disk beside a weight [rows, columns]."""
        sizes = (rows * self.rank, self.rank), (self.rank * columns, columns)
        return sum(self.scheme.num_bytes(elements, groups) for elements, groups in sizes)


def unfit(candidate: Candidate, rank: int) -> str:
    """Why a weight gets no branch; empty where it can."""
    fed = candidate.input
    direct = all(user.op_type == "MatMul" and at == 1 for user, at in candidate.value.uses())
    if fed is None or fed.axis != -1 or not direct:
        return "no branch: it is not read as x W alone"
    if candidate.value.dtype != ir.DataType.FLOAT:
        return "no branch: these are for products in float32"
    rows, columns = candidate.dims
    if rank * (rows + columns) >= rows * columns:
        return f"no branch: of rank {rank} it would be larger than the weight"
    return ""


def solve(
    error: torch.Tensor, rank: int, moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """a [k, r] and b [r, n] for ``error`` [k, n] in float64; ``moment`` [k, k] for the basis ``input``."""
    import torch

    seen, back = error, None
    if moment is not None:
        values, vectors = torch.linalg.eigh(moment.double())
        values = values.clamp(min=0)
        fed = values > _NEVER_FED * values[-1]
        roots = torch.where(fed, values, 1.0).sqrt()
        seen = (vectors * (roots * fed)).T @ error
        back = vectors * (fed / roots)
    left, singular = _leading(seen, rank)
    roots = singular.sqrt()
    a = left * roots
    b = (left / torch.where(roots > 0, roots, 1.0)).T @ seen
    return (a if back is None else back @ a), b


def of_error(
    error: torch.Tensor, rank: int, moment: torch.Tensor | None = None
) -> dict[str, Array]:
    """The arrays of a branch for ``error`` [k, n]; see :func:`solve`."""
    a, b = solve(error.double(), rank, moment)
    return {"a": a.float().cpu().numpy(), "b": b.float().cpu().numpy()}


def _leading(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first left singular vectors and singular values, of the smaller Gram matrix."""
    import torch

    wide = matrix.shape[0] <= matrix.shape[1]
    gram = matrix @ matrix.T if wide else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram)
    singular = values.clamp(min=0).sqrt().flip(0)[:rank]
    vectors = vectors.flip(1)[:, :rank]
    if not wide:
        vectors = matrix @ vectors / torch.where(singular > 0, singular, 1.0)
    return vectors, singular


# -- in the ledger ----------------------------------------------------------------------------------


def detail(branch: Branch) -> dict[str, Any]:
    """What an entry says of it."""
    return {"rank": branch.rank, "basis": branch.basis, "stored": branch.stored}


def product(entry: Entry, arrays: Mapping[str, Array], device: str) -> torch.Tensor:
    """a b of an entry's branch as both are read, in float32 on ``device``."""
    import torch

    branch = branch_of(entry)
    assert branch is not None
    a, b = (torch.tensor(_rounded(arrays[key], branch), device=device).double() for key in "ab")
    return (a @ b).float()


def branch_of(entry: Entry) -> Branch | None:
    """What stands beside the weight of an entry."""
    held = entry.detail.get("low_rank")
    return held and Branch(held["rank"], held["basis"], held["stored"])


def _rounded(array: Array, branch: Branch) -> Array:
    own, scheme = _layout(array, branch), branch.scheme
    scale, zero = rounding.ranges(array, own, scheme)
    codes = rounding.codes(array, own, scheme, scale, zero)
    return rounding.numbers(codes, own, scheme, scale, zero, np.float32)


def _layout(array: Array, branch: Branch) -> Layout:
    if branch.stored == "float16":
        return Layout(array.shape, None)
    return layout(array.shape, frozenset({0}))


# -- in the graph -----------------------------------------------------------------------------------


def add(model: ir.Model, editor: Editor, chosen: Sequence[Entry]) -> None:
    """Put the branches of applied entries beside the products, before any weight is replaced."""
    thin: list[tuple[ir.Value, Branch]] = []
    for entry in chosen:
        branch = branch_of(entry)
        if branch is None:
            continue
        weight = model.graph.initializers[entry.detail["value"]]
        a, b = (editor.constant(model.graph, entry.arrays[k], f"{weight.name}_{k}") for k in "ab")
        thin += [(a, branch), (b, branch)]
        for node, _ in list(weight.uses()):
            x, made = node.inputs[0], node.outputs[0]
            whole = editor.node("MatMul", [x, weight], f"{made.name}_rounded")
            first = editor.node("MatMul", [x, a], f"{made.name}_directions")
            second = editor.node("MatMul", [first.outputs[0], b], f"{made.name}_low_rank")
            both = [whole.outputs[0], second.outputs[0]]
            total = editor.node("Add", both, f"{made.name}_sum")
            new = [whole, first, second, total]
            edit.replace(node, new, {made: total.outputs[0]}, CREATED_BY)
    types.annotate(model)
    for value, branch in thin:
        assert value.const_value is not None
        array = value.const_value.numpy()
        own, scheme = _layout(array, branch), branch.scheme
        scale, zero = rounding.ranges(array, own, scheme)
        codes = rounding.codes(array, own, scheme, scale, zero)
        tensor = as_codes(value.const_value, codes, own, scheme)
        editor.replace(value, tensor, own.scales(scale), own.scales(zero), own, scheme)
