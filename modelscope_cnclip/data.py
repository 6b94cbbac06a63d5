"""Records out of the files that people have: folders of pictures, lists, tsv and jsonl.

Reading is lazy and in order. A record that can't be read is a :class:`DataError` with its file and line, given to
``on_bad``; the default raises it.
"""

from __future__ import annotations

import base64
import glob
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from .images import IMAGE_SUFFIXES, ImageSource, is_address

Kind = Literal["images", "texts"]


class DataError(ValueError):
    """A record or file that can't be read. The text names the file and line."""


@dataclass(frozen=True)
class Record:
    """One picture or text.

    Attributes:
        id: as the file has it, else the path or the line number.
        value: the text, or what :func:`.images.open_image` takes.
        source: where it stands, ``path`` or ``file:line``.
    """

    id: str | int
    value: ImageSource | str
    source: str


def fail(error: DataError) -> None:
    """The default ``on_bad``."""
    raise error


def guess_kind(inputs: Iterable[str]) -> Kind:
    """Whether inputs hold pictures or texts, from their names and, for jsonl, the first line.

    Raises:
        DataError: they don't tell.
    """
    for item in inputs:
        suffix = Path(item).suffix.lower()
        if suffix == ".txt":
            return "texts"
        if suffix == ".jsonl" and stat.S_ISREG(file_mode(item)):
            _, head = next(_lines(item, fail), (0, ""))
            return "images" if '"image"' in head else "texts"
        if (
            suffix == ".tsv"
            or suffix in IMAGE_SUFFIXES
            or is_address(item)
            or stat.S_ISDIR(file_mode(item))
            or glob.has_magic(item)
        ):
            return "images"
    raise DataError(f"{', '.join(inputs)}: pictures or texts? Say which with --kind")


