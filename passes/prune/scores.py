"""What makes a position important: one number for each position of a candidate, larger = more important.

Weights alone give ``l1``, ``l2``, ``group_norm``, ``fpgm``, ``bn_gamma``; the activation that a position is
summed over in gives ``wanda``, ``flap`` and ``cfsp``; the gradient of a loss at that activation gives
``taylor`` and ``obd``; runs with one position masked give ``optin``. Activations and gradients are those of
the model as it is before the pass, all from one sweep. All sums are in float64. Of tokens the calibration
data itself gives ``frequency``.

Notation: j is a position, x_j the activation of it (over all rows of the calibration data), W_j the rows
of the weights that sum over it (its *readers*), V_j those that make it (its *writers*). Of several readers
or activations scores are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from netlathe.analysis.branches import residual_branches
from netlathe.diagnostics import Diagnostic, PassError, missing_extra
from netlathe.ir import edit, weights
from netlathe.passes.prune.candidates import Candidate, Part, Scores
from netlathe.passes.prune.vocabulary import counts, vocabularies
from netlathe.pipeline.pass_ import Context

if TYPE_CHECKING:
    from netlathe.execute.gradients import GateStatistic
    from netlathe.execute.statistics import Statistic

Float64 = npt.NDArray[np.float64]
Place = tuple[str, int]  # an activation and its axis

_TINY = np.finfo(np.float64).tiny
_AT_ONCE = 1 << 22  # elements of a weight that are held in float64 at a time


@dataclass(frozen=True)
class Score:
    """``measure`` gives one array ``[size]`` for each candidate, in order; ``needs_data`` says of what."""

    measure: Callable[[Sequence[Candidate], ir.Model, Context], list[Scores]]
    needs_data: bool = False


def measure(
    name: str, candidates: Sequence[Candidate], model: ir.Model, ctx: Context
) -> dict[Candidate, Scores]:
    """The scores called ``name`` of all candidates.

    Raises:
        PassError: it needs calibration data and there is none; it says nothing about some candidate; a
            score is not finite.
    """
    score = SCORES[name]
    if score.needs_data and not ctx.calibration:
        ctx.collect(model, [], needed_by=f"prune(score={name!r})")  # raises, in one place for all

    def compute() -> dict[str, Float64]:
        each = score.measure(candidates, model, ctx)
        return {c.name: scores for c, scores in zip(candidates, each, strict=True)}

    piece = f"{name} of {len(candidates)} widths"
    arrays = ctx.once(piece, compute) if score.needs_data else compute()
    found = {candidate: np.asarray(arrays[candidate.name]) for candidate in candidates}
    for candidate, scores in found.items():
        if not np.isfinite(scores).all():
            at = int(np.flatnonzero(~np.isfinite(scores))[0])
            message = f"the {name} score of position {at} of {candidate.name} is {scores[at]}"
            raise PassError(Diagnostic("prune.score", message, where=candidate.where))
    return found


def speaks_about(name: str, candidate: Candidate) -> bool:
    """Whether a score that looks at what a position is summed over in finds that: of experts it does not.

    How often ids occur says something about tokens alone.
    """
    if name == "frequency":
        return candidate.scope == "vocab"
    return not SCORES[name].needs_data or bool(_read_once(candidate))


# -- from weights ---------------------------------------------------------------------------------------


def _writers(candidate: Candidate) -> Sequence[Part]:
    """What a position is made by; of an expert, and where nothing writes, all that it holds."""
    of = candidate.writers if candidate.scope != "experts" else candidate.with_role("holds")
    return of or candidate.parts


def _norm(power: int) -> Callable[[Candidate], Scores]:
    """The l1 or l2 norm of V_j (Li et al., arXiv 1608.08710, section 3.1, for filters)."""

    def score(candidate: Candidate) -> Scores:
        total = np.zeros(candidate.size)
        for part in _writers(candidate):
            total += _by_position(candidate, part.index, _row_sums(part, power))
        return total if power == 1 else np.sqrt(total)

    return score


def _group_norm(candidate: Candidate) -> Scores:
    """The l2 norm of all weights that go with a position, readers and gains and biases included.

    DepGraph (arXiv 2301.12900), section 3.3: the importance of a group is added up over its parameters.
    """
    once = {(part.value, part.dim): part for part in candidate.parts}
    total = np.zeros(candidate.size)
    for part in once.values():
        total += _by_position(candidate, part.index, _row_sums(part, 2))
    return np.sqrt(total)


def _fpgm(candidate: Candidate) -> Scores:
    """Sum of the distances of V_j to all other V_k: near the geometric median is replaceable.

    FPGM (arXiv 1811.00250), section 3.3, equations 4 to 6. A distance is that of all writers together.
    """
    size = candidate.size
    products = np.zeros((size, size))  # V_j . V_k
    for part in _writers(candidate):
        moved = np.moveaxis(weights.array(part.value), part.dim, 0)
        flat = moved.reshape(len(moved), -1)
        order = [part.rows(position) for position in range(size)]
        if not len(order[0]) or len({len(rows) for rows in order}) > 1:
            continue
        step = max(1, _AT_ONCE // (size * len(order[0])))
        for start in range(0, flat.shape[1], step):
            piece = flat[np.concatenate(order), start : start + step].astype(np.float64)
            piece = piece.reshape(size, -1)
            products += piece @ piece.T
    squares = np.diag(products)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * products, 0.0))
    np.fill_diagonal(distances, 0.0)  # rounding apart, it is
    return np.asarray(distances.sum(1))


def _bn_gamma(candidate: Candidate) -> Scores:
    """|gamma| of the batch norms over the axis (Network Slimming, arXiv 1708.06519, section 3)."""
    total, found = np.zeros(candidate.size), False
    for part in candidate.with_role("acts"):
        if part.node.op_type == "BatchNormalization" and part.value is part.node.inputs[1]:
            total += _by_position(candidate, part.index, _row_sums(part, 1))
            found = True
    if not found:
        raise _says_nothing("bn_gamma", candidate, "no batch norm normalizes it")
    return total


def _random(candidates: Sequence[Candidate], model: ir.Model, ctx: Context) -> list[Scores]:
    """Uniform numbers that depend on the seed and the candidate's name: the baseline to beat."""
    return [np.asarray(ctx.rng("prune", c.name).random(c.size)) for c in candidates]


