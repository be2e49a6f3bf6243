"""The core itself: bit for bit and cycle for cycle what the instruction set's model says."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from amaranth.hdl import Elaboratable, Module, Mux, Signal
from amaranth.lib.memory import Memory as memory_of_amaranth

from netlathe.backends.fpga import isa, simulate
from netlathe.backends.fpga.core import parts
from netlathe.backends.fpga.core.top import Core
from netlathe.backends.fpga.isa import Instruction
from netlathe.backends.fpga.layers import Builder
from netlathe.backends.fpga.model import Machine, Memory, cycles
from netlathe.backends.fpga.program import link
from netlathe.backends.fpga.spec import PATTERNS, Spec
from netlathe.backends.fpga.tensors import Scale
from tests.backends.fpga.cases import LAYERS, SAME, Built, Layer, build, pairs_wherever_they_can

SMALL = Spec()
WIDE = Spec(rows=16, columns=8, patterns=("2:4", "4:8", "1:4"), weight_rows=256)
LONG = Spec(rows=16, columns=16, beat_bytes=16, patterns=("4:8",), weight_rows=256)
MEMORIES = [Memory(), Memory(40, (1, 3), (2, 3))]


def _same(built: Built, spec: Spec, memory: Memory) -> None:
    """Values, and when what happens at the ports happens."""
    run = simulate.run(built.program, built.memory, spec, memory)
    expected = built.memory.copy()
    Machine(spec, expected).run(built.program)
    np.testing.assert_array_equal(built.got(expected), built.expected)
    np.testing.assert_array_equal(run.memory, expected)
    times = cycles(built.program, spec, memory)
    asked, sent = iter(run.asked), iter(run.sent)
    for step, time in zip(built.program, times, strict=True):
        if step.unit == "load" and step["how"] != 2:
            last = [next(asked) for _ in range(step["inner"] * step["outer"])][-1]
            assert last == time.done - memory.latency
        elif step.unit == "store":
            beats = step["group"] * step["n0"] * step["n1"] * spec.vector_beats
            assert [next(sent) for _ in range(beats)][-1] == time.done
    assert next(asked, None) is None and next(sent, None) is None


@pytest.mark.parametrize("memory", MEMORIES, ids=["fast", "slow"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_core_is_its_model(name: str, memory: Memory) -> None:
    _same(build(LAYERS[name], SMALL, seed=1), SMALL, memory)


@pytest.mark.parametrize("memory", MEMORIES, ids=["fast", "slow"])
def test_sums_of_a_single_row_are_written_before_they_are_read(memory: Memory) -> None:
    """Three terms of one vector: each instruction goes on with what the one before is about to write."""
    rng, builder = np.random.default_rng(3), Builder(SMALL)
    images = [builder.image(1, 1, 8) for _ in range(3)]
    one = np.array(1)
    scale = Scale(0 * one, one << 15, 20 * one, 0)
    factors = [int(n) for n in rng.integers(1, 30, 3)]
    output = builder.add("add", list(zip(images, factors, strict=True)), scale)
    held, total = builder.memory(), np.zeros(8, np.int64)
    for image, factor in zip(images, factors, strict=True):
        values = rng.integers(-128, 128, (1, 1, 8)).astype(np.int8)
        builder.put(held, image, values)
        total += factor * values[0, 0].astype(np.int64)
    expected = (total + 16 >> 5)[None, None]
    _same(Built(builder, link(builder.steps), held, output, expected), SMALL, memory)


def test_every_pair_of_weights_times_every_activation() -> None:
    """All 65,536 triples, one in a sum: what a multiplier and a sum of four make of both halves."""
    pairs = np.arange(256, dtype=np.uint8).view(np.int8)
    weights = np.zeros((512, 72, 1, 1), np.int8)
    columns = weights.reshape(-1, 2, 8, 72)  # tiles of two vectors
    columns[:, 0, :, 0] = ((pairs << 4) >> 4).reshape(-1, 8)
    columns[:, 1, :, 0] = (pairs >> 4).reshape(-1, 8)
    x = np.zeros((1, 256, 72), np.int8)
    x[0, :, 0] = np.arange(-128, 128)
    _sums_by_pairs(weights, x)


def test_the_largest_sums_of_pairs() -> None:
    """Sums of four at both of their ends, in the low half, in the high one and in both."""
    low, high = np.meshgrid([-8, 7, 0, -1], [-8, 7, 0, -1])
    weights = np.zeros((32, 72, 1, 1), np.int8)
    columns = weights.reshape(2, 2, 8, 72)
    columns[:, 0] = low.reshape(2, 8, 1)
    columns[:, 1] = high.reshape(2, 8, 1)
    x = np.repeat(np.array([-128, 127, 0, 1], np.int8), 8)[None, :, None].repeat(72, 2)
    _sums_by_pairs(weights, np.ascontiguousarray(x))


def _sums_by_pairs(weights: np.ndarray, x: np.ndarray) -> None:
    """32-bit sums on the core, against a product of integers."""
    out, channels = weights.shape[:2]
    ones, builder = np.ones(out, np.int64), Builder(SMALL)
    image = builder.image(1, x.shape[1], channels)
    scale = Scale(0 * ones, ones, ones)
    with pairs_wherever_they_can():
        y = builder.product("layer", image, weights, scale, nibbles=True, raw=True)
    assert builder.reports[-1].paired
    held = builder.memory()
    builder.put(held, image, x)
    expected = x.astype(np.int64) @ weights[:, :, 0, 0].astype(np.int64).T
    _same(Built(builder, link(builder.steps), held, y, expected), SMALL, Memory())


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "kind", "share"),
    [
        (128, 256, 128, "int8", 1),
        (128, 256, 128, "int4", 2),
        (128, 256, 128, "2:4", 2),
        (1, 2048, 256, "int8", 0),
        (1, 2048, 256, "int4", 0),
    ],
)
def test_the_core_reaches_nine_tenths_of_its_limit(
    tokens: int, inputs: int, outputs: int, kind: str, share: int
) -> None:
    """Of ``share`` x rows x columns products a cycle, or (0) of the beats that weights take."""
    ones, builder = np.ones(outputs, np.int64), Builder(SMALL)
    x = builder.image(1, tokens, inputs)
    weights = np.zeros((outputs, inputs, 1, 1), np.int8)
    y = builder.product(
        "layer", x, weights, Scale(0 * ones, ones << 15, 20 * ones), nibbles=kind == "int4",
        pattern=PATTERNS[kind] if kind in PATTERNS else None,
    )  # fmt: skip
    held = builder.memory()
    run = simulate.run(link(builder.steps), held, SMALL)
    assert (builder.get(run.memory, y) == 0).all()
    taken = int(run.sent[-1])
    if share:
        assert tokens * inputs * outputs / taken >= 0.9 * share * SMALL.rows * SMALL.columns
    else:
        beats = outputs * inputs // (16 if kind == "int4" else 8)
        assert beats / taken >= 0.9


@pytest.mark.parametrize("channels", [4112, 4400])
def test_pairs_of_a_single_row_go_on_in_parts(channels: int) -> None:
    """Both sums are read a few cycles after they are written; the last part has two steps, or more."""
    with pairs_wherever_they_can():
        built = build(Layer((1, 1), channels, 48, nibbles=True, raw=True), SMALL, seed=1)
    parts_of = [i for i in built.program if i.unit == "compute"]
    assert sum(i["accumulate"] for i in parts_of) == len(parts_of) // 2
    assert all(i["what"] == isa.PAIRS for i in parts_of)
    _same(built, SMALL, Memory())


class Torn(Elaboratable):
    """A memory that gives what is read in the cycle of its writing with all bits turned round."""

    def __init__(self, **settings: Any) -> None:
        self.memory: Any = memory_of_amaranth(**settings)
        self.ports: list[tuple[Any, Signal]] = []

    def write_port(self) -> Any:
        self.write: Any = self.memory.write_port()
        return self.write

    def read_port(self, *, domain: str = "sync") -> Any:
        port = self.memory.read_port(domain=domain)
        if domain == "comb":  # of a queue: read as it is written, or not yet
            return port
        data = Signal.like(port.data)
        self.ports.append((port, data))
        return SimpleNamespace(addr=port.addr, en=port.en, data=data)

    def elaborate(self, platform: object) -> Module:
        m: Any = Module()
        m.submodules.memory = self.memory
        for port, data in self.ports:
            torn = Signal()
            with m.If(port.en):
                m.d.sync += torn.eq(self.write.en & (self.write.addr == port.addr))
            m.d.comb += data.eq(Mux(torn, ~port.data, port.data))
        return m


@pytest.mark.slow
def test_nothing_is_read_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Block RAMs leave open what that gives, and synthesis is told so: here it gives what is wrong."""
    monkeypatch.setattr(parts, "Memory", Torn)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # this core is kept nowhere
    for layer in LAYERS.values():
        for memory in MEMORIES:
            _same(build(layer, SMALL, seed=2), SMALL, memory)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_a_core_without_pairs_is_its_model(name: str) -> None:
    spec = replace(SMALL, pairs=False)
    built = build(LAYERS[name], spec, seed=3)
    assert not any(report.paired for report in built.builder.reports)
    _same(built, spec, MEMORIES[0])


