"""Reads calibration data: ``.npz`` with an array per graph input, or ``.txt`` with a text a line.

The first axis of an array counts samples: arrays are cut into feeds of a few samples each, or of as
many as the model's batch holds where that is fixed. Beside them ``labels`` may tell what the model should
have answered, an integer a row of its output. Everything about a file is checked before
anything runs on it; arrays of Python objects are refused, since loading one can run any code.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.diagnostics import Diagnostic, InputError, did_you_mean
from netlathe.execute import samples
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import LABELS, Feeds

Arrays = dict[str, npt.NDArray[Any]]

SAMPLES_A_FEED = (
    8  # enough rows for fast products, few enough that one stage of activations is small
)
_KINDS = "calibration data is .npz (an array per graph input) or .txt (a text a line)"
_CACHE_INPUT = "past_key_values."


def load(path: Path, captured: Captured) -> list[Feeds]:
    """The feeds in ``path``, ready to run on ``captured``; at least one.

    Raises:
        InputError: with everything that is wrong with the file.
    """
    check_file(path)
    if path.suffix == ".npz":
        return _cut(_read_arrays(path), captured.model, path)
    return list(_tokenized(_read_texts(path), captured, path))


def check_file(path: Path) -> None:
    """Return if ``path`` is a file of a kind that :func:`load` reads; it is not opened.

    Raises:
        InputError: it is none.
    """
    if not path.is_file():
        problem = "it is no file" if path.exists() else "there is no such file"
        raise InputError(Diagnostic("calibration.file", problem, at=str(path), help=_KINDS))
    if path.suffix not in (".npz", ".txt"):
        raise InputError(
            Diagnostic(
                "calibration.format",
                f"{path.suffix or 'a file without a suffix'} is not a kind of calibration data",
                at=str(path),
                help=_KINDS,
            )
        )


def check_feeds(feeds: Sequence[Feeds]) -> None:
    """Return if ``feeds`` are of the kind that :func:`load` gives; how they fit a model is not asked.

    Raises:
        InputError: they are not.
    """
    if not isinstance(feeds, Sequence) or not all(isinstance(one, Mapping) for one in feeds):
        problem = f"a list of feeds is wanted, each with an array by input name, not {feeds!r:.60}"
    elif others := [
        (name, array)
        for one in feeds
        for name, array in one.items()
        if not isinstance(array, np.ndarray | np.generic)
    ]:
        name, other = others[0]
        problem = f"{name!r} is of type {type(other).__name__}, not an array of numpy"
    else:
        return
    help_ = "for example [{'x': array}, ...], or the path of a file"
    raise InputError(Diagnostic("calibration.feeds", problem, help=help_))


# -- texts ----------------------------------------------------------------------------------------


def _read_texts(path: Path) -> list[str]:
    """The lines of ``path`` that hold anything."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(
            Diagnostic("calibration.format", f"the text is not UTF-8: {error}", at=str(path))
        ) from error
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise _empty(path, "no text")
    return texts


def _tokenized(texts: Sequence[str], captured: Captured, path: Path) -> Iterator[Feeds]:
    if captured.tokenize is None:
        raise InputError(
            Diagnostic(
                "calibration.tokenizer",
                f"texts need a tokenizer, and {captured.source} brings none",
                at=str(path),
                help="give a Hugging Face directory with tokenizer.json, or an .npz of token ids",
            )
        )
    for start in range(0, len(texts), SAMPLES_A_FEED):
        feeds = dict(captured.tokenize(texts[start : start + SAMPLES_A_FEED]))
        for value in captured.model.graph.inputs:
            name = value.name or ""
            if name not in feeds and name.startswith(_CACHE_INPUT):
                feeds[name] = _empty_cache(value, len(next(iter(feeds.values()))))
        _check(feeds, captured.model, path)
        if problems := [*_shapes(feeds, captured.model, path)]:
            raise InputError(problems)
        yield feeds


