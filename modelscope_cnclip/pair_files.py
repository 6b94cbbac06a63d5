"""Files of image-text pairs, indexed once and then read where needed: jsonl and csv tables, cn_clip's tsv with jsonl.

:func:`.pairs.read_pairs` opens them. Each has a length, ``read(number, picture)`` that gives a :class:`Pair`, and
``key(number)``.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import mmap
import operator
import os
import re
import reprlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .data import DataError, as_id, byte_lines, decode_line, json_object, open_file, tsv_picture
from .images import ImageSource, is_address

logger = logging.getLogger("modelscope_cnclip")

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 can't
# The columns of image, text and image id; the first name that a row has is taken.
Columns: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True)
class Pair:
    """One picture with what is said of it.

    Attributes:
        image: what :func:`.images.open_image` takes.
        texts: one or more captions.
        image_id: pairs with equal ids show the same picture or concept and are never negatives of each other.
        source: where it stands, ``file:line`` or ``item 7 of MsDataset`` (from 0).
    """

    image: ImageSource
    texts: tuple[str, ...]
    image_id: str | int
    source: str


class BadRecords:
    """``with bad:`` passes DataErrors on to ``on_bad``; at the end :meth:`check` asks whether anything was good."""

    def __init__(self, on_bad: Callable[[DataError], None]) -> None:
        self.on_bad, self.count, self.first = on_bad, 0, None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, DataError):
            return False
        self.count, self.first = self.count + 1, self.first or str(error)
        self.on_bad(error)
        return True

    def check(self, name: str, kept: int) -> None:
        if not kept:
            why = f"all {self.count} records are bad, the first: {self.first}" if self.count else "nothing is in it"
            raise DataError(f"{name}: no pairs: {why}")


class IndexedFile:
    """Lines by their offset. Mapped in each process that asks, so there is no position that readers could share."""

    def __init__(self, path: str) -> None:
        self.path, self.stamp, self._map = path, "", None
        self.stamp = self._open()  # before anything is read, so that a later change shows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None}

    def _open(self) -> str:
        with open_file(self.path) as file:
            status = os.fstat(file.fileno())
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""
        return f"{status.st_size}|{status.st_mtime_ns}"

    @property
    def data(self) -> mmap.mmap | bytes:
        if self._map is None and self._open() != self.stamp:
            self._map = None
            raise DataError(f"{self.path}: changed since it was indexed; open the data set again")
        return self._map

    def line(self, start: int, source: str) -> str:
        return decode_line(self.data[start : self.end(start)], source, first=start == 0)

    def end(self, start: int) -> int:
        return self.data.find(b"\n", start) + 1 or len(self.data)


class Table:
    """A jsonl or csv file."""

    local = False

    def __init__(self, file: str, columns: Columns, bad: BadRecords) -> None:
        self.space, self.folder, self.file = file, Path(file).parent, IndexedFile(file)
        self.columns, self.header = columns, []
        self.starts, self.numbers = array("q"), array("q")
        start, number, size = 0, 1, len(self.file.data)
        if size and file.lower().endswith(".csv"):
            self.header, start = self._cells(0, f"{file}:1")
            number += self.file.data[:start].count(b"\n")
            if not all(set(names) & set(self.header) for names in columns[:2]):
                raise DataError(f"{file}:1: {needs(self.header, columns)}")
        while start < size:
            end = self.file.end(start)  # where to go on after a record that can't be parsed
            with bad:
                values, end = self._parse(start, f"{file}:{number}")
                if values is not None:
                    self._pair(values, f"{file}:{number}")
                    self.starts.append(start)
                    self.numbers.append(number)
            number += self.file.data[start:end].count(b"\n")
            start = end
        bad.check(file, len(self))

    def _parse(self, start: int, source: str) -> tuple[dict[str, Any] | list[str] | None, int]:
        """What is at an offset (None: an empty line), and the offset of the next."""
        if self.header:
            cells, end = self._cells(start, source)
            return cells or None, end
        line = self.file.line(start, source).rstrip("\r\n")
        return json_object(line, source) if line else None, self.file.end(start)

    def _cells(self, start: int, source: str) -> tuple[list[str], int]:
        end = start

        def lines() -> Iterator[str]:
            nonlocal end
            while end < len(self.file.data):
                line, end = self.file.line(end, source), self.file.end(end)
                yield line

        try:
            return next(csv.reader(lines(), strict=True)), end
        except csv.Error as error:
            raise DataError(f"{source}: not CSV: {error}") from None

    def _pair(self, values: dict[str, Any] | list[str], source: str) -> Pair:
        if isinstance(values, list):
            if len(values) != len(self.header):
                what = f"{len(values)} cells where the first line has {len(self.header)}"
                raise DataError(f'{source}: {what}; a text with a comma in it needs "quotes"')
            values = dict(zip(self.header, values))
            values.update((name, as_id(values[name])) for name in self.columns[2] if name in values)
        image, text, image_id = pick(values, self.columns, source)
        if not isinstance(image, str) or not image:
            raise DataError(f"{source}: the image must be a path or an address, not {short(image)}")
        image = image if is_address(image) else str(self.folder / image)
        return Pair(image, texts_of(text, source), id_of(image_id, image, source), source)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, j: int, picture: bool) -> Pair:
        source = f"{self.space}:{self.numbers[j]}"
        return self._pair(self._parse(self.starts[j], source)[0], source)

    def key(self, j: int) -> str | None:
        return key_of(self.read(j, False).image)


class CnclipFiles:
    """``*_imgs.tsv`` with ``*_texts.jsonl``."""

    local = True

    def __init__(self, images: str, texts: str, bad: BadRecords) -> None:
        self.space, self.images, self.captions = images, IndexedFile(images), IndexedFile(texts)
        self.image_starts = array("q")  # of every line; the others have an entry per pair
        self.image_lines, self.text_starts, self.numbers, self.places = (array("q") for _ in range(4))
        where, self.without = self._index_images(bad), 0
        for number, start, line in byte_lines(texts):
            ids: list[str | int] = []
            with bad:
                if line.strip(b"\r\n"):
                    ids = self._caption(start, f"{texts}:{number}")[1]
                    self.without += not ids
            for place, key in enumerate(ids):
                with bad:
                    if key not in where:
                        raise DataError(f"{texts}:{number}: image id {short(key)} is not in {images}")
                    self.image_lines.append(where[key])
                    self.text_starts.append(start)
                    self.numbers.append(number)
                    self.places.append(place)
        if self.without:
            logger.info("%s: %d texts name no image and are left out", texts, self.without)
        bad.check(texts, len(self))

    def _index_images(self, bad: BadRecords) -> dict[str | int, int]:
        """id -> line from 1. Base64 is decoded only when a picture is used: such files have hundreds of GB."""
        where: dict[str | int, int] = {}
        for number, start, line in byte_lines(self.space):
            self.image_starts.append(start)
            source, tab = f"{self.space}:{number}", line.find(b"\t")
            with bad:
                if tab >= 0:
                    key = as_id(decode_line(line[:tab], source, first=number == 1))
                    before = where.setdefault(key, number)
                    if (
                        before != number
                        and line[tab:].strip() != self._line(before).partition("\t")[2].strip().encode()
                    ):
                        raise DataError(f"{source}: image id {short(key)} has another picture in line {before}")
                elif line.strip():
                    raise DataError(f"{source}: expected ID, a tab and base64")
        bad.check(self.space, len(where))
        return where

    def _line(self, number: int) -> str:
        return self.images.line(self.image_starts[number - 1], f"{self.space}:{number}")

    def _caption(self, start: int, source: str) -> tuple[tuple[str, ...], list[str | int]]:
        values = json_object(self.captions.line(start, source), source)
        text, ids = values.get("text"), values.get("image_ids")
        if not isinstance(text, str) or not isinstance(ids, list):
            raise DataError(f'{source}: needs a str "text" and a list "image_ids", has {short(values)}')
        return texts_of(text, source), [as_id(str(id_of(key, "", source))) for key in ids]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, j: int, picture: bool) -> Pair:
        source = f"{self.captions.path}:{self.numbers[j]}"
        texts, ids = self._caption(self.text_starts[j], source)
        key, image = ids[self.places[j]], b""
        if picture:
            number = self.image_lines[j]
            image = tsv_picture(self._line(number), f"{self.space}:{number}")[1]
        return Pair(image, texts, key, source)

    def key(self, j: int) -> str:
        return f"{Path(self.space).absolute()}|{self.images.stamp}|{self.read(j, False).image_id}"


def pick(row: Any, columns: Columns, source: str) -> list[Any]:
    """Image, text and image id of a row; None where no name is given or the id isn't there."""
    if isinstance(row, (tuple, list)) and len(row) == 2:
        return [*row, None]
    if not isinstance(row, Mapping):
        raise DataError(f"{source}: expected a dict or (image, text), found {short(row)}")
    found = [next((name for name in names if name in row), None) for names in columns]
    if any(names and name is None for names, name in zip(columns[:2], found)):
        raise DataError(f"{source}: {needs(row, columns)}")
    return [None if name is None else row[name] for name in found]


