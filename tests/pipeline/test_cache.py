"""What is taken from a cache is what would have been made, and nothing is taken for what it is not."""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

import netlathe
from netlathe.diagnostics import GateError
from netlathe.ir import weights
from netlathe.pipeline import cache_keys, cache_model, manifest
from netlathe.pipeline.cache import Cache
from netlathe.pipeline.cache_file import Reader, Writer
from netlathe.pipeline.ledger import Entry
from netlathe.pipeline.pass_ import Context, Exact, Pass, Result, option, options
from netlathe.pipeline.run import Compiled, plan, run
from tests.pipeline.toy import Balance, Cut, ReluToMax, find, mlp, set_weight

PASSES = (ReluToMax(), Cut(count=2), Balance(factor=2.0))
ran: list[str] = []  # passes and pieces that really ran


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    ran.clear()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def compilation(compiled: Compiled) -> dict[str, Any]:
    """As a manifest holds it: tuples and lists are the same."""
    found: dict[str, Any] = json.loads(json.dumps(manifest.build(compiled)["compilation"]))
    return found


def same_models(a: ir.Model, b: ir.Model) -> None:
    left, right = a.graph.initializers, b.graph.initializers
    assert list(left) == list(right)
    for name, value in left.items():
        one, other = value.const_value, right[name].const_value
        assert one is not None and other is not None
        assert weights.digest(one) == weights.digest(other)
    assert manifest.graph_digest(a) == manifest.graph_digest(b)


@options
class Solve(Pass):
    """Adds to every weight what it solves for, one piece each; may stop before one of them."""

    name = "solve"
    exactness = Exact()
    stop_at: ClassVar[str] = ""

    def run(self, model: ir.Model, ctx: Context) -> Result:
        entries = []
        for name in ("up", "bias", "down"):
            array = weights.array(model.graph.initializers[name])

            def compute(name: str = name, array: Any = array) -> Mapping[str, Any]:
                if name == Solve.stop_at:
                    raise KeyboardInterrupt
                ran.append(name)
                return {"delta": np.zeros_like(array), "odd": np.ones(3, ml_dtypes.bfloat16)}

            solved = ctx.once(name, compute)
            assert not solved["delta"].flags.writeable and solved["odd"].dtype == ml_dtypes.bfloat16
            entries.append(Entry(name, "applied", "solved", arrays={"delta": solved["delta"]}))
            set_weight(model, name, array + solved["delta"])
        return Result(True, entries)


# -- the same -------------------------------------------------------------------------------------


def test_what_is_recalled_is_what_would_have_been_made(cache: Cache) -> None:
    plain, first, second = (run(mlp(), PASSES, Context(), cache=c) for c in (None, cache, cache))
    assert [step.recalled for step in first.steps] == [False] * 3
    assert [step.recalled for step in second.steps] == [True] * 3
    for compiled in (first, second):
        assert compilation(compiled) == compilation(plain)
        same_models(compiled.model, plain.model)
        for step, wanted in zip(compiled.steps, plain.steps, strict=True):
            for name in ("cost_before", "cost_after", "check", "loss", "total_loss", "renamed"):
                assert getattr(step, name) == getattr(wanted, name)
    assert cache.notes == []


@pytest.mark.parametrize("known", range(1, 4))
def test_a_run_goes_on_behind_what_is_known(cache: Cache, known: int) -> None:
    """Checks and losses of later passes are those of a run that nothing was known of."""
    run(mlp(), PASSES[:known], Context(), cache=cache)
    more = (*PASSES, Cut(count=1))
    resumed, plain = run(mlp(), more, Context(), cache=cache), run(mlp(), more, Context())
    assert [step.recalled for step in resumed.steps] == [True] * known + [False] * (4 - known)
    assert compilation(resumed) == compilation(plain)
    same_models(resumed.model, plain.model)


def test_an_entry_lost_in_the_middle_is_made_again(cache: Cache, tmp_path: Path) -> None:
    run(mlp(), PASSES, Context(), cache=cache)
    by_age = sorted(cache.folder.glob("v1/*/*.step"), key=lambda path: path.stat().st_mtime_ns)
    by_age[1].unlink()
    again = run(mlp(), PASSES, Context(), cache=cache)
    assert [step.recalled for step in again.steps] == [True, False, True]
    assert compilation(again) == compilation(run(mlp(), PASSES, Context()))


def test_weights_of_the_source_are_not_written_again(cache: Cache) -> None:
    """ReluToMax makes one scalar."""
    run(mlp(), [ReluToMax()], Context(), cache=cache)
    (entry,) = cache.held()
    arrays = mlp().model.graph.initializers.values()
    total = sum(value.const_value.nbytes for value in arrays if value.const_value is not None)
    weights_written = Reader(entry.path).description["model"]["weights"]
    assert total > 0 and len([w for w in weights_written if "blob" in w]) == 1


