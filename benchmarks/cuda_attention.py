"""Attention of the CUDA backend on a GPU: correctness on ragged sizes, speed against torch and a copy.

    python benchmarks/cuda_attention.py build DIR      # where nvcc and NetLathe are; no GPU needed
    python DIR/cuda_attention.py check DIR             # where the GPU is; torch, tvm_ffi and TVM's runtime
    python DIR/cuda_attention.py speed DIR

``check`` compares with float64, as ||out - reference|| / ||reference||, on fresh random data. ``speed`` times
causal prefill in turn with torch's scaled_dot_product_attention, its own choice and each of its kernels, by
CUDA events; and decoding in a CUDA graph that walks over caches which no level-2 cache holds: its share is
of what copying a gigabyte moves, counted in bytes of keys, values, scales and zero points. That is by calls
of one Attention, and by a call of sixteen in a row ("layers"), one's result being the query of the next.
Times of decoding are medians of seven times ten replays: the host's time to launch the first is not counted
to it alone. ``check`` also decodes tokens into caches in place ("placed"), whose new rows come from the
kernel in front, from calls before and from kernels of torch's. ``--only`` takes the rows whose name contains
a text; ``--small`` the smallest sizes of each alone, for memory checkers.

Of nodes with a bias, a mask or a cap, and of heads of other sizes (FORMS), ``speed`` shows microseconds, and
those of torch's scaled_dot_product_attention with the same mask, replayed in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench_cuda import INSIDE, ROUNDS, Bench

HEADS, KV_HEADS = 32, 8
OTHERS = {"step": 32, "shared": 4}  # heads of keys, where there are others
FORMATS = [("bf16", 64), ("bf16", 96), ("bf16", 128), ("f16", 64), ("f16", 128)]
NAMES = {"bf16": "bfloat16", "f16": "float16"}
BOUND = {"bf16": 4e-3, "f16": 5e-4}  # a rounded result is off by 1.7e-3 or 2.1e-4, weights likewise
# Many queries read codes as rounded halves. Those of 1, 2, 4 and 8 times a scale are off alike.
BOUND_CODES = {"bf16": 5.5e-3, "f16": 6.5e-4}
SHARED = 600_000_000  # bytes of caches that one graph reads

# batch, queries, past, keys there is room for
RAGGED = [(1, 1, 0, 1), (2, 1, 36, 40), (3, 5, 0, 7), (2, 3, 130, 160), (1, 16, 1000, 1024)]
RAGGED += [
    (2, 33, 0, 33),
    (1, 128, 0, 128),
    (2, 129, 0, 129),
    (1, 300, 77, 400),
    (2, 257, 511, 1000),
]
RAGGED += [(1, 1, 4999, 5000), (4, 2, 8190, 8192), (1, 1000, 0, 1000)]
PREFILL = (2048, 4096, 8192, 16384, 32768)
DECODE = [(1, 32768), (4, 32768), (16, 8192)]
# Of models of several; those that end in 8 or 4 read caches in int8 or int4.
NODES = {"layers": 16, "layers8": 16, "layers4": 16, "placed": 2, "placed8": 2, "placed4": 2}
# batch, queries, tokens there, room of caches that tokens are decoded into
PLACED = [(1, 1, 0, 8), (2, 1, 511, 1024), (1, 1, 4000, 4099), (3, 2, 130, 161), (2, 5, 1000, 1027)]
STEPS = 3  # of them
WARM = 10  # replays that are not timed


# -- building --------------------------------------------------------------------------------------

BODIES = {
    # key j of query i, where j <= i
    "causal": ("{t}[b,{h},s,{d}] q, {t}[b,{k},t,{d}] k, {t}[b,{k},t,{d}] v",
               "y = Attention <is_causal = 1> (q, k, v)"),
    "whole": ("{t}[b,{h},s,{d}] q, {t}[b,{k},t,{d}] k, {t}[b,{k},t,{d}] v",
              "y = Attention (q, k, v)"),
    # as a language model is captured: j <= i + past, and a flag for each key
    "masked": ("{t}[b,{h},s,{d}] q, {t}[b,{k},t,{d}] k, {t}[b,{k},t,{d}] v, bool[b,1,1,t] flags",
               """zero = Constant <value_int = 0> ()
            one = Constant <value_int = 1> ()
            two = Constant <value_ints = [2]> ()
            sizes = Shape <start = 2, end = 3> (q)
            queries = Squeeze (sizes)
            places = Shape <start = 2, end = 3> (k)
            keys = Squeeze (places)
            past = Sub (keys, queries)
            own = Range (zero, queries, one)
            at = Add (own, past)
            axes = Constant <value_ints = [0, 1, 3]> ()
            row = Unsqueeze (at, axes)
            every = Range (zero, keys, one)
            others = Constant <value_ints = [0, 1, 2]> ()
            column = Unsqueeze (every, others)
            seen = LessOrEqual (column, row)
            mask = And (seen, flags)
            y = Attention (q, k, v, mask)"""),
    # a cache with room for t keys, of which a sequence has as many as its length
    "room": ("{t}[b,{h},s,{d}] q, {t}[b,{k},t,{d}] k, {t}[b,{k},t,{d}] v, int64[b] n",
             "y = Attention <is_causal = 1> (q, k, v, , , , n)"),
}  # fmt: skip
# One sequence, and a head of keys for each of queries.
BODIES["step"] = (BODIES["room"][0].replace("[b", "[1"), BODIES["room"][1])
# The tensors of a cache in so many bits, as quantize_cache leaves it: what their names end in, types, widths.
CACHES = {
    16: [("", "{t}", "{d}")],
    8: [("", "int8", "{d}"), ("s", "float16", "1")],
    4: [("", "uint8", "{half}"), ("s", "float16", "1"), ("z", "uint8", "1")],
}


def bits(kind: str) -> int:
    """Of what a kind's caches hold."""
    return 8 if kind == "shared" else {"8": 8, "4": 4}.get(kind[-1], 16)