def image_records(inputs: Iterable[str], on_bad: Callable[[DataError], None] = fail) -> Iterator[Record]:
    """Pictures named on a command line.

    Args:
        inputs: picture files, addresses, folders (read through, in name order), globs, ``.txt`` lists of paths,
            cn_clip's ``*_imgs.tsv`` (id, tab, base64), ``.jsonl`` with ``image`` (and ``image_id``), or ``-`` for a
            list on standard input. Paths in a list are relative to the list's folder.
        on_bad: called for each record that can't be read.
    """
    for item in inputs:
        suffix = Path(item).suffix.lower()
        if is_address(item):
            yield Record(item, item, item)
        elif item == "-":
            for number, line in _lines("-", on_bad):
                yield Record(line, line, f"<stdin>:{number}")
        elif stat.S_ISDIR(file_mode(item)):
            for path in _walk(item):
                yield Record(path, path, path)
        elif suffix == ".tsv":
            yield from _tsv_images(item, on_bad)
        elif suffix == ".jsonl":
            for number, values in _json_lines(item, on_bad):
                image = values.get("image")
                if not isinstance(image, str):
                    on_bad(DataError(f'{item}:{number}: no "image" in it, but {", ".join(values) or "nothing"}'))
                    continue
                yield Record(values.get("image_id", image), _beside(item, image), f"{item}:{number}")
        elif suffix == ".txt":
            for number, line in _lines(item, on_bad):
                yield Record(line, _beside(item, line), f"{item}:{number}")
        elif glob.has_magic(item) and not file_mode(item):
            found = sorted(glob.glob(item, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            if not found:
                on_bad(DataError(f"{item}: matches no file"))
            yield from (Record(path, path, path) for path in found)
        else:
            yield Record(item, item, item)


def text_records(inputs: Iterable[str], on_bad: Callable[[DataError], None] = fail) -> Iterator[Record]:
    """Texts named on a command line.

    Args:
        inputs: ``.txt`` files with a text per line, ``.jsonl`` with ``text`` (and ``text_id``), ``.tsv`` (id, tab,
            text), ``-`` for lines on standard input; anything that is no file is a text itself.
        on_bad: called for each record that can't be read.
    """
    for row, item in enumerate(inputs):
        suffix = Path(item).suffix.lower()
        if item != "-" and suffix not in (".txt", ".jsonl", ".tsv"):
            yield Record(row, item, "<command line>")
        elif suffix == ".jsonl":
            for number, values in _json_lines(item, on_bad):
                text = values.get("text")
                if not isinstance(text, str):
                    on_bad(DataError(f'{item}:{number}: no "text" in it, but {", ".join(values) or "nothing"}'))
                    continue
                yield Record(values.get("text_id", number), text, f"{item}:{number}")
        elif suffix == ".tsv":
            for number, line in _lines(item, on_bad):
                key, tab, text = line.partition("\t")
                if not tab:
                    on_bad(DataError(f"{item}:{number}: expected ID, a tab and a text"))
                    continue
                yield Record(as_id(key), text, f"{item}:{number}")
        else:
            for number, line in _lines(item, on_bad):
                yield Record(number, line, f"{'<stdin>' if item == '-' else item}:{number}")


def _tsv_images(file: str, on_bad: Callable[[DataError], None]) -> Iterator[Record]:
    for number, line in _lines(file, on_bad):
        try:
            key, data = tsv_picture(line, f"{file}:{number}")
        except DataError as error:
            on_bad(error)
            continue
        yield Record(key, data, f"{file}:{number}")


def _json_lines(file: str, on_bad: Callable[[DataError], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(file, on_bad):
        try:
            values = json_object(line, f"{file}:{number}")
        except DataError as error:
            on_bad(error)
            continue
        yield number, values


def _lines(file: str, on_bad: Callable[[DataError], None]) -> Iterator[tuple[int, str]]:
    """(number from 1, line without its end) of every line that isn't empty."""
    name = "<stdin>" if file == "-" else file
    for number, _, line in byte_lines(file):
        try:
            text = decode_line(line, f"{name}:{number}", first=number == 1).rstrip("\r\n")
        except DataError as error:
            on_bad(error)
            continue
        if text:
            yield number, text


def byte_lines(file: str) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset in bytes, line with its end) of every line. Lines end at LF and nowhere else.

    Raises:
        DataError: no such file, or it can't be read.
    """
    with open_file(file) as lines:
        offset = 0
        for number, line in enumerate(lines, 1):
            yield number, offset, line
            offset += len(line)


def decode_line(line: bytes, source: str, *, first: bool = False) -> str:
    """UTF-8 to text, or a DataError that starts with ``source``. The first line may start with a BOM."""
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 ({error.reason})") from None


def json_object(line: str, source: str) -> dict[str, Any]:
    """A line of jsonl, or a DataError that starts with ``source``."""
    try:
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {line[:40]!r}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not a JSON object: {error}") from None
    return values


def tsv_picture(line: str, source: str) -> tuple[str | int, bytes]:
    """Id and file content of a line of cn_clip's ``*_imgs.tsv``, or a DataError that starts with ``source``."""
    key, tab, body = line.partition("\t")
    try:
        if not tab:
            raise ValueError("expected ID, a tab and base64")
        # Upstream's files use the url-safe alphabet as often as the plain one.
        return as_id(key), base64.b64decode(body.strip().replace("-", "+").replace("_", "/"), validate=True)
    except ValueError as error:  # binascii.Error is one
        raise DataError(f"{source}: {error}") from None


def open_file(file: str) -> BinaryIO:
    """Bytes, since a text file decodes far ahead of the line that it gives."""
    if file == "-":
        return open(sys.stdin.fileno(), "rb", closefd=False)
    try:
        return Path(file).open("rb")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or error}") from None


def file_mode(path: str) -> int:
    """``st_mode``, or 0 where there is no file; a text may be too long for a name."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):
        return 0


def _walk(folder: str) -> Iterator[str]:
    for root, folders, names in os.walk(folder):  # links to folders are not followed, so no loop is entered
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield str(Path(root) / name)


def _beside(file: str, path: str) -> str:
    return path if is_address(path) else str(Path(file).parent / path)


def as_id(key: str) -> str | int:
    """An int where nothing of the key is lost: ``007`` stays as it is."""
    return int(key) if re.fullmatch("0|[1-9][0-9]{0,17}", key) else key
