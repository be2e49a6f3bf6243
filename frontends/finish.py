"""The common end of every capture: normal form, raised, verified, equal to the original."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from netlathe.diagnostics import VerifyError
from netlathe.execute import samples
from netlathe.frontends.compare import Original, check_same, help_to_fix
from netlathe.ir import normal, verify, weights
from netlathe.passes.normalize import raise_operators
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Feeds


def finish(
    model: ir.Model,
    original: Original,
    *,
    source: str,
    frontend: str,
    dynamic: Mapping[str, int],
    entries: Sequence[Entry] = (),
    files: Mapping[str, Path] | None = None,
    tokenize: Callable[[Sequence[str]], Feeds] | None = None,
) -> Captured:
    """Bring a raw graph into normal form, raise it, verify it, and compare it with the original.

    ``model`` is edited in place and becomes the captured one.

    Raises:
        VerifyError: the graph is malformed.
        CaptureError: it is not the same function as ``original``.
    """
    ledger = list(entries)
    ledger += normal.normalize(model)
    ledger += raise_operators(model)
    ledger += normal.normalize(model)

    def sample(sizes: Mapping[str, int], seed: int) -> Feeds:
        return samples.synthesize(model, {**dynamic, **sizes}, seed)

    if problems := verify.verify(model):
        baked = [problem.code == "verify.baked" for problem in problems]
        help_ = help_to_fix(original, dynamic, sample) if any(baked) else ""
        raise VerifyError(
            dataclasses.replace(problem, help=help_) if help_ and is_baked else problem
            for problem, is_baked in zip(problems, baked, strict=True)
        )
    weights.give_back(model)

    entry, sizes = check_same(model, original, dynamic, sample, what=source)
    ledger.append(entry)
    if changed := {name: size for name, size in sizes.items() if size != dynamic[name]}:
        named = ", ".join(f"{name}={size}" for name, size in changed.items())
        ledger.append(Entry("sizes", "applied", f"it runs at {named}, but not at smaller ones"))
    dynamic = sizes
    return Captured(
        model=model,
        source=source,
        frontend=frontend,
        dynamic=dict(dynamic),
        sample=sample,
        entries=ledger,
        files=dict(files or {}),
        tokenize=tokenize,
    )