def _row_sums(part: Part, power: int) -> Float64:
    """The sum of |w|^power over each row along the part's dim."""
    moved = np.moveaxis(weights.array(part.value), part.dim, 0)
    rows = np.empty(len(moved))
    step = max(1, _AT_ONCE // max(1, moved[:1].size))
    for start in range(0, len(moved), step):
        wide = np.abs(moved[start : start + step].astype(np.float64)) ** power
        rows[start : start + step] = wide.reshape(len(wide), -1).sum(1)
    return rows


def _by_position(candidate: Candidate, index: npt.NDArray[np.int64], of: Float64) -> Scores:
    """What rows or channels have, added up over each position."""
    owned = index >= 0
    return np.bincount(index[owned], of[owned], candidate.size).astype(np.float64)


def _each(score: Callable[[Candidate], Scores]) -> Score:
    return Score(lambda candidates, model, ctx: [score(candidate) for candidate in candidates])


# -- from ids -------------------------------------------------------------------------------------------


def _frequency(candidates: Sequence[Candidate], model: ir.Model, ctx: Context) -> list[Scores]:
    """How often a token occurs in the calibration data; of equal ones the larger l2 norm of V_j counts.

    Padding that the data has counts as what it is padded with.
    """
    for candidate in candidates:
        if not speaks_about("frequency", candidate):
            raise _says_nothing("frequency", candidate, "its positions are no tokens")
    occurrences = {
        candidate: counts(vocabulary, ctx.calibration)
        for vocabulary in vocabularies(candidates)[0]
        for candidate in vocabulary.candidates
    }
    norm = _norm(2)
    found = []
    for candidate in candidates:
        norms = norm(candidate)
        # Less than one occurrence.
        found.append(occurrences[candidate] + norms / (2 * max(norms.max(), _TINY)))
    return found


# -- from activations -------------------------------------------------------------------------------------


def _wanda(candidates: Sequence[Candidate], model: ir.Model, ctx: Context) -> list[Scores]:
    """Sum of |w| * ||x_j||_2 over W_j, with the mean square over rows in place of the sum.

    Wanda (arXiv 2306.11695), section 3, equation 1; of a whole position its weights' scores are added.
    """

    def score(weight: Float64, square: Float64, _: Float64) -> Float64:
        return np.asarray(weight * np.sqrt(square))

    return _from_activations("wanda", candidates, model, ctx, score, power=1)


def _flap(candidates: Sequence[Candidate], model: ir.Model, ctx: Context) -> list[Scores]:
    """Var(x_j) * ||W_j||_2^2: what is lost if x_j becomes its mean (weighted input feature variance).

    FLAP (arXiv 2312.11983), section 3, "WIFV". The released code squares the scores of attention once more;
    here all are in the same units, the squared error of the readers' output.
    """

    def score(weight: Float64, square: Float64, mean: Float64) -> Float64:
        return np.asarray(weight * np.maximum(square - mean**2, 0.0))

    return _from_activations("flap", candidates, model, ctx, score, power=2)


def _cfsp(candidates: Sequence[Candidate], model: ir.Model, ctx: Context) -> list[Scores]:
    """||x_j||_2, with the mean square over rows in place of the sum.

    CFSP (arXiv 2409.13199), fine-grained score, as its released code has it: there the weights' terms are
    normalized to sum 1 for each neuron, which leaves this factor.
    """

    def score(_: Float64, square: Float64, __: Float64) -> Float64:
        return np.sqrt(square)

    return _from_activations("cfsp", candidates, model, ctx, score, power=1)


def _from_activations(
    name: str,
    candidates: Sequence[Candidate],
    model: ir.Model,
    ctx: Context,
    score: Callable[[Float64, Float64, Float64], Float64],
    *,
    power: int,
) -> list[Scores]:
    """``score`` of what readers weigh a channel with, its mean square, and its mean."""
    try:
        from netlathe.execute.statistics import Mean, MeanSquare
    except ModuleNotFoundError as error:
        raise missing_extra("torch", "torch", f"prune(score={name!r})") from error
    places = list(dict.fromkeys(p for c in candidates for p in activations(name, c)))
    wanted: list[Statistic] = [of(*place) for place in places for of in (MeanSquare, Mean)]
    results = [r.array for r in ctx.collect(model, wanted, needed_by=f"prune(score={name!r})")]
    known = {place: results[2 * i : 2 * i + 2] for i, place in enumerate(places)}
    found = []
    for candidate in candidates:
        total = np.zeros(candidate.size)
        for part, place in _read_at(candidate):
            square, mean = known[place]
            rows = _row_sums(part, power)
            index = _index(candidate, place, part)
            if len(rows) != len(square):  # a grouped kernel has the rows of one group only
                rows = np.full(len(square), rows.mean())
            total += _by_position(candidate, index, score(rows, square, mean))
        found.append(total)
    return found


# -- from gradients -----------------------------------------------------------------------------------------


def _taylor(candidates: Sequence[Candidate], model: ir.Model, ctx: Context) -> list[Scores]:
    """E|x_j g_j|, the first-order change of the loss if x_j becomes 0, g being its gradient.

    Molchanov et al. (arXiv 1611.06440), section 2.2, equations 7 and 8: the magnitude is taken for each
    example and averaged over them. An example is what has a label: an image, a token. A gate's sum is not
    divided by the number of its pixels. The loss is that of the labels given, or of the next token.
    """
    return _from_gradients("taylor", candidates, model, ctx)


def _obd(candidates: Sequence[Candidate], model: ir.Model, ctx: Context) -> list[Scores]:
    """E[(x_j g_j)^2] / 2, the second-order change of the loss if x_j becomes 0.

    Optimal Brain Damage (LeCun et al., 1990, section 2, equation 5: h u^2 / 2) for the gate of a position,
    u = 1, with the Fisher information of the model's own output for its Hessian h (Kwon et al.,
    arXiv 2204.09656, section 3.2): x_j g_j is summed over all that shares a label, then squared. It needs no
    labels, and is in nats per label where the output is logits.
    """
    found = _from_gradients("obd", candidates, model, ctx)
    return [total / 2 for total in found]


def _from_gradients(
    name: str, candidates: Sequence[Candidate], model: ir.Model, ctx: Context
) -> list[Scores]:
    try:
        from netlathe.execute import gradients
    except ModuleNotFoundError as error:
        raise missing_extra("torch", "torch", f"prune(score={name!r})") from error
    kind = gradients.GateMagnitude if name == "taylor" else gradients.GateFisher
    objective = gradients.Objective.DATA if name == "taylor" else gradients.Objective.CURVATURE
    wanted: dict[Candidate, list[GateStatistic]] = {
        candidate: [
            kind(*place, tuple(candidate.index(part.activation, part.axis).tolist()))
            for part, place in _read_once(candidate)
            if part.activation is not None
        ]
        for candidate in candidates
    }
    for candidate in candidates:
        activations(name, candidate)
    every = list(dict.fromkeys(s for statistics in wanted.values() for s in statistics))
    results = gradients.sweep(
        model,
        ctx.calibration,
        every,
        objective,
        device=ctx.device,
        progress=ctx.progress,
        seed=ctx.seed,
    )
    known = {result.statistic: result.array for result in results}
    found = []
    for candidate in candidates:
        total = np.zeros(candidate.size)
        for statistic in wanted[candidate]:
            total += known[statistic]
        found.append(total)
    return found


# -- from masked runs -------------------------------------------------------------------------------------


def _optin(candidates: Sequence[Candidate], model: ir.Model, ctx: Context) -> list[Scores]:
    """How far the residual stream and the output go astray behind a position that is masked.

    OPTIN (arXiv 2403.17921), section 3: the importance of a unit is its trajectory, the change of all later
    features and of the output when it alone is masked. Here the change is |after - before|^2 / |before|^2,
    of the stream behind each residual branch and of the first output, added up. (The released code takes the
    squared change of the cosines between 768 sampled rows, and the KL of logits at temperature 4.) It takes a
    run of the whole model for each position, on the first feed of the calibration data.
    """
    try:
        from netlathe.execute.executor import Executor
    except ModuleNotFoundError as error:
        raise missing_extra("torch", "torch", "prune(score='optin')") from error
    places = list(dict.fromkeys(p for c in candidates for p in activations("optin", c)))
    probed, gates = _gated(model, places)
    watched = [b.total.name or "" for b in residual_branches(model)]
    watched += [v.name or "" for v in model.graph.outputs[:1]]
    watched = list(dict.fromkeys(watched))
    executor = Executor(probed, ctx.device, keep_weights=True)
    whole = {name: np.ones(size, dtype) for name, size, dtype in gates.values()}
    feeds = {**ctx.calibration[0], **whole}
    before = {n: t.double() for n, t in executor.run(feeds, watched).items()}
    norms = {name: max(float(t.square().sum()), _TINY) for name, t in before.items()}
    work = [(c, position) for c in candidates for position in range(c.size)]
    found = {candidate: np.zeros(candidate.size) for candidate in candidates}
    for candidate, position in ctx.progress.track(work, "masking positions", len(work)):
        masked = dict(feeds)
        for part, place in _read_once(candidate):
            name, _, dtype = gates[place]
            assert part.activation is not None
            stays = candidate.index(part.activation, part.axis) != position
            masked[name] = stays.astype(dtype)
        for name, after in executor.run(masked, watched).items():
            change = float((after.double() - before[name]).square().sum())
            found[candidate][position] += change / norms[name]
    return [found[candidate] for candidate in candidates]


def _gated(
    model: ir.Model, places: Sequence[Place]
) -> tuple[ir.Model, dict[Place, tuple[str, int, np.dtype[Any]]]]:
    """A copy in which activations are multiplied by inputs, one number a channel; these inputs."""
    probed = model.clone()
    graph = probed.graph
    values = {v.name: v for node in graph for v in node.outputs}
    taken = edit.names_in(graph)
    gates: dict[Place, tuple[str, int, np.dtype[Any]]] = {}
    for place in places:
        value = values[place[0]]
        assert value.shape is not None and value.dtype is not None
        rank, axis = len(value.shape), place[1] % len(value.shape)
        size = value.shape[axis]
        assert isinstance(size, int)
        name = edit.unique_name(graph, f"{value.name}/gate", taken)
        gate = ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(value.dtype))
        graph.inputs.append(gate)
        shape = edit.constant(
            graph, np.array([-1 if at == axis else 1 for at in range(rank)]), f"{name}/shape", taken
        )
        wide = edit.node("Reshape", [gate, shape], dtype=value.dtype)
        product = edit.node("Mul", [value, wide.outputs[0]], dtype=value.dtype, shape=value.shape)
        readers = [use for use in value.uses() if use.node is not product]
        maker = value.producer()
        assert maker is not None
        graph.insert_after(maker, [wide, product])
        for use in readers:
            use.node.replace_input_with(use.idx, product.outputs[0])
        gates[place] = name, size, value.dtype.numpy()
    return probed, gates


