"""Operators that move elements and regroup dims, without looking at them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from netlathe.analysis.axes.algebra import Size, divide
from netlathe.analysis.axes.signature import Signature, Site, Spot, Table, named
from netlathe.ir import dims
from netlathe.ir.dims import Shape


def _reshape(s: Site) -> Signature:
    """Factors split and merged. A 0 of the target copies a dim, a -1 is what is left: both stay."""
    before, after, sizes = regrouped(s)
    uses: dict[Spot, str] = {}
    for element, (size, term) in enumerate(zip(s.out(), after, strict=True)):
        number = s.element(1, element)
        copies = number == 0 and element < len(before) and before[element] == term
        if size != 1 and number != -1 and not copies:
            uses[1, element] = term
    return _moved(f"{' '.join(before)}, _", after, sizes, uses)


def _flatten(s: Site) -> Signature:
    before, after, sizes = regrouped(s)
    return _moved(" ".join(before), after, sizes, {})


def _moved(
    before: str, after: Sequence[str], sizes: Mapping[str, Size], uses: Mapping[Spot, str]
) -> Signature:
    rule = f"{before} -> {' '.join(after)}"
    return Signature(rule, sizes=sizes, uses=uses, linear="0", moves=True)


def regrouped(s: Site) -> tuple[list[str], list[str], dict[str, Size]]:
    """Dims of input and output as products of common factors, and the sizes of the factors.

    ``[b, 6, 4]`` to ``[b, 2, 12]`` is ``b (x y) z -> b x (y z)`` with x=2, y=3, z=4.
    """
    before: list[list[str]] = [[] for _ in s.shape()]
    after: list[list[str]] = [[] for _ in s.out()]
    sizes: dict[str, Size] = {}
    left, right = _rooms(s.shape()), _rooms(s.out())
    while left and right:
        (i, a), (j, b) = left.pop(), right.pop()
        if dims.same(a, b):
            size = a
        elif (rest := divide(b, a)) is not None:
            size = a
            right.append((j, rest))
        elif (rest := divide(a, b)) is not None:
            size = b
            left.append((i, rest))
        else:
            s.refuse(f"regroups {dims.show(s.shape())} as {dims.show(s.out())}, across factors")
        letter = f"f{len(sizes)}"
        sizes[letter] = size
        before[i].append(letter)
        after[j].append(letter)
    if left or right:
        s.refuse(f"makes {dims.show(s.out())} of {dims.show(s.shape())}")
    return [_term(letters) for letters in before], [_term(letters) for letters in after], sizes


def _rooms(shape: Shape) -> list[tuple[int, Size]]:
    """Dims of more than one position, the first one last."""
    return [(index, dim) for index, dim in enumerate(shape) if dim is not None and dim != 1][::-1]


def _term(letters: Sequence[str]) -> str:
    if not letters:
        return "1"
    return letters[0] if len(letters) == 1 else f"({' '.join(letters)})"


def _transpose(s: Site) -> Signature:
    letters = named("d", s.rank())
    perm = s.integers("perm") or range(len(letters))[::-1]
    return _moved(" ".join(letters), [letters[axis] for axis in perm], {}, {})


def _squeeze(s: Site) -> Signature:
    letters = named("d", s.rank())
    axes = s.ints(1)
    if axes is None:
        s.refuse("drops dims that are computed")
    gone = {axis % len(letters) for axis in axes}
    left = [letter for index, letter in enumerate(letters) if index not in gone]
    before = ["1" if index in gone else letter for index, letter in enumerate(letters)]
    return _moved(f"{' '.join(before)}, _", left, {}, {})


def _unsqueeze(s: Site) -> Signature:
    letters = named("d", s.rank())
    axes = s.ints(1)
    if axes is None:
        s.refuse("adds dims that are computed")
    rank = len(s.out())
    new = {axis % rank for axis in axes}
    rest = iter(letters)
    after = ["1" if index in new else next(rest) for index in range(rank)]
    return _moved(f"{' '.join(letters)}, _", after, {}, {})


def _expand(s: Site) -> Signature:
    """A dim of one position becomes a new axis, whose size the target states."""
    out = s.out()
    missing = len(out) - s.rank()
    target = s.node.inputs[1]
    listed = None if target is None or target.shape is None else target.shape[0]
    before: list[str] = []
    after: list[str] = []
    uses: dict[Spot, str] = {}
    for axis, size in enumerate(out):
        given = s.shape()[axis - missing] if axis >= missing else None
        letter = "1" if size == 1 else f"d{axis}"
        after.append(letter)
        if given is not None:
            if given != 1 and not dims.same(given, size):
                s.refuse(f"may or may not repeat dim {axis}")
            before.append(letter if dims.same(given, size) else "1")
        element = axis - len(out) + listed if isinstance(listed, int) else axis
        if element >= 0 and size != 1 and s.element(1, element) != 1:
            uses[1, element] = letter
    return _moved(f"{' '.join(before)}, _", after, {}, uses)


def _tile(s: Site) -> Signature:
    """``x`` repeated r times is ``(r x)``."""
    before: list[str] = []
    after: list[str] = []
    uses: dict[Spot, str] = {}
    for axis, (given, size) in enumerate(zip(s.shape(), s.out(), strict=True)):
        letter = "1" if given == 1 else f"d{axis}"
        before.append(letter)
        if dims.same(given, size):
            after.append(letter)
            continue
        after.append(f"r{axis}" if given == 1 else f"(r{axis} {letter})")
        uses[1, axis] = f"r{axis}"
    return _moved(f"{' '.join(before)}, _", after, {}, uses)


_BLOCKS = "lays blocks of them out in space"


def _depth_to_space(s: Site) -> Signature:
    """Pixel shuffle: r rows of q columns, which are as many, leave the channels."""
    channels = "(r q c)" if s.text("mode", "DCR") == "DCR" else "(c r q)"
    size = s.integer("blocksize")
    return Signature(
        f"b {channels} h w -> b c (h r) (w q)",
        sizes={"r": size, "q": size},
        fixed={"r q": _BLOCKS},
        linear="0",
        moves=True,
    )


def _space_to_depth(s: Site) -> Signature:
    size = s.integer("blocksize")
    return Signature(
        "b c (h r) (w q) -> b (r q c) h w",
        sizes={"r": size, "q": size},
        fixed={"r q": _BLOCKS},
        linear="0",
        moves=True,
    )


TABLE: Table = {
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "SpaceToDepth": _space_to_depth,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
