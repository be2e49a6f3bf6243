"""Prune a model and hold it against its masked reference."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir

from netlathe.analysis.cost import cost
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of, relative_error
from netlathe.ir import interface, normal, verify
from netlathe.passes.prune import Prune
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Feeds


def pruned(
    model: ir.Model, pass_: Prune, ctx: Context | None = None
) -> tuple[ir.Model, list[Entry]]:
    """An edited copy in normal form, which verifies, and the ledger."""
    ctx = ctx or Context()
    after = model.clone()
    chosen = pass_.choose(after, ctx)
    pass_.edit(after, chosen, ctx)
    normal.normalize(after)
    verify.check(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    return after, chosen


def error_to_reference(
    model: ir.Model, after: ir.Model, pass_: Prune, chosen: list[Entry], feeds: Iterable[Feeds]
) -> float:
    """The largest error of ``after`` against the reference, on what is left of the outputs."""
    reference = pass_.simulate(model.clone(), chosen).model
    left, worst = interface.kept(after), 0.0
    for fed in feeds:
        expected = ort.run(reference, inputs_of(reference, fed))
        actual = ort.run(after, inputs_of(after, fed))
        for name, array in expected.items():
            worst = max(worst, relative_error(actual[name], interface.fit(array, name, left, {})))
    return worst


def check(
    model: ir.Model, pass_: Prune, feeds: Iterable[Feeds], tolerance: float = 1e-4
) -> list[Entry]:
    """Prune, compare with the reference, see that parameters fell; the ledger."""
    after, chosen = pruned(model, pass_)
    assert any(entry.status == "applied" for entry in chosen)
    assert error_to_reference(model, after, pass_, chosen, feeds) <= tolerance
    assert cost(after).params < cost(model).params
    return chosen
