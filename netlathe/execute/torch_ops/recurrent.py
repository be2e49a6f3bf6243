"""RNN, GRU and LSTM: one step after the other, in either direction.

t time, n batch, d directions, i input size, h hidden size; W [d, gates * h, i], R [d, gates * h, h],
B [d, 2 * gates * h].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .row import Row, row

Activation = Callable[[Tensor], Tensor]

# Name -> (the function of x, alpha, beta; default alpha; default beta).
_ACTIVATIONS: dict[str, tuple[Callable[[Tensor, float, float], Tensor], float, float]] = {
    "sigmoid": (lambda x, a, b: torch.sigmoid(x), 0, 0),
    "tanh": (lambda x, a, b: torch.tanh(x), 0, 0),
    "relu": (lambda x, a, b: torch.relu(x), 0, 0),
    "affine": (lambda x, a, b: a * x + b, 1, 0),
    "leakyrelu": (lambda x, a, b: F.leaky_relu(x, a), 0.01, 0),
    "thresholdedrelu": (lambda x, a, b: torch.where(x > a, x, torch.zeros_like(x)), 1, 0),
    "scaledtanh": (lambda x, a, b: a * torch.tanh(b * x), 1, 1),
    "hardsigmoid": (lambda x, a, b: (a * x + b).clamp(0, 1), 0.2, 0.5),
    "elu": (lambda x, a, b: F.elu(x, a), 1, 0),
    "softsign": (lambda x, a, b: F.softsign(x), 0, 0),
    "softplus": (lambda x, a, b: F.softplus(x), 0, 0),
}
# Which of the activations take parameters from the attribute lists, in order.
_TAKES_ALPHA = {"affine", "leakyrelu", "thresholdedrelu", "scaledtanh", "hardsigmoid", "elu"}
_TAKES_BETA = {"affine", "scaledtanh", "hardsigmoid"}


def _activations(
    names: Sequence[str],
    alphas: Sequence[float] | None,
    betas: Sequence[float] | None,
    clip: float | None,
) -> list[Activation]:
    """The activations, each applied after the clip of its argument."""
    alpha, beta = list(alphas or ()), list(betas or ())

    def bind(name: str) -> Activation:
        function, a, b = _ACTIVATIONS[name.lower()]
        if name.lower() in _TAKES_ALPHA and alpha:
            a = alpha.pop(0)
        if name.lower() in _TAKES_BETA and beta:
            b = beta.pop(0)
        if clip is None:
            return lambda x: function(x, a, b)
        low, high = -clip, clip
        return lambda x: function(x.clamp(low, high), a, b)

    return [bind(name) for name in names]


Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]


def _run(
    x: Tensor,
    sequence_lens: Tensor | None,
    layout: int,
    direction: str,
    states: Sequence[Tensor | None],
    hidden: int,
    step_of: Callable[[int], Step],
) -> tuple[Tensor, ...]:
    """Every direction over ``x`` [t, n, i]: (Y [t, d, n, h], final states [d, n, h] each).

    ``step_of(d)`` gives the step of a direction; the first state is the output. Entries shorter than
    t keep their last state and give zeros after it; backwards they start at their own end.
    """
    if layout:
        x = x.transpose(0, 1)
        states = [None if s is None else s.transpose(0, 1) for s in states]
    length, batch = x.shape[:2]
    backwards = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    outputs, finals = [], []
    for d, reverse in enumerate(backwards):
        step = step_of(d)
        state = tuple(x.new_zeros(batch, hidden) if s is None else s[d] for s in states)
        made: list[Tensor] = [x.new_zeros(0)] * length
        for t in reversed(range(length)) if reverse else range(length):
            new = step(x[t], state)
            if sequence_lens is None:
                state, made[t] = new, new[0]
            else:
                alive = (t < sequence_lens).unsqueeze(1)
                state = tuple(
                    torch.where(alive, after, before)
                    for after, before in zip(new, state, strict=True)
                )
                made[t] = torch.where(alive, new[0], torch.zeros_like(new[0]))
        outputs.append(torch.stack(made))
        finals.append(state)
    y = torch.stack(outputs, 1)
    last = [torch.stack(parts) for parts in zip(*finals, strict=True)]
    if layout:
        y = y.permute(2, 0, 1, 3)
        last = [s.transpose(0, 1) for s in last]
    return (y, *last)


def _bias(b: Tensor | None, d: int, w: Tensor) -> tuple[Tensor, Tensor]:
    """Input and recurrent bias of direction ``d``."""
    if b is None:
        zero = w.new_zeros(w.shape[1])
        return zero, zero
    first, second = b[d].chunk(2)
    return first, second


_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def rnn(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """RNN: (Y, Y_h)."""
    names = activations or ["Tanh"] * _DIRECTIONS[direction]
    bound = _activations(names, activation_alpha, activation_beta, clip)

    def step_of(d: int) -> Step:
        f = bound[d]
        bias_w, bias_r = _bias(b, d, w)

        def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (f(F.linear(x_t, w[d], bias_w) + F.linear(state[0], r[d], bias_r)),)

        return step

    return _run(x, sequence_lens, layout, direction, [initial_h], r.shape[-1], step_of)


def gru(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """GRU, gates in the order z (update), r (reset), h: (Y, Y_h)."""
    names = activations or ["Sigmoid", "Tanh"] * _DIRECTIONS[direction]
    bound = _activations(names, activation_alpha, activation_beta, clip)

    def step_of(d: int) -> Step:
        f, g = bound[2 * d : 2 * d + 2]
        bias_w, bias_r = _bias(b, d, w)
        widths = [2 * r.shape[-1], r.shape[-1]]
        r_gates, r_hidden = torch.split(r[d], widths)
        rb_gates, rb_hidden = torch.split(bias_r, widths)

        def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (h,) = state
            from_x = F.linear(x_t, w[d], bias_w)
            x_z, x_r, x_h = from_x.chunk(3, -1)
            h_z, h_r = F.linear(h, r_gates, rb_gates).chunk(2, -1)
            update, reset = f(x_z + h_z), f(x_r + h_r)
            if linear_before_reset:
                candidate = g(x_h + reset * F.linear(h, r_hidden, rb_hidden))
            else:
                candidate = g(x_h + F.linear(reset * h, r_hidden, rb_hidden))
            return ((1 - update) * candidate + update * h,)

        return step

    return _run(x, sequence_lens, layout, direction, [initial_h], r.shape[-1], step_of)


def lstm(
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    sequence_lens: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    p: Tensor | None = None,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """LSTM, gates in the order i, o, f, c and peepholes i, o, f: (Y, Y_h, Y_c)."""
    names = activations or ["Sigmoid", "Tanh", "Tanh"] * _DIRECTIONS[direction]
    bound = _activations(names, activation_alpha, activation_beta, clip)

    def step_of(d: int) -> Step:
        f, g, last = bound[3 * d : 3 * d + 3]
        bias_w, bias_r = _bias(b, d, w)
        peep_i, peep_o, peep_f = p[d].chunk(3) if p is not None else [x.new_zeros(r.shape[-1])] * 3

        def step(x_t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            h, c = state
            gates = F.linear(x_t, w[d], bias_w) + F.linear(h, r[d], bias_r)
            i, o, forget, new = gates.chunk(4, -1)
            i = f(i + peep_i * c)
            forget = 1 - i if input_forget else f(forget + peep_f * c)
            c = forget * c + i * g(new)
            o = f(o + peep_o * c)
            return o * last(c), c

        return step

    return _run(x, sequence_lens, layout, direction, [initial_h, initial_c], r.shape[-1], step_of)


ROWS: dict[str, Row] = {"RNN": row(rnn), "GRU": row(gru), "LSTM": row(lstm)}
