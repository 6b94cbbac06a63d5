"""Image-text pairs for training and for retrieval evaluation, out of files and data set objects.

    pairs = read_pairs("captions.jsonl")                       # {"image": "a.png", "text": "一只猫"} per line
    pairs = read_pairs("muge/train")                           # cn_clip's train_imgs.tsv and train_texts.jsonl
    pairs = read_pairs(MsDataset.load(…), column_map={"img": "picture", "text": "caption"})
    pairs[0].image, pairs.texts(0), pairs.image_id(0)

Files are indexed in one pass that checks every line, then read where needed: memory holds 16 to 32 bytes per pair,
whatever the pictures weigh. Picture files are not looked at before they are used.
"""

from __future__ import annotations

import os
import re
import stat
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from .data import DataError, fail, file_mode
from .images import ImageSource
from .pair_files import BadRecords, CnclipFiles, Columns, Pair, Table, id_of, key_of, needs, pick, short, texts_of

__all__ = ["Pair", "PairDataset", "read_pairs"]

_ROLES = {"img": 0, "image": 0, "text": 1, "image_id": 2}
_COLUMNS: Columns = (
    ("image", "image:FILE", "img", "image_path"), ("text", "query", "caption", "title"), ("image_id",)
)  # fmt: skip


class PairDataset:
    """Pairs by number, as a map-style data set of torch; :func:`read_pairs` makes it.

    It can be pickled, and read by threads and by forked or spawned workers at the same time. Reading raises DataError
    where a picture's base64 is broken, or a file changed since it was indexed.

    Attributes:
        texts_without_image: how many texts of cn_clip's files were left out because they name no picture.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts, self._ends = list(parts), list(accumulate(map(len, parts)))
        self.texts_without_image: int = sum(getattr(part, "without", 0) for part in parts)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Pair:
        return self._read(i, True)

    def texts(self, i: int) -> tuple[str, ...]:
        """``self[i].texts``, without reading the picture."""
        return self._read(i, False).texts

    def image_id(self, i: int) -> str | int:
        """``self[i].image_id``, without reading the picture."""
        return self._read(i, False).image_id

    def image_key(self, i: int) -> str | None:
        """A text that changes when the picture does, for caches: path, size and time of a file, the digest of bytes,
        an address itself. None where nothing can be said, and for a missing file."""
        k, j = self._at(i)
        return self._parts[k].key(j)

    def _at(self, i: int) -> tuple[int, int]:
        i = range(len(self))[i]  # counts from the end, and raises IndexError, as a list does
        k = bisect_right(self._ends, i)
        return k, i - (self._ends[k - 1] if k else 0)

    def _read(self, i: int, picture: bool) -> Pair:
        k, j = self._at(i)
        pair = self._parts[k].read(j, picture)
        if len(self._parts) == 1 or (isinstance(pair.image_id, str) and not self._parts[k].local):
            return pair
        return replace(pair, image_id=f"{self._parts[k].space or f'source {k}'}#{pair.image_id}")


def read_pairs(
    source: Any, *, column_map: Mapping[str, str] | None = None, on_bad: Callable[[DataError], None] = fail
) -> PairDataset:
    """Open a data set of image-text pairs.

    Args:
        source: one of

            - a ``.jsonl`` with ``image`` (a path relative to the file's folder, or an address), ``text`` (a str or a
              list of them) and, if known, ``image_id``; or a ``.csv`` whose first line names such columns;
            - cn_clip's files, ``"DIR/train"`` for ``DIR/train_imgs.tsv`` with ``DIR/train_texts.jsonl``, or
              ``{"images": TSV, "texts": JSONL}``. One pair for each text and each of its ``image_ids``; texts without
              any are left out, and how many is logged;
            - ``MsDataset``, ``datasets.Dataset``, torch ``Dataset`` or a sequence, whose items are dicts or
              (image, text). Images may be anything that ``open_image`` takes, or undecoded ``{"bytes", "path"}``;
              paths are relative to the working directory. A torch ``Dataset`` is checked at its first item only, and
              makes a whole item, picture and all, when its text or id is asked for;
            - a list or tuple of these, one after the other. It is one when its first element is a str, a path, files
              of cn_clip or a data set object; when that is another dict, a list or a tuple, the elements are rows.
        column_map: ``{"img": column, "text": column, "image_id": column}``, as ModelScope spells it, for every source
            with columns. Without it, the first that a row has of image, image:FILE, img, image_path, and of text,
            query, caption, title.
        on_bad: called for each record that is left out; the default raises.

    A missing ``image_id`` is the image's path or address if there is one, else the row's number. In a list of sources,
    numbers and cn_clip's ids count within their own file; other ids are shared, so that a concept can have pictures in
    several.

    Raises:
        DataError: no such file, an unknown kind of file, no pairs in it, or none but bad records.
    """
    columns = list(_COLUMNS)
    for role, name in (column_map or {}).items():
        if role not in _ROLES or not isinstance(name, str):
            raise DataError(f"column_map: {role!r}: {name!r}: expected the name of a column for img, text or image_id")
        columns[_ROLES[role]] = (name,)
    if isinstance(source, PairDataset):
        return source
    first = source[0] if isinstance(source, (list, tuple)) and source else ()
    if _is_files(first) or not isinstance(first, (Mapping, list, tuple)):
        opened = [read_pairs(part, column_map=column_map, on_bad=on_bad) for part in source]
        return PairDataset([part for pairs in opened for part in pairs._parts])
    return PairDataset([_open(source, tuple(columns), BadRecords(on_bad))])


def _open(source: Any, columns: Columns, bad: BadRecords) -> _Part:
    if _is_files(source):
        return CnclipFiles(os.fspath(source["images"]), os.fspath(source["texts"]), bad)
    if not isinstance(source, (str, os.PathLike)):
        return _rows(source, columns, bad)
    file = os.fspath(source)
    images, texts = f"{file}_imgs.tsv", f"{file}_texts.jsonl"
    if file_mode(images) or file_mode(texts):
        return CnclipFiles(images, texts, bad)
    if Path(file).suffix.lower() in (".jsonl", ".csv"):
        return Table(file, columns, bad)
    if half := re.fullmatch(r"(.+)_imgs\.tsv", file):
        raise DataError(f"{file}: only the pictures of a data set of cn_clip; for both its files say {half[1]!r}")
    if stat.S_ISDIR(file_mode(file)):
        splits = sorted(str(found).removesuffix("_imgs.tsv") for found in Path(file).glob("*_imgs.tsv"))
        raise DataError(f"{file}: a folder; {'say ' + ' or '.join(splits) if splits else 'no *_imgs.tsv is in it'}")
    what = "not a kind of file that is read" if file_mode(file) else "no such file"
    raise DataError(f"{file}: {what}; expected a .jsonl, a .csv, or DIR/train where DIR/train_imgs.tsv is")


def _is_files(source: Any) -> bool:
    return (
        isinstance(source, Mapping)
        and set(source) == {"images", "texts"}
        and all(isinstance(file, (str, os.PathLike)) for file in source.values())
    )


# In a list of sources, numbers, or all ids if ``local``, are those of the part's ``space``.
_Part: TypeAlias = "Table | CnclipFiles | _Rows"


class _Rows:
    """An object's items. ``light`` has the same items with ``light_columns`` only, where pictures can be left out."""

    space, local = "", False

    def __init__(self, rows: Any, columns: Columns, name: str, light: Any = None, light_columns: Any = None) -> None:
        self.rows, self.columns, self.name, self.light, self.light_columns = rows, columns, name, light, light_columns
        self.kept: Sequence[int] = range(len(rows))

    def check(self, items: Iterable[tuple[int, Any]], bad: BadRecords) -> _Rows:
        """Leave out what is bad among these (number, item of ``light`` or else of ``rows``)."""
        dropped = set()
        for number, row in items:
            dropped.add(number)
            with bad:
                self._pair(row, number)
                dropped.remove(number)
        if dropped:
            self.kept = array("q", (number for number in self.kept if number not in dropped))
        bad.check(self.name, len(self))
        return self

    def _pair(self, row: Any, number: int) -> Pair:
        source = f"item {number} of {self.name}"
        columns = self.columns if self.light is None else self.light_columns
        image, text, image_id = pick(row, columns, source)
        path = os.fspath(image) if isinstance(image, (str, os.PathLike)) else number
        image = _image(image, source) if columns[0] else b""
        return Pair(image, texts_of(text, source), id_of(image_id, path, source), source)

    def __len__(self) -> int:
        return len(self.kept)

    def read(self, j: int, picture: bool) -> Pair:
        number = self.kept[j]
        pair = self._pair((self.rows if self.light is None else self.light)[number], number)
        if picture and self.light is not None:
            image = pick(self.rows[number], self.columns, pair.source)[0]
            return replace(pair, image=_image(image, pair.source))
        return pair

    def key(self, j: int) -> str | None:
        # Items of a torch Dataset may be made anew, and otherwise, at every look.
        fixed = self.light is not None or isinstance(self.rows, Sequence)
        return key_of(self.read(j, True).image) if fixed else None


