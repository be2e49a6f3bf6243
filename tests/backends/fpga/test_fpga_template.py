"""Programs for a range of lengths: patched, they are what is compiled for each length by itself."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import netlathe
from benchmarks.bench_fpga import LLAMA, llama
from netlathe.backends.fpga import agreement, artifact, isa, launch, template
from netlathe.backends.fpga.backend import FpgaBackend
from netlathe.backends.fpga.choices import Choices
from netlathe.backends.fpga.model import Machine, Memory, cycles
from netlathe.backends.fpga.network import Network
from netlathe.backends.fpga.partition import OnCore
from netlathe.backends.fpga.spec import Spec
from netlathe.backends.fpga.template import Patch, Template
from netlathe.diagnostics import LowerError
from netlathe.execute import ort
from tests.backends.fpga.cases import in_four_bits

SPEC = Spec()
# Less fits at a time: tiles are smaller.
TIGHT = Spec(sum_rows=64, hidden_vectors=512)


class Net(nn.Module):
    """Two layers, a residual sum between them, and a wide one whose sums leave the core."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 40)
        self.third, self.last = nn.Linear(40, 72), nn.Linear(72, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, 24] to [batch, tokens, 20]."""
        x = self.first(x).relu()
        x = x + self.second(x)
        return self.last(self.third(x).relu())


@pytest.fixture(scope="module")
def compiled() -> netlathe.Compiled:
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    captured = netlathe.capture(
        Net().eval(), args=(torch.randn(2, 7, 24),), dynamic={"x": {0: "batch", 1: "tokens"}}
    )
    data = [{"x": rng.standard_normal((2, 7, 24), np.float32)} for _ in range(4)]
    return netlathe.compile(captured, "quantize(activations='int8', min_size=0)", calibration=data)


def _template(
    compiled: netlathe.Compiled, spec: Spec, rows: int, *, int4: bool = False
) -> tuple[OnCore, Template]:
    model = in_four_bits(compiled.model) if int4 else compiled.model
    (part,) = (p for p in Network(model, spec).parts if isinstance(p, OnCore))
    (value,) = part.inputs
    return part, template.build(part, {value: 24}, rows, spec)


@pytest.mark.parametrize(
    ("spec", "high", "int4"),
    [(SPEC, 8, False), (SPEC, 50, False), (TIGHT, 24, False), (SPEC, 60, True)],
    ids=["one tile", "tiles", "small tiles", "pairs of int4"],
)
def test_every_length_is_what_is_compiled_for_it(
    compiled: netlathe.Compiled, spec: Spec, high: int, int4: bool
) -> None:
    part, made = _template(compiled, spec, high, int4=int4)
    assert any(one.paired for one in made.longest.builder.reports) == int4
    assert made.low <= high - 5 and made.high == high
    (value,) = part.inputs
    rng = np.random.default_rng(2)
    for rows in range(made.low, made.high + 1):
        x = rng.integers(-128, 128, (rows, 24)).astype(np.int8)
        patched, own = made.launch(rows), launch.build(part, {value: (rows, 24)}, spec)
        got, expected = patched.run({value: x}), own.run({value: x})
        for output, array in expected.items():
            np.testing.assert_array_equal(got[output], array)
        assert len(patched.program) == len(made.longest.program)
        # Reports count what these instructions do, and macs are those of the length.
        ours, theirs = patched.builder.reports, own.builder.reports
        assert [one.macs for one in ours] == [one.macs for one in theirs]
        loads = [i for i in patched.program if i.unit == "load" and i["how"] != isa.FILL]
        assert sum(one.beats_in for one in ours) == sum(i["inner"] * i["outer"] for i in loads)


def test_patches_are_what_another_build_in_the_same_places_says(
    compiled: netlathe.Compiled,
) -> None:
    """Every length between the two that the slopes were taken from."""
    part, made = _template(compiled, SPEC, 50)
    (value,) = part.inputs
    choices = Choices()
    launch.build(part, {value: (50, 24)}, SPEC, choices)
    for rows in range(made.low, made.high):
        built = launch.build(part, {value: (rows, 24)}, SPEC, choices.again())
        for ours, theirs in zip(made.launch(rows).program, built.program, strict=True):
            names = isa.FIELDS[ours.unit]
            assert [ours[n] for n in names] == [theirs[n] for n in names]


@pytest.mark.parametrize("rows", [41, 46])
def test_a_patched_program_runs_on_the_core_itself(compiled: netlathe.Compiled, rows: int) -> None:
    part, made = _template(compiled, SPEC, 50)
    (value,) = part.inputs
    x = np.random.default_rng(3).integers(-128, 128, (rows, 24)).astype(np.int8)
    patched = made.launch(rows)
    memory = patched.memory.copy()
    patched.builder.put(memory, patched.inputs[value], x[None])
    ran = agreement.run(patched.program, memory, SPEC, Memory())
    expected = launch.build(part, {value: (rows, 24)}, SPEC).run({value: x})
    for output, image in patched.outputs.items():
        got = patched.builder.get_sums(ran.memory, image)
        np.testing.assert_array_equal(got, expected[output])
    # Tiles chosen for 50 rows may be a little worse for fewer, and never by much.
    own = cycles(launch.build(part, {value: (rows, 24)}, SPEC).program, SPEC, Memory())
    taken = cycles(patched.program, SPEC, Memory())
    assert max(t.done for t in taken) <= 1.1 * max(t.done for t in own)


def test_a_network_takes_templates_for_its_lengths(compiled: netlathe.Compiled) -> None:
    plain, shared = Network(compiled.model, SPEC), Network(compiled.model, SPEC, [50, 16])
    rng = np.random.default_rng(4)
    for shape in ((1, 1, 24), (2, 8, 24), (1, 17, 24), (3, 10, 24), (5, 10, 24), (1, 51, 24)):
        feeds = {"x": rng.standard_normal(shape, np.float32)}
        expected = ort.run(compiled.model, feeds)
        for network in (plain, shared):
            for name, array in network.run(feeds).items():
                np.testing.assert_array_equal(array, expected[name])
    (found,) = shared.templates.values()
    # 1 and 17 rows are fewer than the templates for 16 and 50 reach, 30 are fewer than that too.
    assert [one.high for one in found] == [16, 1, 50, 17, 30]
    assert found[0].low > 1 and 30 < found[2].low
    assert len(shared.launches) == 6 and not plain.templates


def test_bytes_of_instructions_are_saved(compiled: netlathe.Compiled) -> None:
    _, made = _template(compiled, SPEC, 8)
    assert made.low == 1
    assert made.bytes == 32 * len(made.longest.program) + 12 * len(made.patches)
    assert made.bytes_apart == 8 * 32 * len(made.longest.program) > 6 * made.bytes
    assert all(len(patch.encode()) == 12 for patch in made.patches)


def test_fields_that_grow_by_no_fixed_amount_are_refused() -> None:
    with pytest.raises(LowerError, match="from 3 to 10 in 2 rows, by no fixed amount"):
        template._slope(10, 3, 2)


def test_rows_beyond_a_template_are_refused(compiled: netlathe.Compiled) -> None:
    _, made = _template(compiled, SPEC, 50)
    for rows in (made.low - 1, 51):
        with pytest.raises(ValueError, match=f"{rows} rows; the template is for {made.low} to 50"):
            made.launch(rows)


def test_an_artifact_holds_templates_that_anyone_can_patch(
    compiled: netlathe.Compiled, tmp_path: Path
) -> None:
    """From the files alone: instructions, patches, memory, and the places that ``meta.json`` names."""
    target, *_ = FpgaBackend.targets()
    chosen = replace(target, settings={"host": "onnxruntime", "lengths": "8, 50"})
    made = FpgaBackend().compile(compiled.model, chosen)
    made.save(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["templates"]["lengths"] == [8, 50]
    shared, apart = (
        sum(getattr(one, name) for found in made.network.templates.values() for one in found)
        for name in ("bytes", "bytes_apart")
    )
    assert meta["templates"]["bytes"] == shared
    assert meta["templates"]["bytes_saved"] == apart - shared > 2 * shared
    (record,) = (one for one in meta["launches"] if one.get("rows", [0, 0])[1] == 50)
    stem = f"launch-{record['launch']}"
    raw = (tmp_path / f"{stem}.program").read_bytes()
    words = [int.from_bytes(raw[at : at + 32], "little") for at in range(0, len(raw), 32)]
    patches = [
        Patch(*fields)
        for fields in struct.iter_unpack("<IHHi", (tmp_path / f"{stem}.patches").read_bytes())
    ]
    rows = record["rows"][0]
    template.patch(words, patches, rows - 50)
    memory = np.frombuffer((tmp_path / f"{stem}.memory").read_bytes(), np.uint8).copy()
    x = np.random.default_rng(5).integers(-128, 128, (rows, 24)).astype(np.int8)
    (place,), (result,) = record["inputs"], record["outputs"]
    memory[place["byte"] : place["byte"] + x.size] = x.reshape(-1).view(np.uint8)
    Machine(SPEC, memory).run([isa.decode(word) for word in words])
    sums = memory[result["byte"] :][: rows * result["vectors"] * 8].reshape(rows, -1, 4, 8)
    got = np.ascontiguousarray(sums.swapaxes(-1, -2)).view("<i4").reshape(rows, -1)[:, :20]
    part, _ = _template(compiled, SPEC, 50)
    expected = launch.build(part, {part.inputs[0]: (rows, 24)}, SPEC).run({part.inputs[0]: x})
    np.testing.assert_array_equal(got[None], next(iter(expected.values())))
    loaded = artifact.load(tmp_path)
    feeds = {"x": np.random.default_rng(6).standard_normal((1, 45, 24), np.float32)}
    for name, array in ort.run(compiled.model, feeds).items():
        np.testing.assert_array_equal(loaded.run(feeds)[name], array)
    assert loaded.network.templates


@pytest.mark.slow
def test_a_llama_takes_prompts_of_any_length_by_templates(tmp_path: Path) -> None:
    settings = {**LLAMA, "num_hidden_layers": 2, "vocab_size": 512}
    case = llama(tmp_path, settings)
    captured = netlathe.capture(case.model, cache=True)
    passes = "fold_norms, quantize(activations='int8', min_size=0)"
    compiled = netlathe.compile(captured, passes, calibration=[case.data])
    plain, shared = (Network(compiled.model, SPEC, lengths) for lengths in ((), (1, 16, 32, 64)))
    rng = np.random.default_rng(7)
    for tokens, past in ((1, 9), (7, 0), (16, 0), (23, 5), (32, 0), (50, 0)):
        feeds = dict(case.feeds["prefill"])
        feeds["input_ids"] = rng.integers(3, 512, (1, tokens))
        feeds["attention_mask"] = np.ones((1, tokens + past), np.int64)
        for name in feeds:
            if name.startswith("past"):
                feeds[name] = rng.standard_normal((1, 2, past, 64), np.float32)
        expected = ort.run(compiled.model, feeds)
        for network in (plain, shared):
            got = network.run(feeds)
            for name, array in expected.items():
                np.testing.assert_array_equal(got[name], array)
    shared.prepare()
    templates = [one for found in shared.templates.values() for one in found]
    assert sum(one.bytes_apart for one in templates) > 15 * sum(one.bytes for one in templates)
    assert all(one.own for one in plain.launches.values())
    assert not any(one.own for one in shared.launches.values())
