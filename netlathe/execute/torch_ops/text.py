"""TfIdfVectorizer, on integer tokens (torch has no strings)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .row import Row, row


def tfidf_vectorizer(
    x: Tensor,
    *,
    max_gram_length: int,
    max_skip_count: int,
    min_gram_length: int,
    mode: str,
    ngram_counts: Sequence[int],
    ngram_indexes: Sequence[int],
    pool_int64s: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """TfIdfVectorizer: counts (TF), presence times weight (IDF), or counts times weight (TFIDF).

    ``pool_int64s`` holds all 1-grams, then all 2-grams, ...; ``ngram_counts`` says where each begins.
    """
    starts = [*ngram_counts, len(pool_int64s)]
    grams: dict[tuple[int, ...], int] = {}  # n-gram -> its number in the pool
    for n, (begin, end) in enumerate(itertools.pairwise(starts), 1):
        for i in range(begin, end, n):
            grams[tuple(pool_int64s[i : i + n])] = len(grams)
    factors = [1.0] * len(grams) if weights is None or mode == "TF" else list(weights)
    rows = []
    for tokens in x.reshape(-1, x.shape[-1]).tolist() if x.dim() > 1 else [x.tolist()]:
        counts = [0] * len(grams)
        for n in range(min_gram_length, max_gram_length + 1):
            # A single token has no gaps to skip.
            for gap in range(1, (max_skip_count + 1 if n > 1 else 1) + 1):
                for first in range(len(tokens) - (n - 1) * gap):
                    gram = tuple(tokens[first : first + n * gap : gap])
                    if len(gram) == n and gram in grams:
                        counts[grams[gram]] += 1
        y = [0.0] * (max(ngram_indexes) + 1)
        for number, count in enumerate(counts):
            shown = min(count, 1) if mode == "IDF" else count
            y[ngram_indexes[number]] += shown * factors[number]
        rows.append(y)
    result = torch.tensor(rows, dtype=torch.float32, device=x.device)
    return result if x.dim() > 1 else result[0]


ROWS: dict[str, Row] = {"TfIdfVectorizer": row(tfidf_vectorizer)}
