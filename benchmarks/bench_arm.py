"""The inner loops of the ARM kernels against the ports of each core, and their dynamic instruction counts.

    python benchmarks/bench_arm.py [--cores neoverse-n1 ...] [--kernels dot ...] [--report FILE] [--count]

Every kernel is lowered and compiled as a model is; its object code is disassembled, and the loop with the
most multiplications goes through llvm-mca 19 or newer, loads and loop control included, two ways:

* ports: the cycles that the busiest unit needs for this loop, as a share of the cycles that it takes;
* peak: likewise, counting the multiplications alone.

Bar: ports at least 85 % everywhere. The kernels of float weights and bytes are expected there by peak
too; those that unpack codes do more than they multiply. Neoverse cores need llvm-mca 19: 14 falls back to
the model of another core without a word, so the names of the units are checked.

--count runs whole kernels in qemu's user mode with a plugin of a few lines, which needs a C compiler, and
shows instructions for each multiply-add, beside what the inner loops of XNNPACK's micro-kernels of the same
kind take by their shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from netlathe.backends.tvm.arm import bare, emulator
from netlathe.backends.tvm.arm.artifact import BareArtifact, build_program
from netlathe.backends.tvm.arm.cores import CORES, Core
from netlathe.ir import normal

BAR = 0.85
UNITS: Mapping[str, str] = {
    "cortex-a72": "A57Unit",
    "neoverse-n1": "N1Unit",
    "neoverse-v1": "V1Unit",
}
MULTIPLY = re.compile(r"^(fmla|sdot|smmla|fmul)\b")
ROWS, INNER, COLUMNS = 64, 512, 256


@dataclass(frozen=True)
class Kernel:
    """A product or convolution, the cores that have it, and micro-kernels of XNNPACK's that do the same."""

    build: Callable[[], ir.Model]
    work: int  # multiply-adds of all of it
    cores: Sequence[str]
    peers: Mapping[str, float]  # name -> instructions of its inner loop for each multiply-add


def _model(text: str, **constants: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 25]> product {text}')
    for name, array in constants.items():
        value = next(v for v in model.graph.inputs if v.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name, dtype=value.dtype)
        model.graph.register_initializer(value)
    normal.normalize(model)
    return model


_RNG = np.random.default_rng(0)


def floats(kind: str, rows: int = ROWS) -> Callable[[], ir.Model]:
    """A MatMul of floats."""

    def build() -> ir.Model:
        text = (
            f"({kind}[{rows}, {INNER}] x, {kind}[{INNER}, {COLUMNS}] w)"
            f" => ({kind}[{rows}, {COLUMNS}] y) {{ y = MatMul(x, w) }}"
        )
        dtype = {"float": np.float32, "float16": np.float16}[kind]
        return _model(text, w=_RNG.normal(size=(INNER, COLUMNS)).astype(dtype))

    return build


def bytes_() -> ir.Model:
    """A MatMulInteger of signed bytes."""
    text = (
        f"(int8[{ROWS}, {INNER}] x, int8[{INNER}, {COLUMNS}] w)"
        f" => (int32[{ROWS}, {COLUMNS}] y) {{ y = MatMulInteger(x, w) }}"
    )
    return _model(text, w=_RNG.integers(-127, 128, (INNER, COLUMNS)).astype(np.int8))


def codes(kind: str, rows: int = ROWS) -> Callable[[], ir.Model]:
    """A MatMul of floats with codes in groups of 32."""

    def build() -> ir.Model:
        blocks = INNER // 32
        text = (
            f"(float[{rows}, {INNER}] x, {kind}[{INNER}, {COLUMNS}] w, float[{blocks}, {COLUMNS}] s)"
            f" => (float[{rows}, {COLUMNS}] y)"
            " { d = DequantizeLinear<axis = 0, block_size = 32>(w, s) y = MatMul(x, d) }"
        )
        low, high = {"int4": (-8, 8), "int8": (-128, 128)}[kind]
        import ml_dtypes

        dtype = {"int4": ml_dtypes.int4, "int8": np.int8}[kind]
        return _model(
            text,
            w=_RNG.integers(low, high, (INNER, COLUMNS)).astype(dtype),
            s=_RNG.uniform(0.01, 0.02, (blocks, COLUMNS)).astype(np.float32),
        )

    return build


