"""RNN, GRU and LSTM: one step after the other; directions and batch entries run in parallel.

W [d, gates * h, i], R [d, gates * h, h], B [d, 2 * gates * h] as in the standard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import tirx

from netlathe.backends.tvm import mathfn, storage
from netlathe.backends.tvm.kernel import Kernel
from netlathe.backends.tvm.kernels.general import vectors
from netlathe.backends.tvm.kernels.reduce import COMBINE, row
from netlathe.backends.tvm.ops.elementwise import elu, like
from netlathe.backends.tvm.ops.op import Op, Rule
from netlathe.backends.tvm.tir import (
    PARALLEL,
    Code,
    Expr,
    cast,
    const,
    flat_index,
    i64,
    idiv,
    imod,
    select,
)
from netlathe.backends.tvm.values import Value

_Function = Callable[[Code, Expr, float, float], Expr]


def _held(x: Expr, low: float, high: float) -> Expr:
    return select(x < like(x, low), like(x, low), select(x > like(x, high), like(x, high), x))


# Name -> (the function of x, alpha, beta; default alpha; default beta).
_ACTIVATIONS: Mapping[str, tuple[_Function, float, float]] = {
    "sigmoid": (lambda code, x, a, b: mathfn.sigmoid(code, x), 0, 0),
    "tanh": (lambda code, x, a, b: mathfn.tanh(code, x), 0, 0),
    "relu": (lambda code, x, a, b: select(x < like(x, 0), like(x, 0), x), 0, 0),
    "affine": (lambda code, x, a, b: like(x, a) * x + like(x, b), 1, 0),
    "leakyrelu": (lambda code, x, a, b: select(x < like(x, 0), like(x, a) * x, x), 0.01, 0),
    "thresholdedrelu": (lambda code, x, a, b: select(x > like(x, a), x, like(x, 0)), 1, 0),
    "scaledtanh": (lambda code, x, a, b: like(x, a) * mathfn.tanh(code, like(x, b) * x), 1, 1),
    "hardsigmoid": (lambda code, x, a, b: _held(like(x, a) * x + like(x, b), 0, 1), 0.2, 0.5),
    "elu": (lambda code, x, a, b: elu(code, x, a), 1, 0),
    "softsign": (lambda code, x, a, b: x / (like(x, 1) + tirx.abs(x)), 0, 0),
    "softplus": (lambda code, x, a, b: mathfn.softplus(code, x), 0, 0),
}
_TAKES_ALPHA = {"affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu"}
_TAKES_BETA = {"affine", "scaledtanh", "hardsigmoid"}
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def _activations(op: Op) -> list[Callable[[Code, Expr], Expr]]:
    attributes = op.node.attributes
    count = 2 if op.text("direction", "forward") == "bidirectional" else 1
    names = list(attributes.get_strings("activations") or _DEFAULTS[op.node.op_type] * count)
    alpha = list(attributes.get_floats("activation_alpha") or ())
    beta = list(attributes.get_floats("activation_beta") or ())
    clip = op.real("clip", 0.0)
    made: list[Callable[[Code, Expr], Expr]] = []
    for name in names:
        key = name.lower()
        if key not in _ACTIVATIONS:
            raise op.gap(f"activation {name}")
        function, a, b = _ACTIVATIONS[key]
        a = alpha.pop(0) if key in _TAKES_ALPHA and alpha else a
        b = beta.pop(0) if key in _TAKES_BETA and beta else b

        def bound(
            code: Code, x: Expr, function: _Function = function, a: float = a, b: float = b
        ) -> Expr:
            x = code.bind(x)
            return function(code, code.bind(_held(x, -clip, clip)) if clip else x, a, b)

        made.append(bound)
    return made


class _Recurrent:
    """The kernel of one node."""

    def __init__(self, op: Op) -> None:
        self.op = op
        self.kind = op.node.op_type
        self.x, self.w, self.r = op.ready(0), op.ready(1), op.ready(2)
        self.layout = op.integer("layout")
        self.direction = op.text("direction", "forward")
        self.functions = _activations(op)
        self.kernel = Kernel(op.low)
        self.code = self.kernel.code
        self.dtype = storage.computed(self.x.dtype)
        self.lanes = op.low.machine.lanes(self.dtype)
        time, batch, inputs = self.x.shape
        if self.layout:
            time, batch = batch, time
        self.directions = self.w.shape[0]
        self.hidden = self.r.shape[2]
        k = self.kernel
        self.t, self.n, self.i = k.size(time), k.size(batch), k.size(inputs)
        self.h, self.d = k.size(self.hidden), k.size(self.directions)
        d, h = self.directions, self.hidden
        shapes = (
            [(batch, time, d, h), (batch, d, h), (batch, d, h)]
            if self.layout
            else [(time, d, batch, h), (d, batch, h), (d, batch, h)]
        )
        count = 3 if self.kind == "LSTM" else 2
        self.out = [k.write(self.x.dtype, shape) for shape in shapes[:count]]
        self.shapes = [k.shape(shape) for shape in shapes]

    def run(self) -> Sequence[Value]:
        code = self.code
        with code.loop(self.d * self.n, PARALLEL) as task:
            d, n = code.bind(idiv(task, self.n)), code.bind(imod(task, self.n))
            names = ["h"] + (["c"] if self.kind == "LSTM" else [])
            state = {}
            for number, name in enumerate(names):
                state[name] = code.alloc([self.h], self.dtype, scope="global")
                self._each(lambda j: self._start(state[name], number, d, n, j))  # noqa: B023
            width = self.h * i64(_GATES[self.kind])
            gates = [code.alloc([width], self.dtype, scope="global") for _ in range(2)]
            spare = code.alloc([self.h], self.dtype, scope="global")
            length = self.t
            if self.op.has(4):
                length = cast(self.op.operand(4).at(code, [n]), "int64")
                length = code.bind(tirx.min(length, self.t))
            with code.loop(self.t) as step:
                backward = {"forward": i64(0), "reverse": i64(1)}.get(self.direction, d)
                turned = select(step < length, length - i64(1) - step, step)
                t = code.bind(select(backward == i64(1), turned, step))
                code.branch(
                    step < length,
                    lambda: self._step(t, d, n, state, gates, spare),
                    lambda: self._each(lambda j: self._put(t, d, n, j, const(0, self.dtype))),
                )
            for number, name in enumerate(names):
                self._each(lambda j: self._end(state[name], number, d, n, j))  # noqa: B023
        return self.kernel.finish("recurrent.steps")

    def _each(self, body: Callable[[Expr], None]) -> None:
        vectors(self.code, self.h, self.lanes, body)

    def _start(self, buffer: Any, number: int, d: Expr, n: Expr, j: Expr) -> None:
        value = const(0, self.dtype)
        if self.op.has(5 + number):
            index = [n, d, j] if self.layout else [d, n, j]
            value = self.op.operand(5 + number).at(self.code, index)
        self.code.store(buffer, j, value)

    def _end(self, buffer: Any, number: int, d: Expr, n: Expr, j: Expr) -> None:
        index = [n, d, j] if self.layout else [d, n, j]
        at = flat_index(index, self.shapes[1 + number])
        value = storage.store(self.code, self.x.dtype, tirx.BufferLoad(buffer, [j]))
        self.code.store(self.out[1 + number], at, value)

    def _put(self, t: Expr, d: Expr, n: Expr, j: Expr, value: Expr) -> None:
        index = [n, t, d, j] if self.layout else [t, d, n, j]
        at = flat_index(index, self.shapes[0])
        self.code.store(self.out[0], at, storage.store(self.code, self.x.dtype, value))

    def _dot(
        self, weight: Any, d: Expr, gate: Expr, count: Expr, other: Callable[[Expr], Expr]
    ) -> Expr:
        return row(
            self.code,
            [count],
            self.lanes,
            self.dtype,
            COMBINE["sum"],
            lambda at: weight.at(self.code, [d, gate, at[0]]) * other(at[0]),
        )

    def _bias(self, d: Expr, at: Expr) -> Expr:
        if not self.op.has(3):
            return const(0, self.dtype)
        return self.op.operand(3).at(self.code, [d, at])

    def _step(
        self, t: Expr, d: Expr, n: Expr, state: Mapping[str, Any], gates: list[Any], spare: Any
    ) -> None:
        code = self.code
        width = self.h * i64(_GATES[self.kind])
        with code.loop(width) as gate:
            index = [n, t] if self.layout else [t, n]
            from_x = self._dot(self.w, d, gate, self.i, lambda j: self.x.at(code, [*index, j]))
            from_h = self._dot(self.r, d, gate, self.h, lambda j: tirx.BufferLoad(state["h"], [j]))
            code.store(gates[0], gate, from_x + self._bias(d, gate))
            code.store(gates[1], gate, from_h + self._bias(d, width + gate))
        {"RNN": self._rnn, "GRU": self._gru, "LSTM": self._lstm}[self.kind](d, state, gates, spare)
        self._each(lambda j: self._put(t, d, n, j, tirx.BufferLoad(state["h"], [j])))

    def _chosen(self, d: Expr, number: int, x: Expr) -> Expr:
        """The ``number``-th activation of the direction."""
        per = len(_DEFAULTS[self.kind])
        first = self.functions[number](self.code, x)
        if len(self.functions) == per:
            return first
        return select(d == i64(0), first, self.functions[per + number](self.code, x))

    def _sum(self, gates: list[Any], gate: int, j: Expr) -> Expr:
        at = self.h * i64(gate) + j
        return tirx.BufferLoad(gates[0], [at]) + tirx.BufferLoad(gates[1], [at])

    def _rnn(self, d: Expr, state: Mapping[str, Any], gates: list[Any], spare: Any) -> None:
        self._each(
            lambda j: self.code.store(state["h"], j, self._chosen(d, 0, self._sum(gates, 0, j)))
        )

    def _gru(self, d: Expr, state: Mapping[str, Any], gates: list[Any], spare: Any) -> None:
        code = self.code
        before = bool(self.op.integer("linear_before_reset"))

        def reset(j: Expr) -> None:
            factor = self._chosen(d, 0, self._sum(gates, 1, j))
            held = tirx.BufferLoad(gates[1], [self.h * i64(2) + j])
            code.store(spare, j, factor * (held if before else tirx.BufferLoad(state["h"], [j])))

        self._each(reset)
        if not before:
            with code.loop(self.h) as j:
                gate = self.h * i64(2) + j
                value = self._dot(self.r, d, gate, self.h, lambda k: tirx.BufferLoad(spare, [k]))
                code.store(gates[1], gate, value + self._bias(d, self.h * i64(3) + gate))

        def update(j: Expr) -> None:
            at = self.h * i64(2) + j
            inner = tirx.BufferLoad(spare if before else gates[1], [j if before else at])
            candidate = self._chosen(d, 1, tirx.BufferLoad(gates[0], [at]) + inner)
            z = code.bind(self._chosen(d, 0, self._sum(gates, 0, j)))
            old = tirx.BufferLoad(state["h"], [j])
            code.store(state["h"], j, (like(z, 1) - z) * candidate + z * old)

        self._each(update)

    def _lstm(self, d: Expr, state: Mapping[str, Any], gates: list[Any], spare: Any) -> None:
        code = self.code

        def peep(gate: int, j: Expr, c: Expr) -> Expr:
            if not self.op.has(7):
                return like(c, 0)
            return self.op.operand(7).at(code, [d, self.h * i64(gate) + j]) * c

        def update(j: Expr) -> None:
            c = code.bind(tirx.BufferLoad(state["c"], [j]))
            i = code.bind(self._chosen(d, 0, self._sum(gates, 0, j) + peep(0, j, c)))
            if self.op.integer("input_forget"):
                forget = like(i, 1) - i
            else:
                forget = self._chosen(d, 0, self._sum(gates, 2, j) + peep(2, j, c))
            new = code.bind(forget * c + i * self._chosen(d, 1, self._sum(gates, 3, j)))
            o = self._chosen(d, 0, self._sum(gates, 1, j) + peep(1, j, new))
            code.store(state["c"], j, new)
            code.store(state["h"], j, o * self._chosen(d, 2, new))

        self._each(update)


def _recurrent(op: Op) -> Sequence[Value]:
    return _Recurrent(op).run()


ROWS: dict[str, Rule] = {"RNN": _recurrent, "GRU": _recurrent, "LSTM": _recurrent}
