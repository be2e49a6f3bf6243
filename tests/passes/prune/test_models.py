"""At ratio 0.3 and 0.5 every model of the zoo, pruned in all scopes, equals its masked reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netlathe.diagnostics import PassError
from netlathe.ir import weights
from netlathe.passes.prune import Prune
from netlathe.passes.prune.candidates import SCOPES, Scope
from tests import zoo, zoo_ir
from tests.analysis.axes import graphs
from tests.analysis.axes.architectures import IMAGES
from tests.analysis.axes.test_architectures import captured
from tests.passes.prune.helpers import check, error_to_reference, pruned

QUICK = ("falcon", "mixtral", "segformer")
# What each model has, by structure alone; a T5 gives its encoder's states out, which pins its width.
SCOPES_OF = {
    "bert": {"ffn", "heads", "hidden"},
    "convnext": {"ffn", "hidden"},
    "efficientnet": {"channels"},
    "falcon": {"ffn", "heads", "hidden"},
    "gemma": {"ffn", "heads", "hidden"},
    "gpt2": {"ffn", "heads", "hidden"},
    "llama": {"ffn", "kv_groups", "hidden"},
    "minilm": {"ffn", "heads"},
    "mistral": {"ffn", "kv_groups", "hidden"},
    "mixtral": {"ffn", "kv_groups", "hidden", "experts"},
    "mobilenet_v2": {"channels", "hidden"},
    "opt": {"ffn", "heads", "hidden"},
    "phi": {"ffn", "heads", "hidden"},
    "qwen2": {"ffn", "kv_groups", "hidden"},
    "resnet": {"channels", "hidden"},
    "segformer": {"channels", "ffn", "heads", "hidden"},
    "swin": {"ffn", "heads", "hidden"},
    "t5": {"ffn", "heads"},
    "vit": {"ffn", "heads", "hidden"},
    "whisper": {"channels", "ffn", "heads", "hidden"},
}


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("name", zoo_ir.some(*QUICK))
def test_a_pruned_model_equals_its_masked_reference(name: str, ratio: float) -> None:
    chosen = check(zoo_ir.captured(name), Prune(ratio=ratio), zoo_ir.feeds(name))
    applied = [entry for entry in chosen if entry.status == "applied"]
    assert {entry.detail["scope"] for entry in applied} == SCOPES_OF[name]
    assert len({entry.candidate for entry in chosen}) == len(chosen)


def test_every_model_of_the_zoo_has_its_scopes_stated() -> None:
    assert set(SCOPES_OF) == set(zoo.NAMES)


QUICK_NETWORKS = ("resnext", "shufflenet")


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK_NETWORKS else pytest.mark.slow)
        for name in (*IMAGES, "qwen2_moe")
    ],
)
def test_networks_with_joins_equal_their_masked_reference(name: str, ratio: float) -> None:
    source = captured(name)
    check(source.model, Prune(ratio=ratio), [source.sample({}, seed) for seed in range(2)])


@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope not in ("vocab", "channels")])
def test_each_scope_by_itself(scope: Scope) -> None:
    model = zoo_ir.captured("mixtral")
    chosen = check(model, Prune(ratio=0.5, scope=(scope,)), zoo_ir.feeds("mixtral"))
    assert {entry.detail["scope"] for entry in chosen} == {scope}


@pytest.mark.parametrize("name", ["gpt2", "resnet"])
def test_a_wrong_edit_differs_from_the_reference(name: str) -> None:
    """One weight of a consumer with the rows of other positions, at the right shape."""
    model, pass_ = zoo_ir.captured(name), Prune(ratio=0.3, scope=("ffn", "channels"))
    after, chosen = pruned(model, pass_)
    right = error_to_reference(model, after, pass_, chosen, zoo_ir.feeds(name)[:1])
    old = {value.name: value for value in model.graph.initializers.values()}
    narrow = [
        value
        for value in after.graph.initializers.values()
        if value.name in old
        and len(value.shape or ()) > 1
        and (value.shape or (0,))[0] < (old[value.name].shape or (0,))[0]  # type: ignore[operator]
    ]
    value = narrow[0]
    array = np.roll(weights.array(value), 1, axis=0)
    value.const_value = ir.tensor(array, name=value.name)
    wrong = error_to_reference(model, after, pass_, chosen, zoo_ir.feeds(name)[:1])
    assert right <= 1e-4 < 1e-2 < wrong


@pytest.mark.parametrize(
    "models", [graphs.sequences(), graphs.images()], ids=["sequences", "images"]
)
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_models_equal_their_masked_references(
    models: st.SearchStrategy[ir.Model], count: int
) -> None:
    outcomes: list[bool] = []

    @settings(max_examples=count, deadline=None, derandomize=True, database=None)
    @given(
        models,
        st.sampled_from((0.2, 0.4, 0.6)),
        st.sampled_from(((), ("channels", "ffn"), ("hidden",), ("heads", "kv_groups"))),
        st.sampled_from(("l1", "l2", "random")),
        st.sampled_from((1, 2)),
    )
    def run(model: ir.Model, ratio: float, scope: Any, score: Any, round_to: int) -> None:
        pass_ = Prune(ratio=ratio, scope=scope, score=score, round_to=round_to)
        try:
            after, chosen = pruned(model, pass_)
        except PassError as error:  # tiny widths: half of one position is left, or no even width
            assert error.diagnostics[0].code in ("prune.empty", "prune.round_to")
            outcomes.append(False)
            return
        outcomes.append(any(entry.status == "applied" for entry in chosen))
        assert error_to_reference(model, after, pass_, chosen, [graphs.feeds(model)]) <= 1e-4

    run()
    assert sum(outcomes) * 3 >= len(outcomes)  # the settings do prune
