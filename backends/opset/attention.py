"""Attention and RotaryEmbedding (opset 23 to 25) in terms of MatMul, Softmax and Slice.

The formulas are those of the ONNX operator pages. Query heads that share a key / value head are
folded into the sequence axis, [b, kv*r, s, h] -> [b, kv, r*s, h], so that keys are never repeated
in memory and every Reshape has a literal shape.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .builder import Builder, Gap

_FEATURES_OF_25 = ("left_window_size", "right_window_size")


def attention(b: Builder) -> list[ir.Value] | None:
    """Attention: kept from opset 23 on while its features exist there, else written out."""
    windowed = any(b.attribute(name, -1) >= 0 for name in _FEATURES_OF_25)
    if b.opset >= 23 and not windowed and (b.opset >= 24 or b.input(6) is None):
        for name in _FEATURES_OF_25:
            b.node.attributes.pop(name, None)
        return None
    return _Attention(b).write()


class _Attention:
    """One Attention node, 4-D or 3-D, being written out."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        query, key, value = b.need(0), b.need(1), b.need(2)
        self.dtype = b.dtype(query)
        if b.dtype(value) != self.dtype:
            raise Gap("Attention mixes the types of keys and values")
        self.is_flat = b.rank(query) == 3
        if self.is_flat:
            self.q_heads = int(b.attribute("q_num_heads"))
            self.kv_heads = int(b.attribute("kv_num_heads"))
            head_dim = b.dims(query)[2]
            self.head_dim = head_dim // self.q_heads if isinstance(head_dim, int) else None
        else:
            q_heads, kv_heads = b.dims(query)[1], b.dims(key)[1]
            if not isinstance(q_heads, int) or not isinstance(kv_heads, int):
                raise Gap("the number of heads is dynamic")
            self.q_heads, self.kv_heads = q_heads, kv_heads
            head_dim = b.dims(query)[3]
            self.head_dim = head_dim if isinstance(head_dim, int) else None
        self.query = self._heads(query, self.q_heads)
        self.new_key = self._heads(key, self.kv_heads)
        self.new_value = self._heads(value, self.kv_heads)
        self.past_key, self.past_value = b.input(4), b.input(5)
        self.key, self.value = self.new_key, self.new_value
        if self.past_key is not None and self.past_value is not None:
            self.key = b("Concat", self.past_key, self.new_key, axis=2)
            self.value = b("Concat", self.past_value, self.new_value, axis=2)
        self.mask = b.input(3)
        self.valid = b.input(6)  # nonpad_kv_seqlen: int64 [b]

    def _heads(self, x: ir.Value, heads: int) -> ir.Value:
        """[b, s, heads*h] -> [b, heads, s, h]; 4-D as it is."""
        if not self.is_flat:
            return x
        return self.b("Transpose", self.b.reshape(x, [0, 0, heads, -1]), perm=[0, 2, 1, 3])

    def write(self) -> list[ir.Value]:
        """The outputs: Y, present_key, present_value, qk_matmul_output, as many as the node has."""
        b = self.b
        stages = [self._scores()]  # 0: scaled product, [b, hq, s, t]
        cap = float(b.attribute("softcap", 0.0))
        capped = stages[0]
        if cap != 0.0:
            inner = b("Tanh", b("Div", capped, b.like(cap, capped)))
            capped = b("Mul", inner, b.like(cap, capped))
        stages.append(capped)  # 1: after the soft cap
        allowed = self._allowed()
        biased = capped
        if self.mask is not None and self.mask.dtype != ir.DataType.BOOL:
            biased = b("Add", biased, self._padded_mask())
        if allowed is not None:
            biased = b("Where", allowed, biased, b.like(-math.inf, biased))
        stages.append(biased)  # 2: with the bias
        stages.append(self._softmax(biased))  # 3: probabilities
        y = self._merge(self._grouped(stages[3]), self.value, self.q_heads)
        if self.is_flat:
            y = b.reshape(b("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, -1])
        mode = int(b.attribute("qk_matmul_output_mode", 0))
        outputs = [y, self.key, self.value, stages[mode]]
        return outputs[: len(b.node.outputs)]

    # -- scores ----------------------------------------------------------------------------------

    def _scores(self) -> ir.Value:
        b = self.b
        scale = b.attribute("scale")
        if scale is None:
            if self.head_dim is None:
                raise Gap("Attention has no scale and its head size is dynamic")
            scale = 1 / math.sqrt(self.head_dim)
        # Both factors carry sqrt(scale), as the operator page says: half precision stays in range.
        root = b.like(math.sqrt(scale), self.query)
        query = b("Mul", self._grouped(self.query), root)
        key = b("Transpose", b("Mul", self.key, root), perm=[0, 1, 3, 2])
        return self._merge(query, key, self.q_heads)

    def _grouped(self, x: ir.Value) -> ir.Value:
        """[b, kv*r, s, k] -> [b, kv, r*s, k]."""
        if self.q_heads == self.kv_heads:
            return x
        return self.b.reshape(x, [0, self.kv_heads, -1, 0])

    def _merge(self, grouped: ir.Value, right: ir.Value, heads: int) -> ir.Value:
        """[b, kv, r*s, k] @ [b, kv, k, n] -> [b, kv*r, s, n]."""
        product = self.b("MatMul", grouped, right)
        if self.q_heads == self.kv_heads:
            return product
        return self.b.reshape(product, [0, heads, -1, 0])

    # -- masks -----------------------------------------------------------------------------------

    def _padded_mask(self) -> ir.Value:
        """attn_mask; a last dim shorter than the keys is filled up with positions not attended."""
        b, mask = self.b, self.mask
        assert mask is not None
        if b.dims(mask)[-1] is not None and b.dims(mask)[-1] == self._total():
            return mask
        is_bool = mask.dtype == ir.DataType.BOOL
        missing = b("Sub", self._key_length(), b.length(mask, -1 % b.rank(mask)))
        zeros = b.const([0] * (2 * b.rank(mask) - 1))
        pads = b("Concat", zeros, missing, axis=0)
        # Pad takes bool from opset 13 on in the schema but not in every runtime: pad as a number.
        number = b.cast(mask, ir.DataType.FLOAT) if is_bool else mask
        fill = b.like(0.0 if is_bool else -math.inf, number)
        padded = b("Pad", number, pads, fill, mode="constant")
        return b.cast(padded, ir.DataType.BOOL) if is_bool else padded

    def _total(self) -> int | str | None:
        """The number of keys as an int or the name of a dynamic dim, where one is known."""
        axis = 1 if self.is_flat else 2
        if self.past_key is None:
            return self.b.dims(self.b.need(1))[axis]
        if len(self.b.node.outputs) > 1 and self.b.node.outputs[1].shape is not None:
            return self.b.dims(self.b.node.outputs[1])[2]
        return None

    def _query_length(self) -> ir.Value:
        return self.b.length(self.b.need(0), 1 if self.is_flat else 2)

    def _past_length(self) -> ir.Value:
        return self.b.length(self.past_key, 2) if self.past_key is not None else self.b.const([0])

    def _key_length(self) -> ir.Value:
        own = self.b.length(self.b.need(1), 1 if self.is_flat else 2)
        return own if self.past_key is None else self.b("Add", own, self._past_length())

    def _allowed(self) -> ir.Value | None:
        """Which (query, key) pairs attend, as bool broadcastable to [b, hq, s, t]; None: all."""
        b = self.b
        found = []
        if self.mask is not None and self.mask.dtype == ir.DataType.BOOL:
            found.append(self._padded_mask())
        positional = self._positional()
        if positional is not None:
            found.append(positional)
        if self.valid is not None:  # keys beyond each sample's length: [b, 1, 1, t]
            columns = self._range(self._key_length())
            found.append(b("Less", columns, b.unsqueeze(self.valid, [1, 2, 3])))
        if not found:
            return None
        allowed = found[0]
        for other in found[1:]:
            allowed = b("And", allowed, other)
        return allowed

    def _positional(self) -> ir.Value | None:
        """The causal and window conditions, [s, t], or [b, 1, s, t] with per-sample lengths."""
        b = self.b
        causal = bool(b.attribute("is_causal", 0))
        left, right = (int(b.attribute(name, -1)) for name in _FEATURES_OF_25)
        if not causal and left < 0 and right < 0:
            return None
        rows, columns = self._dims_known()
        past = 0 if self.past_key is None else b.dims(self.past_key)[2]
        # Layers with the same dims share one mask; a dim of unknown name is shared with nothing.
        key = (id(b.graph), causal, left, right, rows, columns, past)
        shareable = self.valid is None and None not in (rows, columns, past)
        found = b.shared.results.get(key) if shareable else None
        if found is not None and found.graph is not None:  # else its readers went, and it with them
            return found
        if shareable and isinstance(rows, int) and isinstance(columns, int) and past == 0:
            ahead = np.arange(columns)[None, :] - np.arange(rows)[:, None]  # key minus query
            keep = np.ones_like(ahead, bool)
            keep &= (ahead <= 0) | (not causal)
            keep &= (ahead >= -left) | (left < 0)
            keep &= (ahead <= right) | (right < 0)
            result = b.const(keep, ir.DataType.BOOL)
        else:
            result = self._positions(causal, left, right)
        if shareable:
            b.shared.results[key] = result
        return result

    def _dims_known(self) -> tuple[int | str | None, int | str | None]:
        axis = 1 if self.is_flat else 2
        return self.b.dims(self.b.need(0))[axis], self.b.dims(self.b.need(1))[axis]

    def _positions(self, causal: bool, left: int, right: int) -> ir.Value:
        b = self.b
        queries = b.unsqueeze(self._range(self._query_length()), [1])  # [s, 1]
        if self.valid is not None:  # the last query sits at the sample's last valid key
            offset = b("Sub", self.valid, self._query_length())
            queries = b("Add", queries, b.unsqueeze(offset, [1, 2, 3]))  # [b, 1, s, 1]
        elif self.past_key is not None:
            queries = b("Add", queries, self._past_length())
        ahead = b("Sub", self._range(self._key_length()), queries)
        conditions = []
        if causal:
            conditions.append(b("LessOrEqual", ahead, b.const(0)))
        if left >= 0:
            conditions.append(b("GreaterOrEqual", ahead, b.const(-left)))
        if right >= 0:
            conditions.append(b("LessOrEqual", ahead, b.const(right)))
        allowed = conditions[0]
        for other in conditions[1:]:
            allowed = b("And", allowed, other)
        return allowed

    def _range(self, length: ir.Value) -> ir.Value:
        """[0, 1, ..., length - 1] for a length of shape [1]."""
        b = self.b
        stop = b("Squeeze", length, b.const([0]))
        return b("Range", b.const(0), stop, b.const(1))

    # -- softmax ---------------------------------------------------------------------------------

    def _softmax(self, scores: ir.Value) -> ir.Value:
        b = self.b
        precision = b.attribute("softmax_precision")
        wide = b.cast(scores, ir.DataType(precision)) if precision else scores
        probabilities = b.cast(b("Softmax", wide, axis=-1), self.dtype)
        # Without a mask every query attends a key: its own position, or key 0 where it has no past.
        windowed = any(int(b.attribute(name, -1)) >= 0 for name in _FEATURES_OF_25)
        if self.mask is None and self.valid is None and not windowed:
            return probabilities
        # A query that attends no key yields zeros, where Softmax alone would yield NaN.
        best = b("ReduceMax", scores, b.const([-1]), keepdims=1)
        best = b.cast(best, ir.DataType.FLOAT)
        nothing = b("Equal", best, b.like(-math.inf, best))
        return b("Where", nothing, b.like(0.0, probabilities), probabilities)


def rotary_embedding(b: Builder) -> list[ir.Value]:
    """RotaryEmbedding: x1 * cos - x2 * sin, x1 * sin + x2 * cos over the first rotary dims."""
    x, cos, sin, positions = b.need(0), b.need(1), b.need(2), b.input(3)
    if positions is not None:  # caches [max, r/2] -> [b, s, r/2]
        cos, sin = b("Gather", cos, positions, axis=0), b("Gather", sin, positions, axis=0)
    is_flat = b.rank(x) == 3
    size = b.dims(x)[-1]
    if not isinstance(size, int):
        raise Gap("the head size of RotaryEmbedding is dynamic")
    whole = x
    if is_flat:  # [b, s, heads*h] -> [b, s, heads, h]
        heads = int(b.attribute("num_heads", 0))
        if heads == 0:
            raise Gap("RotaryEmbedding of a 3-D input has no num_heads")
        whole = b.reshape(x, [0, 0, heads, -1])
        size //= heads
    cos, sin = (b.unsqueeze(table, [2 if is_flat else 1]) for table in (cos, sin))
    rotary = int(b.attribute("rotary_embedding_dim", 0)) or size
    half = rotary // 2
    if b.attribute("interleaved", 0):
        pairs = b.reshape(b.slice(whole, 3, 0, rotary), [0, 0, 0, half, 2])
        first, second = (b("Squeeze", b.slice(pairs, 4, i, i + 1), b.const([4])) for i in (0, 1))
    else:
        first, second = b.slice(whole, 3, 0, half), b.slice(whole, 3, half, rotary)
    real = b("Sub", b("Mul", first, cos), b("Mul", second, sin))
    imaginary = b("Add", b("Mul", first, sin), b("Mul", second, cos))
    if b.attribute("interleaved", 0):
        parts = [b.unsqueeze(real, [4]), b.unsqueeze(imaginary, [4])]
        rotated = b.reshape(b("Concat", *parts, axis=4), [0, 0, 0, rotary])
    else:
        rotated = b("Concat", real, imaginary, axis=3)
    if rotary < size:
        rotated = b("Concat", rotated, b.slice(whole, 3, rotary, size), axis=3)
    return [b.reshape(rotated, [0, 0, -1]) if is_flat else rotated]
