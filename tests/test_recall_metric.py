"""The registered recall metric and the evaluation pool: repeats, broken pictures, batches, parts that are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from modelscope.metrics import build_metric
from modelscope.outputs import OutputKeys

from modelscope_cnclip import registry
from modelscope_cnclip.data import DataError
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.pairs import read_pairs
from modelscope_cnclip.trainers.distributed import Ranks
from modelscope_cnclip.trainers.evaluation import RetrievalRecallMetric, feed, pool_features

from .test_features import together
from .test_retrieval import brute

KEYS = ("image_key", "image_id", "text")
NAMES = {
    f"{side}_{what}"
    for side in ("text_to_image", "image_to_text")
    for what in ("recall@1", "recall@5", "recall@10", "mean_recall")
} | {"mean_recall"}


def features(names: list[Any], seed: int) -> np.ndarray:
    """Unit vectors, equal where the names are."""
    made = {
        name: np.random.default_rng([seed, i]).standard_normal(4).astype(np.float32)
        for i, name in enumerate(dict.fromkeys(names))
    }
    vectors = np.stack([made[name] for name in names])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Pool:
    """Rows of a pool with repeated pictures, concepts and captions."""

    def __init__(self, size: int = 40, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.inputs = {
            "image_key": [f"{i}.png" for i in rng.integers(20, size=size)],
            "text": [f"第{i}" for i in rng.integers(15, size=size)],
        }
        self.inputs["image_id"] = [f"concept {int(key[:-4]) // 2}" for key in self.inputs["image_key"]]
        self.image = features(self.inputs["image_key"], 1)
        self.text = features(self.inputs["text"], 2)

    def add(self, metric: Any, start: int = 0, end: int | None = None, named: bool = True) -> Any:
        rows = slice(start, end)
        outputs = {
            OutputKeys.IMG_EMBEDDING: torch.from_numpy(self.image[rows]),
            OutputKeys.TEXT_EMBEDDING: torch.from_numpy(self.text[rows]),
        }
        metric.add(outputs, {key: values[rows] for key, values in self.inputs.items()} if named else {})
        return metric

    def expected(self) -> dict[str, float]:
        """Written out: each distinct picture and caption is in its pool once; what counts is who says what of whom."""
        keys, ids, texts = (self.inputs[key] for key in KEYS)
        pictures, captions = (list({name: i for i, name in reversed(list(enumerate(names)))}.values())
                              for names in (keys, texts))  # fmt: skip
        pictures, captions = sorted(pictures), sorted(captions)
        said = [{texts[j] for j in range(len(ids)) if ids[j] == ids[i]} for i in pictures]
        shown = [{ids[j] for j in range(len(ids)) if texts[j] == texts[i]} for i in captions]
        ranks = {
            "text_to_image": brute(self.text[captions], self.image[pictures], shown, [ids[i] for i in pictures]),
            "image_to_text": brute(self.image[pictures], self.text[captions], said, [texts[i] for i in captions]),
        }
        out = {f"{side}_recall@{k}": np.mean(np.array(ranks[side]) < k) for side in ranks for k in (1, 5, 10)}
        for side in ranks:
            out[f"{side}_mean_recall"] = np.mean([out[f"{side}_recall@{k}"] for k in (1, 5, 10)])
        out["mean_recall"] = np.mean([out[f"{side}_mean_recall"] for side in ranks])
        return out


@pytest.mark.parametrize("seed", range(4))
def test_repeats_are_in_the_pool_once_and_found_for_one_another(seed: int) -> None:
    pool = Pool(seed=seed)
    found = pool.add(RetrievalRecallMetric()).evaluate()
    assert found.keys() == NAMES
    assert found == pytest.approx(pool.expected())
    assert 0 < found["mean_recall"] < 1
    naive = pool.add(RetrievalRecallMetric(), named=False).evaluate()
    assert naive["mean_recall"] < found["mean_recall"]


def test_without_names_each_row_is_its_own() -> None:
    """As ModelScope's own trainers would feed it."""
    size = 30
    pool = Pool(size)
    pool.inputs = {key: [f"{key} {i}" for i in range(size)] for key in KEYS[:1] + KEYS[2:]}
    pool.inputs["image_id"] = pool.inputs["image_key"]
    rng = np.random.default_rng(5)
    pool.image, pool.text = (rng.standard_normal((size, 4)).astype(np.float32) for _ in range(2))
    metric = RetrievalRecallMetric()
    for start in range(0, size, 7):
        pool.add(metric, start, start + 7, named=False)
    assert metric.evaluate() == pytest.approx(pool.expected())


def test_perfect_and_hopeless() -> None:
    size = 12
    eye = np.eye(size, dtype=np.float32)
    for image, wanted in ((eye, 1.0), (-eye, 0.0)):
        metric = RetrievalRecallMetric()
        metric.add({OutputKeys.IMG_EMBEDDING: image, OutputKeys.TEXT_EMBEDDING: eye}, {})
        assert metric.evaluate()["mean_recall"] == wanted