def needs(names: Iterable[str], columns: Columns) -> str:
    """What to say of a row or table that has other columns."""
    image, text = (" or ".join(map(repr, column)) for column in columns[:2])
    has = ", ".join(map(short, names)) or "nothing"
    return f"needs an image ({image}) and a text ({text}), has {has}; column_map can name others"


def texts_of(value: Any, source: str) -> tuple[str, ...]:
    """One caption or a list of them, checked."""
    texts = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{source}: the text must be a str that isn't empty, or a list of them, not {short(value)}")
        if _SURROGATE.search(text):
            raise DataError(f"{source}: the text holds half a character (a lone surrogate): {short(text)}")
    if not texts:
        raise DataError(f"{source}: the list of texts is empty")
    return tuple(map(str, texts))


def id_of(value: Any, default: str | int, source: str) -> str | int:
    """An image id, checked; the default where there is none."""
    if value is None or isinstance(value, str):
        return str(value or "") or default  # a plain str also of numpy's
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise DataError(f"{source}: an image id must be a str or a whole number, not {short(value)}")


def key_of(image: ImageSource) -> str | None:
    """See :meth:`.pairs.PairDataset.image_key`."""
    if isinstance(image, str) and is_address(image) and not image.startswith("data:"):
        return image
    if isinstance(image, (bytes, bytearray, memoryview)) or (isinstance(image, str) and image.startswith("data:")):
        return "sha256:" + hashlib.sha256(image.encode() if isinstance(image, str) else image).hexdigest()
    if not isinstance(image, (str, os.PathLike)):
        return None
    try:
        status = Path(image).stat()
    except (OSError, ValueError):
        return None
    return f"{Path(image).absolute()}|{status.st_size}|{status.st_mtime_ns}"


def short(value: Any) -> str:
    """A value for a message, on one line."""
    return " ".join(reprlib.repr(value).split())
