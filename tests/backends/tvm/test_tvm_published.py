"""The published networks, pruned by 0.3, through TVM against the judge."""

from __future__ import annotations

import pytest

from netlathe.execute import ort
from netlathe.execute.compare import inputs_of, relative_error
from netlathe.passes.prune import Prune
from tests.passes.prune.helpers import pruned
from tests.published import networks

pytest.importorskip("tvm", reason="the tvm extra is not installed")

from tests.backends.tvm.in_process import InProcess

# The project's bar for TVM: max|difference| as a share of the output's RMS, in float32, against ONNX Runtime
# with its optimizations off.
BOUND = 1e-4


@pytest.mark.parametrize("name", networks.some("super_resolution"))
def test_a_pruned_network_agrees_with_the_judge(name: str) -> None:
    """At two sizes, from one compilation."""
    model, chosen = pruned(networks.captured(name), Prune(ratio=0.3))
    assert any(entry.status == "applied" for entry in chosen)
    artifact = InProcess(model)
    for feeds in networks.feeds(name):
        given = inputs_of(model, feeds)
        actual, expected = artifact.run(given), ort.run(model, given)
        assert actual.keys() == expected.keys()
        errors = {name: relative_error(actual[name], expected[name]) for name in expected}
        assert max(errors.values()) <= BOUND, errors
