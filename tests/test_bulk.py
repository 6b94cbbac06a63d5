"""Vectors and manifest of a bulk run: row for row what the Encoder gives, and all of it or nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from modelscope_cnclip.bulk import Summary, encode_to
from modelscope_cnclip.data import DataError, Record, image_records
from modelscope_cnclip.encoder import Encoder, ItemError

FORMATS = ("parquet", "jsonl")


def read_manifest(file: str | Path) -> list[dict[str, Any]]:
    if str(file).endswith(".parquet"):
        return pq.read_table(file).to_pylist()
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").split("\n")[:-1]]


def records_of(values: list[Any]) -> list[Record]:
    return [Record(f"id{i}", value, f"list:{i + 1}") for i, value in enumerate(values)]


class Counter:
    """An Encoder's stand-in with tiny vectors: row i is (i, -i). One record a piece, or as many as ``size``."""

    embed_dim, model_id, size = 2, "counter", 1
    backend = SimpleNamespace(name="none", precision="fp32", device="cpu")

    def iter_text(self, texts: Iterator[str], **_: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        positions: list[int] = []
        for i, _text in enumerate(texts):
            positions.append(i)
            if len(positions) == self.size:
                yield self.piece(positions)
                positions = []
        if positions:
            yield self.piece(positions)

    def piece(self, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
        rows = np.array(positions)
        return rows, np.stack([rows, -rows], axis=1).astype(np.float32)


@pytest.mark.parametrize("manifest", FORMATS)
def test_pictures(manifest: str, encoder: Encoder, pictures: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "x.npy"
    records = image_records([str(pictures[0].parent)])
    summary = encode_to(encoder, records, "images", out, manifest=manifest, batch_size=5)
    assert summary == Summary(
        vectors=str(out), manifest=str(out.with_suffix(f".{manifest}")), rows=12, skipped=0, dim=encoder.embed_dim,
        model=encoder.model_id, backend="torch", precision="fp32", device="cpu",
    )  # fmt: skip
    vectors = np.load(out)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, encoder.encode_image(pictures, batch_size=5), atol=1e-6)
    assert read_manifest(summary.manifest) == [
        {"row": i, "id": str(path), "source": str(path)} for i, path in enumerate(pictures)
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == [f"x.{kind}" for kind in sorted(("npy", manifest))]


@pytest.mark.parametrize("manifest", FORMATS)
def test_texts(manifest: str, encoder: Encoder, tmp_path: Path) -> None:
    texts = ["一只很长很长很长的猫", "狗", "", 'a "quoted"\ttext\n', "鱼\u2028"]
    summary = encode_to(encoder, records_of(texts), "texts", tmp_path / "x.npy", manifest=manifest, batch_size=2)
    np.testing.assert_allclose(np.load(summary.vectors), encoder.encode_text(texts), atol=1e-6)
    assert read_manifest(summary.manifest) == [
        {"row": i, "id": f"id{i}", "source": f"list:{i + 1}", "text": text} for i, text in enumerate(texts)
    ]


def test_records_are_taken_as_they_are_needed(tmp_path: Path) -> None:
    """From a generator, and not many more than the model has seen."""
    encoder, taken, given = Counter(), 0, 0

    def records() -> Iterator[Record]:
        nonlocal taken
        for i in range(500):
            taken += 1
            yield Record(i, "x", "x")

    one = Counter.iter_text

    def watch(texts: Iterator[str], **_: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal given
        for piece in one(encoder, texts):
            given += 1
            assert taken == given
            yield piece

    encoder.iter_text = watch
    assert encode_to(encoder, records(), "texts", tmp_path / "x.npy").rows == 500
    assert given == 500


@pytest.mark.parametrize(("rows", "size"), [(0, 1), (1, 1), (9, 1), (10, 1), (1234, 1), (100_001, 4096)])
def test_the_header_has_the_final_count(rows: int, size: int, tmp_path: Path) -> None:
    encoder = Counter()
    encoder.size = size
    records = (Record(i, "x", "x") for i in range(rows))
    summary = encode_to(encoder, records, "texts", tmp_path / "x.npy", manifest="jsonl")
    vectors = np.load(summary.vectors, mmap_mode="r")
    assert vectors.shape == (rows, 2)
    assert np.array_equal(vectors, np.stack([np.arange(rows), -np.arange(rows)], axis=1))
    assert summary.rows == rows
    assert [row["row"] for row in read_manifest(summary.manifest)] == list(range(rows))


@pytest.mark.parametrize("manifest", FORMATS)
@pytest.mark.parametrize("bad", [[0], [11], [3, 4, 5, 6], [0, 1, 2, 11], list(range(12))])
def test_bad_pictures_are_skipped_and_counted(
    bad: list[int], manifest: str, encoder: Encoder, pictures: list[Path], tmp_path: Path, caplog: Any
) -> None:
    values: list[Any] = list(pictures)
    for i in bad:
        values[i] = tmp_path / f"gone{i}.png"
    good = [i for i in range(12) if i not in bad]
    with caplog.at_level(logging.WARNING, "modelscope_cnclip"):
        summary = encode_to(
            encoder, iter(records_of(values)), "images", tmp_path / "x.npy", manifest=manifest, batch_size=3,
            on_error="skip",
        )  # fmt: skip
    assert (summary.rows, summary.skipped) == (len(good), len(bad))
    vectors = np.load(summary.vectors)
    assert vectors.shape == (len(good), encoder.embed_dim)
    if good:
        np.testing.assert_allclose(vectors, encoder.encode_image([values[i] for i in good]), atol=1e-6)
    rows = read_manifest(summary.manifest)
    assert [(row["row"], row["id"]) for row in rows] == [(n, f"id{i}") for n, i in enumerate(good)]
    told = [record.getMessage() for record in caplog.records]
    assert [f"gone{i}.png: no such file" in line for i, line in zip(bad, told)] == [True] * len(bad)
    assert len(told) == len(bad)


def test_bad_texts_are_skipped(encoder: Encoder, tmp_path: Path) -> None:
    summary = encode_to(
        encoder, records_of(["猫", None, "狗"]), "texts", tmp_path / "x.npy", manifest="jsonl", on_error="skip"
    )
    assert (summary.rows, summary.skipped) == (2, 1)
    assert [row["text"] for row in read_manifest(summary.manifest)] == ["猫", "狗"]


@pytest.mark.parametrize("manifest", FORMATS)
@pytest.mark.parametrize("before", [False, True], ids=["new", "over old files"])
def test_nothing_is_left_behind_when_it_raises(
    before: bool, manifest: str, encoder: Encoder, pictures: list[Path], tmp_path: Path
) -> None:
    if before:
        (tmp_path / "x.npy").write_bytes(b"old vectors")
        (tmp_path / f"x.{manifest}").write_bytes(b"old manifest")
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ItemError, match=r"item 10: .*gone\.png: no such file"):
        encode_to(
            encoder, records_of([*pictures[:10], "gone.png"]), "images", tmp_path / "x.npy", manifest=manifest,
            batch_size=2,
        )  # fmt: skip

    def records() -> Iterator[Record]:
        yield from records_of(pictures[:8])
        raise DataError("list:9: broken")

    with pytest.raises(DataError, match="list:9: broken"):
        encode_to(encoder, records(), "images", tmp_path / "x.npy", manifest=manifest, batch_size=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


def test_old_files_are_replaced(tmp_path: Path) -> None:
    for rows in (20, 3):
        encode_to(Counter(), (Record(i, "x", "x") for i in range(rows)), "texts", tmp_path / "x.npy")
    assert np.load(tmp_path / "x.npy").shape == (3, 2)
    assert len(read_manifest(tmp_path / "x.parquet")) == 3


@pytest.mark.parametrize("manifest", FORMATS)
def test_no_records_make_empty_files(manifest: str, encoder: Encoder, tmp_path: Path) -> None:
    summary = encode_to(encoder, [], "texts", tmp_path / "x.npy", manifest=manifest)
    assert (summary.rows, summary.skipped) == (0, 0)
    assert np.load(summary.vectors).shape == (0, encoder.embed_dim)
    assert read_manifest(summary.manifest) == []


@pytest.mark.parametrize("name", ["x.npz", "x", "x.parquet", "x.npy.gz"])
def test_vectors_go_into_npy(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}: the vectors go into a \.npy file"):
        encode_to(Counter(), [], "texts", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("manifest", FORMATS)
def test_ids_that_are_numbers_become_text(manifest: str, tmp_path: Path) -> None:
    records = [Record(7, "a", "x:1"), Record("007", "b", "x:2"), Record(None, "c", "x:3")]
    summary = encode_to(Counter(), records, "texts", tmp_path / "x.npy", manifest=manifest)
    assert [row["id"] for row in read_manifest(summary.manifest)] == ["7", "007", "None"]


@pytest.mark.parametrize("manifest", FORMATS)
def test_half_a_surrogate_pair_does_not_end_the_run(manifest: str, encoder: Encoder, tmp_path: Path) -> None:
    """JSON may hold one: ``"\\ud83d"``."""
    texts = ["猫", json.loads(r'"\ud83d猫"')]
    summary = encode_to(encoder, records_of(texts), "texts", tmp_path / "x.npy", manifest=manifest)
    assert [row["text"] for row in read_manifest(summary.manifest)] == ["猫", r"\ud83d猫"]
    np.testing.assert_allclose(np.load(summary.vectors), encoder.encode_text(texts), atol=1e-6)


@pytest.mark.parametrize("manifest", FORMATS)
def test_file_names_that_are_not_utf8(manifest: str, encoder: Encoder, pictures: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(pictures[0], folder / "a.png")
    try:
        shutil.copy(pictures[1], os.fsencode(folder) + "/狗.png".encode("gbk"))
    except OSError:
        pytest.skip("this file system wants UTF-8")
    summary = encode_to(encoder, image_records([str(folder)]), "images", tmp_path / "x.npy", manifest=manifest)
    assert summary.rows == 2
    assert [row["id"] for row in read_manifest(summary.manifest)] == [f"{folder}/a.png", rf"{folder}/\udcb9\udcb7.png"]
