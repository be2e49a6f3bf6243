"""NetLathe from Python: capture a model, compile it with checked passes, save the artifact."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from netlathe.diagnostics import Diagnostic, OptionError, did_you_mean
from netlathe.pipeline import cache_capture, calibration_data, precheck, registry, run, text
from netlathe.pipeline.cache import Cache, user_folder
from netlathe.pipeline.interfaces import Captured, Target
from netlathe.pipeline.loss import Metric
from netlathe.pipeline.pass_ import Context, Feeds, Pass, Progress, SilentProgress
from netlathe.pipeline.run import Compiled
from netlathe.pipeline.step import Step


def capture(source: Any, *, cache_dir: str | Path | None = None, **settings: Any) -> Captured:
    """Bring a model into the IR and compare it there with the original.

    ``source`` is the path of an ONNX file, of a ``.pt2`` file or of a local Hugging Face directory, an
    ``nn.Module``, a ``torch.fx.GraphModule`` or an ``ExportedProgram``. torch unpickles parts of a
    ``.pt2`` file: give only one that you trust. Settings are its frontend's: ``args``, ``kwargs`` and
    ``dynamic`` for modules, ``args`` and ``kwargs`` for programs without example inputs, ``cache=True``
    for a causal language model with its KV cache, and for an ONNX file ``sizes`` of dynamic dims to work
    at (``{"batch": 1}``) and ``fixed``, dims that are to have one size only. ``cache_dir`` is a folder where
    captured files and directories are kept and found again, such as :func:`user_cache_dir`.

    Raises:
        InputError: the source cannot be read as what it claims to be.
        CaptureError: the captured graph is not the same function.
        OptionError: the frontend has no such setting.
        MissingExtraError: an extra is needed that is not installed.
    """
    return capture_with(source, settings, None if cache_dir is None else Cache(cache_dir))


def user_cache_dir() -> Path:
    """Where the command ``netlathe`` keeps finished work: $NETLATHE_CACHE, else the system's place."""
    return user_folder()


def capture_with(source: Any, settings: Mapping[str, Any], cache: Cache | None) -> Captured:
    """:func:`capture` with a cache that is open."""
    frontend = registry.find_frontend(source)
    known = [name for name in inspect.signature(frontend).parameters]
    for name in settings:
        if name not in known:
            raise OptionError(
                Diagnostic(
                    "frontend.setting",
                    f"the frontend {frontend.name} has no setting {name!r}",
                    help=did_you_mean(name, known) if known else f"{frontend.name} takes none",
                )
            )
    made = frontend(**settings)
    return made.capture(source) if cache is None else cache_capture.capture(made, source, cache)


def compile(
    source: Any,
    passes: str | Sequence[Pass],
    *,
    calibration: str | Path | Sequence[Feeds] | None = None,
    seed: int = 0,
    strict: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    device: str = "cpu",
    target: str | Target | None = None,
    metric: Metric | None = None,
    cache_dir: str | Path | None = None,
) -> Compiled:
    """Run ``passes`` over ``source``, which is captured first unless it is already.

    ``passes`` are in the text form (``'cleanup, drop(kind="ffn", count=1)'``) or made in Python.
    ``calibration`` is a file (.npz, .txt) or feeds; ``device`` is where calibration runs. ``target``
    is what the result is for: passes round widths as it wants. ``strict`` turns a skipped candidate
    into an error, unless the pass' options leave it out. ``metric`` is measured before and after every
    lossy pass: it is called with a function that runs a model on feeds, and returns a number.
    ``cache_dir`` is a folder where finished work is kept and found again, such as :func:`user_cache_dir`.

    Raises:
        OptionError: a pass, option or target is unknown, or a value out of range; a pass cannot come
            behind one before it, or needs calibration data and there is none.
        PassError: a pass could not do what was asked of it.
        VerifyError: a pass broke the model, or changed what it must not change.
        GateError: with ``strict``, a pass did nothing, or skipped what its options do not leave out.
        LowerError: ``target``, given by name, lacks operators that no pass takes away; every gap is listed.
        InputError, CaptureError, MissingExtraError: see :func:`capture`; the cache cannot be used.
    """
    made = _made(passes, calibration)
    backend, chosen = registry.find_target(target) if isinstance(target, str) else (None, target)
    cache = None if cache_dir is None else Cache(cache_dir)
    captured = source if isinstance(source, Captured) else capture_with(source, {}, cache)
    ctx = _context(captured, calibration, chosen, seed, device, progress)
    return run.run(
        captured,
        made,
        ctx,
        strict=strict,
        verify=verify,
        metric=metric,
        cache=cache,
        backend=backend,
    )


def plan(
    source: Any,
    passes: str | Sequence[Pass],
    *,
    calibration: str | Path | Sequence[Feeds] | None = None,
    seed: int = 0,
    strict: bool = False,
    progress: Progress | None = None,
    device: str = "cpu",
    target: str | Target | None = None,
    cache_dir: str | Path | None = None,
) -> list[Step]:
    """What :func:`compile` would do, candidate by candidate; nothing is touched or compared.

    What was solved for it is kept in ``cache_dir``, where :func:`compile` finds it.

    Raises:
        As :func:`compile`; with ``strict`` all skipped candidates of all passes are listed.
    """
    made = _made(passes, calibration)
    chosen = registry.find_target(target)[1] if isinstance(target, str) else target
    cache = None if cache_dir is None else Cache(cache_dir)
    captured = source if isinstance(source, Captured) else capture_with(source, {}, cache)
    ctx = _context(captured, calibration, chosen, seed, device, progress)
    return run.plan(captured, made, ctx, strict=strict, cache=cache)


def _made(
    passes: str | Sequence[Pass], calibration: str | Path | Sequence[Feeds] | None
) -> list[Pass]:
    """The passes, which may come in this order and have data if they need it; asked before a capture."""
    made = text.parse(passes) if isinstance(passes, str) else passes
    if not isinstance(made, Sequence) or not all(isinstance(pass_, Pass) for pass_ in made):
        raise OptionError(
            Diagnostic(
                "pipeline.passes",
                f"passes are a text or a list of passes, not {passes!r}",
                help="for example 'cleanup, quantize', or [Cleanup(), Quantize()]",
            )
        )
    empty = calibration is None or (isinstance(calibration, Sequence) and not calibration)
    precheck.check(made, data=not empty)
    return list(made)


def _context(
    captured: Captured,
    calibration: str | Path | Sequence[Feeds] | None,
    target: Target | None,
    seed: int,
    device: str,
    progress: Progress | None,
) -> Context:
    if isinstance(calibration, str | Path):
        calibration = calibration_data.load(Path(calibration), captured)
    elif calibration is not None:
        calibration_data.check_feeds(calibration)
    return Context(calibration or (), target, seed, device, progress or SilentProgress())