def _empty_cache(value: ir.Value, batch: int) -> npt.NDArray[Any]:
    """A cache that holds no token yet: every dim but the batch that may vary is 0."""
    assert value.shape is not None and value.dtype is not None  # the frontend made it
    rest = [dim if isinstance(dim, int) else 0 for dim in value.shape[1:]]
    return np.zeros((batch, *rest), value.dtype.numpy())


# -- arrays ---------------------------------------------------------------------------------------


def _read_arrays(path: Path) -> Arrays:
    """Every array of an ``.npz``, none of Python objects."""
    arrays: Arrays = {}
    try:
        with zipfile.ZipFile(path):  # np.load would take a lone .npy, or a pickle, under this name
            pass
        with np.load(path, allow_pickle=False) as stored:
            for name in stored.files:
                try:
                    array = stored[name]
                except ValueError as error:
                    if "pickle" not in str(error):
                        raise
                    raise InputError(
                        Diagnostic(
                            "calibration.pickle",
                            f"array {name!r} holds pickled Python objects; loading them can run"
                            " any code",
                            at=str(path),
                            help="save plain numbers: np.savez(file, name=array)",
                        )
                    ) from error
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"the entry {name!r} is not an array")
                arrays[name] = array
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError) as error:
        raise InputError(
            Diagnostic(
                "calibration.format",
                f"not a whole .npz file: {error}",
                at=str(path),
                help="write it with np.savez(file, name=array, ...), a name per graph input",
            )
        ) from error
    if not arrays:
        raise _empty(path, "no array")
    return arrays


def _empty(path: Path, what: str) -> InputError:
    return InputError(
        Diagnostic("calibration.empty", f"the calibration data holds {what}", at=str(path))
    )