# -- what reads a candidate ---------------------------------------------------------------------------------


def activations(name: str, candidate: Candidate) -> list[Place]:
    """The activations that a candidate's positions are summed over in.

    Raises:
        PassError: there is none, so that a score called ``name`` says nothing.
    """
    found = [place for _, place in _read_once(candidate)]
    if not found:
        raise _says_nothing(name, candidate, "no product with a weight sums over it")
    return found


def _read_at(candidate: Candidate) -> Iterator[tuple[Part, Place]]:
    for part in candidate.readers:
        if part.activation is not None:
            yield part, (part.activation.name or "", part.axis)


def _read_once(candidate: Candidate) -> list[tuple[Part, Place]]:
    """A reader for each activation: what several read counts once."""
    return [(part, place) for place, part in {at: part for part, at in _read_at(candidate)}.items()]


def _index(candidate: Candidate, place: Place, part: Part) -> npt.NDArray[np.int64]:
    assert part.activation is not None
    return candidate.index(part.activation, part.axis)


def _says_nothing(name: str, candidate: Candidate, why: str) -> PassError:
    return PassError(
        Diagnostic(
            "prune.score",
            f"score={name!r} says nothing about {candidate.name}: {why}",
            where=candidate.where,
            help="choose another score, such as l2, narrow the scope, or ignore the module",
        )
    )


SCORES: Mapping[str, Score] = {
    "l1": _each(_norm(1)),
    "l2": _each(_norm(2)),
    "group_norm": _each(_group_norm),
    "fpgm": _each(_fpgm),
    "bn_gamma": _each(_bn_gamma),
    "wanda": Score(_wanda, needs_data=True),
    "flap": Score(_flap, needs_data=True),
    "cfsp": Score(_cfsp, needs_data=True),
    "taylor": Score(_taylor, needs_data=True),
    "obd": Score(_obd, needs_data=True),
    "optin": Score(_optin, needs_data=True),
    "frequency": Score(_frequency, needs_data=True),
    "random": Score(_random),
}
