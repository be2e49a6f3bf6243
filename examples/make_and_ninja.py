"""Build a small model from make and from ninja, which build again when something it is made from changes.

    python examples/make_and_ninja.py

The files that matter are Makefile, build.ninja and small.yaml in examples/make_and_ninja: this script
copies them beside a network whose weights lie in a file of their own, and shows what happens when each
file changes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
from onnx_model import write_network

HERE = Path(__file__).parent / "make_and_ninja"
NETLATHE = shlex.join([sys.executable, "-m", "netlathe"])
SOURCES = ("network.onnx", "network.data", "small.yaml", "data.npz")


def prepare(folder: Path) -> None:
    """Write the network, its weights, the data and the build files into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in HERE.iterdir():
        shutil.copy(file, folder)
    (folder / "settings.ninja").write_text(f"netlathe = {NETLATHE}\n")
    (folder / "network.data").unlink(missing_ok=True)  # onnx would append to it
    write_network(folder / "network.onnx")
    onnx.save(
        onnx.load(folder / "network.onnx"),
        folder / "network.onnx",
        save_as_external_data=True,
        location="network.data",
        size_threshold=0,
    )
    images = np.random.default_rng(1).standard_normal((8, 3, 32, 32), dtype=np.float32)
    np.savez(folder / "data.npz", image=images)


def ninja() -> str:
    """The ninja of this Python environment, else the system's."""
    beside = Path(sys.executable).with_name("ninja")
    return str(beside) if beside.exists() else "ninja"


def build(tool: str, folder: Path) -> bool:
    """Run a build; whether it had anything to do."""
    command = {"make": ["make", f"NETLATHE={NETLATHE}"], "ninja": [ninja()]}[tool]
    result = folder / f"out-{tool}" / "model.onnx"
    before = result.stat().st_mtime_ns if result.exists() else None
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return result.stat().st_mtime_ns != before


def touch(file: Path, folder: Path) -> None:
    """Make ``file`` newer than everything that was built."""
    newest = max(path.stat().st_mtime for path in folder.glob("out-*/model.onnx"))
    os.utime(file, (newest + 1, newest + 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("out/make-and-ninja"))
    parser.add_argument("--tool", choices=["make", "ninja"], action="append")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    shutil.rmtree(folder, ignore_errors=True)
    prepare(folder)
    for tool in arguments.tool or ["make", "ninja"]:
        said = {"at first": build(tool, folder), "at once again": build(tool, folder)}
        for name in SOURCES:
            was = (folder / name).stat()
            touch(folder / name, folder)
            said[f"{name} changed"] = build(tool, folder)
            os.utime(folder / name, ns=(was.st_atime_ns, was.st_mtime_ns))
        (folder / "notes.txt").write_text("nothing that the model is made from")
        said["another file came"] = build(tool, folder)
        for what, built in said.items():
            print(f"{tool}: {what}: {'built' if built else 'nothing to do'}")
        wanted = [True, False, *[True] * len(SOURCES), False]
        if list(said.values()) != wanted:
            raise SystemExit(f"{tool} does not build exactly when something has changed")


if __name__ == "__main__":
    main()
