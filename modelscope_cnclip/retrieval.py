"""Exact retrieval scores over a whole pool, in blocks: arrays in, arrays out.

    ranks = first_hit(queries, gallery, query_ids, gallery_ids)     # (Q,) 0 is the top
    recall(ranks, 10)                                                # share of queries with a hit in the first ten

A query counts as found at k if *any* of its positives is among the k nearest, as cn_clip's ``evaluation.py`` has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

KS = (1, 5, 10)
NEVER = np.iinfo(np.int64).max  # rank of what isn't there, beyond every k
_BLOCK = 2**24  # similarities at once: 64 MiB


def first_hit(
    queries: np.ndarray, gallery: np.ndarray, query_ids: Sequence[set[Any]], gallery_ids: Sequence[Any]
) -> np.ndarray:
    """Rank of each query's nearest positive in the whole gallery.

    Args:
        queries, gallery: (Q, D) and (G, D) float32, L2-normalised.
        query_ids: for each query, the ids that count as found.
        gallery_ids: one per row of the gallery; several rows may share one.

    Returns:
        (Q,) int64 from 0; :data:`NEVER` for a query without a positive. Among equal scores the earlier row is first.
    """
    rows: dict[Any, list[int]] = {}
    for row, name in enumerate(gallery_ids):
        rows.setdefault(name, []).append(row)
    positives = [sorted(row for name in names for row in rows.get(name, ())) for names in query_ids]
    out = np.full(len(queries), NEVER, dtype=np.int64)
    size = max(1, _BLOCK // max(1, len(gallery)))
    for start in range(0, len(queries), size):
        scores = queries[start : start + size] @ gallery.T
        for i, row in enumerate(scores, start):
            if positives[i]:
                best = max(positives[i], key=lambda p: (row[p], -p))
                out[i] = np.count_nonzero(row > row[best]) + np.count_nonzero(row[:best] == row[best])
    return out


def recall(ranks: np.ndarray, k: int) -> float:
    """Share of queries whose nearest positive is among the first k; a query without one is a miss. NaN for none."""
    return float(np.mean(ranks < k)) if len(ranks) else float("nan")
