"""Order of a pass, broken pictures, augmentation: the same for any number of ranks and workers, from any start."""

from __future__ import annotations

import base64
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modelscope_cnclip import layouts
from modelscope_cnclip.data import DataError
from modelscope_cnclip.pairs import PairDataset, read_pairs
from modelscope_cnclip.preprocessor import ImageTransform, Tokenizer
from modelscope_cnclip.trainers.batches import (
    IN_A_ROW,
    Batch,
    Broken,
    PassSampler,
    Pixels,
    View,
    Visits,
    batches_of,
    loader,
    seeded,
)
from modelscope_cnclip.trainers.distributed import Ranks

from .pair_sources import cnclip

TRANSFORM = ImageTransform(32)
AUGMENTED = {"auto_augment": "original", "color_jitter": 0.3, "gray": 0.2, "background": 0.5}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(layouts.default_vocab(), 8)


@pytest.fixture(scope="module")
def pairs(pictures: list[Path]) -> PairDataset:
    return read_pairs([(file, [f"{file.stem}一", f"{file.stem}二", "同"]) for file in pictures])


# ---------------------------------------------------------------- order

SEED = st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 9))


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 50), batch=st.integers(1, 9), ranks=st.sampled_from([2, 3, 4]), seed=SEED,
    shuffle=st.booleans(), drop_last=st.booleans(),
)  # fmt: skip
def test_ranks_together_are_one(
    size: int, batch: int, ranks: int, seed: tuple[int, ...], shuffle: bool, drop_last: bool
) -> None:
    options: dict[str, Any] = {"seed": seed, "shuffle": shuffle, "drop_last": drop_last}
    alone = list(PassSampler(size, batch * ranks, **options))
    shares = [list(PassSampler(size, batch, rank=rank, ranks=ranks, **options)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    for number, parts in enumerate(zip(*shares)):
        assert len({len(part) for part in parts}) == 1  # no rank has more than another
        together = [visit for part in parts for visit in part]
        assert together == alone[number][: len(together)]  # the same rows in the same order, with the same seeds
        assert len(alone[number]) - len(together) < ranks
    assert len(alone) - len(shares[0]) in (0, 1)  # one more where less than a pair per rank is left
    if size % (batch * ranks) == 0 or drop_last:
        assert [[visit for part in parts for visit in part] for parts in zip(*shares)] == alone


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 50), batch=st.integers(1, 9), ranks=st.integers(1, 3), start=st.integers(0, 60), seed=SEED,
    shuffle=st.booleans(), drop_last=st.booleans(),
)  # fmt: skip
def test_any_start_gives_the_same_rest(
    size: int, batch: int, ranks: int, start: int, seed: tuple[int, ...], shuffle: bool, drop_last: bool
) -> None:
    options: dict[str, Any] = {
        "seed": seed, "shuffle": shuffle, "drop_last": drop_last, "rank": ranks - 1, "ranks": ranks,
    }  # fmt: skip
    whole = PassSampler(size, batch, **options)
    rest = PassSampler(size, batch, start=start, **options)
    assert list(rest) == list(whole)[start:]
    assert len(rest) == len(list(rest))
    assert len(whole) == batches_of(size, batch * ranks, ranks, drop_last)
    assert list(whole) == list(whole)


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 60), batch=st.integers(1, 9), seed=SEED, drop_last=st.booleans())
def test_every_pair_once(size: int, batch: int, seed: tuple[int, ...], drop_last: bool) -> None:
    batches = list(PassSampler(size, batch, seed=seed, drop_last=drop_last))
    rows = [row for one in batches for row, _ in one]
    assert len(rows) == len(set(rows)) == (size // batch * batch if drop_last else size)
    assert set(rows) <= set(range(size))
    sizes = [len(one) for one in batches]
    assert sizes == [batch] * (size // batch) + ([size % batch] if size % batch and not drop_last else [])


def test_an_uneven_rest_is_shared() -> None:
    """11 pairs, 2 × 4 to a batch: three are left, so each rank has one more pair and one stays out."""
    shares = [list(PassSampler(11, 4, seed=(1,), rank=rank, ranks=2, drop_last=False)) for rank in range(2)]
    assert [[len(batch) for batch in share] for share in shares] == [[4, 1], [4, 1]]
    assert batches_of(11, 8, 2, drop_last=False) == 2
    assert batches_of(9, 8, 2, drop_last=False) == 1  # one pair for two ranks
    assert batches_of(9, 8, 1, drop_last=False) == 2
    assert batches_of(7, 8, 2) == 0


def test_orders_differ_where_they_should() -> None:
    orders = {
        seed: [visit for batch in PassSampler(40, 8, seed=seed) for visit in batch]
        for seed in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    }
    assert len({tuple(order) for order in orders.values()}) == 4
    assert len({tuple(row for row, _ in order) for order in orders.values()}) == 4
    rows = [row for batch in PassSampler(40, 8, seed=(0,), shuffle=False) for row, _ in batch]
    assert rows == list(range(40))
    seeds = [{seed for _, seed in order} for order in orders.values()]
    assert len(set().union(*seeds)) == 160  # each visit has a number of its own


# ---------------------------------------------------------------- visits


def same(one: Batch, two: Batch) -> bool:
    values = [(getattr(one, field.name), getattr(two, field.name)) for field in fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)


def batches(
    pairs: PairDataset, tokenizer: Tokenizer, workers: int = 0, options: Any = None, start: int = 0
) -> list[Batch]:
    visits = Visits(pairs, tokenizer, Pixels(TRANSFORM, options))
    return list(loader(visits, PassSampler(len(pairs), 4, seed=(1, 2), start=start), workers))


def states() -> tuple[Any, ...]:
    numbers = np.random.get_state()
    return random.getstate(), numbers[1].tolist(), numbers[2:], torch.get_rng_state().tolist()


def test_the_same_whoever_decodes(pairs: PairDataset, tokenizer: Tokenizer) -> None:
    """Any number of workers, any start, any state of the global generators, which stay as they are."""
    Pixels(TRANSFORM, AUGMENTED)  # timm draws a number as it is imported
    before = states()
    wanted = batches(pairs, tokenizer, 0, AUGMENTED)
    assert states() == before
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    before = states()
    for workers in (0, 1, 2):
        found = batches(pairs, tokenizer, workers, AUGMENTED)
        assert len(found) == len(wanted) == 3
        assert all(map(same, found, wanted)), workers
        assert all(map(same, batches(pairs, tokenizer, workers, AUGMENTED, start=1), wanted[1:])), workers
    assert states() == before


def test_what_a_batch_holds(pairs: PairDataset, tokenizer: Tokenizer) -> None:
    (batch, *_) = batches(pairs, tokenizer)
    for i, row in enumerate(batch.rows.tolist()):
        assert np.array_equal(batch.pixels[i].numpy(), TRANSFORM.to_uint8(pairs[row].image))
        ids = tokenizer.encode(pairs.texts(row))[0]
        kept = batch.text[i][batch.text[i] > 0].tolist()
        assert kept in ids
    assert batch.pixels.dtype == torch.uint8
    assert batch.cut == sum(len(ids) == 8 for ids in batch.text.tolist() if 0 not in ids and ids[-1])
    plain = Visits(pairs, tokenizer, None)
    sample = plain[3, 5]
    assert sample["pixels"] is None
    assert plain.collate([sample]).pixels is None


def test_cut_captions_are_counted(path: Path, tokenizer: Tokenizer) -> None:
    visits = Visits(read_pairs([(path, "一二三四五六"), (path, "一二三四五六七"), (path, "一" * 99)]), tokenizer, None)
    batch = visits.collate([visits[i, 0] for i in range(3)])
    assert batch.cut == 2
    assert batch.text.shape == (3, 8)


def test_captions_are_drawn(path: Path, tokenizer: Tokenizer) -> None:
    visits = Visits(read_pairs([(path, ["甲", "乙", "丙"]), (path, "丁")]), tokenizer, None)
    drawn = [visits[0, seed]["text"] for seed in range(300)]
    assert {text: drawn.count(text) > 60 for text in set(drawn)} == {"甲": True, "乙": True, "丙": True}
    assert drawn == [visits[0, seed]["text"] for seed in range(300)]
    assert {visits[1, seed]["text"] for seed in range(9)} == {"丁"}


def test_numbers_stand_for_identities(path: Path, tokenizer: Tokenizer, pictures: list[Path]) -> None:
    rows = [
        {"image": pictures[0], "text": "猫", "image_id": 1},
        {"image": pictures[1], "text": "猫", "image_id": "1"},
        {"image": pictures[2], "text": "狗", "image_id": 1},
        {"image": pictures[0], "text": "鱼"},
        {"image": pictures[0], "text": "鱼 "},
        {"image": pictures[1], "text": "2"},
    ]
    visits = Visits(read_pairs(rows), tokenizer, None)
    batch = visits.collate([visits[i, i] for i in range(6)])

    def equal(numbers: torch.Tensor) -> set[tuple[int, int]]:
        return {(i, j) for i in range(6) for j in range(i) if numbers[i] == numbers[j]}

    assert equal(batch.image_ids) == {(2, 0), (4, 3)}  # a number isn't its digits
    assert equal(batch.text_ids) == {(1, 0)}
    assert batch.image_ids.dtype == batch.text_ids.dtype == torch.int64
    assert batch.image_ids.min() >= 0


# ---------------------------------------------------------------- broken pictures


def damaged(pictures: list[Path], tmp_path: Path, broken: set[int], size: int = 12) -> PairDataset:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = [(tmp_path / "bad.png" if i in broken else pictures[i % 12], f"第{i}") for i in range(size)]
    return read_pairs(rows)


def test_broken_pictures_give_way(pictures: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    pairs = damaged(pictures, tmp_path, {2, 3, 11})
    visits = Visits(pairs, tokenizer, Pixels(TRANSFORM, None))
    for first, row, passed in ((1, 1, []), (2, 4, ["2", "3"]), (3, 4, ["3"]), (11, 0, ["11"])):
        sample = visits[first, 9]
        assert sample["row"] == row
        assert sample["text"] == pairs.texts(row)[0]
        assert np.array_equal(sample["pixels"], TRANSFORM.to_uint8(pairs[row].image))
        assert [number for number, _ in sample["bad"]] == passed
        assert all("bad.png" in reason for _, reason in sample["bad"])
    batch = visits.collate([visits[i, i] for i in (2, 3, 1)])
    assert [number for number, _ in batch.bad] == ["2", "3", "3"]
    assert batch.rows.tolist() == [4, 4, 1]
    known = Visits(pairs, tokenizer, None, frozenset({2, 3}))
    assert (known[2, 0]["row"], known[2, 0]["bad"]) == (4, [])


def test_broken_base64_gives_way(data: bytes, tokenizer: Tokenizer, tmp_path: Path) -> None:
    prefix = cnclip(
        tmp_path, [(1, b"x"), (2, data)], [("a", [1]), ("b", [2])],
        encode=lambda one: b"!!!" if one == b"x" else base64.b64encode(one),
    )  # fmt: skip
    sample = Visits(read_pairs(prefix), tokenizer, Pixels(TRANSFORM, None))[0, 0]
    assert (sample["row"], sample["bad"][0][0]) == (1, "0")
    assert "train_imgs.tsv:1" in sample["bad"][0][1]


def test_many_in_a_row_are_too_many(pictures: list[Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    size = IN_A_ROW + 6
    visits = Visits(damaged(pictures, tmp_path, set(range(IN_A_ROW - 1)), size), tokenizer, Pixels(TRANSFORM, None))
    assert visits[0, 0]["row"] == IN_A_ROW - 1
    visits = Visits(damaged(pictures, tmp_path, set(range(IN_A_ROW)), size), tokenizer, Pixels(TRANSFORM, None))
    with pytest.raises(DataError, match=rf"{IN_A_ROW} pictures in a row can't be read; the last: .*bad\.png"):
        visits[0, 0]
    assert visits[1, 0]["row"] == IN_A_ROW
    few = Visits(damaged(pictures, tmp_path, {0, 1}, 2), tokenizer, Pixels(TRANSFORM, None))
    with pytest.raises(DataError, match="2 pictures in a row"):
        few[1, 0]


def test_each_broken_picture_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    broken = Broken(["3"], size=10, limit=0.2)
    with caplog.at_level("WARNING", "modelscope_cnclip"):
        broken.note([("3", "three"), ("4", "four"), ("4", "four")])
        broken.note([("4", "four")])
    assert [record.getMessage() for record in caplog.records] == ["skipped a picture: four"]
    broken.share(Ranks())
    broken.note([("5", "five")])
    with pytest.raises(DataError, match=r"3 of 10 pictures can't be read .*max_bad_fraction = 0\.2"):
        broken.share(Ranks())


# ---------------------------------------------------------------- augmentation


def corners(pixels: np.ndarray) -> list[list[int]]:
    return [pixels[y, x].tolist() for y in (2, -3) for x in (2, -3)]


def plain(**options: Any) -> Pixels:
    """The whole picture, nothing else done to it."""
    return Pixels(TRANSFORM, {"scale": [1, 1], "ratio": [1, 1], "flip": 0, "auto_augment": "", **options})


def transparent(kind: str) -> Image.Image:
    """The upper half opaque blue; below, red that nobody should see."""
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 64, 32))
    if kind == "P":
        image = Image.new("P", (64, 64), 1)
        image.putpalette([0, 0, 255, 255, 0, 0])
        image.paste(0, (0, 0, 64, 32))
        image.info["transparency"] = 1
    return image


@pytest.mark.parametrize("kind", ["RGBA", "P"])
def test_backgrounds(kind: str) -> None:
    image, blue = transparent(kind), [0, 0, 255]
    hidden = {"RGBA": [0, 0, 0], "P": [255, 0, 0]}[kind]  # as upstream: Pillow scales RGBA with its alpha
    assert corners(plain().to_uint8(View(image, 1))) == [blue, blue, hidden, hidden]
    rare = [corners(plain(background=1e-9).to_uint8(View(image, seed))) for seed in range(20)]
    assert rare == [[blue, blue, [255] * 3, [255] * 3]] * 20
    always = [corners(plain(background=1.0).to_uint8(View(image, seed))) for seed in range(40)]
    assert all(found[:2] == [blue, blue] and found[2] == found[3] for found in always)
    colours = [tuple(found[2]) for found in always]
    assert len(set(colours)) == 40
    assert tuple(hidden) not in colours
    half = [corners(plain(background=0.5).to_uint8(View(image, seed)))[2] for seed in range(200)]
    assert 60 < half.count([255] * 3) < 140


def test_opaque_pictures_have_no_background(path: Path) -> None:
    image = Image.open(path).convert("RGB")
    one, two = (plain(background=b).to_uint8(View(image, 3)) for b in (0, 1.0))
    assert np.array_equal(one, two)


def test_options_do_what_they_say(path: Path) -> None:
    image = Image.open(path).convert("RGB").resize((48, 48))
    whole = plain().to_uint8(View(image, 0))
    assert np.array_equal(whole, TRANSFORM.to_uint8(image))
    assert np.array_equal(plain(flip=1.0).to_uint8(View(image, 0)), whole[:, ::-1])
    grey = plain(gray=1.0).to_uint8(View(image, 0))
    assert (grey == grey[..., :1]).all()
    for options in ({"color_jitter": 0.5}, {"auto_augment": "original"}, {"scale": [0.2, 0.3]}, {"ratio": [3, 3.1]}):
        views = [plain(**options).to_uint8(View(image, seed)) for seed in range(6)]
        assert sum(not np.array_equal(view, whole) for view in views) >= 3, options
        assert all(view.shape == (32, 32, 3) for view in views)


def test_the_same_seed_gives_the_same_pixels(pictures: list[Path]) -> None:
    """Also for a copy that was pickled, and from threads at once."""
    pixels = Pixels(TRANSFORM, AUGMENTED)
    copy = pickle.loads(pickle.dumps(pixels))
    views = [View(file, seed) for file in pictures for seed in range(3)]
    wanted = [pixels.to_uint8(view) for view in views]
    assert len({one.tobytes() for one in wanted}) > 30
    assert all(map(np.array_equal, map(copy.to_uint8, views), wanted))
    with ThreadPoolExecutor(4) as pool:
        assert all(map(np.array_equal, pool.map(copy.to_uint8, views), wanted))
    assert isinstance(Pixels._lock, type(threading.Lock()))


def test_without_augmentation_it_is_the_towers_transform(path: Path) -> None:
    pixels = pickle.loads(pickle.dumps(Pixels(ImageTransform(40, (0, 0, 0), (1, 2, 3), exif=True), None)))
    wanted = ImageTransform(40, (0, 0, 0), (1, 2, 3), exif=True)
    assert np.array_equal(pixels.to_uint8(View(path, 1)), wanted.to_uint8(path))
    assert torch.equal(pixels(path), wanted(path))
    assert pixels.exif


def test_seeded_leaves_no_trace() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    def fail() -> None:
        with seeded(5):
            drawn.append(draw())
            raise KeyError

    before, drawn = states(), []
    with pytest.raises(KeyError):
        fail()
    assert states() == before
    with seeded(5):
        assert [draw()] == drawn
    with seeded(2**62 - 1):  # numpy takes 32 bits
        assert draw() != drawn[0]
