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


@pytest.mark.parametrize(
    "groups, files, granted",
    [
        ("0::/", {}, None),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "no number"}, None),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "40000 100000"}, 1),
        ("0::/a/b", {"other/cpu.max": "40000 100000"}, None),
        (
            "4:memory:/m\n3:cpu,cpuacct:/c\n2:cpuset:/s\n0::/",
            {"cpu/c/cpu.cfs_quota_us": "100000", "cpu/c/cpu.cfs_period_us": "100000"},
            1,
        ),
        (
            "3:cpuset,cpuacct:/c",
            {"cpu/c/cpu.cfs_quota_us": "100000", "cpu/c/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_no_more_threads_than_a_container_is_granted(
    tmp_path: Path, groups: str, files: dict[str, str], granted: int | None
) -> None:
    for file, text in {"proc/self/cgroup": groups, **held_by(files)}.items():
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    program = built(tmp_path, f'-DSYSTEM="{tmp_path}"')
    done = subprocess.run([program], env={}, capture_output=True, text=True, check=True)
    there = min(len(os.sched_getaffinity(0)), 256)
    assert int(done.stdout) == (there if granted is None else min(there, granted))


def held_by(files: dict[str, str]) -> dict[str, str]:
    """Where Linux has the files of control groups."""
    return {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
