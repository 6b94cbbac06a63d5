"""Many pictures or texts to files: ``vectors.npy`` and, row for row, a manifest that says what each row is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .data import Kind, Record
from .encoder import Encoder, OnError

_ROW_GROUP = 2**14  # rows of a manifest that are written together

ManifestFormat = Literal["parquet", "jsonl"]


@dataclass(frozen=True)
class Summary:
    """What :func:`encode_to` did. Paths are where it wrote; ``skipped`` counts items that couldn't be embedded."""

    vectors: str
    manifest: str
    rows: int
    skipped: int
    dim: int
    model: str
    backend: str
    precision: str
    device: str


def encode_to(
    encoder: Encoder,
    records: Iterable[Record],
    kind: Kind,
    out: str | Path,
    *,
    manifest: ManifestFormat = "parquet",
    batch_size: int | None = None,
    show_progress: bool | None = None,
    on_error: OnError = "raise",
) -> Summary:
    """Embed records into ``out`` (``.npy``, (N, D) float32) and a manifest beside it.

    The manifest has a row per vector: ``row`` (from 0), ``id``, ``source`` and, for texts, ``text``. Both files are
    written under other names and renamed at the end; no more than a few batches are in memory.

    Raises:
        encoder.ItemError: a record can't be embedded and ``on_error`` is ``raise``.
        ValueError: ``out`` has another suffix.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"{out}: the vectors go into a .npy file")
    listed = out.with_suffix(f".{manifest}")
    out.parent.mkdir(parents=True, exist_ok=True)
    waiting: dict[int, Record] = {}

    def values() -> Iterator[Any]:
        for index, record in enumerate(records):
            waiting[index] = record
            yield record.value

    encode = encoder.iter_image if kind == "images" else encoder.iter_text
    settings = {"batch_size": batch_size} if batch_size else {}
    pieces = encode(values(), show_progress=show_progress, on_error=on_error, **settings)
    seen = rows = 0
    with _Vectors(out, encoder.embed_dim) as vectors, _MANIFESTS[manifest](listed, kind) as lines:
        for positions, piece in pieces:
            vectors.add(piece)
            lines.add([_row(rows + i, waiting[position], kind) for i, position in enumerate(positions.tolist())])
            rows += len(piece)
            for index in [index for index in waiting if index <= positions[-1]]:
                del waiting[index]
                seen += 1
    skipped = seen + len(waiting) - rows
    backend = encoder.backend
    return Summary(
        str(out), str(listed), rows, skipped, encoder.embed_dim, encoder.model_id, backend.name, backend.precision,
        backend.device,
    )  # fmt: skip


def _row(row: int, record: Record, kind: Kind) -> dict[str, Any]:
    values = {"id": str(record.id), "source": record.source}
    if kind == "texts":
        values["text"] = record.value
    # File names that aren't UTF-8, and halves of surrogate pairs in JSON, have no place in either format.
    return {"row": row} | {key: text.encode(errors="backslashreplace").decode() for key, text in values.items()}


class _File:
    """A file under a temporary name, which gets its own name if all went well."""

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
            if kind is None:
                self.temporary.replace(self.path)
        finally:
            self.temporary.unlink(missing_ok=True)

    def close(self) -> None: ...


class _Vectors(_File):
    """``.npy`` of rows that come one piece at a time; numpy leaves room in the header for the final count."""

    def __init__(self, path: Path, dim: int) -> None:
        super().__init__(path)
        self.dim, self.rows = dim, 0
        self.file = self.temporary.open("wb")
        self._header()

    def add(self, piece: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(piece, dtype="<f4").tobytes())
        self.rows += len(piece)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        self.file.close()

    def _header(self) -> None:
        shape = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.dim)}
        np.lib.format.write_array_header_1_0(self.file, shape)


class _JsonLines(_File):
    def __init__(self, path: Path, kind: Kind) -> None:
        super().__init__(path)
        self.file = self.temporary.open("w", encoding="utf-8")

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        self.file.close()


class _Parquet(_File):
    def __init__(self, path: Path, kind: Kind) -> None:
        super().__init__(path)
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [("row", pa.int64()), ("id", pa.string()), ("source", pa.string())]
        self.schema = pa.schema([*columns, ("text", pa.string())] if kind == "texts" else columns)
        self.table = pa.Table
        self.waiting: list[dict[str, Any]] = []
        self.writer = pq.ParquetWriter(self.temporary, self.schema)

    def add(self, rows: list[dict[str, Any]]) -> None:
        self.waiting += rows
        if len(self.waiting) >= _ROW_GROUP:
            self._write()

    def close(self) -> None:
        if self.waiting:
            self._write()
        self.writer.close()

    def _write(self) -> None:
        self.writer.write_table(self.table.from_pylist(self.waiting, schema=self.schema))
        self.waiting = []


_MANIFESTS: dict[str, Callable[[Path, Kind], Any]] = {"parquet": _Parquet, "jsonl": _JsonLines}