def _cut(arrays: Arrays, model: ir.Model, path: Path) -> list[Feeds]:
    """Check ``arrays`` against the model's inputs and cut them into feeds along the first axis."""
    _check(arrays, model, path)
    batch = _batch(model)
    if batch and LABELS in arrays:
        batch.setdefault(LABELS, next(iter(batch.values())))
    rows = {name: len(arrays[name]) for name in batch}
    if batch and not min(rows.values()):
        raise _empty(path, f"no sample: array {min(rows, key=lambda n: rows[n])!r} is empty")
    steps = {name: fixed or SAMPLES_A_FEED for name, fixed in batch.items()}
    counts = {name: -(-rows[name] // steps[name]) for name in batch}
    uneven = [name for name, fixed in batch.items() if fixed and rows[name] % fixed]
    # Two arrays of other lengths may take as many steps: the last feed would not fit together.
    free = {rows[name] for name, fixed in batch.items() if not fixed}
    if uneven or len(set(counts.values())) > 1 or len(free) > 1:
        shown = ", ".join(
            f"{name!r} has {rows[name]}"
            + (f" (the model takes {fixed} at a time)" if fixed else "")
            for name, fixed in batch.items()
        )
        raise InputError(
            Diagnostic(
                "calibration.shape",
                f"the arrays do not hold the same number of samples: {shown}",
                at=str(path),
                help="the first axis counts samples",
            )
        )
    feeds: list[Feeds] = []
    for number in range(next(iter(counts.values()), 1)):
        one = dict(arrays)
        for name, step in steps.items():
            one[name] = arrays[name][number * step : (number + 1) * step]
        if problems := [*_shapes(one, model, path)]:
            raise InputError(problems)
        feeds.append(one)
    return feeds


def _batch(model: ir.Model) -> dict[str, int | None]:
    """The inputs whose first axis counts samples, with its size where that is fixed.

    With a dynamic batch those are the inputs that share its dim, and what other inputs hold is the
    same in every feed; without one, every input that has an axis.
    """
    first = {v.name: v.shape[0] for v in model.graph.inputs if v.name and v.shape}
    dynamic = [dim for dim in first.values() if not isinstance(dim, int)]
    if dynamic:
        return {name: None for name, dim in first.items() if dim == dynamic[0]}
    return {name: dim for name, dim in first.items() if isinstance(dim, int)}


# -- checks ---------------------------------------------------------------------------------------


def _check(given: Feeds, model: ir.Model, path: Path) -> None:
    if problems := [*_names(given, model, path), *_types(given, model, path)]:
        raise InputError(problems)


def _names(given: Feeds, model: ir.Model, path: Path) -> Iterator[Diagnostic]:
    known = [v.name for v in model.graph.inputs if v.name]
    for name in given:
        if name not in known and name != LABELS:
            yield Diagnostic(
                "calibration.input",
                f"the model has no input {name!r}",
                at=str(path),
                help=did_you_mean(name, known),
            )
    for name in known:
        if name not in given:
            yield Diagnostic(
                "calibration.input",
                f"no data for the model's input {name!r}",
                at=str(path),
                help="the file needs an array per graph input: " + ", ".join(known),
            )


def _types(given: Feeds, model: ir.Model, path: Path) -> Iterator[Diagnostic]:
    """Another dtype or rank than the input's, and numbers that are not finite; labels are integers."""
    if (labels := given.get(LABELS)) is not None and (
        labels.dtype.kind not in "iu" or not labels.ndim
    ):
        if all(value.name != LABELS for value in model.graph.inputs):
            yield Diagnostic(
                "calibration.dtype",
                f"array {LABELS!r} is {labels.dtype} of shape {list(labels.shape)}, not integers",
                at=str(path),
                help="labels are the class of each row of the output, counted from 0",
            )
    for value in model.graph.inputs:
        array = given.get(value.name or "")
        if array is None:
            continue
        wanted = None if value.dtype is None else np.dtype(value.dtype.numpy())
        if wanted is not None and array.dtype != wanted:
            yield Diagnostic(
                "calibration.dtype",
                f"array {value.name!r} is {array.dtype}, the input is {wanted}",
                at=str(path),
                help=f"convert it before saving: array.astype(np.{wanted})",
            )
            continue
        if value.shape is not None and array.ndim != len(value.shape):
            yield _shape(value, array, path)
        if array.dtype.kind not in "iub" and not (finite := np.isfinite(array)).all():
            place = np.unravel_index(int(np.argmin(finite)), array.shape)
            yield Diagnostic(
                "calibration.finite",
                f"array {value.name!r} holds {array[place]} at {[int(i) for i in place]}"
                f" ({int(np.count_nonzero(~finite))} such numbers)",
                at=str(path),
                help="calibration data must be finite: look at how it was made",
            )


def _shapes(feeds: Feeds, model: ir.Model, path: Path) -> Iterator[Diagnostic]:
    """Shapes that do not fit the inputs or, where a dim is shared, each other; ranks are right."""
    inputs = [v for v in model.graph.inputs if v.name in feeds and v.shape is not None]
    sizes: dict[str, int] = {}
    for value in inputs:
        for dim, size in zip(value.shape or (), feeds[value.name or ""].shape, strict=True):
            if not isinstance(dim, int) and dim.value in samples.free_dims(value):
                sizes.setdefault(str(dim), size)
    for value in inputs:
        array = feeds[value.name or ""]
        if not sizes.keys() >= set(samples.free_dims(value)):
            continue  # an expression of a size that no input gives by itself
        if samples.shape_of(value, sizes) != array.shape:
            yield _shape(value, array, path)


def _shape(value: ir.Value, array: npt.NDArray[Any], path: Path) -> Diagnostic:
    dims = [dim if isinstance(dim, int) else dim.value or "?" for dim in value.shape or ()]
    return Diagnostic(
        "calibration.shape",
        f"array {value.name!r} of shape {list(array.shape)} does not fit the input's"
        f" [{', '.join(map(str, dims))}]",
        at=str(path),
        help="the first axis counts samples, the others are the input's; a name stands for one size"
        " in all arrays",
    )
