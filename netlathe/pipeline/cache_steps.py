"""Looks passes and their pieces up in a cache, and keeps those that were not there.

Everything is found by what it was made from: the model before the pass, the pass with its options and
code, calibration data, seed, target and toolchain. So the same command goes on where it was killed, another
one takes over what it has in common with it, and nothing is ever taken for what it is not.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import onnx_ir as ir

from netlathe.analysis.cost import Cost
from netlathe.pipeline import cache_model
from netlathe.pipeline.cache import Cache, Material
from netlathe.pipeline.cache_file import Reader, Writer
from netlathe.pipeline.cache_keys import code_of, toolchain
from netlathe.pipeline.cache_model import Snapshot
from netlathe.pipeline.fingerprint import feeds_digest
from netlathe.pipeline.inputs import describe_calibration, describe_pass, describe_target
from netlathe.pipeline.interfaces import Backend, Captured
from netlathe.pipeline.pass_ import Array, Context, Lossy, Pass, read_only
from netlathe.pipeline.step import Step


class Steps:
    """The steps of one compilation in a cache; told of every step, in order.

    ``verify`` is whether steps are verified. Those that are not ``kept`` are neither looked up nor written:
    only the pieces of their passes are.
    """

    def __init__(self, cache: Cache, captured: Captured, *, verify: bool, kept: bool) -> None:
        self.cache = cache
        self._captured = captured
        self._verify = verify
        self._kept = kept
        self._model = captured.model
        self._snapshots: dict[int, Snapshot] = {}  # by the id of a model that is held on to
        self._last = captured.model  # the last that lost accuracy: losses are measured to it
        self._calibration: tuple[object, Any] = (None, None)
        self._pieces: Pieces | None = None
        self._material: Material | None = None  # of the step that is being made

    def start(self, pass_: Pass, ctx: Context) -> Context:
        """``ctx`` as ``pass_`` gets it: its pieces are looked up and kept."""
        self._pieces = None
        if _repeatable(pass_):
            self._pieces = Pieces(self.cache, str(pass_), lambda: self._work(pass_, ctx))
        return dataclasses.replace(ctx, pieces=self._pieces)

    def recall(self, pass_: Pass, ctx: Context, cost_before: Cost) -> tuple[ir.Model, Step] | None:
        """The model after ``pass_`` and what it did, where that is known; else it has to be made."""
        self._material = None
        if not self._kept or not _repeatable(pass_):
            return None
        start = time.perf_counter()
        self._material = self._step_material(pass_, ctx)
        reader = self.cache.read("step", self._material)
        if reader is None:
            return None
        known = reader.description
        model = self._model
        if known["model"] is not None:
            read = cache_model.read_model(known["model"], reader, self.snapshot(model))
            model = self._remember(read)
        step = Step(
            pass_,
            cache_model.read_entries(known["entries"], reader),
            known["changed"],
            known["statistics"],
            known["renamed"],
            cost_before,
            cache_model.read_cost(known["cost"]),
            cache_model.read_check(known["check"]),
            cache_model.read_loss(known["loss"]),
            cache_model.read_loss(known["total_loss"]),
            recalled=True,
        )
        step.seconds = time.perf_counter() - start
        self._advance(pass_, model, step)
        return model, step

    def keep(self, pass_: Pass, model: ir.Model, step: Step) -> None:
        """Write what ``pass_`` made of the current model, which then is ``model``."""
        if self._pieces is not None:
            step.pieces, step.recalled_pieces = self._pieces.count, self._pieces.recalled
        if self._material is not None:
            before = self.snapshot(self._model)
            made: list[Snapshot] = []

            def write(writer: Writer) -> Mapping[str, Any]:
                described = None
                if step.changed:
                    described, snapshot = cache_model.write_model(model, before, writer)
                    made.append(snapshot)
                return {"model": described, **_describe(step, writer)}

            try:
                if self.cache.write("step", self._material, write) and made:
                    self._remember(made[0])
            except cache_model.NotFaithfulError:
                self.cache.tell(f"{pass_} is not kept: ONNX does not hold all that its model is")
        self._advance(pass_, model, step)

    def snapshot(self, model: ir.Model) -> Snapshot:
        """What a model of this compilation is; the current one is looked at where that is not known."""
        known = self._snapshots.get(id(model))
        if known is None:
            before = next(reversed(self._snapshots.values()), None)
            known = self._snapshots[id(model)] = Snapshot.of(model, before)
        return known

    def artifact_material(
        self, model: ir.Model, backend: Backend, manifest: str
    ) -> Material | None:
        """What an artifact is made from; ``manifest`` is the digest that it is stamped with.

        None where that cannot be told.
        """
        if (code := code_of(backend)) is None:
            return None
        return {
            "toolchain": toolchain(),
            "model": self.snapshot(model).digest,
            "code": code,
            "manifest": manifest,
        }

    def _remember(self, snapshot: Snapshot) -> ir.Model:
        self._snapshots[id(snapshot.model)] = snapshot
        return snapshot.model

    def _advance(self, pass_: Pass, model: ir.Model, step: Step) -> None:
        self._model = model
        if step.changed and isinstance(pass_.exactness, Lossy):
            self._last = model
        needed = [id(m) for m in (self._captured.model, self._last, model)]
        self._snapshots = {at: self._snapshots[at] for at in needed if at in self._snapshots}

    # -- what things are made from ----------------------------------------------------------------

    def _work(self, pass_: Pass, ctx: Context) -> Material:
        if self._calibration[0] is not ctx.calibration:
            self._calibration = (ctx.calibration, describe_calibration(ctx.calibration))
        return {
            "toolchain": toolchain(),
            "model": self.snapshot(self._model).digest,
            "pass": describe_pass(pass_),
            "code": code_of(pass_),
            "calibration": self._calibration[1],
            "target": None if ctx.target is None else describe_target(ctx.target),
            "seed": ctx.seed,
            "device": ctx.device,
        }

    def _step_material(self, pass_: Pass, ctx: Context) -> Material:
        """A step is what a pass made, and what was found when that was checked."""
        captured = self._captured
        dense = self.snapshot(captured.model).digest
        checked = {
            "captured": dense,
            "last": self.snapshot(self._last).digest,
            "sample": feeds_digest(captured.sample(captured.dynamic, 0)),
        }
        return {
            **self._work(pass_, ctx),
            "dynamic": dict(captured.dynamic),
            "checked": checked if self._verify else None,
        }


class Pieces:
    """The named pieces of work of one pass."""

    def __init__(self, cache: Cache, pass_: str, work: Callable[[], Material]) -> None:
        self._cache = cache
        self._pass = pass_
        self._work = work
        self._material: Material | None = None
        self.count = 0
        self.recalled = 0

    def once(self, name: str, compute: Callable[[], Mapping[str, Array]]) -> Mapping[str, Array]:
        """See :meth:`Context.once`."""
        if self._material is None:
            self._material = self._work()
        material = {**self._material, "piece": name}
        self.count += 1
        if (reader := self._cache.read("piece", material)) is not None:
            if not self.recalled:
                self._cache.tell(f"going on with {self._pass} where an earlier run stopped")
            self.recalled += 1
            return _arrays(reader)
        arrays = read_only(compute())
        described = lambda writer: {  # noqa: E731
            "arrays": {name: writer.add_array(array) for name, array in arrays.items()}
        }
        if self._cache.write("piece", material, described):
            reader = self._cache.read("piece", material)
        return arrays if reader is None else _arrays(reader)


def _arrays(reader: Reader) -> Mapping[str, Array]:
    return {name: reader.array(array) for name, array in reader.description["arrays"].items()}


def _repeatable(pass_: Pass) -> bool:
    """Whether what ``pass_`` makes can be told by its name, options and code."""
    if not pass_.repeatable or code_of(pass_) is None:
        return False
    try:
        json.dumps(pass_.option_values(), allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _describe(step: Step, writer: Writer) -> dict[str, Any]:
    return {
        "entries": cache_model.write_entries(step.entries, writer),
        "changed": step.changed,
        "statistics": step.statistics,
        "renamed": step.renamed,
        "cost": dataclasses.asdict(step.cost_after),
        "check": dataclasses.asdict(step.check),
        "loss": None if step.loss is None else dataclasses.asdict(step.loss),
        "total_loss": None if step.total_loss is None else dataclasses.asdict(step.total_loss),
    }