def test_attributes_keep_every_digit(cache: Cache) -> None:
    """ONNX writes float32; what a pass computes from an attribute must not depend on the cache."""
    captured = mlp()
    relu = find(captured.model, "r")
    relu.attributes["alpha"] = ir.AttrFloat32("alpha", 0.1)
    relu.attributes["betas"] = ir.AttrFloat32s("betas", [0.5, 1e-12])
    data = cache_model.graph_bytes(captured.model)
    tensors = list(cache_model.weights_of(captured.model))
    read = cache_model.read_graph(data, tensors)
    assert find(read, "r").attributes["alpha"].value == 0.1
    assert list(find(read, "r").attributes["betas"].as_floats()) == [0.5, 1e-12]
    assert manifest.graph_digest(read) == manifest.graph_digest(captured.model)
    cache_model.check_faithful(captured.model, data, tensors)
    relu.attributes["alpha"] = ir.AttrFloat32("alpha", float(np.float32(0.1)))
    with pytest.raises(cache_model.NotFaithfulError):
        cache_model.check_faithful(captured.model, data, tensors)


# -- pieces ---------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_with_its_pieces(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Solve, "stop_at", "down")
    with pytest.raises(KeyboardInterrupt):
        run(mlp(), [ReluToMax(), Solve()], Context(), cache=cache)
    assert ran == ["up", "bias"]
    monkeypatch.setattr(Solve, "stop_at", "")
    resumed = run(mlp(), [ReluToMax(), Solve()], Context(), cache=cache)
    assert ran == ["up", "bias", "down"]
    first, second = resumed.steps
    assert first.recalled and not second.recalled
    assert (second.pieces, second.recalled_pieces) == (3, 2)
    assert cache.notes == ["going on with solve where an earlier run stopped"]
    plain = run(mlp(), [ReluToMax(), Solve()], Context())
    assert compilation(resumed) == compilation(plain)


def test_compile_finds_what_plan_has_solved(cache: Cache) -> None:
    plan(mlp(), [Solve()], Context(), cache=cache)
    assert ran == ["up", "bias", "down"]
    assert {entry.kind for entry in cache.held()} == {"piece"}  # no model of a dry run
    step = run(mlp(), [Solve()], Context(), cache=cache).steps[0]
    assert len(ran) == 3 and step.recalled_pieces == 3 and not step.recalled


def test_pieces_of_another_model_are_others(cache: Cache) -> None:
    run(mlp(), [Solve()], Context(), cache=cache)
    other = mlp()
    set_weight(other.model, "up", weights.array(other.model.graph.initializers["up"]) * 2)
    run(other, [Solve()], Context(), cache=cache)
    assert ran == ["up", "bias", "down"] * 2


# -- never for what it is not ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "context", "more"),
    [
        ([Cut(count=3)], {}, {}),
        ([Cut(count=2, side="first")], {}, {}),
        ([Cut(count=2)], {"seed": 1}, {}),
        ([Cut(count=2)], {"calibration": [{"x": np.ones((2, 6), np.float32)}]}, {}),
        ([Cut(count=2)], {"target": netlathe.Target("t", "b", "h", width_multiple=2)}, {}),
        ([Cut(count=2)], {}, {"verify": False}),
        ([Cut(count=2)], {}, {"metric": lambda runner: 1.0}),
    ],
)
def test_another_request_is_not_found(
    cache: Cache, passes: Sequence[Pass], context: dict[str, Any], more: dict[str, Any]
) -> None:
    run(mlp(), [Cut(count=2)], Context(), cache=cache)
    found = run(mlp(), passes, Context(**context), cache=cache, **more)
    assert [step.recalled for step in found.steps] == [False]