@dataclass(frozen=True)
class Convolution:
    """A square window over a plane of ``plane`` x ``plane``, channels last, as inside of models."""

    inputs: int
    outputs: int
    window: int
    plane: int
    stride: int = 1
    groups: int = 1

    @property
    def out(self) -> int:
        """Rows and columns of the result."""
        return (self.plane + 2 * (self.window // 2) - self.window) // self.stride + 1

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.out**2 * self.outputs * self.inputs // self.groups * self.window**2

    def model(self, bytes_: bool) -> ir.Model:
        """A Conv of floats, or of quantized pairs of bytes."""
        p, k = self.window // 2, self.window
        size = (self.outputs, self.inputs // self.groups, k, k)
        kind = "int8" if bytes_ else "float"
        conv = (
            f"Conv<pads = [{p}, {p}, {p}, {p}], strides = [{self.stride}, {self.stride}],"
            f" group = {self.groups}>"
        )
        given = f"{kind}[1, {self.plane}, {self.plane}, {self.inputs}] x, {kind}{list(size)} w"
        result = f"float[1, {self.out}, {self.out}, {self.outputs}] y"
        turn = "t = Transpose<perm = [0, 3, 1, 2]>(x)"
        back = "y = Transpose<perm = [0, 2, 3, 1]>(c)"
        if not bytes_:
            text = f"({given}) => ({result}) {{ {turn} c = {conv}(t, w) {back} }}"
            return _model(text, w=_RNG.normal(size=size).astype(np.float32))
        text = (
            f"({given}, float sx, float[{self.outputs}] sw) => ({result}) {{ {turn}"
            f" d = DequantizeLinear(t, sx) e = DequantizeLinear<axis = 0>(w, sw) c = {conv}(d, e) {back} }}"
        )
        return _model(
            text,
            w=_RNG.integers(-127, 128, size).astype(np.int8),
            sx=np.array(0.1, np.float32),
            sw=np.full(self.outputs, 0.1, np.float32),
        )


CONVOLUTIONS: Mapping[str, Convolution] = {
    "3x3": Convolution(64, 64, 3, 28),
    "3x3-7": Convolution(64, 64, 3, 7),
    "1x1": Convolution(64, 128, 1, 28),
    "stem": Convolution(3, 32, 3, 56, stride=2),
    "depthwise": Convolution(128, 128, 3, 28, groups=128),
}


def _peer(multiplies: int, loads: int, control: int, macs: int) -> float:
    return (multiplies + loads + control) / macs


ALL = tuple(CORES)
# Instructions of a peer: multiplications, loads (a pair of registers is one), loop control.
WORK = ROWS * INNER * COLUMNS
KERNELS: Mapping[str, Kernel] = {
    "float32": Kernel(floats("float"), WORK, ALL, {
        "f32-gemm 6x8 lane ld128": _peer(48, 6 + 4, 2, 6 * 8 * 4),
        "f32-gemm 4x8 lane ld128": _peer(32, 4 + 4, 2, 4 * 8 * 4),
        "f32-gemm 1x8 lane ld64": _peer(4, 1 + 2, 2, 1 * 8 * 2),
    }),
    "float16": Kernel(floats("float16"), WORK, ALL[1:], {
        "f16-gemm 6x16 lane ld64": _peer(48, 6 + 4, 2, 6 * 16 * 4),
        "f16-gemm 1x16 lane ld64": _peer(8, 1 + 4, 2, 1 * 16 * 4),
    }),
    "dot": Kernel(bytes_, WORK, ALL[1:2], {
        "qs8-gemm 4x16c4 lane ld128": _peer(64, 4 + 8, 2, 4 * 16 * 16),
        "qs8-gemm 4x16c4 lane ld64": _peer(32, 4 + 4, 2, 4 * 16 * 8),
    }),
    "matrix": Kernel(bytes_, WORK, ALL[2:], {
        "qs8-gemm 4x16c8 i8mm": _peer(16, 4 + 2 + 8, 2, 4 * 16 * 8),
    }),
    "int4-tile": Kernel(codes("int4"), WORK, ALL, {}),
    "int4-row": Kernel(codes("int4", 1), INNER * COLUMNS, ALL, {}),
    "int8-row": Kernel(codes("int8", 1), INNER * COLUMNS, ALL, {}),
    **{
        f"conv-{kind}-{name}": Kernel(partial(conv.model, kind == "int8"), conv.work, cores, {})
        for kind, cores in (("float32", ALL), ("int8", ALL[1:]))
        for name, conv in CONVOLUTIONS.items()
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", nargs="+", choices=CORES, default=list(CORES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument(
        "--report", type=Path, help="write the loops and what llvm-mca says of them"
    )
    parser.add_argument("--count", action="store_true", help="count instructions of whole kernels")
    arguments = parser.parse_args()
    tools = Tools.find()
    reports, worst = [], 1.0
    print(f"{'kernel':24} {'core':12} {'instructions':>12} {'cycles':>7} {'ports':>6} {'peak':>6}")
    for name in arguments.kernels:
        for core in (CORES[c] for c in arguments.cores if c in KERNELS[name].cores):
            if (made := inner_loop(tools, KERNELS[name], core)) is None:
                print(f"{name:24} {core.name:12} no loop without branches multiplies", flush=True)
                continue
            text, found = made
            reports.append(f"=== {name}, {core.name}\n{text}\n{found.said}")
            print(
                f"{name:24} {core.name:12} {found.instructions:12} {found.cycles:7.1f}"
                f" {found.ports / found.cycles:6.1%} {found.peak / found.cycles:6.1%}",
                flush=True,
            )
            worst = min(worst, found.ports / found.cycles)
    if arguments.report is not None:
        arguments.report.write_text("\n".join(reports), "utf-8")
    if arguments.count:
        count(tools, arguments.kernels, arguments.cores)
    print(f"least share of the port-bound peak: {worst:.1%} (bar {BAR:.0%})")
    return int(worst < BAR)


# -- inner loops --------------------------------------------------------------------------------------


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
    """A loop: cycles of one turn, and those that its busiest unit and its multiplications need."""

    instructions: int
    cycles: float
    ports: float
    peak: float
    said: str


def inner_loop(tools: Tools, kernel: Kernel, core: Core) -> tuple[str, Measured] | None:
    """The hot loop of the kernel's object code, and what llvm-mca says of it.

    None where none adds products: LLVM unrolled a short one, or taps are conditional, as in depthwise ones.
    """
    made = bare.program(kernel.build(), core.machine, "bench", only_plan=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        path.write_bytes(made.object)
        lines = disassembled(tools, path)

    def adds(body: Sequence[str]) -> int:
        return sum(line.startswith(("fmla", "sdot", "smmla")) for line in body)

    loop = max(loops(lines), key=adds, default=[])
    if not adds(loop):
        return None
    whole = simulated(tools, core, loop)
    alone = simulated(tools, core, [line for line in loop if MULTIPLY.match(line)])
    return "\n".join(loop), dataclasses.replace(whole, peak=alone.ports)


def disassembled(tools: Tools, path: Path) -> list[tuple[int, str]]:
    """Addresses and instructions of the kernels; branches name an address."""
    told = subprocess.run(
        [tools.objdump, "-d", "--no-show-raw-insn", "--section=.text", str(path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = []
    for line in told.splitlines():
        match = re.match(r"^\s*([0-9a-f]+):\s+(\S.*)$", line)
        if match:
            text = match[2].split("//")[0].split("<")[0]
            found.append((int(match[1], 16), re.sub(r"\s+", " ", text).strip()))
    return found


def loops(lines: Sequence[tuple[int, str]]) -> list[list[str]]:
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


def simulated(tools: Tools, core: Core, loop: Sequence[str]) -> Measured:
    """One turn of a loop by llvm-mca's model of the core, in a steady state."""
    turns = 400
    text = "\n".join(
        re.sub(r"0x[0-9a-f]+$", "done", line) if line.startswith(("b.", "cb", "tb")) else line
        for line in loop
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

    cycles = number("Total Cycles") / turns
    said = (
        told[: told.index("Instruction Info")]
        + told[told.index("Resources:") : told.index("Resource pressure by instruction")]
    )
    return Measured(len(loop), cycles, number("Block RThroughput"), 0.0, said)


# -- instructions -------------------------------------------------------------------------------------

# qemu's plugin interface, version 1 and later, as far as it is used here.
PLUGIN = """
#include <stdint.h>
#include <stdio.h>
#include <stddef.h>
typedef uint64_t id_t_;
struct qemu_plugin_tb;
extern void qemu_plugin_register_vcpu_tb_trans_cb(id_t_, void (*)(id_t_, struct qemu_plugin_tb *));
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int, void *, uint64_t);
extern void qemu_plugin_register_atexit_cb(id_t_, void (*)(id_t_, void *), void *);
__attribute__((visibility("default"))) int qemu_plugin_version = 1;
static uint64_t count;
static void block(id_t_ id, struct qemu_plugin_tb *tb) {
  (void)id;
  qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &count, qemu_plugin_tb_n_insns(tb));
}
static void done(id_t_ id, void *data) {
  (void)id, (void)data;
  fprintf(stderr, "instructions %llu\\n", (unsigned long long)count);
}
__attribute__((visibility("default"))) int qemu_plugin_install(id_t_ id, const void *info, int argc,
                                                               char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, block);
  qemu_plugin_register_atexit_cb(id, done, NULL);
  return 0;
}
"""


def count(tools: Tools, names: Sequence[str], cores: Sequence[str]) -> None:
    """Print instructions for each multiply-add of whole kernels, epilogues and tails included."""
    print(f"\n{'kernel':24} {'core':12} {'instructions per multiply-add':>30}")
    for name in names:
        kernel = KERNELS[name]
        for core in (CORES[c] for c in cores if c in kernel.cores):
            each = instructions(kernel, core) / kernel.work
            print(f"{name:24} {core.name:12} {each:30.4f}", flush=True)
        for peer, each in kernel.peers.items():
            print(f"{'':24} {peer + ' (its inner loop)':42} {each:.4f}")


def instructions(kernel: Kernel, core: Core) -> int:
    """What a second run of the model adds to the instructions of a program."""
    before = emulator.command(core)
    if not before:
        sys.exit("counting instructions needs qemu-aarch64 (Debian: apt-get install qemu-user)")
    artifact = BareArtifact(kernel.build(), core, "model")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact.save(folder)
        (folder / "plugin.c").write_text(PLUGIN)
        plugin = folder / "plugin.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O2", folder / "plugin.c", "-o", plugin], check=True
        )
        text = (folder / "main.c").read_text()
        call = "  const char *error = model_run(weights, arena, &in, &out);\n"
        totals = []
        for runs in (1, 2):
            (folder / "main.c").write_text(
                text.replace(
                    call, call + "  error = model_run(weights, arena, &in, &out);\n" * (runs - 1)
                )
            )
            program = build_program(folder, "model", folder)
            size = re.search(r"in\.\w+ = file\(argv\[2\], (\d+)", text)
            assert size is not None
            (folder / "in").write_bytes(bytes(int(size[1])))
            words = [
                str(program),
                str(folder / "model.weights"),
                str(folder / "in"),
                str(folder / "out"),
            ]
            done = subprocess.run(
                [*before, "-plugin", str(plugin), *words],
                capture_output=True,
                text=True,
                check=True,
            )
            totals.append(int(done.stderr.split("instructions ")[1]))
    return totals[1] - totals[0]


if __name__ == "__main__":
    sys.exit(main())
