"""The cache and the lock as a user meets them: found again, resumed, damaged, full, locked, cleared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.cli.conftest import Run, tree
from tests.pipeline.small_disk import small_disk

PASSES = 'fold_batch_norm, quantize(weights="int8", min_size=600)'


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def words(model: Path, kept: Path) -> tuple[object, ...]:
    return ("compile", model, "--passes", PASSES, "--cache", kept)


def written(folder: Path) -> dict[str, bytes]:
    """Every file but the times in the manifest."""
    files = tree(folder)
    files["manifest.json"] = json.dumps(
        {k: v for k, v in json.loads(files["manifest.json"]).items() if k != "timings"}
    ).encode()
    return files


def entries(kept: Path, kind: str = "*") -> list[Path]:
    return sorted(kept.glob(f"v1/*/*.{kind}"))


# -- found again ----------------------------------------------------------------------------------


def test_the_second_time_everything_is_there(
    run: Run, words: tuple[object, ...], tmp_path: Path, kept: Path
) -> None:
    first = run(*words, "-o", tmp_path / "a")
    assert first.code == 0 and "from the cache" not in first.err
    before = tree(kept)
    second = run(*words, "-o", tmp_path / "b")
    assert second.code == 0
    assert second.err.count("from the cache:") == 2 and "taken from the cache" in second.err
    assert tree(kept) == before
    without = run(*words[:-2], "--no-cache", "-o", tmp_path / "c")
    assert without.code == 0
    assert written(tmp_path / "a") == written(tmp_path / "b") == written(tmp_path / "c")


def test_without_a_cache_nothing_is_kept(run: Run, model: Path, tmp_path: Path) -> None:
    done = run("compile", model, "--passes", PASSES, "--no-cache", "-o", tmp_path / "out")
    assert done.code == 0
    assert list(Path(os.environ["NETLATHE_CACHE"]).iterdir()) == []


def test_what_pipelines_have_in_common_is_shared(
    run: Run, words: tuple[object, ...], tmp_path: Path
) -> None:
    assert run(*words, "-o", tmp_path / "a").code == 0
    changed = [w if w != PASSES else "fold_batch_norm, cleanup" for w in words]
    done = run(*changed, "-o", tmp_path / "b")
    assert done.code == 0 and done.err.count("from the cache:") == 1


def test_other_weights_are_another_model(
    run: Run, words: tuple[object, ...], model: Path, tmp_path: Path
) -> None:
    assert run(*words, "-o", tmp_path / "a").code == 0
    proto = onnx.load(model)
    held = proto.graph.initializer[0]
    array = numpy_helper.to_array(held) * np.float32(1 + 2**-20)
    held.CopyFrom(numpy_helper.from_array(array, held.name))
    onnx.save(proto, model)
    done = run(*words, "-o", tmp_path / "b")
    assert done.code == 0 and "from the cache" not in done.err


@pytest.mark.parametrize(
    "more",
    [("--seed", "1"), ("--no-verify",), ("--dims", "batch=3"), ("--opset", "21")],
)
def test_another_request_is_another_result(
    run: Run, words: tuple[object, ...], tmp_path: Path, more: tuple[str, ...]
) -> None:
    """What an option may decide is never taken from a run with another one."""
    assert run(*words, "-o", tmp_path / "a").code == 0
    done = run(*words, *more, "-o", tmp_path / "b")
    assert done.code == 0 and "from the cache:" not in done.err
    fresh = run(*words[:-2], *more, "--no-cache", "-o", tmp_path / "c")
    assert fresh.code == 0 and written(tmp_path / "b") == written(tmp_path / "c")


def test_strict_holds_for_what_comes_from_the_cache(run: Run, model: Path, tmp_path: Path) -> None:
    words = ("compile", model, "--passes", "fold_batch_norm, fold_norms")
    assert run(*words, "-o", tmp_path / "a").code == 0
    done = run(*words, "--strict", "-o", tmp_path / "b")
    assert done.err.count("from the cache:") == 1  # the second has nothing to do
    assert done.code == 1 and "error[strict.skipped]" in done.err and not (tmp_path / "b").exists()


# -- damaged --------------------------------------------------------------------------------------


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data.clear()
    elif how == "end":
        data[-1] ^= 1
    else:
        place = {"first": 0, "middle": len(data) // 2, "description": len(data) - 60}[how]
        data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "end", "first", "middle", "description"])
def test_a_damaged_entry_is_named_and_made_again(
    run: Run, words: tuple[object, ...], tmp_path: Path, kept: Path, how: str
) -> None:
    assert run(*words, "-o", tmp_path / "a").code == 0
    before = tree(kept)
    assert {file.suffix for file in entries(kept)} == {".capture", ".step", ".artifact"}
    for file in entries(kept):
        damage(file, how)
    done = run(*words, "-o", tmp_path / "b")
    assert done.code == 0
    for file in entries(kept):
        assert f"a cache entry was damaged, and is made again: {file}" in done.err
    assert written(tmp_path / "a") == written(tmp_path / "b")
    assert tree(kept) == before


def test_an_entry_under_the_name_of_another_is_damaged(
    run: Run, words: tuple[object, ...], tmp_path: Path, kept: Path
) -> None:
    assert run(*words, "-o", tmp_path / "a").code == 0
    one, other = entries(kept, "step")
    shutil.copyfile(one, other)
    done = run(*words, "-o", tmp_path / "b")
    assert "it was made from something else" in done.err
    assert written(tmp_path / "a") == written(tmp_path / "b")


# -- folders that cannot be used ------------------------------------------------------------------


def refused(done: Any, code: str, *said: str) -> None:
    assert done.code == 2 and f"error[{code}]" in done.err and "Traceback" not in done.err
    for text in (*said, "--no-cache"):
        assert text in done.err


def test_a_file_is_no_cache(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/deeper"):
        words = ("--cache", tmp_path / place, "-o", tmp_path / "out")
        done = run("compile", model, "--passes", PASSES, *words)
        refused(done, "cache.not_a_folder", str(tmp_path / place))
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_no_cache(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    words = ("--cache", tmp_path / "photos", "-o", tmp_path / "out")
    done = run("compile", model, "--passes", PASSES, *words)
    assert done.code == 2 and "error[cache.foreign]" in done.err
    assert run("cache", "--clear", "--cache", tmp_path / "photos").code == 2
    assert tree(tmp_path / "photos") == {"cat.jpg": b"cat"}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody may write to")
def test_a_cache_where_nobody_may_write(run: Run, model: Path, tmp_path: Path) -> None:
    words = ("--cache", "/proc/netlathe", "-o", tmp_path / "out")
    done = run("compile", model, "--passes", PASSES, *words)
    refused(done, "cache.denied", "/proc/netlathe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_without_permission(
    run: Run, words: tuple[object, ...], tmp_path: Path, kept: Path
) -> None:
    assert run(*words, "-o", tmp_path / "a").code == 0
    kept.chmod(0o500)
    (kept / "tmp").chmod(0o500)
    try:
        refused(run(*words, "-o", tmp_path / "b"), "cache.denied", str(kept))
    finally:
        kept.chmod(0o700)
        (kept / "tmp").chmod(0o700)


def test_a_full_disk_keeps_what_was_finished(run: Run, model: Path, tmp_path: Path) -> None:
    """The output fits and the cache does not: what to do is said, and the run goes on from there."""
    with small_disk(tmp_path / "disk", 32) as disk:
        words = ("compile", model, "--passes", PASSES, "-o", tmp_path / "out")
        done = run(*words, "--cache", disk / "cache")
        refused(done, "cache.full", str(disk / "cache"), "goes on from there", "--clear")
        assert not (tmp_path / "out").exists()
        assert list((disk / "cache" / "tmp").iterdir()) == []
        assert entries(disk / "cache")
        shutil.copytree(disk / "cache", tmp_path / "larger")
    again = run(*words, "--cache", tmp_path / "larger")
    assert again.code == 0 and "from the cache" in again.err


def test_a_cache_and_none(run: Run, words: tuple[object, ...], tmp_path: Path) -> None:
    done = run(*words, "--no-cache", "-o", tmp_path / "out")
    assert done.code == 2 and "error[cli.cache]" in done.err


def test_the_output_does_not_replace_the_cache(
    run: Run, words: tuple[object, ...], kept: Path
) -> None:
    done = run(*words, "-o", kept, "--overwrite")
    assert done.code == 2 and "error[output.source]" in done.err


# -- looked after ---------------------------------------------------------------------------------


def test_the_cache_is_shown_bounded_and_cleared(
    run: Run, words: tuple[object, ...], tmp_path: Path, kept: Path
) -> None:
    assert run(*words, "-o", tmp_path / "a").code == 0
    typo = run("cache", "--cache", f"{kept}x")
    assert typo.code == 2 and f"{kept}x" in typo.err and not Path(f"{kept}x").exists()
    shown = run("cache", "--cache", kept)
    assert shown.code == 0 and str(kept) in shown.out and "20.00 GB" in shown.out
    said = run("cache", "--cache", kept, "--json").json
    assert said["kinds"]["step"]["entries"] == 2 and said["kinds"]["artifact"]["entries"] == 1
    assert said["bytes"] == sum(file.stat().st_size for file in entries(kept))
    newest = max(entries(kept), key=lambda file: file.stat().st_mtime_ns)
    assert run("cache", "--cache", kept, "--limit", newest.stat().st_size).code == 0
    assert entries(kept) == [newest]
    assert run("cache", "--cache", kept, "--limit", "1M").code == 0
    assert run(*words, "-o", tmp_path / "b").code == 0
    assert sum(file.stat().st_size for file in entries(kept)) <= 1e6
    cleared = run("cache", "--cache", kept, "--clear")
    assert cleared.code == 0 and entries(kept) == []
    assert written(tmp_path / "a") == written(tmp_path / "b")


def test_what_alone_is_too_large_is_told(
    run: Run, words: tuple[object, ...], tmp_path: Path, kept: Path
) -> None:
    assert run("cache", "--cache", kept, "--limit", "8K").code == 0
    done = run(*words, "-o", tmp_path / "a")
    assert done.code == 0 and "not kept in the cache" in done.err and "8.00 kB" in done.err


@pytest.mark.parametrize("size", ["", "large", "-5G", "5X"])
def test_sizes_that_are_none(run: Run, kept: Path, size: str) -> None:
    done = run("cache", "--cache", kept, f"--limit={size}")
    assert done.code == 2 and "error[cache.limit]" in done.err and "20G" in done.err


# -- locked ---------------------------------------------------------------------------------------


def test_locked_gives_the_same_or_nothing(
    run: Run, words: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(*words, "-o", out).code == 0
    before = tree(out)
    assert run(*words, "-o", out, "--locked").code == 0
    assert tree(out) == before
    for file in out.iterdir():  # as it lies in a repository
        if file.name != "manifest.json":
            file.unlink()
    assert run(*words[:-2], "--no-cache", "-o", out, "--locked").code == 0
    assert tree(out) == before


def lock_with(out: Path, change: Any) -> None:
    data = json.loads((out / "manifest.json").read_text())
    change(data)
    (out / "manifest.json").write_text(json.dumps(data))


def test_every_difference_is_explained_before_the_work(
    run: Run, words: tuple[object, ...], model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(*words, "-o", out).code == 0

    def change(data: dict[str, Any]) -> None:
        data["compilation"]["versions"]["numpy"] = "1.0"
        data["compilation"]["source"]["files"]["network.onnx"] = "0" * 64

    lock_with(out, change)
    before = tree(tmp_path)
    passes = 'fold_batch_norm, quantize(weights="int8", min_size=500)'
    changed = [passes if w == PASSES else w for w in words]
    done = run(*changed, "--seed", 7, "--opset", 21, "-o", out, "--locked")
    assert done.code == 1 and tree(tmp_path) == before
    for code in ("versions", "source", "pipeline", "passes", "seed", "target"):
        assert f"error[lock.{code}]" in done.err
    assert f"versions.numpy: locked 1.0, here {np.__version__}" in done.err
    assert "source.files.network.onnx: locked 000000000000..., here " in done.err
    assert "seed: locked 0, here 7" in done.err
    assert "passes[quantize].options.min_size: locked 600, here 500" in done.err
    assert "running" not in done.err


def test_what_a_run_does_without_is_no_other_version(run: Run, model: Path, tmp_path: Path) -> None:
    """torch takes part where there are calibration data: leaving them out is one difference."""
    data, out = tmp_path / "data.npz", tmp_path / "out"
    np.savez(data, x=np.ones((2, 4, 8, 8), np.float32))
    words = ("compile", model, "--passes", PASSES, "-o", out)
    assert run(*words, "--calibration", data).code == 0
    done = run(*words, "--locked")
    assert done.code == 1 and "error[lock.calibration]" in done.err
    assert "lock.versions" not in done.err


@pytest.mark.parametrize(
    ("code", "at"),
    [
        ("lock.files", ("artifact", "files", "model.onnx", "sha256")),
        ("lock.steps", ("compilation", "steps", 0, "ledger", 0, "status")),
        ("lock.result", ("compilation", "result", "graph")),
    ],
)
def test_a_result_that_differs_is_not_written(
    run: Run, words: tuple[object, ...], tmp_path: Path, code: str, at: tuple[str | int, ...]
) -> None:
    out = tmp_path / "out"
    assert run(*words, "-o", out).code == 0

    def change(data: Any) -> None:
        for key in at[:-1]:
            data = data[key]
        data[at[-1]] = "f" * 64

    lock_with(out, change)
    before = tree(out)
    done = run(*words, "-o", out, "--locked")
    assert done.code == 1 and f"error[{code}]" in done.err and "ffffffffffff" in done.err
    assert tree(out) == before


def test_a_lock_that_is_not_there(run: Run, words: tuple[object, ...], tmp_path: Path) -> None:
    done = run(*words, "-o", tmp_path / "out", "--locked")
    assert done.code == 2 and "error[lock.missing]" in done.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\0"])
def test_a_lock_that_cannot_be_read(
    run: Run, words: tuple[object, ...], tmp_path: Path, text: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    done = run(*words, "-o", tmp_path / "out", "--locked")
    assert done.code == 2 and "error[lock.read]" in done.err
