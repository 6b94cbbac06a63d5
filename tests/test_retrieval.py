"""Retrieval scores beside a plain reference and cn_clip's own evaluation scripts."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_cnclip import retrieval
from modelscope_cnclip.retrieval import KS, NEVER, first_hit, recall


def brute(queries: np.ndarray, gallery: np.ndarray, wanted: list[set[Any]], names: list[Any]) -> list[int]:
    """Sort the gallery for each query, stably, and look for the first positive."""
    out = []
    for query, positives in zip(queries, wanted):
        scores = [float(query @ one) for one in gallery]
        order = sorted(range(len(gallery)), key=lambda row: -scores[row])  # sorted() keeps the order of equals
        out.append(next((rank for rank, row in enumerate(order) if names[row] in positives), NEVER))
    return out


# Few different values, so that scores tie; small whole numbers, so that sums are exact in any order.
VECTOR = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
NAMES = st.integers(0, 5) | st.sampled_from("ab")


@settings(max_examples=300, deadline=None)
@given(
    queries=st.lists(st.tuples(VECTOR, st.frozensets(NAMES, max_size=3)), max_size=8),
    gallery=st.lists(st.tuples(VECTOR, NAMES), max_size=12),
    block=st.integers(1, 40),
)
def test_first_hit_is_the_plain_one(queries: list, gallery: list, block: int) -> None:
    vectors = [np.array([v for v, _ in side], np.float32).reshape(-1, 3) for side in (queries, gallery)]
    wanted, names = [set(w) for _, w in queries], [name for _, name in gallery]
    usual = retrieval._BLOCK
    try:
        retrieval._BLOCK = block
        ranks = first_hit(*vectors, wanted, names)
    finally:
        retrieval._BLOCK = usual
    assert ranks.dtype == np.int64
    expected = brute(*vectors, wanted, names)
    assert ranks.tolist() == expected
    for k in (1, 2, 5, 10):
        found = recall(ranks, k)
        # in a pool of fewer than k, whoever has a positive at all is found, and nobody else
        hits = [rank < min(k, len(gallery)) for rank in expected]
        assert np.isnan(found) if not queries else found == pytest.approx(np.mean(hits))


def test_ties_go_to_the_earlier_row() -> None:
    gallery = np.eye(1, dtype=np.float32).repeat(5, 0)
    assert first_hit(gallery[:3], gallery, [{0}, {3}, {4, 2}], range(5)).tolist() == [0, 3, 2]


def test_queries_without_positives_are_misses() -> None:
    one = np.ones((3, 1), np.float32)
    ranks = first_hit(one, one, [{0}, set(), {"x"}], [0, 1, 2])
    assert ranks.tolist() == [0, NEVER, NEVER]
    assert recall(ranks, 1) == recall(ranks, 3) == pytest.approx(1 / 3)
    # a gallery of fewer than k rows is no reason to find what isn't there
    assert recall(ranks, 10) == pytest.approx(1 / 3)


def test_empty_pools() -> None:
    one, none = np.ones((2, 4), np.float32), np.ones((0, 4), np.float32)
    assert first_hit(one, none, [{1}, set()], []).tolist() == [NEVER, NEVER]
    assert recall(first_hit(one, none, [{1}, set()], []), 1) == 0
    assert first_hit(none, one, [], [1, 2]).shape == (0,)
    assert np.isnan(recall(np.array([], np.int64), 1))


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, 16)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def jsonl(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_recall_is_cnclips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own scripts: top-k search, then the evaluation of the predictions."""
    rng = np.random.default_rng(0)
    images, texts = unit(rng, 40), unit(rng, 60)
    texts[:40] = images + 0.9 * texts[:40]
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    shows = [sorted({i % 40, int(rng.integers(40))}) for i in range(60)]
    image_file = jsonl(tmp_path / "i", [{"image_id": i, "feature": x.tolist()} for i, x in enumerate(images)])
    text_file = jsonl(tmp_path / "t", [{"text_id": i, "feature": x.tolist()} for i, x in enumerate(texts)])
    truth = jsonl(tmp_path / "truth", [{"text_id": i, "text": "x", "image_ids": shows[i]} for i in range(60)])

    def run(module: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        runpy.run_module(f"cn_clip.eval.{module}", run_name="__main__")

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)  # it doesn't ask whether there is one
    features = (f"--image-feats={image_file}", f"--text-feats={text_file}", "--top-k=10")
    run("make_topk_predictions", *features, f"--output={tmp_path / 'p'}")
    run("evaluation", truth, str(tmp_path / "p"), str(tmp_path / "out"))
    theirs = json.loads((tmp_path / "out").read_text())["scoreJson"]
    ranks = first_hit(texts, images, [set(one) for one in shows], range(40))
    for k in KS:
        assert 100 * recall(ranks, k) == pytest.approx(theirs[f"r{k}"], abs=1e-9)
    assert 0 < theirs["r1"] < theirs["r5"] < theirs["r10"] < 100
