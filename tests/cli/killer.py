"""Kills a compile at random points with SIGKILL and runs it again: nothing broken, and the end is the same.

    python -m tests.cli.killer MODEL PASSES FOLDER POINTS [SEED]

The command runs in children of one process that has imported everything, so that points are spread over the
work and not over the imports. At every other point an older output is overwritten.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import netlathe.backends.onnx_file
import netlathe.frontends.onnx_file
import netlathe.pipeline.save  # noqa: F401  # imported here, so that children do not
from netlathe.cli import main
from netlathe.pipeline.cache import Cache
from netlathe.pipeline.cache_file import Reader

FEW_WORDS = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def start(words: list[str], log: Path) -> int:
    """Run a command in a child that is its own process."""
    child = os.fork()
    if child:
        return child
    held = os.open(log, FEW_WORDS)
    os.dup2(held, 1)
    os.dup2(held, 2)
    os._exit(main(words))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output; of the manifest what it says of the compilation and the files."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    told = json.loads(files["manifest.json"])
    del told["timings"]
    return {**files, "manifest.json": json.dumps(told).encode()}


def check_cache(folder: Path) -> set[str]:
    """The names of the entries, each of which must be whole."""
    held = Cache(folder).held()
    for entry in held:
        Reader(entry.path)  # raises where it is damaged
    return {entry.path.name for entry in held}


def sweep(model: Path, passes: str, folder: Path, points: int, seed: int) -> None:
    """Raise at the first point where something is wrong."""
    rng = random.Random(seed)
    out, cache, log = folder / "place" / "out", folder / "cache", folder / "log"
    old, wanted, whole = folder / "old", folder / "wanted", folder / "whole"
    words = ["compile", str(model), "--passes", passes, "--cache", str(cache)]

    def run(*words: str) -> float:
        began = time.perf_counter()
        _, status = os.waitpid(start(list(words), log), 0)
        assert os.waitstatus_to_exitcode(status) == 0, log.read_text()
        return time.perf_counter() - began

    run("compile", str(model), "--passes", "", "--no-cache", "-o", str(old))
    run(*words[:-2], "--no-cache", "-o", str(wanted))
    took = run(*words[:-1], str(whole), "-o", str(out))
    result, before, entries = contents(wanted), contents(old), check_cache(whole)
    assert contents(out) == result
    resumed = 0
    for point in range(points):
        shutil.rmtree(out.parent)
        shutil.rmtree(cache, ignore_errors=True)
        log.unlink(missing_ok=True)
        out.parent.mkdir()
        if point % 2:
            shutil.copytree(old, out)
        again = [*words, "-o", str(out), "--overwrite"]
        child = start(again, log)
        time.sleep(rng.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if out.exists():
            assert contents(out) in (result, *([before] if point % 2 else [])), point
        else:
            assert not point % 2, point
        kept = check_cache(cache)
        assert kept <= entries, point
        log.unlink(missing_ok=True)
        run(*again)
        assert contents(out) == result, point
        assert [path.name for path in out.parent.iterdir()] == ["out"], point
        assert check_cache(cache) == entries and not list((cache / "tmp").iterdir()), point
        said = log.read_text()
        assert "damaged" not in said, said
        steps = sum(name.endswith(".step") for name in kept)
        assert said.count("from the cache:") == steps, (point, steps, said)
        resumed += bool(kept)
    print(json.dumps({"points": points, "resumed": resumed, "seconds": round(took, 3)}))


if __name__ == "__main__":
    path, text, place, count, *more = sys.argv[1:]
    sweep(Path(path), text, Path(place), int(count), int(more[0]) if more else 0)