def read(name: str, held: int) -> tuple[str, str]:
    """Statements that make halves of a cache of so many bits, and the name of these."""
    if held == 16:
        return "", name
    codes, body = name, ""
    if held == 4:
        body = f"""{name}f15 = Constant <value = uint8 {{{{15}}}}> ()
            {name}f4 = Constant <value = uint8 {{{{4}}}}> ()
            {name}low = BitwiseAnd ({name}, {name}f15)
            {name}high = BitShift <direction = "RIGHT"> ({name}, {name}f4)
            {name}a = Concat <axis = 3> ({name}low, {name}high)"""
        codes = f"{name}a"
    beside = f"{codes}, {name}w" + (f", {name}z" if held == 4 else "")
    body += f"""
            {name}w = Cast <to = 1> ({name}s)
            {name}f = DequantizeLinear <axis = 3, block_size = {{d}}> ({beside})
            {name}h = Cast <to = {{code}}> ({name}f)"""
    return body, f"{name}h"


def over_codes(held: int) -> tuple[str, str]:
    """Inputs and statements of a node that reads a cache in so many bits."""
    inputs = [
        f"{dtype}[b,{{k}},t,{wide}] {name}{end}"
        for end, dtype, wide in CACHES[held]
        for name in "kv"
    ]
    statements = [*(read(name, held)[0] for name in "kv"), "y = Attention (q, kh, vh)"]
    return ", ".join(["{t}[b,{h},s,{d}] q", *inputs]), "\n".join(statements)


BODIES |= {"int8": over_codes(8), "int4": over_codes(4)}
BODIES["shared"] = BODIES["int8"]  # by 8 query heads

# What scores get besides, with as many heads of keys as of queries: attributes of the node, and a mask of a
# type (or that of the node) and of these dims; then the sizes of heads that are built.
FORMS: dict[str, tuple[str, str, str, tuple[tuple[str, int], ...]]] = {
    "biased": ("", "", "1hst", (("bf16", 32), ("bf16", 64), ("bf16", 128), ("f16", 72))),
    "exact": ("", "float", "bhst", (("bf16", 64), ("bf16", 128), ("f16", 256))),
    "seen": ("is_causal = 1", "bool", "b1st", (("bf16", 64), ("bf16", 96), ("bf16", 128))),
    "line": ("", "", "b11t", (("f16", 40), ("bf16", 200))),
    "capped": ("softcap = 30.0", "bool", "11st", (("bf16", 128), ("f16", 64), ("bf16", 256))),
    "sized": ("", "", "", (("bf16", 80), ("bf16", 112), ("bf16", 256))),
}
# batch, heads, queries, keys
FORM_RAGGED = [(1, 8, 1, 1), (2, 8, 5, 7), (1, 8, 33, 40), (2, 16, 128, 128), (3, 8, 129, 136)]
FORM_RAGGED += [(2, 8, 300, 577), (1, 8, 257, 1000), (1, 16, 1000, 1000), (2, 8, 64, 2048)]
# batch, heads, queries, which are as many as keys
FORM_SIZES = [(4, 16, 2048), (8, 12, 512), (4, 16, 577), (256, 6, 49), (1, 32, 4096)]


