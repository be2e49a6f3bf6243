"""The published networks, pruned in every scope that they have, equal their masked references."""

from __future__ import annotations

from collections import Counter

import pytest

from netlathe.analysis.axes import analyse
from netlathe.passes.prune import Prune
from netlathe.passes.prune.candidates import SCOPES, find_candidates
from tests.passes.prune.helpers import check
from tests.published import networks
from tests.published.expected import EXPECTED

QUICK = networks.some("super_resolution")


@pytest.mark.parametrize("name", QUICK)
def test_the_candidates_are_what_the_structure_says(name: str) -> None:
    found: dict[str, Counter[int]] = {scope: Counter() for scope in SCOPES}
    for candidate in find_candidates(analyse(networks.captured(name))):
        if not candidate.pins and candidate.size > candidate.least:
            found[candidate.scope][candidate.size] += 1
    expected = EXPECTED[name]
    for scope in SCOPES:
        wanted = {} if scope == "vocab" else getattr(expected, scope)  # ids are the caller's
        assert found[scope] == Counter(wanted), scope


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_a_pruned_network_equals_its_masked_reference(name: str, ratio: float) -> None:
    chosen = check(networks.captured(name), Prune(ratio=ratio), networks.feeds(name))
    applied = {entry.detail["scope"] for entry in chosen if entry.status == "applied"}
    wanted = {scope for scope in SCOPES if getattr(EXPECTED[name], scope, {})}
    if "kv_groups" in wanted:  # of groups and the heads in them, prune takes one
        assert len(applied & {"heads", "kv_groups"}) == 1
        wanted = wanted - {"heads", "kv_groups"} | applied & {"heads", "kv_groups"}
    assert applied == wanted
