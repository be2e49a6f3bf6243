"""Object code of the ARM kernels as llvm-mca and qemu see it: loops, ports, and what a program executes."""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from netlathe.backends.tvm.arm import bare, emulator
from netlathe.backends.tvm.arm.artifact import BareArtifact, build_program
from netlathe.backends.tvm.arm.cores import Core

UNITS: Mapping[str, str] = {
    "cortex-a72": "A57Unit",
    "neoverse-n1": "N1Unit",
    "neoverse-v1": "V1Unit",
}
# Units that do the same work: of vectors, of memory, of integers.
_CLASSES = tuple(re.compile(rf"Unit{letters}\d*$") for letters in ("[VWX]", "L", "[IMS]"))
MULTIPLY = re.compile(r"^(fmla|sdot|smmla|fmul)\b")
_BRANCH = re.compile(r"^(b|b\.\w+|cbnz|cbz|tbnz|tbz|bl)\b")


@dataclass(frozen=True)
class Tools:
    """llvm-mca and llvm-objdump, 19 or newer."""

    mca: str
    objdump: str

    @classmethod
    def find(cls) -> Tools:
        for suffix in ("", *(f"-{version}" for version in range(25, 18, -1))):
            mca, objdump = shutil.which(f"llvm-mca{suffix}"), shutil.which(f"llvm-objdump{suffix}")
            if mca and objdump:
                told = subprocess.run(
                    [mca, "--version"], capture_output=True, text=True, check=True
                )
                version = re.search(r"version (\d+)", told.stdout)
                if version and int(version[1]) >= 19:
                    return cls(mca, objdump)
        sys.exit("llvm-mca 19 or newer is not installed (Debian: apt-get install llvm-19)")


@dataclass(frozen=True)
class Measured:
    """Instructions: the cycles they take, and those that they need.

    ``mca`` is llvm-mca's "Block RThroughput", ``ports`` what the busiest units need, ``peak`` what the
    multiplications alone need.
    """

    instructions: int
    cycles: float
    mca: float
    ports: float
    peak: float
    said: str


def measured(tools: Tools, core: Core, lines: Sequence[str], turns: int) -> Measured:
    """``lines`` over and over, ``turns`` times, and the multiplications among them."""
    whole = _simulated(tools, core, lines, turns)
    alone = _simulated(tools, core, [line for line in lines if MULTIPLY.match(line)], turns)
    return dataclasses.replace(whole, peak=alone.ports)


