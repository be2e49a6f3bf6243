"""Any order of passes works and equals its references, or is refused with the reason before anything runs."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import netlathe
from netlathe.diagnostics import OptionError
from netlathe.pipeline import order, run, text
from netlathe.pipeline.interfaces import Captured
from netlathe.pipeline.pass_ import Context, Lossy, Pass
from netlathe.pipeline.step import Step
from netlathe.testing import from_text

LAYERS, WIDTH, HIDDEN, WORDS = 5, 16, 32, 24
PASSES = {
    "prune": "prune(scope=('ffn', 'heads'), ratio=0.25, round_to=2)",
    "hidden": "prune(scope='hidden', ratio=0.25, round_to=2)",
    "slice": "fold_norms(untie=True), slice(ratio=0.25, round_to=4)",
    "adapters": "fold_norms(untie=True), slice(ratio=0.25, round_to=4, adapters=True)",
    "drop": "drop(kind='ffn', score='kl')",
    "tie": "tie_blocks(kind='attention', score='kl')",
    "quantize": "quantize(min_size=0)",
    "gptq": "quantize(min_size=0, weights='int4', solver='gptq')",
    "integers": "quantize(min_size=0, activations='int8')",
}
# What cannot follow what, and why. Everything else has to work.
REFUSED = {
    ("quantize", "prune"): "weights are codes by then",
    ("quantize", "hidden"): "weights are codes by then",
    ("quantize", "slice"): "weights are codes by then, which take in no basis",
    ("quantize", "adapters"): "weights are codes by then, which take in no basis",
    ("quantize", "tie"): "weights are codes by then",
    ("adapters", "drop"): "a skip is a matrix by then, so no branch can be left out",
    ("adapters", "slice"): "every block has a basis of its own by then",
    ("adapters", "adapters"): "every block has a basis of its own by then",
    ("tie", "slice"): "norms would be folded into a copy of the shared weights",
    ("tie", "adapters"): "norms would be folded into a copy of the shared weights",
}
SOME = ("prune", "hidden", "slice", "adapters", "drop", "tie", "quantize")
QUICK = (
    ("slice", "drop"), ("hidden", "slice"), ("tie", "prune"), ("tie", "gptq"), ("adapters", "tie"),
    ("quantize", "drop"),
)  # fmt: skip


@lru_cache(maxsize=1)
def decoder() -> Captured:
    """A language model of some layers of attention and FFN with RMSNormalization and a gate."""
    rng = np.random.default_rng(11)
    held: dict[str, Any] = {"embed": rng.standard_normal((WORDS, WIDTH)).astype(np.float32)}

    def weight(name: str, *shape: int) -> str:
        drawn = rng.standard_normal(shape) * shape[0] ** -0.5
        held[name] = (drawn if len(shape) > 1 else 1 + 0.2 * drawn).astype(np.float32)
        return f'"{name}"'

    def product(i: int, part: str, a: str, y: str, *shape: int) -> str:
        name = f"layers.{i}.{part}"
        matrix = weight(f"{name}.weight", *shape)
        return f'["/{name.replace(".", "/")}/MatMul"] {y} = MatMul({a}, {matrix})'

    def norm(i: int, part: str, a: str, y: str) -> str:
        scale = weight(f"layers.{i}.{part}.weight", WIDTH)
        return f'["/layers/{i}/{part}/Norm"] {y} = RMSNormalization<axis = -1>({a}, {scale})'

    body = ['["/embed/Gather"] h0 = Gather(embed, ids)']
    for i in range(LAYERS):
        d = (WIDTH, WIDTH)
        body += [
            norm(i, "first", f"h{i}", f"n{i}"),
            *(product(i, f"attention.{p}", f"n{i}", f"{p}{i}", *d) for p in "qkv"),
            f'["/layers/{i}/attention/Attention"] a{i} = Attention<q_num_heads = 4, kv_num_heads = 4,'
            f" is_causal = 1>(q{i}, k{i}, v{i})",
            product(i, "attention.o", f"a{i}", f"o{i}", *d),
            f'["/layers/{i}/Add"] m{i} = Add(h{i}, o{i})',
            norm(i, "second", f"m{i}", f"f{i}"),
            product(i, "ffn.gate", f"f{i}", f"g{i}", WIDTH, HIDDEN),
            product(i, "ffn.up", f"f{i}", f"u{i}", WIDTH, HIDDEN),
            f'["/layers/{i}/ffn/Swish"] s{i} = Swish(g{i}) ["/layers/{i}/ffn/Mul"] p{i} = Mul(s{i}, u{i})',
            product(i, "ffn.down", f"p{i}", f"d{i}", HIDDEN, WIDTH),
            f'["/layers/{i}/Add_1"] h{i + 1} = Add(m{i}, d{i})',
        ]
    scale = weight("norm.weight", WIDTH)
    body += [
        f'["/norm/Norm"] last = RMSNormalization<axis = -1>(h{LAYERS}, {scale})',
        f'["/head/MatMul"] logits = MatMul(last, {weight("head.weight", WIDTH, WORDS)})',
    ]
    head = f"(int64[batch, sequence] ids) => (float[batch, sequence, {WORDS}] logits)"
    return from_text("decoder", f"{head} {{ {' '.join(body)} }}", held)


def calibrated() -> Context:
    captured = decoder()
    sizes = {"batch": 4, "sequence": 9}
    return Context([dict(captured.sample(sizes, seed)) for seed in (101, 102)])


class Watching:
    """Notes which passes have started."""

    def __init__(self) -> None:
        self.begun: list[Pass] = []

    def started(self, pass_: Pass) -> None:
        """It begins."""
        self.begun.append(pass_)

    def finished(self, step: Step) -> None:
        """It has ended."""


def plain(name: str) -> str:
    """All quantization is one to those that cannot follow it."""
    return "quantize" if name in ("gptq", "integers") else name


def expected(names: tuple[str, ...]) -> list[str]:
    """Why an order is refused, every pair by itself; nothing where it works."""
    pairs = itertools.combinations([plain(name) for name in names], 2)
    return [REFUSED[pair] for pair in pairs if pair in REFUSED]


def hold(names: tuple[str, ...]) -> None:
    """The order works, every step changes the model and equals its reference; or it is refused at once."""
    passes = text.parse(", ".join(PASSES[name] for name in names))
    wanted = expected(names)
    if wanted:
        watching = Watching()
        with pytest.raises(OptionError) as caught:
            run.run(decoder(), passes, calibrated(), observer=watching)
        assert watching.begun == []
        told = [d.message for d in caught.value.diagnostics]
        assert len(told) == len(wanted), told
        assert all(any(reason in message for message in told) for reason in wanted), told
        assert all(d.code == "pipeline.order" and d.help for d in caught.value.diagnostics)
        return
    compiled = run.run(decoder(), passes, calibrated())
    for at, step in enumerate(compiled.steps):
        if not isinstance(step.pass_.exactness, Lossy):
            continue
        if step.pass_.name == "quantize" and any(
            earlier.pass_.name == "quantize" for earlier in compiled.steps[:at]
        ):  # all there is to quantize is quantized
            assert not step.changed
            assert all(
                (e.status != "applied" and "quantized already" in e.reason) or e.status == "skipped"
                for e in step.entries
            )
            continue
        assert step.changed, (names, [entry.reason for entry in step.entries])
        assert step.check.against == "simulated reference" and step.check.error is not None


@pytest.mark.parametrize("names", QUICK, ids="-".join)
def test_pairs(names: tuple[str, ...]) -> None:
    hold(names)


@pytest.mark.parametrize("pair", REFUSED, ids="-".join)
def test_what_cannot_follow_is_refused_in_the_plan(pair: tuple[str, str]) -> None:
    passes = ", ".join(PASSES[name] for name in pair)
    with pytest.raises(OptionError, match="cannot come behind"):
        netlathe.plan("no such model", passes)  # before a capture
    hold(pair)


@pytest.mark.slow
@pytest.mark.parametrize("names", list(itertools.product(PASSES, repeat=2)), ids="-".join)
def test_every_pair(names: tuple[str, ...]) -> None:
    hold(names)


@pytest.mark.slow
@pytest.mark.parametrize("names", list(itertools.product(SOME, repeat=3)), ids="-".join)
def test_every_triple(names: tuple[str, ...]) -> None:
    hold(names)


def test_folded_norms_let_tied_blocks_be_sliced() -> None:
    """The way that the refusal of slicing behind tying points to: shared weights turn once."""
    passes = f"fold_norms(untie=True), {PASSES['tie']}, slice(ratio=0.25, round_to=4)"
    compiled = run.run(decoder(), text.parse(passes), calibrated())
    assert [step.changed for step in compiled.steps] == [True, True, True]
    tied = [name for name in compiled.model.graph.initializers if "attention" in name]
    assert len(tied) == 4 * (LAYERS - 1)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        order.check(text.parse("quantize, prune(ratio=0.1), drop, slice"))
    assert [d.message.split(":")[0] for d in caught.value.diagnostics] == [
        "prune(ratio=0.1) cannot come behind quantize",
        "slice cannot come behind quantize",
    ]
    assert caught.value.diagnostics[0].help == "put prune in front of quantize"
