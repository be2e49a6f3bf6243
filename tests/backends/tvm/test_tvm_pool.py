"""The threads of kernels (pool.c), by a program of its own, under ThreadSanitizer too."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import netlathe.backends.tvm
from netlathe.backends.tvm import toolchain

POOL = Path(netlathe.backends.tvm.__file__).with_name("pool.c")
STRESS = Path(__file__).with_name("pool_stress.cpp")


def built(folder: Path, *flags: str) -> Path:
    """The stress program."""
    program = folder / "stress"
    hesitating = "-DHESITATE=void hesitate(void); hesitate"
    command = [
        toolchain.compiler(),
        "-O1",
        "-g",
        "-pthread",
        hesitating,
        *flags,
        "-o",
        str(program),
    ]
    subprocess.run([*command, str(STRESS), "-x", "c", str(POOL)], check=True, capture_output=True)
    return program


def run(program: Path, *numbers: int) -> str:
    """What it says; it fails unless it is all that is well, or that ThreadSanitizer cannot run."""
    command = [os.fspath(program), *map(str, numbers)]
    environment = {"TSAN_OPTIONS": "die_after_fork=0"}  # the forked process has threads, too
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if "unexpected memory mapping" not in done.stderr:
        assert (done.returncode, done.stdout, done.stderr) == (0, "all done\n", "")
    return done.stderr


@pytest.mark.parametrize("threads, callers", [(1, 2), (2, 1), (4, 3), (3, 12)])
def test_every_task_once(tmp_path: Path, threads: int, callers: int) -> None:
    """More callers than jobs there are, and more threads than processors, among them."""
    program = built(tmp_path, "-fsanitize=undefined", "-fno-sanitize-recover=all")
    run(program, threads, callers, 2000)


def test_no_data_races(tmp_path: Path) -> None:
    try:
        program = built(tmp_path, "-fsanitize=thread")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no ThreadSanitizer: {error.stderr.decode().splitlines()[-1]}")
    for threads, callers in ((4, 3), (2, 1)):
        said = run(program, threads, callers, 300)
        if "unexpected memory mapping" in said:
            pytest.skip("ThreadSanitizer does not run with this kernel's addresses")
