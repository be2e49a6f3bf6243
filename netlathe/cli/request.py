"""What a command line asks for: the model, captured; and the passes with what they run with."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netlathe.cli import render
from netlathe.cli.options import Dims
from netlathe.diagnostics import Diagnostic, InputError, OptionError

if TYPE_CHECKING:  # a command's help must not wait for the imports
    from netlathe.pipeline.cache import Cache
    from netlathe.pipeline.interfaces import Backend, Captured, Target
    from netlathe.pipeline.pass_ import Context, Feeds, Pass

_MANIFEST = "manifest.json"
_GRAPHS = ("model.onnx", "model.pt2")  # what a folder that `compile` wrote may hold to work on


def model_path(path: Path) -> Path:
    """``path``, or the model in it where it is a folder that `compile` wrote.

    Raises:
        InputError: it was written for a target whose artifacts hold no graph.
    """
    for name in _GRAPHS:
        if (path / _MANIFEST).is_file() and (path / name).is_file():
            return path / name
    target = compiled_for(path)
    if target is not None and not (path / "config.json").is_file():
        raise InputError(
            Diagnostic(
                "cli.artifact",
                f"what was compiled for {target} holds no graph to look at or work on",
                at=str(path),
                help="give the model that it was made from",
            )
        )
    return path


def compiled_for(path: Path) -> str | None:
    """The target that `compile` wrote the folder ``path`` for; None if it wrote no such folder."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads((path / _MANIFEST).read_text("utf-8"))
        return str(manifest["compilation"]["target"]["name"])
    return None


def open_cache(folder: Path | None, *, none: bool) -> Cache | None:
    """The cache that was asked for, opened; None where none is wanted.

    Raises:
        OptionError: one is named and none is wanted.
        InputError: it cannot be used.
    """
    from netlathe.pipeline.cache import Cache, user_folder

    if none and folder is not None:
        raise OptionError(
            Diagnostic("cli.cache", "both --cache and --no-cache", help="leave one of them out")
        )
    return None if none else Cache(folder or user_folder(), render.note)


def capture(
    path: Path,
    *,
    kv_cache: bool = False,
    dims: Dims | None = None,
    cache: Cache | None = None,
) -> Captured:
    """The model at ``path``, its dynamic dims at the sizes asked for.

    Raises:
        OptionError: a size names no dim, or a cache or fixed dims were asked of what cannot have them.
        InputError: it is an artifact without a graph.
    """
    from netlathe import api
    from netlathe.execute import samples
    from netlathe.pipeline import registry

    path = model_path(path)
    if kv_cache and not path.is_dir():
        raise OptionError(
            Diagnostic(
                "cli.kv_cache",
                "--kv-cache is for a Hugging Face directory: a file has its inputs already",
                at=str(path),
            )
        )
    dims = dims or Dims({}, {})
    settings: dict[str, Any] = {"cache": True} if kv_cache else {}
    frontend = registry.find_frontend(path)
    takes = inspect.signature(frontend).parameters
    if dims.fixed and "fixed" not in takes:
        raise OptionError(
            Diagnostic(
                "cli.fix_dims",
                "--fix-dims is for an ONNX file: other models run at every size that they declare",
                at=str(path),
                help="compile it with --passes '' first, and give what that wrote",
            )
        )
    asked = {"sizes": dims.sizes, "fixed": dims.fixed}
    settings |= {name: given for name, given in asked.items() if given and name in takes}
    with render.working(f"capturing {path}"):
        captured = api.capture_with(path, settings, cache)
    samples.check_dims(dims.sizes, captured.dynamic, str(path))
    return dataclasses.replace(captured, dynamic={**captured.dynamic, **dims.sizes})