def in_a_row(kind: str) -> tuple[str, str, str]:
    """Inputs, statements and outputs of nodes with caches of their own; one's result is the next's query.

    Of "placed" ones new keys and values are written into the caches first.
    """
    placed, count = kind.startswith("placed"), NODES[kind]
    inputs = ["{t}[b,{h},%s,{d}] q" % ("s" if placed else "1")]
    inputs += ["int64[b] first, int64[b] n"] if placed else []
    body, outputs = [], []
    for i in range(count):
        halves = []
        for c in (f"k{i}", f"v{i}"):
            made = f"next_{c}" if placed else c
            for end, dtype, wide in CACHES[bits(kind)]:
                inputs.append(f"{dtype}[b,{{k}},t,{wide}] {c}{end}")
                if placed:
                    inputs.append(f"{dtype}[b,{{k}},s,{wide}] new_{c}{end}")
                    given = f"({c}{end}, new_{c}{end}, first)"
                    body.append(f"{made}{end} = TensorScatter <axis = 2> {given}")
                    outputs.append(f"{dtype}[b,{{k}},t,{wide}] {made}{end}")
            statements, name = read(made, bits(kind))
            body.append(statements)
            halves.append(name)
        query, result = f"y{i - 1}" if i else "q", f"y{i}" if i + 1 < count else "y"
        rest = ", , , , n" if placed else ""
        causal = " <is_causal = 1>" if placed else ""
        body.append(f"{result} = Attention{causal} ({query}, {', '.join(halves)}{rest})")
    return ", ".join(inputs), "\n".join(body), "".join(f", {x}" for x in outputs)


KINDS = [*BODIES, *NODES, *FORMS]


def formats(kind: str) -> Sequence[tuple[str, int]]:
    """Half types and sizes of heads that there are libraries of."""
    return FORMS[kind][3] if kind in FORMS else FORMATS


def formed(kind: str) -> tuple[str, str, str]:
    """Inputs, statements and further outputs of a node of FORMS."""
    attributes, dtype, dims, _ = FORMS[kind]
    inputs = "{t}[b,{h},s,{d}] q, {t}[b,{h},t,{d}] k, {t}[b,{h},t,{d}] v"
    if dims:
        inputs += f", {dtype or '{t}'}[{','.join('{h}' if dim == 'h' else dim for dim in dims)}] m"
    node = f"y = Attention{attributes and f' <{attributes}>'} (q, k, v{', m' if dims else ''})"
    return inputs, node, ""


def model(kind: str, half: str, depth: int) -> Any:
    """A graph of one Attention, see BODIES, or of several."""
    import onnx_ir as ir

    from netlathe.ir import normal

    if kind in FORMS:
        inputs, body, outputs = formed(kind)
    else:
        inputs, body, outputs = in_a_row(kind) if kind in NODES else (*BODIES[kind], "")
    heads = "h" if kind in FORMS else str(HEADS)
    queries = "1" if kind.startswith("layers") else "s"
    batch = 1 if kind == "step" else "b"
    facts = {
        "t": NAMES[half],
        "d": depth,
        "half": depth // 2,
        "h": heads,
        "k": OTHERS.get(kind, KV_HEADS),
        "code": 16 if half == "bf16" else 10,
    }
    text = f"""<ir_version: 11, opset_import: ["" : 25]> g ({inputs.format(**facts)})
        => ({NAMES[half]}[{batch},{heads},{queries},{depth}] y{outputs.format(**facts)})
        {{ {body.format(**facts)} }}"""
    made = ir.from_onnx_text(text)
    normal.normalize(made)
    return made