@pytest.mark.parametrize("cuts", [[13], [1, 2, 39], []])
def test_batches_and_merged_parts_are_the_whole(cuts: list[int]) -> None:
    pool = Pool()
    whole = pool.add(RetrievalRecallMetric()).evaluate()
    parts = [pool.add(RetrievalRecallMetric(), a, b) for a, b in zip([0, *cuts], [*cuts, None])]
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].evaluate() == whole
    batched = RetrievalRecallMetric()
    for a, b in zip([0, *cuts], [*cuts, None]):
        pool.add(batched, a, b)
    assert batched.evaluate() == whole


def test_merged_parts_without_names() -> None:
    """Rows of one part aren't those of another, whatever their numbers."""
    pool = Pool()
    whole = pool.add(RetrievalRecallMetric(), named=False).evaluate()
    one, two = pool.add(RetrievalRecallMetric(), 0, 17, named=False), pool.add(RetrievalRecallMetric(), 17, None, False)
    one.merge(two)
    assert one.evaluate() == whole


def test_the_host_builds_it() -> None:
    metric = build_metric({"type": registry.RECALL})
    assert type(metric) is RetrievalRecallMetric
    assert Pool().add(metric).evaluate() == pytest.approx(Pool().expected())


def test_nothing_was_added() -> None:
    with pytest.raises(DataError, match="no pairs to evaluate"):
        RetrievalRecallMetric().evaluate()


# ---------------------------------------------------------------- the pool


@pytest.fixture(scope="module")
def rows(pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    bad = tmp_path_factory.mktemp("bad") / "bad.png"
    bad.write_bytes(b"no picture")
    return [
        {"image": pictures[0], "text": ["一只猫", "猫"], "image_id": "猫"},
        {"image": bad, "text": "坏"},
        {"image": pictures[1], "text": "一条狗"},
        {"image": pictures[0], "text": "动物", "image_id": "猫"},
        {"image": pictures[2], "text": ["鱼", "一条鱼"]},
    ]


def test_features_of_a_pool(encoder: Encoder, rows: list[dict[str, Any]]) -> None:
    pairs = read_pairs(rows)
    images, texts, captions = pool_features(encoder, pairs, 2, Ranks())
    assert captions == [(0, "一只猫"), (0, "猫"), (1, "坏"), (2, "一条狗"), (3, "动物"), (4, "鱼"), (4, "一条鱼")]
    good = [0, 2, 3, 4]
    assert np.isnan(images).all(1).tolist() == [i == 1 for i in range(5)]
    np.testing.assert_allclose(images[good], encoder.encode_image([rows[i]["image"] for i in good]), atol=1e-6)
    np.testing.assert_allclose(texts, encoder.encode_text([text for _, text in captions]), atol=1e-6)
    known, again, _ = pool_features(encoder, pairs, 2, Ranks(), images)
    assert known is images
    assert np.array_equal(again, texts)


@pytest.mark.parametrize("count", [2, 9])
def test_ranks_share_a_pool(count: int, encoder: Encoder, rows: list[dict[str, Any]]) -> None:
    pairs = read_pairs(rows)
    images, texts, captions = pool_features(encoder, pairs, 2, Ranks())
    with together(count) as start:
        for found in start(lambda ranks: pool_features(encoder, pairs, 2, ranks)):
            np.testing.assert_allclose(found[0], images, atol=1e-6)
            np.testing.assert_allclose(found[1], texts, atol=1e-6)
            assert found[2] == captions


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_what_metrics_are_shown(batch_size: int, encoder: Encoder, rows: list[dict[str, Any]]) -> None:
    """A row per caption, in order, without the broken picture's."""

    class Kept:
        def __init__(self) -> None:
            self.rows: list[Any] = []

        def add(self, outputs: dict[str, Any], inputs: dict[str, Any]) -> None:
            image, text = outputs[OutputKeys.IMG_EMBEDDING], outputs[OutputKeys.TEXT_EMBEDDING]
            assert len(image) == len(text) <= batch_size
            self.rows += zip(image.tolist(), text.tolist(), *(inputs[key] for key in KEYS))

    pairs = read_pairs(rows)
    images, texts, captions = pool_features(encoder, pairs, 8, Ranks())
    kept, metric = Kept(), RetrievalRecallMetric()
    feed([kept, metric], pairs, images, texts, captions, batch_size)
    assert [row[4] for row in kept.rows] == ["一只猫", "猫", "一条狗", "动物", "鱼", "一条鱼"]
    owners = [0, 0, 2, 3, 4, 4]
    assert [row[3] for row in kept.rows] == [pairs.image_id(i) for i in owners]
    assert [row[2] for row in kept.rows] == [pairs.image_key(i) for i in owners]
    assert [row[0] for row in kept.rows] == [images[i].tolist() for i in owners]
    assert metric.evaluate()["image_to_text_recall@10"] == 1