def test_a_changed_version_is_not_found(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    run(mlp(), [Cut()], Context(), cache=cache)
    monkeypatch.setattr(Cut, "version", 2)
    assert not run(mlp(), [Cut()], Context(), cache=cache).steps[0].recalled


def test_another_toolchain_finds_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    run(mlp(), [Cut()], Context(), cache=cache)
    other = {**cache_keys.toolchain(), "packages": {"numpy": "1.0"}}
    monkeypatch.setattr("netlathe.pipeline.cache_steps.toolchain", lambda: other)
    assert not run(mlp(), [Cut()], Context(), cache=cache).steps[0].recalled


def test_a_pass_that_says_so_runs_every_time(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what comes after it is found as long as it gives the same."""
    monkeypatch.setattr(Solve, "repeatable", False)
    passes = [Solve(), ReluToMax()]
    run(mlp(), passes, Context(), cache=cache)
    compiled = run(mlp(), passes, Context(), cache=cache)
    assert ran == ["up", "bias", "down"] * 2
    assert [step.recalled for step in compiled.steps] == [False, True]


PLUGIN = '''
from netlathe import Exact, Pass, Result, option, options
from netlathe.pipeline.ledger import Entry

@options
class Mine(Pass):
    """Renames a node."""
    name = "mine"
    exactness = Exact()

    def run(self, model, ctx):
        for node in model.graph:
            node.doc_string = {text!r}
        return Result(True, [Entry("graph", "applied", {text!r})])
'''


def test_a_plugin_is_cached_and_an_edit_of_its_code_counts(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word from its author, and before the version is raised."""
    module = tmp_path / "mine_plugin.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    said = []
    for text in ("one", "one", "two!"):
        module.write_text(PLUGIN.format(text=text))
        sys.modules.pop("mine_plugin", None)
        importlib.invalidate_caches()
        made = importlib.import_module("mine_plugin")
        step = run(mlp(), [made.Mine()], Context(), cache=cache).steps[0]
        said.append((step.recalled, step.entries[0].reason))
    assert said == [(False, "one"), (True, "one"), (False, "two!")]


def test_a_pass_without_a_file_is_not_cached(cache: Cache) -> None:
    """Typed into a prompt: nobody can tell whether it is the same."""
    module = type(sys)("typed")
    sys.modules["typed"] = module
    try:
        exec(PLUGIN.format(text="x"), vars(module))
        for _ in range(2):
            step = run(mlp(), [vars(module)["Mine"]()], Context(), cache=cache).steps[0]
            assert not step.recalled
    finally:
        del sys.modules["typed"]
    assert cache.held() == []


def test_a_pass_that_fails_keeps_nothing(cache: Cache) -> None:
    with pytest.raises(GateError):
        run(mlp(), [Cut(count=0)], Context(), strict=True, cache=cache)
    assert cache.held() == []


def test_options_that_are_no_json_are_not_cached(cache: Cache) -> None:
    @options
    class Odd(ReluToMax):
        """As the other."""

        name = "odd"
        place: Path = option(default=Path("x"), help="a place")

    for _ in range(2):
        assert not run(mlp(), [Odd()], Context(), cache=cache).steps[0].recalled


# -- shared ---------------------------------------------------------------------------------------


def _compile(folder: str, results: Any) -> None:
    compiled = run(mlp(), PASSES, Context(), cache=Cache(folder))
    results.put(manifest.digest(compilation(compiled)))


def test_two_runs_at_once_share_a_cache(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    results = processes.Queue()
    workers = [
        processes.Process(target=_compile, args=(str(tmp_path / "cache"), results))
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    digests = {results.get(timeout=300) for _ in workers}
    for worker in workers:
        worker.join()
    assert digests == {manifest.digest(compilation(run(mlp(), PASSES, Context())))}
    assert len(Cache(tmp_path / "cache").held()) == 3


def test_what_a_run_uses_is_not_removed(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model from the cache stays whole while it lives, whoever clears the cache."""
    monkeypatch.setattr(cache_model, "_IN_MEMORY", 0)  # small weights are mapped too
    run(mlp(), PASSES, Context(), cache=cache)
    compiled = run(mlp(), PASSES, Context(), cache=cache)
    removed, left = cache.clear()
    assert left >= 1 and removed + left == 3
    same_models(compiled.model, run(mlp(), PASSES, Context()).model)
    del compiled
    gc.collect()  # a graph and its nodes hold each other
    assert cache.clear()[1] == 0


def test_an_entry_is_never_changed(cache: Cache) -> None:
    """Somebody may have mapped it: the second writer keeps what is there."""
    for text in (b"first", b"second"):

        def write(writer: Writer, text: bytes = text) -> dict[str, Any]:
            return {"number": writer.add_bytes(text)}

        assert cache.write("piece", {"a": 1}, write)
    reader = cache.read("piece", {"a": 1})
    assert reader is not None and bytes(reader.bytes(0)) == b"first"
    assert list((cache.folder / "tmp").iterdir()) == []


def test_a_writer_that_was_killed_leaves_nothing_for_long(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, signal
        from netlathe.pipeline.cache import Cache
        def write(writer):
            writer.add_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        Cache({str(tmp_path / "cache")!r}).write("piece", {{"a": 1}}, write)
    """)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert len(list((tmp_path / "cache" / "tmp").iterdir())) == 1
    cache = Cache(tmp_path / "cache")
    assert list((cache.folder / "tmp").iterdir()) == [] and cache.held() == []


def test_where_the_user_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETLATHE_CACHE", str(tmp_path / "here"))
    assert netlathe.user_cache_dir() == tmp_path / "here"
    monkeypatch.delenv("NETLATHE_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert netlathe.user_cache_dir() == tmp_path / "netlathe"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
        assert netlathe.user_cache_dir() == Path.home() / ".cache" / "netlathe"


def test_an_artifact_from_the_cache_runs(cache: Cache, tmp_path: Path) -> None:
    feeds = {"x": np.ones((2, 6), np.float32)}
    results = []
    for name in ("a", "b"):
        made = netlathe.compile(mlp(), PASSES, cache_dir=cache.folder)
        artifact = made.save(tmp_path / name)
        results.append((artifact.report(), artifact.run(feeds)["y"].tolist()))
    assert results[0] == results[1]
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b/model.onnx").read_bytes()
    assert os.listdir(tmp_path / "a") == os.listdir(tmp_path / "b")
