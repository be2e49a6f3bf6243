"""Any order of passes works and equals its references, or is refused with the reason before anything runs."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import netlathe
from netlathe.diagnostics import OptionError
from netlathe.pipeline import precheck, run, text
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
    "rotate": "fold_norms(untie=True), rotate",
    "online": "fold_norms(untie=True), rotate(online=True)",
    "equalize": "equalize",
    "sparsify": "sparsify(min_size=0)",
    "convert": "convert",
    "quantize": "quantize(min_size=0)",
    "gptq": "quantize(min_size=0, weights='int4', solver='gptq')",
    "integers": "quantize(min_size=0, activations='int8')",
    "cache": "quantize_cache",
}
CODES = "weights are codes by then"
FOLDED = f"{CODES}, which take in no scale"  # fold_norms stands in front of others
FILLED = "weights that write to a LayerNormalization's stream fills zeros"
TURNED = "zeros of weights would be turned into other numbers"
BASES = "every block has a basis of its own by then"
COPIED = "norms would be folded into a copy of the shared weights"
# What cannot follow what, and why. Everything else has to work.
REFUSED = {
    ("quantize", "prune"): (CODES,),
    ("quantize", "hidden"): (CODES,),
    ("quantize", "slice"): (FOLDED, f"{CODES}, which take in no basis"),
    ("quantize", "adapters"): (FOLDED, f"{CODES}, which take in no basis"),
    ("quantize", "tie"): (CODES,),
    ("quantize", "rotate"): (FOLDED, CODES),
    ("quantize", "equalize"): (CODES,),
    ("quantize", "sparsify"): (CODES,),
    ("cache", "prune"): ("what the cache holds shares scales by then with what would go",),
    ("cache", "rotate"): ("what the cache holds would round to other codes",),
    ("cache", "equalize"): ("what the cache holds would round to other codes",),
    ("convert", "integers"): ("sums of integers are scaled in float32",),
    ("convert", "cache"): ("casts stand in front of the cache by then",),
    ("sparsify", "slice"): (FILLED, TURNED),
    ("sparsify", "adapters"): (FILLED, TURNED),
    ("sparsify", "rotate"): (FILLED, TURNED),
    ("adapters", "drop"): ("a skip is a matrix by then, so no branch can be left out",),
    ("adapters", "slice"): (BASES,),
    ("adapters", "adapters"): (BASES,),
    ("tie", "slice"): (COPIED,),
    ("tie", "adapters"): (COPIED,),
    ("tie", "rotate"): (COPIED,),
}
DONE_ONCE = {"quantize", "quantize_cache", "sparsify", "convert"}
SOME = ("prune", "hidden", "slice", "adapters", "drop", "tie", "quantize")
QUICK = (
    ("slice", "drop"), ("hidden", "slice"), ("tie", "prune"), ("tie", "gptq"), ("adapters", "tie"),
    ("quantize", "drop"), ("sparsify", "quantize"), ("rotate", "quantize"), ("equalize", "slice"),
    ("sparsify", "prune"), ("cache", "drop"), ("rotate", "cache"), ("prune", "cache"),
)  # fmt: skip


@lru_cache(maxsize=2)
def decoder(cache: bool = False) -> Captured:
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
            *(f"{p}n{i} = Concat<axis = 1>({p}p{i}, {p}{i})" for p in "kv" if cache),
            f'["/layers/{i}/attention/Attention"] a{i} = Attention<q_num_heads = 4, kv_num_heads = 4'
            + (f">(q{i}, kn{i}, vn{i})" if cache else f", is_causal = 1>(q{i}, k{i}, v{i})"),
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
    held_back = [f"{p}{{}}{i}" for i in range(LAYERS) for p in "kv" if cache]
    past = "".join(f", float[batch, past, {WIDTH}] {name.format('p')}" for name in held_back)
    present = "".join(f", float[batch, total, {WIDTH}] {name.format('n')}" for name in held_back)
    head = (
        f"(int64[batch, sequence] ids{past}) => (float[batch, sequence, {WORDS}] logits{present})"
    )
    return from_text("decoder", f"{head} {{ {' '.join(body)} }}", held)


def calibrated(captured: Captured) -> Context:
    """Some data."""
    sizes = {**captured.dynamic, "batch": 4, "sequence": 9}
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
    """Kinds of one pass, which are alike in what they can follow and what can follow them."""
    return {"gptq": "quantize", "integers": "quantize", "online": "rotate"}.get(name, name)


def expected(names: tuple[str, ...]) -> list[str]:
    """Why an order is refused, every pair by itself; nothing where it works."""
    found: list[str] = []
    for one, other in itertools.combinations(names, 2):
        found += REFUSED.get((one, other)) or REFUSED.get((plain(one), plain(other)), ())
    return found


def hold(names: tuple[str, ...]) -> None:
    """The order works, every step changes the model and equals its reference; or it is refused at once."""
    passes = text.parse(", ".join(PASSES[name] for name in names))
    captured = decoder("cache" in names)
    wanted = expected(names)
    if wanted:
        watching = Watching()
        with pytest.raises(OptionError) as caught:
            run.run(captured, passes, calibrated(captured), observer=watching)
        assert watching.begun == []
        told = [d.message for d in caught.value.diagnostics]
        assert len(told) == len(wanted), told
        assert all(any(reason in message for message in told) for reason in wanted), told
        assert all(d.code == "pipeline.order" and d.help for d in caught.value.diagnostics)
        return
    compiled = run.run(captured, passes, calibrated(captured))
    before: set[str] = set()
    for step in compiled.steps:
        name = step.pass_.name
        if name in before & DONE_ONCE:  # all that it could do is done
            assert not step.changed and {e.status for e in step.entries} <= {"refused", "skipped"}
        elif name != "fold_norms":
            assert step.changed, (names, [entry.reason for entry in step.entries])
            lossy = isinstance(step.pass_.exactness, Lossy)
            assert step.check.against == ("simulated reference" if lossy else "input model")
            assert step.check.error is not None
        before.add(name)


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
    compiled = run.run(decoder(), text.parse(passes), calibrated(decoder()))
    assert [step.changed for step in compiled.steps] == [True, True, True]
    tied = [name for name in compiled.model.graph.initializers if "attention" in name]
    assert len(tied) == 4 * (LAYERS - 1)


def test_factors_of_a_batch_norm_are_folded_before_weights_are_codes() -> None:
    with pytest.raises(OptionError, match=f"fold_batch_norm cannot come behind quantize: {CODES}"):
        precheck.check(text.parse("quantize, cleanup, fold_batch_norm"), data=True)


# What runs calibration data, and beside it the same pass that does not.
DATA = (
    ("drop", 'drop(score="uniform"), drop(count=0)'),
    ("tie_blocks", "tie_blocks(count=0)"),
    ("equalize", 'equalize(method="range")'),
    ('rotate(basis="pca")', "rotate"),
    ("slice", 'slice(ratio=0, basis="hadamard")'),
    ('sparsify(score="wanda")', "sparsify"),
    ("sparsify(refine=True)", "sparsify"),
    ("sparsify(sweeps=1)", "sparsify"),
    ('prune(ratio=0.1, score="wanda")', 'prune(ratio=0.1, score="l1")'),
    ('prune(ratio=0.1, allocation="cfsp")', 'prune(ratio=0.1, allocation="global")'),
    ('prune(ratio=0.1, compensate="bias")', "prune(ratio=0.1)"),
    ('quantize(solver="gptq")', "quantize"),
    ('quantize(low_rank=2, low_rank_basis="input")', "quantize(low_rank=2)"),
    ('quantize(bits=6, formats=("int4", "int8"))', 'quantize(bits=6, sensitivity="zd")'),
    ("quantize(correct_bias=True)", "quantize"),
    ('quantize(activations="int8")', 'quantize(activations="int8", activation_scales="token")'),
)


@pytest.mark.parametrize(("hungry", "sated"), DATA)
def test_what_needs_data_is_refused_in_the_plan_without(hungry: str, sated: str) -> None:
    with pytest.raises(OptionError, match="needs calibration data for") as caught:
        netlathe.plan("no such model", f"cleanup, {hungry}")  # before a capture
    (problem,) = caught.value.diagnostics
    assert problem.code == "calibration.missing" and "--calibration" in problem.help
    precheck.check(text.parse(hungry), data=True)
    precheck.check(text.parse(sated), data=False)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(OptionError) as caught:
        precheck.check(text.parse("quantize, prune(ratio=0.1), drop, slice"), data=True)
    assert [d.message.split(":")[0] for d in caught.value.diagnostics] == [
        "prune(ratio=0.1) cannot come behind quantize",
        "slice cannot come behind quantize",
    ]
    assert caught.value.diagnostics[0].help == "put prune in front of quantize"