@pytest.mark.slow
@pytest.mark.parametrize("spec", [WIDE, LONG], ids=["16x8", "16x16"])
@pytest.mark.parametrize("seed", range(30))
def test_other_cores_are_their_models(seed: int, spec: Spec) -> None:
    rng = np.random.default_rng(seed)
    names = [str(p) for p in spec.kept]
    layer = Layer(
        (int(rng.integers(3, 12)), int(rng.integers(3, 12))),
        int(rng.integers(1, 90)),
        int(rng.integers(1, 60)),
        SAME,
        pattern=str(rng.choice(["", *names])),
        nibbles=bool(rng.integers(2)),
        table=bool(rng.integers(2)),
    )
    with pairs_wherever_they_can():
        built = build(layer, spec, seed)
    _same(built, spec, MEMORIES[seed % 2])


@pytest.mark.parametrize("seed", [1, 2])
def test_a_memory_that_hesitates_changes_nothing(seed: int) -> None:
    built = build(LAYERS["2:4, ragged"], SMALL, seed)
    run = simulate.run(built.program, built.memory, SMALL, seed=seed)
    np.testing.assert_array_equal(built.got(run.memory), built.expected)


def test_tokens_are_needed() -> None:
    """Without them units overtake each other: the comparison would notice a core that ignores them."""
    built = build(LAYERS["tokens"], SMALL, seed=1)
    loose = [Instruction(i.unit, i.fields) for i in built.program]
    run = simulate.run(loose, built.memory, SMALL)
    assert (built.got(run.memory) != built.expected).any()