def _rows(source: Any, columns: Columns, bad: BadRecords) -> _Rows:
    rows, name = getattr(source, "ds_instance", source), type(source).__name__  # MsDataset wraps one of datasets
    if isinstance(rows, Mapping):
        wanted = 'one data set, such as a split of it, or {"images": TSV, "texts": JSONL}'
        raise DataError(f"{name} with {', '.join(map(short, rows))}: expected {wanted}")
    # ModelScope's and torch's streams may have len() and [] and mean something else by them.
    stream = any(kind.__name__ == "IterableDataset" for kind in type(rows).__mro__)
    if stream or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise DataError(f"{name}: needs len() and items by number; a stream has to be loaded without streaming")
    if not len(rows):
        bad.check(name, 0)
    if isinstance(rows, Sequence):
        return _Rows(rows, columns, name).check(enumerate(rows), bad)
    if hasattr(rows, "select_columns") and rows.format["type"] != "custom":
        return _arrow_rows(rows, columns, bad, name)
    return _Rows(rows, columns, name).check([(0, rows[0])], bad)


def _arrow_rows(rows: Any, columns: Columns, bad: BadRecords, name: str) -> _Rows:
    """Of a ``datasets.Dataset``. Pictures stay undecoded: it would turn them by their EXIF tag, which we don't."""
    from datasets import Image

    rows = rows.with_format(None)
    image, text, image_id = (next((n for n in names if n in rows.column_names), None) for names in columns)
    if not image or not text:
        raise DataError(f"{name}: {needs(rows.column_names, columns)}")
    if isinstance(rows.features[image], Image):
        rows = rows.cast_column(image, Image(decode=False))
    is_text = getattr(rows.features[image], "dtype", None) in ("string", "large_string")
    light_columns = (columns[0] if is_text else (), (text,), columns[2])
    light = rows.select_columns([column for column in (image if is_text else None, text, image_id) if column])
    items = (dict(zip(batch, values)) for batch in light.iter(1000) for values in zip(*batch.values()))
    return _Rows(rows, columns, name, light, light_columns).check(enumerate(items), bad)


def _image(value: Any, source: str) -> ImageSource:
    if isinstance(value, Mapping) and value and set(value) <= {"bytes", "path"}:  # datasets.Image(decode=False)
        value = value["path"] if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, ImageSource) or (isinstance(value, str) and not value):
        raise DataError(f"{source}: the image must be a path, address, bytes, PIL or uint8 array, not {short(value)}")
    return value
