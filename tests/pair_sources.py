"""Small data sets of pairs on disk, and what holds for every one of them."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelscope_cnclip.data import DataError
from modelscope_cnclip.pairs import PairDataset, read_pairs


def write(file: Path, content: str | bytes) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def jsonl(file: Path, *rows: Any) -> str:
    return write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def cnclip(folder: Path, images: list[tuple[Any, bytes]], texts: list[tuple[str, list]], encode: Any = None) -> str:
    """The two files of split ``train``."""
    encode = encode or base64.b64encode
    write(folder / "train_imgs.tsv", "".join(f"{key}\t{encode(data).decode()}\n" for key, data in images))
    rows = [{"text_id": i, "text": text, "image_ids": ids} for i, (text, ids) in enumerate(texts)]
    jsonl(folder / "train_texts.jsonl", *rows)
    return str(folder / "train")


def refused(source: Any, *says: str, **options: Any) -> None:
    """A DataError of one line that says all of this."""
    with pytest.raises(DataError) as caught:
        read_pairs(source, **options)
    text = str(caught.value)
    assert "\n" not in text
    for part in says:
        assert part in text


def kept_and_bad(source: Any, **options: Any) -> tuple[PairDataset, list[str]]:
    bad: list[DataError] = []
    pairs = read_pairs(source, on_bad=bad.append, **options)
    return pairs, [str(error) for error in bad]


def assert_consistent(pairs: PairDataset) -> None:
    """However a pair is asked for, the answer is the same; also from a copy that was pickled."""
    copy = pickle.loads(pickle.dumps(pairs))
    assert len(copy) == len(pairs) > 0
    for i, pair in enumerate(pairs):
        assert pairs.texts(i) == copy.texts(i) == pair.texts
        assert pairs.image_id(i) == copy.image_id(i) == pair.image_id
        assert pairs.image_key(i) == copy.image_key(i)
        assert copy[i].source == pair.source
    assert pairs[-1].source == pairs[len(pairs) - 1].source == pairs[np.int64(len(pairs) - 1)].source
    for i in (len(pairs), -len(pairs) - 1):
        with pytest.raises(IndexError):
            pairs[i]
