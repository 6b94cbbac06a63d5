"""Data set objects of image-text pairs, several sources in a row, and what a picture is known by."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from modelscope.msdatasets import MsDataset
from PIL import Image

from modelscope_cnclip.data import DataError
from modelscope_cnclip.images import open_image
from modelscope_cnclip.pairs import Pair, read_pairs

from .conftest import assert_shows
from .pair_sources import assert_consistent, cnclip, jsonl, kept_and_bad, refused, write

# ---------------------------------------------------------------- objects


class Made(torch.utils.data.Dataset):
    """A torch Dataset that counts how often it is asked."""

    def __init__(self, rows: list) -> None:
        self.rows, self.asked = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        self.asked += 1
        return self.rows[i]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator:
        return iter([])

    def __len__(self) -> int:
        return 1


def test_rows_of_any_kind_of_image(path: Path, data: bytes, pixels: np.ndarray) -> None:
    kinds = [path, str(path), data, memoryview(data), pixels, Image.open(path).convert("RGB"), {"bytes": data}]
    kinds += [{"bytes": None, "path": str(path)}, {"bytes": data, "path": "x.png"}]
    for rows in ([{"image": kind, "text": "猫"} for kind in kinds], [(kind, ["猫"]) for kind in kinds]):
        pairs = read_pairs(rows)
        for i, pair in enumerate(pairs):
            assert_shows(pair.image, pixels)
            assert (pair.texts, pair.source) == (("猫",), f"item {i} of list")
        assert [pair.image_id for pair in pairs] == [str(path), str(path), *range(2, len(kinds))]
        keys = [pairs.image_key(i) for i in range(len(pairs))]
        assert keys[0] == keys[1] == keys[7] is not None
        assert keys[2] == keys[3] == keys[6] == keys[8] is not None
        assert keys[4] is keys[5] is None


def test_numpy_text_becomes_plain() -> None:
    pair = read_pairs([{"image": "a.png", "text": np.str_("猫"), "image_id": np.str_("k")}])[0]
    assert (type(pair.texts[0]), type(pair.image_id)) == (str, str)
    assert (pair.texts, pair.image_id) == (("猫",), "k")


def test_a_sequence_of_rows() -> None:
    rows = ({"image": "a.png", "text": "猫", "image_id": np.int64(3)}, {"img": "b.png", "caption": ["a", "b"]})
    pairs = read_pairs(rows)
    assert list(pairs) == [
        Pair("a.png", ("猫",), 3, "item 0 of tuple"),
        Pair("b.png", ("a", "b"), "b.png", "item 1 of tuple"),
    ]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"image": "a.png"}, "needs an image"),
        ({"image": torch.zeros(3), "text": "a"}, "the image must be a path, address, bytes, PIL or uint8 array"),
        ({"image": {"bytes": None, "path": None}, "text": "a"}, "not None"),
        ({"image": "", "text": "a"}, "not ''"),
        (("a.png", 3), "the text must be a str"),
        (("a.png", "猫", 3), "expected a dict or (image, text)"),
        ("a.png", "expected a dict or (image, text), found 'a.png'"),
        (None, "expected a dict or (image, text), found None"),
    ],
)
def test_bad_rows(row: Any, says: str) -> None:
    good = {"image": "a.png", "text": "猫"}
    pairs, bad = kept_and_bad([good, row, good])
    assert [pair.source for pair in pairs] == ["item 0 of list", "item 2 of list"]
    assert len(bad) == 1
    assert bad[0].startswith("item 1 of list: ")
    assert says in bad[0]
    refused([good, row], bad[0])
    assert_consistent(pairs)
    if row != "a.png":
        refused(Made([row, good]), "item 0 of Made: ", says)
        made = read_pairs(Made([good, row]))
        with pytest.raises(DataError) as caught:
            made[1]
        assert str(caught.value).startswith("item 1 of Made: ")


def test_torch_dataset(data: bytes, pixels: np.ndarray) -> None:
    made = Made([(data, "猫"), {"image": "b.png", "text": ["a", "b"], "image_id": "k"}])
    pairs = read_pairs(made)
    assert made.asked == 1
    assert_shows(pairs[0].image, pixels)
    assert made.asked == 2
    assert (pairs.texts(1), pairs.image_id(1), pairs[1].source) == (("a", "b"), "k", "item 1 of Made")
    assert pairs.image_key(0) is pairs.image_key(1) is None
    assert_consistent(pairs)
    assert len(read_pairs(Made([None, *made.rows]), on_bad=lambda error: None)) == 2


@pytest.fixture
def hf(data: bytes, tmp_path: Path) -> datasets.Dataset:
    """Three rows with an Image feature: embedded, in a file, and turned by its EXIF tag."""
    sideways = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(sideways, "JPEG", exif=exif)
    images = [{"bytes": data}, {"path": write(tmp_path / "a.png", data)}, {"bytes": sideways.getvalue()}]
    features = datasets.Features({"image": datasets.Image(), "query": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "query": ["猫", "狗", "鱼"]}, features)


@pytest.mark.parametrize("wrap", [lambda ds: ds, MsDataset, lambda ds: ds.with_format("numpy")])
def test_image_feature(hf: datasets.Dataset, wrap: Callable, pixels: np.ndarray) -> None:
    source = wrap(hf)
    pairs = read_pairs(source)
    assert [pair.texts for pair in pairs] == [("猫",), ("狗",), ("鱼",)]
    assert [pair.image_id for pair in pairs] == [0, 1, 2]
    assert pairs[1].source == f"item 1 of {type(source).__name__}"
    for i in (0, 1):
        assert_shows(pairs[i].image, pixels)
    assert open_image(pairs[2].image).size == (8, 4)  # as it is stored: datasets itself would turn it
    assert pairs.image_key(0).startswith("sha256:")
    assert "a.png|" in pairs.image_key(1)
    assert_consistent(pairs)
    assert hf.features["image"].decode
    assert isinstance(hf[0]["image"], Image.Image)


def test_texts_and_ids_come_without_the_pictures(hf: datasets.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = read_pairs(hf.add_column("image_id", ["a", None, "c"]))
    part = pairs._parts[0]
    assert part.light.column_names == ["query", "image_id"]
    monkeypatch.setattr(part, "rows", None)
    assert [(pairs.texts(i), pairs.image_id(i)) for i in range(3)] == [(("猫",), "a"), (("狗",), 1), (("鱼",), "c")]


def test_arrow_rows_of_paths() -> None:
    table = {
        "image:FILE": ["a.png", None, "b.png", "c.png"],
        "text": ["猫", "狗", None, "鱼"],
        "image_id": [4, 5, 6, 7],
    }
    pairs, bad = kept_and_bad(MsDataset(datasets.Dataset.from_dict(table)))
    assert [(pair.image, pair.texts, pair.image_id) for pair in pairs] == [("a.png", ("猫",), 4), ("c.png", ("鱼",), 7)]
    assert pairs[1].source == "item 3 of MsDataset"
    assert [error.split(": ")[0] for error in bad] == ["item 1 of MsDataset", "item 2 of MsDataset"]
    assert_consistent(pairs)


def test_a_transform_of_the_owner_is_kept(hf: datasets.Dataset, pixels: np.ndarray) -> None:
    def transform(batch: dict) -> dict:
        return {"image": batch["image"], "text": [f"一张{text}" for text in batch["query"]]}

    pairs = read_pairs(hf.with_transform(transform))
    assert pairs.texts(1) == ("一张狗",)
    assert_shows(pairs[0].image, pixels)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_real_msdataset(name: str, path: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    row = {"image": str(path), "query": "一只猫"}
    if name == "a.jsonl":
        file = jsonl(tmp_path / name, row, row)
    else:
        file = write(tmp_path / name, f"image,query\n{path},一只猫\n{path},一只猫\n")
    loaded = MsDataset.load(file, split="train", cache_dir=str(tmp_path / "cache"))
    pairs = read_pairs(loaded, column_map={"img": "image", "text": "query"})
    assert [pair.texts for pair in pairs] == [("一只猫",)] * 2
    assert pairs.image_id(0) == pairs.image_id(1) == str(path)
    assert pairs.image_key(0) == read_pairs([(path, "x")]).image_key(0)
    assert_shows(pairs[0].image, pixels)
    assert_consistent(pairs)


def test_objects_of_no_use(hf: datasets.Dataset) -> None:
    refused([], "list: no pairs: nothing is in it")
    refused((), "tuple: no pairs")
    refused(hf.select([]), "Dataset: no pairs: nothing is in it")
    refused(hf.remove_columns("image"), "Dataset: needs an image", "has 'query'")
    splits = 'expected one data set, such as a split of it, or {"images": TSV, "texts": JSONL}'
    refused(datasets.DatasetDict(train=hf, test=hf), "DatasetDict with 'train', 'test'", splits)
    refused({"images": "a.tsv"}, "dict with 'images'", splits)
    for stream in (hf.to_iterable_dataset(), MsDataset(hf.to_iterable_dataset()), Stream(), iter([]), 5, None):
        refused(stream, "needs len() and items by number")


# ---------------------------------------------------------------- several sources


def test_sources_in_a_row(path: Path, hf: datasets.Dataset, tmp_path: Path) -> None:
    first = cnclip(tmp_path / "a", [(1, b"x"), ("k", b"z")], [("猫", [1]), ("k", ["k"])])
    second = cnclip(tmp_path / "b", [(1, b"y"), ("k", b"w")], [("狗", [1]), ("k", ["k"])])
    third = jsonl(
        tmp_path / "c.jsonl", {"image": "/c.png", "text": "鱼", "image_id": 1}, {"image": "/d.png", "text": "d"}
    )
    fourth = write(tmp_path / "d.csv", "image,text,image_id\n/c.png,鱼,concept\n/d.png,d,\n")
    files = {"images": f"{second}_imgs.tsv", "texts": f"{second}_texts.jsonl"}
    pairs = read_pairs([first, files, (Path(third), fourth)[0], [first, third][1], fourth, hf])
    assert len(pairs) == 2 + 2 + 2 + 2 + 2 + 3
    assert [pair.texts[0] for pair in pairs] == [
        "猫",
        "k",
        "狗",
        "k",
        "鱼",
        "d",
        "鱼",
        "d",
        "鱼",
        "d",
        "猫",
        "狗",
        "鱼",
    ]
    ids = [pair.image_id for pair in pairs]
    assert len(set(ids[:4])) == 4  # cn_clip's count within their tsv
    assert ids[4] == ids[6] != ids[0]  # a number within its file; the same file twice has the same pictures
    assert ids[5] == ids[7] == ids[9] == "/d.png"
    assert ids[8] == "concept"
    assert len(set(ids[10:])) == 3
    assert not set(ids[10:]) & set(ids[:10])
    assert pairs[2].image == b"y"
    assert [pairs[i].source for i in (0, 2, 12)] == [
        f"{first}_texts.jsonl:1",
        f"{second}_texts.jsonl:1",
        "item 2 of Dataset",
    ]
    assert_consistent(pairs)
    again = read_pairs([read_pairs([first, third]), hf])
    assert [again.image_id(i) for i in range(4)] == ids[:2] + ids[4:6]


def test_one_source_in_a_list_is_that_source(tmp_path: Path) -> None:
    prefix = cnclip(tmp_path, [(1, b"x")], [("猫", [1])])
    assert list(read_pairs([prefix])) == list(read_pairs((prefix,))) == list(read_pairs(prefix))


def test_a_bad_source_among_several(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "a.jsonl", {"image": "a.png", "text": "猫"})
    refused([good, str(tmp_path / "gone.jsonl")], "gone.jsonl: No such file")
    refused([good, {"image": "a.png", "text": "猫"}], "dict with 'image', 'text'")
    refused(("a.png", "一只猫"), "a.png: no such file; expected a .jsonl")


# ---------------------------------------------------------------- identities


def test_image_keys_follow_the_picture(data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = write(tmp_path / "a.png", data)
    address = "https://example.com/a.png"
    rows = [{"image": image, "text": "猫"} for image in ("a.png", "gone.png", address, "data:image/png;base64,AA==")]
    pairs = read_pairs(jsonl(tmp_path / "a.jsonl", *rows))
    before = [pairs.image_key(i) for i in range(4)]
    assert before[0].startswith(f"{picture}|{len(data)}|")
    assert before[1:3] == [None, address]
    assert before[3].startswith("sha256:")
    monkeypatch.chdir(tmp_path)
    assert read_pairs([("a.png", "猫")]).image_key(0) == read_pairs("a.jsonl").image_key(0) == before[0]
    write(tmp_path / "a.png", data + b"x")
    assert pairs.image_key(0) != before[0]
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", [1])])
    old = read_pairs(prefix).image_key(0)
    cnclip(tmp_path, [(1, b"xyzzy")], [("a", [1])])
    assert read_pairs(prefix).image_key(0) != old
    assert read_pairs("train").image_key(0) == read_pairs(prefix).image_key(0)