def build(folder: Path, archs: str, only: str) -> None:
    """Compile every library."""
    from netlathe.backends.tvm import process, runtime, toolchain
    from netlathe.backends.tvm.cuda.machine import gpu

    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__)
    for source in (here, here.with_name("bench_cuda.py"), Path(runtime.__file__)):
        shutil.copyfile(source, folder / source.name)
    machine = gpu(archs.split(","))
    for kind in KINDS:
        for half, depth in formats(kind):
            name = f"{kind}-{half}-{depth}"
            if only not in name:
                continue
            library = folder / f"{name}.so"
            process.build(model(kind, half, depth), machine, library, (toolchain.compiler(),))
            facts = {"kind": kind, "half": half, "depth": depth, "parameters": []}
            (folder / f"{name}.json").write_text(json.dumps(facts))
            print(name, flush=True)


# -- data and references ---------------------------------------------------------------------------


class AttentionBench(Bench):
    """Libraries of one Attention each, or of several."""

    def names(self, only: str) -> Iterator[str]:
        """Libraries of the folder."""
        for kind in KINDS:
            for half, depth in formats(kind):
                name = f"{kind}-{half}-{depth}"
                if only in name and (self.folder / f"{name}.so").exists():
                    yield name

    def given(self, value: Any) -> Any:
        """torch's tensor as the program takes it."""
        bits = value.view(self.torch.uint16) if value.dtype == self.torch.bfloat16 else value
        return self.ffi.from_dlpack(bits)

    def inputs(self, facts: dict[str, Any], batch: int, queries: int, past: int, room: int) -> Any:
        """Random inputs, and what the reference makes its mask and cache from."""
        torch, depth, kind = self.torch, facts["depth"], facts["kind"]
        half = torch.bfloat16 if facts["half"] == "bf16" else torch.float16
        kv = OTHERS.get(kind, KV_HEADS)
        keys = room if kind in ("room", "step") else past + queries

        def normal(heads: int, rows: int) -> Any:
            return torch.randn((batch, heads, rows, depth), device="cuda").to(half)

        q = normal(HEADS, queries)
        if bits(kind) < 16:
            made = [self.codes(bits(kind), (batch, kv, keys), depth) for _ in range(2)]
            return [q, *(x for pair in zip(*made, strict=True) for x in pair)]
        made = [q, normal(kv, keys), normal(kv, keys)]
        if kind == "masked":
            flags = torch.rand((batch, 1, 1, keys), device="cuda") > 0.2
            flags[0] = True
            made.append(flags)
        if kind in ("room", "step"):
            least = torch.arange(batch, device="cuda")
            made.append((past + queries - least).clamp(min=queries))
        return made

    def codes(self, held: int, shape: tuple[int, ...], depth: int) -> list[Any]:
        """Random codes of so many bits, scales and, of 4 bits, zero points."""
        torch = self.torch
        scale = (torch.rand((*shape, 1), device="cuda") + 0.5) / (64 if held == 8 else 6)
        if held == 8:
            sizes = (*shape, depth)
            made = torch.randint(-128, 128, sizes, dtype=torch.int8, device="cuda")
            return [made, scale.half()]
        sizes = (*shape, depth // 2)
        made = torch.randint(0, 256, sizes, dtype=torch.uint8, device="cuda")
        zeros = torch.randint(0, 16, (*shape, 1), dtype=torch.uint8, device="cuda")
        return [made, scale.half(), zeros]

    def wide(self, parts: list[Any]) -> Any:
        """What a cache stands for, in float64."""
        codes, *scale = parts
        if len(parts) == 3:
            codes = self.torch.cat((codes & 15, codes >> 4), -1).double() - parts[2].double()
        return codes.double() * scale[0].double() if scale else codes.double()

    def reference(self, facts: dict[str, Any], given: list[Any]) -> Any:
        """float64."""
        torch, kind = self.torch, facts["kind"]
        q, parts = given[0].double(), len(CACHES[bits(kind)])
        k, v = (self.wide(given[first : 2 * parts + 1 : 2]) for first in (1, 2))
        k, v = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(facts["depth"])
        queries, keys = scores.shape[2:]
        i = torch.arange(queries, device="cuda")[:, None]
        j = torch.arange(keys, device="cuda")
        if kind == "causal":
            scores.masked_fill_(j > i, -math.inf)
        if kind == "masked":
            scores.masked_fill_(~(given[3] & (j <= i + keys - queries)), -math.inf)
        if kind in ("room", "step"):
            length = given[3][:, None, None, None]
            scores.masked_fill_((j >= length) | (j > i + length - queries), -math.inf)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)
        return weights @ v

    def check(self, name: str, small: bool) -> bool:
        """Whether every ragged size is within the bound."""
        main, facts = self.load(name)
        if facts["kind"] in FORMS:
            return self.check_form(name, small)
        if facts["kind"] in NODES:
            check = self.check_placed if facts["kind"].startswith("placed") else self.check_row
            return check(name, small)
        worst, good = 0.0, True
        for sizes in RAGGED[:8] if small else RAGGED:
            sizes = (1, *sizes[1:]) if facts["kind"] == "step" else sizes
            given = self.inputs(facts, *sizes)
            made = self.torch.from_dlpack(main(*(self.given(x) for x in given))[0])
            found, wanted = made.view(given[0].dtype).double(), self.reference(facts, given)
            error = float((found - wanted).norm() / wanted.norm())
            if not error <= self.bound(facts):
                good = False
                print(f"{name} {sizes}: error {error:.2e}", flush=True)
            worst = max(worst, error)
        return self.judged(name, facts, worst) and good

    def formed(self, facts: dict[str, Any], sizes: tuple[int, int, int, int]) -> list[Any]:
        """Random queries, keys, values and mask of a node of FORMS: batch, heads, queries, keys.

        A third of the keys is hidden; where there are several queries, the second sees none, and, by a bias,
        all others are as low as a float can be for the third.
        """
        torch, (_, dtype, dims, _) = self.torch, FORMS[facts["kind"]]
        half = torch.bfloat16 if facts["half"] == "bf16" else torch.float16
        batch, heads, queries, keys = sizes
        made = [
            torch.randn((batch, heads, rows, facts["depth"]), device="cuda").to(half)
            for rows in (queries, keys, keys)
        ]
        if not dims:
            return made
        shape = [dict(zip("bhst1", (*sizes, 1), strict=True))[dim] for dim in dims]
        hidden = torch.rand(shape, device="cuda") > 0.7
        if shape[2] > 2:
            hidden[..., 1, :] = True
        if dtype == "bool":
            return [*made, ~hidden]
        mask = torch.randn(shape, device="cuda").to(torch.float32 if dtype == "float" else half)
        mask.masked_fill_(hidden, -math.inf)
        if shape[2] > 2:
            mask[..., 2, :] = torch.finfo(mask.dtype).min
        return [*made, mask]

    def form_reference(self, facts: dict[str, Any], given: list[Any]) -> Any:
        """float64, but for sums of scores and a bias: beside the lowest of floats a score counts nothing."""
        torch, (attributes, _, _, _) = self.torch, FORMS[facts["kind"]]
        q, k, v = (x.double() for x in given[:3])
        scores = q @ k.transpose(2, 3) / math.sqrt(facts["depth"])
        if attributes.startswith("softcap"):
            cap = float(attributes.split("=")[1])
            scores = torch.tanh(scores / cap) * cap
        for mask in given[3:]:
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -math.inf)
            else:
                scores = (scores.float() + mask.float()).double()
        if attributes.startswith("is_causal"):
            i = torch.arange(scores.shape[2], device="cuda")[:, None]
            scores.masked_fill_(torch.arange(scores.shape[3], device="cuda") > i, -math.inf)
        return torch.softmax(scores, -1).nan_to_num(0.0) @ v

    def check_form(self, name: str, small: bool) -> bool:
        """Whether a node of FORMS is within the bound."""
        main, facts = self.load(name)
        worst = 0.0
        for sizes in FORM_RAGGED[:5] if small else FORM_RAGGED:
            given = self.formed(facts, sizes)
            made = self.torch.from_dlpack(main(*(self.given(x) for x in given))[0])
            found, wanted = made.view(given[0].dtype).double(), self.form_reference(facts, given)
            error = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return self.judged(name, facts, worst)

    def caches(self, facts: dict[str, Any], batch: int, room: int) -> list[Any]:
        """A random cache of one node: keys and values, each with scales behind it where there are any."""
        torch, shape = self.torch, (batch, KV_HEADS, room)
        half = torch.bfloat16 if facts["half"] == "bf16" else torch.float16
        made = []
        for _ in range(2):
            held = bits(facts["kind"])
            if held == 16:
                made.append(torch.randn((*shape, facts["depth"]), device="cuda").to(half))
            else:
                made += self.codes(held, shape, facts["depth"])
        return made

    def through(self, facts: dict[str, Any], q: Any, caches: list[list[Any]], length: Any) -> Any:
        """What nodes in a row make of ``q``, in float64: ``length`` [batch] keys, queries at their end."""
        torch = self.torch
        for cache in caches:
            parts = (cache[: len(cache) // 2], cache[len(cache) // 2 :])
            k, v = (self.wide(x).repeat_interleave(HEADS // KV_HEADS, 1) for x in parts)
            scores = q.double() @ k.transpose(2, 3) / math.sqrt(facts["depth"])
            i = torch.arange(q.shape[2], device="cuda")[:, None]
            j = torch.arange(k.shape[2], device="cuda")
            hidden = j > i + length[:, None, None, None] - q.shape[2]
            q = torch.softmax(scores.masked_fill_(hidden, -math.inf), -1) @ v
        return q

    def check_row(self, name: str, small: bool) -> bool:
        """Whether nodes in a row are within the bound."""
        main, facts = self.load(name)
        half = self.torch.bfloat16 if facts["half"] == "bf16" else self.torch.float16
        worst = 0.0
        for batch, _, _, room in PLACED[:2] if small else [*PLACED, (1, 1, 0, 32768)]:
            q = self.torch.randn((batch, HEADS, 1, facts["depth"]), device="cuda").to(half)
            caches = [self.caches(facts, batch, room) for _ in range(NODES[facts["kind"]])]
            made = main(self.given(q), *(self.given(x) for cache in caches for x in cache))
            made = made if hasattr(made, "shape") else made[0]
            found = self.torch.from_dlpack(made).view(half).double()
            length = self.torch.full((batch,), room, device="cuda")
            wanted = self.through(facts, q, caches, length)
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
        return self.judged(name, facts, worst)

    def check_placed(self, name: str, small: bool) -> bool:
        """Whether tokens that are decoded into caches, in place, are within the bound.

        Nothing waits for anything: each call's rows are read by the same call and by those behind, and what
        was there before is written by torch, late, just in front of the first call. All else is no number.
        """
        torch = self.torch
        main, facts = self.load(name)
        half = torch.bfloat16 if facts["half"] == "bf16" else torch.float16
        worst, wide = 0.0, 512 if small else 8192
        busy = torch.randn((wide, wide), device="cuda")
        for batch, queries, there, room in PLACED[:2] if small else PLACED:
            count = NODES[facts["kind"]]
            last = there + STEPS * queries
            caches = [self.caches(facts, batch, room) for _ in range(count)]
            new = [[self.caches(facts, batch, queries) for _ in range(count)] for _ in range(STEPS)]
            held, empty = [], []
            for cache in caches:
                for x in cache:
                    x[:, :, last:] = 0
                    codes = x.dtype in (torch.int8, torch.uint8)
                    lost = torch.full_like(x, 127 if codes else math.nan)
                    empty.append(lost)
                    held.append(lost.clone())
            qs = [
                torch.randn((batch, HEADS, queries, facts["depth"]), device="cuda").to(half)
                for _ in range(STEPS)
            ]
            starts = [
                torch.full((batch,), there + step * queries, device="cuda")
                for step in range(STEPS + 1)
            ]
            flat = [x for cache in caches for x in cache]

            def steps(
                qs: Any = qs, new: Any = new, held: Any = held, starts: Any = starts
            ) -> list[Any]:
                made = []
                for step in range(STEPS):
                    tensors = [x for cache in new[step] for x in cache]
                    pairs = [
                        self.given(x) for pair in zip(held, tensors, strict=True) for x in pair
                    ]
                    times = [self.given(starts[step + i]) for i in range(2)]
                    made.append(main(self.given(qs[step]), *times, *pairs)[0])
                return made

            graph = torch.cuda.CUDAGraph()
            kept = steps()  # memory for the graph to take
            del kept
            with self.ffi.use_torch_stream(torch.cuda.graph(graph)):
                recorded = steps()
            for run in (steps, graph.replay):
                for x, lost in zip(held, empty, strict=True):
                    x.copy_(lost)
                torch.cuda.synchronize()
                with self.ffi.use_torch_stream(torch.cuda.current_stream()):
                    torch.mm(busy, busy)
                    for x, known in zip(held, flat, strict=True):
                        x[:, :, :there].copy_(known[:, :, :there])
                    made = run() or recorded
                torch.cuda.synchronize()
                whole = [[x.clone() for x in cache] for cache in caches]
                for step in range(STEPS):
                    begin, end = there + step * queries, there + (step + 1) * queries
                    for cache, rows in zip(whole, new[step], strict=True):
                        for x, row in zip(cache, rows, strict=True):
                            x[:, :, begin:end] = row
                    wanted = self.through(facts, qs[step], whole, starts[step + 1])
                    found = torch.from_dlpack(made[step]).view(half).double()
                    error = float((found - wanted).norm() / wanted.norm())
                    if not error <= self.bound(facts):
                        print(f"{name} {(batch, queries, there, room)} {step}: error {error:.2e}")
                        worst = math.inf
                    worst = max(worst, error)
        return self.judged(name, facts, worst)

    def bound(self, facts: dict[str, Any]) -> float:
        """Of an error."""
        return (BOUND_CODES if bits(facts["kind"]) == 4 else BOUND)[facts["half"]]

    def judged(self, name: str, facts: dict[str, Any], worst: float) -> bool:
        """Say how large the error is, and whether that is within the bound."""
        good = worst <= self.bound(facts)
        self.results[f"{name} error"] = worst
        print(f"{name:18s} worst error {worst:.2e} {'' if good else 'FAILED'}", flush=True)
        return good

    # -- speed -------------------------------------------------------------------------------------

    def prefill(self, name: str, small: bool) -> None:
        """Causal attention, batch 1, in turn with torch."""
        torch = self.torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        main, facts = self.load(name)
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        for length in PREFILL[:1] if small else PREFILL:
            given = self.inputs(facts, 1, length, 0, length)
            own = [self.given(x) for x in given]

            def theirs(backend: Any = None, given: list[Any] = given) -> Any:
                attend = torch.nn.functional.scaled_dot_product_attention
                if backend is None:
                    return attend(*given, is_causal=True, enable_gqa=True)
                with sdpa_kernel(backend):
                    return attend(*given, is_causal=True, enable_gqa=True)

            sides: dict[str, Any] = {"own": partial(main, *own), "torch": theirs}
            sides |= {label: partial(theirs, backend) for label, backend in backends.items()}
            inside = max(2, min(20, (16384 // length) ** 2))
            for label, side in list(sides.items()):
                try:
                    self.milliseconds(side, 2)
                except RuntimeError as error:
                    print(f"{name} torch {label}: {str(error)[:100]}")
                    del sides[label]
            times: dict[str, list[float]] = {label: [] for label in sides}
            for _ in range(ROUNDS):
                for label, side in sides.items():
                    times[label].append(self.milliseconds(side, inside))
            found = {label: statistics.median(values) for label, values in times.items()}
            best = min(time for label, time in found.items() if label != "own")
            work = 2 * length * length * facts["depth"] * HEADS / 1e9
            self.results[f"{name} {length}"] = found
            rates = ", ".join(f"{label} {work / time:4.0f}" for label, time in found.items())
            print(
                f"{name:18s} {length:6d}: TFLOP/s {rates}; share {found['torch'] / found['own']:.2f},"
                f" of the best {best / found['own']:.2f}",
                flush=True,
            )

    def form(self, name: str, small: bool) -> None:
        """A node of FORMS, by replays of graphs in turn with torch's; torch applies no cap."""
        torch = self.torch
        main, facts = self.load(name)
        causal = FORMS[facts["kind"]][0].startswith("is_causal")
        for batch, heads, queries in FORM_SIZES[:1] if small else FORM_SIZES:
            given = self.formed(facts, (batch, heads, queries, queries))
            if len(given) > 3 and given[3].dtype != torch.bool:
                given[3] = torch.randn_like(given[3])
            own, mask = [self.given(x) for x in given], given[3] if len(given) > 3 else None
            if mask is not None:
                mask = mask.tril() if causal else mask
                mask = mask if mask.dtype == torch.bool else mask.to(given[0].dtype)
            attend = torch.nn.functional.scaled_dot_product_attention
            theirs = partial(attend, *given[:3], attn_mask=mask, is_causal=causal and mask is None)
            graphs = []
            for side in (partial(main, *own), theirs):
                kept = [side() for _ in range(2)]  # memory for the graph to take
                del kept
                graph = torch.cuda.CUDAGraph()
                with self.ffi.use_torch_stream(torch.cuda.graph(graph)):
                    for _ in range(INSIDE):
                        side()
                self.milliseconds(graph.replay, 2)
                graphs.append(graph)
            times = [
                [self.milliseconds(graph.replay, 2) / INSIDE for graph in graphs]
                for _ in range(ROUNDS)
            ]
            ours, other = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
            self.results[f"{name} {batch} x {heads} x {queries}"] = {"own": ours, "torch": other}
            print(
                f"{name:18s} {batch:3d} x {heads:2d} x {queries:5d}: {ours:7.1f} us,"
                f" torch {other:7.1f}, share {other / ours:.2f}",
                flush=True,
            )

    def decode(self, name: str, rate: float, small: bool) -> None:
        """One query, over caches that are read once."""
        torch = self.torch
        main, facts = self.load(name)
        for batch, length in DECODE[:1] if small else DECODE:
            caches: list[Any] = []
            moved = 0
            while not caches or moved * len(caches) < SHARED:
                given = self.inputs(facts, batch, 1, length - 1, length)
                moved = sum(x.numel() * x.element_size() for x in given[1:])
                caches.append([self.given(x) for x in given])
            count = max(len(caches), 3)
            caches = [caches[i % len(caches)] for i in range(count)]
            kept = [main(*given) for given in caches]  # memory for the graph to take
            del kept
            graph = torch.cuda.CUDAGraph()
            with self.ffi.use_torch_stream(torch.cuda.graph(graph)):
                for given in caches:
                    main(*given)
            self.milliseconds(graph.replay, WARM)
            times = [self.milliseconds(graph.replay, INSIDE) / count for _ in range(ROUNDS)]
            self.say(name, (batch, length), statistics.median(times), moved, rate)

    def say(
        self, name: str, sizes: tuple[int, int], time: float, moved: float, rate: float
    ) -> None:
        """Keep and print the milliseconds in which so many bytes are read, at ``sizes``: batch and keys."""
        batch, length = sizes
        self.results[f"{name} {batch} x {length}"] = {"ms": time, "bytes": moved}
        print(
            f"{name:18s} {batch:2d} x {length:6d}: {time * 1e3:6.1f} us,"
            f" {moved / time / 1e6:5.0f} GB/s, share {moved / time / rate:.3f}",
            flush=True,
        )

    def layers(self, name: str, rate: float, small: bool) -> None:
        """One query through nodes in a row, each with a cache of its own."""
        torch = self.torch
        main, facts = self.load(name)
        half = torch.bfloat16 if facts["half"] == "bf16" else torch.float16
        for batch, length in DECODE[:1] if small else DECODE:
            count = NODES[facts["kind"]]
            q = torch.randn((batch, HEADS, 1, facts["depth"]), device="cuda").to(half)
            flat = [x for _ in range(count) for x in self.caches(facts, batch, length)]
            moved = sum(x.numel() * x.element_size() for x in flat) / count
            given = [self.given(x) for x in (q, *flat)]
            kept = [main(*given) for _ in range(2)]  # memory for the graph to take
            del kept
            graph = torch.cuda.CUDAGraph()
            with self.ffi.use_torch_stream(torch.cuda.graph(graph)):
                held = main(*given)
            self.milliseconds(graph.replay, WARM)
            times = [self.milliseconds(graph.replay, INSIDE) / count for _ in range(ROUNDS)]
            del held
            self.say(name, (batch, length), statistics.median(times), moved, rate)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["build", "check", "speed"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--archs", default="sm_90a", help="build: architectures, with commas")
    parser.add_argument("--only", default="", help="libraries whose name contains this")
    parser.add_argument("--small", action="store_true", help="the smallest sizes alone")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    args = parser.parse_args()
    if args.what == "build":
        build(args.folder, args.archs, args.only)
        return
    bench = AttentionBench(args.folder.resolve())
    good = True
    if args.what == "check":
        good = all([bench.check(name, args.small) for name in bench.names(args.only)])
    else:
        rate = bench.copy_rate()
        print(f"{bench.results['gpu']}: copies {rate / 1e6:.0f} GB/s")
        for name in bench.names(args.only):
            if name.startswith("causal"):
                bench.prefill(name, args.small)
            if name.startswith(("whole", "int8", "int4")):
                bench.decode(name, rate, args.small)
            if name.startswith("layers"):
                bench.layers(name, rate, args.small)
            if name.partition("-")[0] in FORMS:
                bench.form(name, args.small)
    if args.json is not None:
        args.json.write_text(json.dumps(bench.results, indent=1) + os.linesep)
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