def test_a_program_that_waits_for_ever_is_an_error() -> None:
    from netlathe.diagnostics import LowerError

    stuck = [Instruction("store", {"group": 1, "n0": 1, "n1": 1}, pops={"requantize"})]
    with pytest.raises(LowerError, match="not done within the limit of cycles"):
        simulate.run(stuck, np.zeros(64, np.uint8), SMALL, limit=1000)


@pytest.mark.parametrize("named", ["", "no-such-compiler"])
def test_a_missing_compiler_is_an_error(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from netlathe.diagnostics import LowerError

    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", named)
    else:
        monkeypatch.setenv("PATH", "")
    with pytest.raises(LowerError, match=r"no C\+\+ compiler is found"):
        simulate.executable(SMALL)


@pytest.mark.parametrize("pairs", [False, True], ids=["int8", "int4 by pairs"])
def test_amaranth_s_own_simulator_agrees(pairs: bool) -> None:
    """Another simulator than Verilator, on the smallest core and a layer of a few hundred cycles."""
    from amaranth.sim import Simulator

    spec = Spec(
        patterns=(), input_vectors=64, hidden_vectors=8, weight_rows=16, sum_rows=16,
        output_vectors=16, parameter_words=32, table_entries=512,
    )  # fmt: skip
    with pairs_wherever_they_can():
        built = build(Layer((1, 5), 24, 8 + 8 * pairs, nibbles=pairs), spec, seed=4)
    assert built.builder.reports[-1].paired == pairs
    core = Core(spec)
    memory = built.memory.view("<u8").copy()
    ports: Any = core  # made at run time

    async def bench(ctx: Any) -> None:
        words = [i.encode() for i in built.program]
        coming: list[int] = []
        ctx.set(ports.read_ready, 1)
        ctx.set(ports.write_ready, 1)
        for _ in range(2000):
            ctx.set(ports.instruction_valid, bool(words))
            ctx.set(ports.instruction, words[0] if words else 0)
            ctx.set(ports.beat_valid, bool(coming))
            ctx.set(ports.beat, int(memory[coming[0]]) if coming else 0)
            taken = bool(words) and ctx.get(ports.instruction_ready)
            eaten = bool(coming) and ctx.get(ports.beat_ready)
            asked = ctx.get(ports.read_address) if ctx.get(ports.read_valid) else None
            if ctx.get(ports.write_valid):
                memory[ctx.get(ports.write_address)] = ctx.get(ports.write_beat)
            if ctx.get(ports.idle) and not words and not coming:
                return
            await ctx.tick()
            if taken:
                words.pop(0)
            if eaten:
                coming.pop(0)
            if asked is not None:
                coming.append(asked)
        raise AssertionError("not done")

    simulator = Simulator(core)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.run()
    np.testing.assert_array_equal(built.got(memory.view(np.uint8)), built.expected)


@pytest.mark.slow
def test_waves_are_written(tmp_path: Path) -> None:
    built = build(LAYERS["one token"], SMALL, seed=1)
    run = simulate.run(built.program, built.memory, SMALL, waves=tmp_path / "waves.vcd")
    np.testing.assert_array_equal(built.got(run.memory), built.expected)
    head = (tmp_path / "waves.vcd").read_text()[:100_000]
    assert re.search(r"\$var wire +1 \S+ instruction_valid \$end", head)