def capture_all(paths: Sequence[Path], *, kv_cache: bool, dims: Dims) -> list[Captured]:
    """The models at ``paths``, which go together: of the dims asked for, each is given those that it has.

    Raises:
        OptionError: none of them has such a dim, or see :func:`capture`.
        InputError: see :func:`capture`.
    """
    from netlathe.execute import samples

    names = [*dims.sizes, *dims.fixed]
    if len(paths) < 2 or not names:  # nothing to share out: what a model lacks is told of it
        return [capture(path, kv_cache=kv_cache, dims=dims) for path in paths]
    declared = [_declared(model_path(path)) for path in paths]

    def check() -> None:
        known = [name for its in declared for name in its or ()]
        samples.check_dims(names, known, ", ".join(map(str, paths)))

    if None not in declared:
        check()
    captured = []
    for at, (path, its) in enumerate(zip(paths, declared, strict=True)):
        if its is not None:
            captured.append(capture(path, kv_cache=kv_cache, dims=dims.of(its)))
            continue
        one = capture(path, kv_cache=kv_cache, dims=Dims({}, dims.fixed))
        declared[at] = list(one.dynamic)
        sizes = dims.of(one.dynamic).sizes
        captured.append(dataclasses.replace(one, dynamic={**one.dynamic, **sizes}))
    check()
    return captured


def _declared(path: Path) -> list[str] | None:
    """The dynamic dims of an ONNX file; None for any other model, whose capture tells."""
    from netlathe.frontends import onnx_file
    from netlathe.pipeline import registry

    if issubclass(registry.find_frontend(path), onnx_file.OnnxFile):
        return onnx_file.declared_dims(path)
    return None


def onnx_of(captured: Captured) -> Path | None:
    """The ONNX file that was captured, to be looked at as it lies on disk; None for any other source."""
    return Path(captured.source) if captured.frontend == "onnx_file" else None


@dataclass(frozen=True)
class Request:
    """The passes and what they run with; from the command line, else the recipe, else defaults."""

    passes: list[Pass]
    calibration: Path | None
    seed: int
    strict: bool
    target: str
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        *,
        passes: str | None,
        recipe: Path | None,
        calibration: Path | None,
        seed: int | None,
        strict: bool,
        target: str | None,
        opset: int | None,
        settings: Mapping[str, Any],
    ) -> Request:
        """Read everything, and check what can be checked without the model.

        Raises:
            OptionError: a pass, option, target or setting is unknown or impossible, or a pass cannot come
                behind one before it or lacks calibration data.
            InputError: the recipe cannot be read, or there is no such calibration file.
        """
        from netlathe.pipeline import calibration_data, precheck, registry, text
        from netlathe.pipeline import recipe as recipes

        if (passes is None) == (recipe is None):
            problem = "both --passes and --recipe" if passes is not None else "nothing to run"
            raise OptionError(
                Diagnostic(
                    "cli.passes",
                    f"{problem}: give --passes TEXT or --recipe FILE",
                    help='`netlathe passes` lists the passes; --passes "" runs none',
                )
            )
        if recipe is None:
            made = cls(
                text.parse(passes or ""), calibration, seed or 0, strict, target or "onnx", {}
            )
        else:
            read = recipes.load(recipe)
            other_target = target is not None and target != read.target
            made = cls(
                list(read.passes),
                calibration or read.calibration,
                read.seed if seed is None else seed,
                strict or read.strict,
                target or read.target,
                {} if other_target else read.settings,  # they are those of the recipe's target
            )
        given = settings if opset is None else {**settings, "opset": opset}
        made = dataclasses.replace(made, settings={**made.settings, **given})
        registry.find_target(made.target, **made.settings)
        precheck.check(made.passes, data=made.calibration is not None)
        if made.calibration is not None:
            calibration_data.check_file(made.calibration)
        return made

    @property
    def backend(self) -> Backend:
        """What builds for the target."""
        from netlathe.pipeline import registry

        return registry.find_target(self.target, **self.settings)[0]

    @property
    def build_for(self) -> Target:
        """The target with its settings."""
        from netlathe.pipeline import registry

        return registry.find_target(self.target, **self.settings)[1]

    def context(self, captured: Captured) -> Context:
        """What the passes are given besides the model."""
        from netlathe.pipeline import calibration_data
        from netlathe.pipeline.pass_ import Context

        data: Sequence[Feeds] = ()
        if self.calibration is not None:
            data = calibration_data.load(self.calibration, captured)
        return Context(data, self.build_for, self.seed, progress=render.Bars())