def _simulated(tools: Tools, core: Core, lines: Sequence[str], turns: int) -> Measured:
    """What llvm-mca's model of the core says.

    Its throughput takes each group of units by itself. Stores and conversions keep some of the vector
    units from multiplying, so a class of units as a whole is a bound too.
    """
    text = "\n".join(
        re.sub(r"0x[0-9a-f]+$", "done", line)
        if _BRANCH.match(line) or line.startswith("adr")
        else line
        for line in lines
    )
    told = subprocess.run(
        [tools.mca, "-mtriple=aarch64", f"-mcpu={core.name}", f"-iterations={turns}"],
        input=text + "\ndone:\n", capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    if UNITS[core.name] not in told:
        sys.exit(f"llvm-mca has no model of {core.name} with units {UNITS[core.name]}*")

    def number(name: str) -> float:
        match = re.search(rf"{name}:\s+([\d.]+)", told)
        assert match is not None
        return float(match[1])

    resources = told[told.index("Resources:") : told.index("Resource pressure by instruction")]
    names = re.findall(r"^\[[\d.]+\]\s+- (\w+)$", resources, re.M)
    last = resources.strip().splitlines()[-1].split()
    pressure = [0.0 if word == "-" else float(word) for word in last]
    throughput = number("Block RThroughput")
    bounds = [throughput]
    for units in _CLASSES:
        held = [p for name, p in zip(names, pressure, strict=True) if units.search(name)]
        bounds.append(sum(held) / len(held))
    said = told[: told.index("Instruction Info")] + resources
    cycles = number("Total Cycles") / turns
    return Measured(len(lines), cycles, throughput, max(bounds), 0.0, said)


def inner_loop(tools: Tools, model: ir.Model, core: Core) -> list[str]:
    """The loop without branches that multiplies most, of the object code.

    Empty where none adds products: LLVM unrolled a short one, or taps are conditional, as in depthwise ones.
    """
    made = bare.program(model, core.machine, "bench", only_plan=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        path.write_bytes(made.object)
        lines = _disassembled(tools, path)

    def adds(body: Sequence[str]) -> int:
        return sum(line.startswith(("fmla", "sdot", "smmla")) for line in body)

    loop = max(_loops(lines), key=adds, default=[])
    return loop if adds(loop) else []


def _disassembled(tools: Tools, path: Path) -> list[tuple[int, str]]:
    """Addresses and instructions of the kernels; branches name an address."""
    told = subprocess.run(
        [tools.objdump, "-d", "--no-show-raw-insn", "--section=.text", "--mattr=+all", str(path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = []
    for line in told.splitlines():
        match = re.match(r"^\s*([0-9a-f]+):\s+(\S.*)$", line)
        if match:
            text = match[2].split("//")[0].split("<")[0]
            found.append((int(match[1], 16), re.sub(r"\s+", " ", text).strip()))
    return found


def _loops(lines: Sequence[tuple[int, str]]) -> list[list[str]]:
    """The bodies of innermost loops: what lies between a backward branch and its target."""
    at = {address: index for index, (address, _) in enumerate(lines)}
    found = []
    for index, (address, text) in enumerate(lines):
        match = re.match(r"^(?:b\.\w+|cbnz|cbz|tbnz|tbz)\b.*0x([0-9a-f]+)$", text)
        if match and int(match[1], 16) < address and int(match[1], 16) in at:
            body = [line for _, line in lines[at[int(match[1], 16)] : index + 1]]
            if not any(line.startswith(("b", "cb", "tb", "ret")) for line in body[:-1]):
                found.append(body)
    return found


# -- programs -----------------------------------------------------------------------------------------

# qemu's plugin interface, version 1 and later, as far as it is used here. It counts instructions, and
# writes where each block of them begins and how many it has, if it is given a file.
PLUGIN = """
#include <stdint.h>
#include <stdio.h>
#include <stddef.h>
#include <string.h>
typedef uint64_t id_t_;
struct qemu_plugin_tb;
extern void qemu_plugin_register_vcpu_tb_trans_cb(id_t_, void (*)(id_t_, struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *,
                                                 void (*)(unsigned, void *), int, void *);
extern void qemu_plugin_register_atexit_cb(id_t_, void (*)(id_t_, void *), void *);
__attribute__((visibility("default"))) int qemu_plugin_version = 1;
static uint64_t count;
static FILE *trace;
static void executed(unsigned cpu, void *data) {
  (void)cpu;
  fwrite(&data, sizeof data, 1, trace);
}
static void block(id_t_ id, struct qemu_plugin_tb *tb) {
  (void)id;
  uint64_t size = qemu_plugin_tb_n_insns(tb);
  qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &count, size);
  if (trace)
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0,
                                         (void *)(qemu_plugin_tb_vaddr(tb) << 16 | size));
}
static void done(id_t_ id, void *data) {
  (void)id, (void)data;
  fprintf(stderr, "instructions %llu\\n", (unsigned long long)count);
  if (trace) fclose(trace);
}
__attribute__((visibility("default"))) int qemu_plugin_install(id_t_ id, const void *info, int argc,
                                                               char **argv) {
  (void)info;
  if (argc) trace = fopen(argv[0] + strlen("trace="), "wb");
  qemu_plugin_register_vcpu_tb_trans_cb(id, block);
  qemu_plugin_register_atexit_cb(id, done, NULL);
  return 0;
}
"""
_CALL = "  const char *error = model_run(weights, arena, &in, &out);\n"


@dataclass(frozen=True)
class Running:
    """A model as a program in a folder, run by qemu with the plugin."""

    folder: Path
    emulator: Sequence[str]
    main: str

    def run(self, change: Callable[[str], str], options: str = "") -> tuple[Path, int]:
        """The program of a changed ``main.c``, and the instructions that it executed."""
        (self.folder / "main.c").write_text(change(self.main))
        program = build_program(self.folder, "model", self.folder)
        files = [str(self.folder / name) for name in ("model.weights", "in", "out")]
        plugin = f"{self.folder / 'plugin.so'}{options}"
        done = subprocess.run(
            [*self.emulator, "-plugin", plugin, str(program), *files],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return program, int(done.stderr.split("instructions ")[1])


def _running(model: ir.Model, core: Core, folder: Path) -> Running:
    before = emulator.command(core)
    if not before:
        sys.exit("executing kernels needs qemu-aarch64 (Debian: apt-get install qemu-user)")
    BareArtifact(model, core, "model").save(folder)
    (folder / "plugin.c").write_text(PLUGIN)
    made = [str(folder / "plugin.c"), "-o", str(folder / "plugin.so")]
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", *made], check=True)
    main = (folder / "main.c").read_text()
    size = re.search(r"in\.\w+ = file\(argv\[2\], (\d+)", main)
    assert size is not None and _CALL in main
    (folder / "in").write_bytes(bytes(int(size[1])))
    return Running(folder, before, main)


def count(model: ir.Model, core: Core) -> int:
    """What a second run of the model adds to the instructions of a program."""
    with tempfile.TemporaryDirectory() as name:
        running = _running(model, core, Path(name))
        again = _CALL + _CALL.replace("const char *", "")
        return running.run(lambda m: m.replace(_CALL, again))[1] - running.run(lambda m: m)[1]


def executed(tools: Tools, model: ir.Model, core: Core) -> list[str]:
    """The instructions of the model's own functions in one run, in the order in which they ran."""
    with tempfile.TemporaryDirectory() as name:
        running = _running(model, core, Path(name))
        trace = Path(name) / "trace"
        program, _ = running.run(lambda m: m, f",trace={trace}")
        symbols = subprocess.run(
            [tools.objdump, "--syms", str(program)], capture_output=True, text=True, check=True
        ).stdout
        own = [
            range(int(start, 16), int(start, 16) + int(size, 16))
            for start, size in re.findall(
                r"^([0-9a-f]+) .* F \.text\s+([0-9a-f]+) (?:\.hidden )?model_(?!run$)\w+$",
                symbols,
                re.M,
            )
        ]
        text = dict(_disassembled(tools, program))
        made = []
        for (word,) in struct.iter_unpack("<Q", trace.read_bytes()):
            start, size = word >> 16, word & 0xFFFF
            if any(start in each for each in own):
                made += [text[start + 4 * i] for i in range(size)]
        return made
