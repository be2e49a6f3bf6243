"""The manager: runs passes one after the other, checks each, and accounts for what each did.

Every pass works on a copy of the model (weights are shared, not copied), which becomes the current
model only after its checks. So whatever happens, Ctrl-C included, the caller's model is as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

import onnx_ir as ir

from netlathe.analysis.cost import Cost, cost
from netlathe.diagnostics import (
    Diagnostic,
    GateError,
    LowerError,
    NetLatheError,
    PassError,
    VerifyError,
)
from netlathe.execute import ort
from netlathe.execute.compare import inputs_of
from netlathe.ir import coded, interface, normal, sparsity, verify, weights
from netlathe.pipeline import precheck
from netlathe.pipeline.cache import Cache
from netlathe.pipeline.cache_steps import Steps
from netlathe.pipeline.fingerprint import Guard
from netlathe.pipeline.interfaces import Artifact, Backend, Captured
from netlathe.pipeline.ledger import Entry, Status
from netlathe.pipeline.loss import Loss, Metric, Scale, Subject
from netlathe.pipeline.pass_ import ChoosingPass, Context, Lossy, Pass, Result
from netlathe.pipeline.step import Step
from netlathe.pipeline.verification import Bench, Check, Outcome, blamed

if TYPE_CHECKING:  # an extra
    import torch

if sys.platform != "win32":
    import resource

_MOST_LISTED = 20  # skipped candidates that an error shows one by one


@dataclass
class Compiled:
    """A model and how it came about; ``dense`` is the model as captured, ``model`` the result."""

    captured: Captured
    model: ir.Model
    steps: list[Step]
    context: Context = field(default_factory=Context)
    cached: Steps | None = field(default=None, repr=False)  # where it was compiled with a cache

    @property
    def dense(self) -> ir.Model:
        """The model as captured."""
        return self.captured.model

    def module(self) -> torch.fx.GraphModule:
        """The model as a PyTorch module to fine-tune; it has copies of the weights.

        Its inputs go by the model's names, its outputs are a dict. Weights in floating point are parameters;
        the rest are buffers, the running statistics of a batch norm among them: modules of NetLathe compute
        as in inference, in training mode too.

        Raises:
            LowerError: with every node that torch has no function for.
        """
        from netlathe.execute.fx import to_fx  # torch is not needed to run passes

        return to_fx(self.model)

    def with_weights(self, tuned: torch.nn.Module | Mapping[str, torch.Tensor]) -> Compiled:
        """The model with other weights: those of :meth:`module`, trained, or of its ``state_dict``.

        It is a capture of its own, to save or to compile on from its ``captured``: losses are measured to
        it from then on. Its manifest holds the compilation so far, and of every weight that changed the
        digests. It is compared with the module in ONNX Runtime at two sizes. ``self`` stays as it is.

        Raises:
            InputError: a weight is unknown, missing, of another shape or dtype, or not finite; an integer
                or a constant has changed; names of a tied weight differ.
            VerifyError, CaptureError: the model is not well formed, or differs from the module.
        """
        from netlathe.frontends.tuned import with_weights  # torch is not needed to run passes

        return with_weights(self, tuned)

    def save(
        self,
        folder: str | Path,
        target: str | None = None,
        *,
        overwrite: bool = False,
        locked: bool = False,
        **settings: Any,
    ) -> Artifact:
        """Build for ``target`` and write the artifact, its manifest and what travels with it.

        ``target`` is the one it was compiled for unless another is named, else ``onnx``; settings are
        the target's, such as ``opset``. ``folder`` is written whole or not at all. With ``locked`` it
        holds a manifest, from which nothing may differ: versions, weights, passes, data, decisions and the
        bytes of every file.

        Raises:
            OptionError: there is no such target or setting.
            LowerError: the target cannot express the model; every gap is listed.
            InputError: the folder exists or cannot be written, or holds the source.
            VerifyError: what was written computes something else.
            GateError: with ``locked``, something differs from the manifest; all of it is listed.
        """
        from netlathe.pipeline.save import save  # backends and output are not needed to run passes

        return save(
            self, Path(folder), target, overwrite=overwrite, locked=locked, settings=settings
        )


class Observer(Protocol):
    """Is told what the manager does; the CLI shows it."""

    def started(self, pass_: Pass) -> None:
        """``pass_`` is about to run."""
        ...

    def finished(self, step: Step) -> None:
        """A pass has run and was checked."""
        ...


def run(
    captured: Captured,
    passes: Sequence[Pass],
    ctx: Context,
    *,
    strict: bool = False,
    verify: bool = True,
    observer: Observer | None = None,
    metric: Metric | None = None,
    cache: Cache | None = None,
    backend: Backend | None = None,
) -> Compiled:
    """Run ``passes`` over a copy of the captured model, checking after each.

    Structure and types are always checked; ``verify`` compares outputs too and measures losses.
    ``metric`` is a number of the user's own, measured before and after every lossy pass. What ``cache``
    holds is taken from there, and what is made is kept there. Nobody can tell what a ``metric`` depends
    on: with one only pieces of passes are looked up. ``backend`` is for the context's target: as soon as
    no pass to come can fill a gap between the model and the target, all of them are an error.

    Raises:
        OptionError: a pass cannot come behind one before it, or needs calibration data and there is none;
            nothing has run then.
        VerifyError: a pass broke the model, or changed what it must not change. It is named.
        PassError: a pass could not do what was asked, failed, or did not tell the truth.
        GateError: with ``strict``, a pass did nothing, or skipped what its options do not leave out.
        LowerError: the target lacks operators that no pass takes away; every gap is listed.
        InputError: the cache cannot be written any more.
    """
    return _run(
        captured,
        passes,
        ctx,
        strict,
        verify,
        observer,
        metric,
        cache,
        keep_steps=metric is None,
        backend=backend,
    )


def _run(
    captured: Captured,
    passes: Sequence[Pass],
    ctx: Context,
    strict: bool,
    verify: bool,
    observer: Observer | None,
    metric: Metric | None,
    cache: Cache | None,
    *,
    keep_steps: bool,
    backend: Backend | None = None,
) -> Compiled:
    precheck.check(passes, data=bool(ctx.calibration))
    cached = None
    if cache is not None:
        cached = Steps(cache, captured, verify=verify, kept=keep_steps)
    judge = _Judge(captured, ctx, metric) if verify else None
    if judge is not None and (cached is None or not passes):
        judge.ready()
    model = captured.model
    costs = cost(model, captured.dynamic)
    given = ctx
    steps: list[Step] = []
    settled = len(passes)
    while settled and passes[settled - 1].keeps_operators:
        settled -= 1
    for at, pass_ in enumerate(passes):
        if at == settled and backend is not None and backend.gaps_last and ctx.target is not None:
            if gaps := backend.unsupported(model, ctx.target):
                raise LowerError(gaps)
        if observer is not None:
            observer.started(pass_)
        known = cached.recall(pass_, given, costs) if cached is not None else None
        if known is not None:
            model, step = known
            if strict and (problems := _skips(pass_, step.entries)):
                raise GateError(problems)
            if judge is not None:
                judge.take(pass_, model, step)
        else:
            if judge is not None:
                judge.ready()
            at_work = given if cached is None else cached.start(pass_, given)
            model, step = _step(pass_, model, at_work, captured, costs, judge, strict)
            if cached is not None:
                cached.keep(pass_, model, step)
        given = _fitting(ctx, model)
        costs = step.cost_after
        steps.append(step)
        if observer is not None:
            observer.finished(step)
    return Compiled(captured, model, steps, ctx, cached)


def plan(
    captured: Captured,
    passes: Sequence[Pass],
    ctx: Context,
    *,
    strict: bool = False,
    cache: Cache | None = None,
) -> list[Step]:
    """What :func:`run` would do, without comparing outputs; the caller's model is not touched.

    Pieces of passes are taken from ``cache`` and kept there, so that :func:`run` finds them.

    Raises:
        OptionError: a pass cannot come behind one before it, or needs calibration data and there is none;
            nothing has run then.
        PassError: a pass could not do what was asked, failed, or did not tell the truth.
        VerifyError: a pass left a model that is not well formed.
        GateError: with ``strict``, for what :func:`run` raises it; all passes are listed.
    """
    made = _run(captured, passes, ctx, False, False, None, None, cache, keep_steps=False)
    steps = made.steps
    if strict and (problems := [d for step in steps for d in _skips(step.pass_, step.entries)]):
        raise GateError(problems)
    return steps


def walk(
    captured: Captured, passes: Sequence[Pass], ctx: Context, *, cache: Cache | None = None
) -> Iterator[tuple[ir.Model, Step, ir.Model, Context]]:
    """Run ``passes`` without comparing outputs: of each the model before it, what it did, and to what.

    The context is the one that it ran with. Pieces of passes are taken from ``cache`` and kept there.

    Raises:
        PassError, VerifyError: as :func:`run`.
    """
    cached = None if cache is None else Steps(cache, captured, verify=False, kept=False)
    model, costs, given = captured.model, cost(captured.model, captured.dynamic), ctx
    for pass_ in passes:
        at_work = given if cached is None else cached.start(pass_, given)
        after, step = _step(pass_, model, at_work, captured, costs, None, False)
        if cached is not None:
            cached.keep(pass_, after, step)
        yield model, step, after, given
        model, costs, given = after, step.cost_after, _fitting(ctx, after)


def _fitting(ctx: Context, model: ir.Model) -> Context:
    """``ctx`` with data for the inputs that ``model`` still has (a cache may be gone, or narrower)."""
    data = [inputs_of(model, feeds) for feeds in ctx.calibration]
    pairs = zip(data, ctx.calibration, strict=True)
    same = all(len(a) == len(b) and all(a[name] is b[name] for name in a) for a, b in pairs)
    return ctx if same else dataclasses.replace(ctx, calibration=data)


def _step(
    pass_: Pass,
    before: ir.Model,
    ctx: Context,
    captured: Captured,
    cost_before: Cost,
    judge: _Judge | None,
    strict: bool,
) -> tuple[ir.Model, Step]:
    """Run and check one pass; the current model after it, and what happened."""
    start = time.perf_counter()
    model, result, chosen = _transform(pass_, before, ctx)
    step = Step(
        pass_,
        result.entries,
        result.changed,
        dict(result.statistics),
        dict(result.renamed),
        cost_before,
        cost_before,
        Check("nothing", reason="nothing changed"),
    )
    if strict and (problems := _skips(pass_, result.entries)):
        raise GateError(problems)
    if result.changed:
        _settle(pass_, model)
        sparsity.carry(before, model, result.renamed)
    weights.give_back(before)  # what was read to choose
    checking = time.perf_counter()
    step.seconds = checking - start
    if result.changed:
        _check_structure(pass_, before, model, result)
        step.cost_after = cost(model, captured.dynamic)
        step.check = Check("nothing", reason="verification is off")
        if judge is not None:
            step.check, step.loss, step.total_loss = judge.judge(pass_, model, result, chosen)
    step.check_seconds = time.perf_counter() - checking
    step.peak_bytes = _peak_bytes()
    return (model if result.changed else before), step


# -- running one pass -----------------------------------------------------------------------------


def _transform(
    pass_: Pass, before: ir.Model, ctx: Context
) -> tuple[ir.Model, Result, Sequence[Entry]]:
    """The pass on a copy of ``before``: the copy, the result, and what was chosen."""
    if isinstance(pass_.exactness, Lossy) and not isinstance(pass_, ChoosingPass):
        raise _untrue(pass_, "is lossy and no ChoosingPass: nothing says what it must equal")
    model = before.clone()
    was = Guard.of(model)
    chosen: Sequence[Entry] = ()
    with _naming(pass_):
        if isinstance(pass_, ChoosingPass):
            chosen = pass_.choose(model, ctx)
            now = Guard.of(model)
            if now != was:
                raise _untrue(pass_, "edited the model while it chose", *was.edited_in_place(now))
            result = pass_.edit(model, chosen, ctx)
        else:
            result = pass_.run(model, ctx)
    if not isinstance(result, Result):
        raise _untrue(pass_, f"returned {result!r} and no Result")
    now = Guard.of(model)
    if edited := was.edited_in_place(now):
        raise _untrue(pass_, "wrote into weights that the model before it still uses", *edited)
    if not result.changed and now != was:
        raise _untrue(pass_, "changed the model and says that it did not")
    if not result.entries:
        reason = "no candidate: the model has nothing that this pass is for"
        result.entries = [Entry("(the model)", "skipped", reason)]
    _check_ledger(pass_, chosen, result)
    return model, result, chosen


def _check_ledger(pass_: Pass, chosen: Sequence[Entry], result: Result) -> None:
    """Check that the ledger is whole, says what happened, and can be written down."""
    for entry in result.entries:
        if entry.status not in get_args(Status):
            raise _untrue(pass_, f"has a ledger entry with the status {entry.status!r}")
        try:
            json.dumps(entry.to_json(), allow_nan=False)
        except (TypeError, ValueError) as error:
            message = f"has a ledger entry for {entry.candidate} that is no JSON data: {error}"
            raise _untrue(pass_, message) from error
    listed = {entry.candidate for entry in result.entries}
    if lost := [entry.candidate for entry in chosen if entry.candidate not in listed]:
        raise _untrue(pass_, "lost candidates from its ledger", *lost)
    if result.changed != any(entry.status == "applied" for entry in result.entries):
        says = "changed the model" if result.changed else "did not change the model"
        raise _untrue(pass_, f"{says}, but its ledger says otherwise")


def _settle(pass_: Pass, model: ir.Model) -> None:
    """Bring the model into normal form again; a model too broken for that is reported as such."""
    try:
        normal.normalize(model)
    except Exception as error:
        if problems := verify.verify(model):
            raise blamed(VerifyError(problems), pass_) from error
        raise _failed(pass_, error, "left a model that has no normal form") from error


@contextlib.contextmanager
def _naming(pass_: Pass) -> Iterator[None]:
    """Let every error that comes out of a pass name it."""
    try:
        yield
    except NetLatheError as error:
        error.add_note(f"  in the pass {pass_}")
        raise
    except Exception as error:
        raise _failed(pass_, error, "failed") from error


def _failed(pass_: Pass, error: Exception, what: str) -> PassError:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"raised at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return PassError(
        Diagnostic(
            "pass.failed",
            f"the pass {pass_} {what}: {type(error).__name__}: {error}",
            notes=(place,) if place else (),
            help=f"leave {pass_.name} out, and report this to whoever wrote it",
        )
    )


def _untrue(pass_: Pass, what: str, *names: str) -> PassError:
    """A pass that breaks its contract with the pipeline."""
    more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
    listed = f": {', '.join(names[:3])}{more}" if names else ""
    return PassError(
        Diagnostic(
            "pass.contract",
            f"the pass {pass_} {what}{listed}",
            help=f"leave {pass_.name} out, and report this to whoever wrote it",
        )
    )


def _skips(pass_: Pass, entries: Sequence[Entry]) -> list[Diagnostic]:
    """What strictness objects to: a skip that no option asks for, or a pass that did nothing at all."""
    if any(entry.status == "applied" for entry in entries):
        wrong = [e for e in entries if e.status == "skipped" and not e.left_out]
    else:
        wrong = [*entries]
    found = [
        Diagnostic(
            "strict.skipped",
            f"{pass_} {entry.status} {entry.candidate}: {entry.reason}",
            where=entry.where,
        )
        for entry in wrong[:_MOST_LISTED]
    ]
    if more := len(wrong) - len(found):
        found.append(Diagnostic("strict.skipped", f"{pass_} left {more} more candidates alone"))
    return found


# -- checking -------------------------------------------------------------------------------------


class _Judge:
    """Compares models after passes with those before, and measures what is lost.

    With a cache nothing runs before there is something to judge: all steps may come from there.
    """

    def __init__(self, captured: Captured, ctx: Context, metric: Metric | None) -> None:
        self._captured, self._ctx, self._metric = captured, ctx, metric
        self._taken = captured.model  # the current model
        self._taken_last: ir.Model | None = None  # the last that lost accuracy
        self._started = False

    def take(self, pass_: Pass, model: ir.Model, step: Step) -> None:
        """Go on from ``model``, which ``pass_`` has led to and which was judged before."""
        self._taken = model
        if step.changed and isinstance(pass_.exactness, Lossy):
            self._taken_last = model
        self._started = False

    def ready(self) -> None:
        """Run what the next model is compared with.

        Raises:
            VerifyError: ONNX Runtime cannot run the captured model.
        """
        if self._started:
            return
        try:
            self._bench = Bench(self._captured)
        except ort.RuntimeFailure as error:
            problem = Diagnostic(
                "verify.run",
                "no pass can be verified: ONNX Runtime cannot run the captured model",
                help="--no-verify (verify=False) checks structure and types only",
            )
            raise VerifyError([problem, *error.diagnostics]) from error
        samples = [trial.feeds for trial in self._bench.trials]
        ctx = self._ctx
        self._scale = Scale.of(ctx.calibration, samples, self._metric, ctx.progress)
        self._before = self._bench.dense
        self._dense = self._subject(self._bench.dense)
        self._last = self._dense  # what the next loss is measured against
        if self._taken_last is not None:
            self._last = self._subject(self._bench.run(self._taken_last))
        if self._taken is not self._captured.model:
            self._before = self._bench.run(self._taken)
        self._started = True

    def judge(
        self, pass_: Pass, model: ir.Model, result: Result, chosen: Sequence[Entry]
    ) -> tuple[Check, Loss | None, Loss | None]:
        """Check ``model``, which then is what the next one is compared with."""
        before = self._before
        try:
            after = self._bench.run(model)
        except ort.RuntimeFailure as error:
            message = "ONNX Runtime cannot run the model any more"
            diagnostics = [Diagnostic("verify.run", message), *error.diagnostics]
            raise blamed(VerifyError(diagnostics), pass_) from error
        loss = total = None
        if isinstance(pass_.exactness, Lossy):
            assert isinstance(pass_, ChoosingPass)  # _transform lets no other lossy pass through
            with _naming(pass_):
                reference = pass_.simulate(before.model.clone(), chosen)
                check = self._bench.simulated(pass_, before, after, reference, result)
            subject = self._subject(after)
            loss = self._scale.loss(self._last, subject)
            total = loss
            if self._last is not self._dense:
                total = self._scale.loss(self._dense, subject)
            self._last = subject  # an exact pass after it loses nothing that could be measured
            self._taken_last = model
        else:
            check = self._bench.same(pass_, before, after, result)
        after.session = None
        self._before = after
        self._taken = model
        return check, loss, total

    def _subject(self, outcome: Outcome) -> Subject:
        """What a loss is measured on; it takes the session over."""
        known = outcome.outputs if self._scale.data == "samples" else ()
        session, outcome.session = outcome.session, None
        return Subject(outcome.model, known, session)


def _check_structure(pass_: Pass, before: ir.Model, after: ir.Model, result: Result) -> None:
    """Check interface, structure and types."""
    problems = _interface_problems(pass_, before, after, result) or verify.verify(after)
    if problems:
        raise blamed(VerifyError(problems), pass_)


def _interface_problems(
    pass_: Pass, before: ir.Model, after: ir.Model, result: Result
) -> list[Diagnostic]:
    """Inputs and outputs stay as they are; only a lossy pass may remove one, and must say so."""
    removable = isinstance(pass_.exactness, Lossy)
    removed = {name for name, new in result.renamed.items() if new is None and removable}
    narrowed = interface.kept(after) if removable else {}
    stored = coded.coded(after) if removable else {}
    known = {value.name for value in (*before.graph.inputs, *before.graph.outputs)}
    beside = {name for how in stored.values() for name in how.names} - known
    found = []
    for kind, old, new in (
        ("input", before.graph.inputs, after.graph.inputs),
        ("output", before.graph.outputs, after.graph.outputs),
    ):
        now = {value.name: value for value in new if value.name not in beside}
        wanted = [value for value in old if value.name in now or value.name not in removed]
        for value in wanted:
            if value.name not in now:
                found.append(_interface(f"{kind} {value.name!r} is gone"))
            elif value.name in stored:  # its record says what is in it now
                continue
            elif _spec(now[value.name], kind) != _spec(value, kind, narrowed.get(value.name or "")):
                message = f"{kind} {value.name!r} was {_spec(value, kind)}"
                found.append(_interface(f"{message} and is {_spec(now[value.name], kind)}"))
        names = [value.name for value in wanted]
        found += [_interface(f"{kind} {n!r} is new") for n in now if n not in names]
        if not found and list(now) != names:
            found.append(
                _interface(f"the {kind}s are in another order: {', '.join(map(str, now))}")
            )
    return found


def _interface(message: str) -> Diagnostic:
    return Diagnostic(
        "verify.interface", message, help="whoever uses the model relies on its inputs and outputs"
    )


def _spec(value: ir.Value, kind: str, left: Mapping[int, list[int]] | None = None) -> str:
    """What must stay: of an output only dtype and rank, as its dims may be derived anew.

    ``left`` are the positions that a pass says are left of some dims.
    """
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    if value.shape is None:
        return dtype
    if left and kind == "input":
        sizes = [len(left[at]) if at in left else dim for at, dim in enumerate(value.shape)]
        return f"{dtype}{ir.Shape(sizes)}"
    return f"{dtype}{value.shape}" if kind == "input" else f"{dtype} of rank {len(value.shape)}"


def _peak_bytes() -> int:
    if sys.platform == "win32":
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
