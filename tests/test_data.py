"""Records out of folders, lists, tsv and jsonl: their order, ids and sources, and lines that can't be read."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelscope_cnclip import data
from modelscope_cnclip.data import DataError, Record, guess_kind, image_records, text_records

Reader = Callable[..., Iterator[Record]]


def write(file: Path, content: str | bytes) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def values(records: Iterator[Record]) -> list[Any]:
    return [record.value for record in records]


def kept_and_bad(reader: Reader, *inputs: str) -> tuple[list[Record], list[str]]:
    bad: list[DataError] = []
    kept = list(reader(inputs, bad.append))
    return kept, [str(error) for error in bad]


ALBUM = ["a.JPG", "b.png", "c/10.gif", "c/2.jpeg", "c/猫.avif", "c/d/x.tiff", "z/1.webp"]


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Pictures (empty files will do) in folders, among other files."""
    for name in (*reversed(ALBUM), "notes.txt", "c/x.pdf", "c/png"):
        write(tmp_path / "album" / name, b"")
    return tmp_path / "album"


def test_folders_are_walked_in_name_order(album: Path) -> None:
    records = list(image_records([str(album)]))
    assert [record.value for record in records] == [str(album / name) for name in ALBUM]
    assert all(record.id == record.source == record.value for record in records)


def test_a_link_to_a_folder_is_not_entered_but_a_link_to_a_picture_counts(album: Path) -> None:
    try:
        (album / "c" / "loop").symlink_to(album, target_is_directory=True)
        (album / "bb.png").symlink_to(album / "b.png")
    except OSError:
        pytest.skip("no symbolic links here")
    names = ["a.JPG", "b.png", "bb.png", *ALBUM[2:]]
    assert values(image_records([str(album)])) == [str(album / name) for name in names]


def test_inputs_keep_their_order(album: Path) -> None:
    address = "https://example.com/x.jpg"
    rest = ["oss://b/k.png", str(album / "b.png"), "data:image/png;base64,AA==", "nowhere.png"]
    assert values(image_records([address, str(album / "z"), *rest])) == [address, str(album / "z/1.webp"), *rest]


def test_globs(album: Path) -> None:
    assert values(image_records([f"{album}/*.[pJ]*"])) == [str(album / "a.JPG"), str(album / "b.png")]
    deep = values(image_records([f"{album}/**/*.*g"]))
    assert deep == sorted(str(album / name) for name in ("b.png", "c/2.jpeg"))
    with pytest.raises(DataError, match=r"\*\.bmp: matches no file"):
        list(image_records([f"{album}/*.bmp"]))
    assert kept_and_bad(image_records, f"{album}/*.bmp", "x.png")[0] == [Record("x.png", "x.png", "x.png")]


def test_a_file_named_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "x[1].png", b"")
    assert values(image_records([file])) == [file]


def test_lists_of_paths_are_relative_to_the_list(tmp_path: Path) -> None:
    file = write(tmp_path / "lists/a.txt", "x.png\n../猫.jpg\r\n\nhttps://example.com/a b.png\n/abs/y.png")
    assert list(image_records([file])) == [
        Record("x.png", str(tmp_path / "lists/x.png"), f"{file}:1"),
        Record("../猫.jpg", str(tmp_path / "lists/../猫.jpg"), f"{file}:2"),
        Record("https://example.com/a b.png", "https://example.com/a b.png", f"{file}:4"),
        Record("/abs/y.png", "/abs/y.png", f"{file}:5"),
    ]


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode], ids=["plain", "url-safe"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_tsv_of_pictures(encode: Callable[[bytes], bytes], end: str, tmp_path: Path) -> None:
    contents = [bytes(range(256)), b"\xfb\xff\xfe" * 5, "猫".encode()]
    keys = ["17", "abc", "007"]
    body = "".join(f"{key}\t{encode(content).decode()}{end}" for key, content in zip(keys, contents))
    file = write(tmp_path / "x_imgs.tsv", body)
    assert list(image_records([file])) == [
        Record(17, contents[0], f"{file}:1"),
        Record("abc", contents[1], f"{file}:2"),
        Record("007", contents[2], f"{file}:3"),
    ]


def test_jsonl_of_pictures(tmp_path: Path) -> None:
    lines = ['{"image": "a.png", "image_id": 9}', "", '{"image": "oss://b/k"}', '{"image": "/c.png", "image_id": "c"}']
    file = write(tmp_path / "x.jsonl", "\n".join(lines))
    assert list(image_records([file])) == [
        Record(9, str(tmp_path / "a.png"), f"{file}:1"),
        Record("oss://b/k", "oss://b/k", f"{file}:3"),
        Record("c", "/c.png", f"{file}:4"),
    ]


def test_text_files(tmp_path: Path) -> None:
    plain = write(tmp_path / "a.txt", "一只猫\n\n a dog \n\t\n最后一行")
    tsv = write(tmp_path / "b.tsv", "1\t一只猫\nx\ta\tb\n3\t\n")
    jsonl = write(tmp_path / "c.jsonl", '{"text": "猫", "text_id": "t1", "image_ids": [1]}\n{"text": ""}\n')
    assert list(text_records([plain, tsv, jsonl])) == [
        Record(1, "一只猫", f"{plain}:1"),
        Record(3, " a dog ", f"{plain}:3"),
        Record(4, "\t", f"{plain}:4"),
        Record(5, "最后一行", f"{plain}:5"),
        Record(1, "一只猫", f"{tsv}:1"),
        Record("x", "a\tb", f"{tsv}:2"),
        Record(3, "", f"{tsv}:3"),
        Record("t1", "猫", f"{jsonl}:1"),
        Record(2, "", f"{jsonl}:2"),
    ]


def test_texts_on_the_command_line(tmp_path: Path) -> None:
    long = "一只猫" * 2000
    assert list(text_records(["一只猫", long, "what? [sic]"])) == [
        Record(0, "一只猫", "<command line>"),
        Record(1, long, "<command line>"),
        Record(2, "what? [sic]", "<command line>"),
    ]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("place", ["file", "stdin"])
def test_bom_and_line_ends_are_no_part_of_a_line(
    place: str, bom: bytes, end: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "x.txt", bom + "猫\u2028一\x85二\x0c三".encode() + end + end + b"dog")
    with Path(file).open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        item = file if place == "file" else "-"
        lines = [(record.id, record.value) for record in text_records([item])]
    assert lines == [(1, "猫\u2028一\x85二\x0c三"), (3, "dog")]


def test_stdin_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "x", "a.png\n猫.jpg\n".encode() + b"\xff.png\n" + b"http://x/y")
    with Path(file).open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        kept, bad = kept_and_bad(image_records, "-")
        assert not stream.closed
        stream.read(0)
    assert kept == [
        Record("a.png", "a.png", "<stdin>:1"),
        Record("猫.jpg", "猫.jpg", "<stdin>:2"),
        Record("http://x/y", "http://x/y", "<stdin>:4"),
    ]
    assert bad == ["<stdin>:3: not UTF-8 (invalid start byte)"]


@pytest.mark.parametrize(
    ("reader", "name", "line", "says"),
    [
        (image_records, "x.tsv", "no tab", "expected ID, a tab and base64"),
        (image_records, "x.tsv", "1\t!!!!", "base64"),
        (image_records, "x.tsv", "1\tAAA", "padding"),
        (image_records, "x.tsv", "1\t图", "ASCII"),
        (image_records, "x.jsonl", "{oops", "not a JSON object"),
        (image_records, "x.jsonl", "[1, 2]", "not a JSON object: expected an object, found '[1, 2]'"),
        (image_records, "x.jsonl", "[" * 100_000, "not a JSON object"),
        (image_records, "x.jsonl", '{"text": "猫", "id": 1}', 'no "image" in it, but text, id'),
        (image_records, "x.jsonl", '{"image": 5}', 'no "image" in it, but image'),
        (image_records, "x.jsonl", "{}", 'no "image" in it, but nothing'),
        (text_records, "x.jsonl", "null", "not a JSON object"),
        (text_records, "x.jsonl", '{"text": ' + "9" * 5000 + "}", "not a JSON object"),
        (text_records, "x.jsonl", '{"texts": "猫"}', 'no "text" in it, but texts'),
        (text_records, "x.jsonl", '{"text": null}', 'no "text" in it, but text'),
        (text_records, "x.tsv", "no tab", "expected ID, a tab and a text"),
        (text_records, "x.txt", b"\xc3\xa8\xe7", "not UTF-8"),
        (text_records, "x.jsonl", '{"text": "狗"}'.encode("gbk"), "not UTF-8"),
        (image_records, "x.txt", "狗.png".encode("gbk"), "not UTF-8"),
    ],
)
def test_bad_lines_are_told_with_file_and_line(
    reader: Reader, name: str, line: str | bytes, says: str, tmp_path: Path
) -> None:
    """Between good ones, which are kept."""
    good = {"x.tsv": "5\tAAAA", "x.jsonl": '{"image": "a.png", "text": "猫"}', "x.txt": "a.png"}[name].encode()
    line = line.encode() if isinstance(line, str) else line
    file = write(tmp_path / name, b"\n".join([good, b"", line, good]))
    kept, bad = kept_and_bad(reader, file)
    assert [record.source for record in kept] == [f"{file}:1", f"{file}:4"]
    assert len(bad) == 1
    assert bad[0].startswith(f"{file}:3: ")
    assert says in bad[0]
    assert "\n" not in bad[0]
    read = reader([file])
    assert next(read).source == f"{file}:1"
    with pytest.raises(DataError) as caught:
        next(read)
    assert str(caught.value) == bad[0]


@pytest.mark.parametrize("reader", [image_records, text_records])
@pytest.mark.parametrize("name", ["gone.txt", "gone.tsv", "gone.jsonl"])
def test_lists_that_are_not_there(reader: Reader, name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{name}: No such file or directory"):
        list(reader([str(tmp_path / name)]))
    (tmp_path / name).mkdir()
    if reader is text_records:
        with pytest.raises(DataError, match=rf"{name}: Is a directory"):
            list(reader([str(tmp_path / name)]))


def test_reading_is_lazy(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "a\nb\n")
    records = text_records([file, str(tmp_path / "gone.txt")])
    assert [next(records).value, next(records).value] == ["a", "b"]
    with pytest.raises(DataError):
        next(records)


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        (["a.JPG"], "images"),
        (["x.avif"], "images"),
        (["a.tsv"], "images"),
        (["photos/*"], "images"),
        (["http://example.com/x"], "images"),
        (["oss://bucket/key"], "images"),
        (["data:image/png;base64," + "A" * 5000], "images"),
        (["."], "images"),
        (["a.txt"], "texts"),
        (["一只猫", "a.txt"], "texts"),
        (["-", "a.png"], "images"),
    ],
)
def test_kinds_by_name(inputs: list[str], kind: str) -> None:
    assert guess_kind(inputs) == kind


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('{"image": "a.png"}\n', "images"),
        ('{"text": "猫", "image_ids": [1]}\n', "texts"),
        ('\ufeff\n\n{"image": "a.png"}', "images"),
        ("", "texts"),
    ],
)
def test_kinds_by_the_first_line_of_jsonl(content: str, kind: str, tmp_path: Path) -> None:
    assert guess_kind([write(tmp_path / "x.jsonl", content)]) == kind


@pytest.mark.parametrize("inputs", [["一只猫"], ["-"], ["nowhere.jsonl"], ["猫" * 5000], ["a\0b"]])
def test_kinds_that_cannot_be_told(inputs: list[str]) -> None:
    with pytest.raises(DataError, match=r"pictures or texts\? Say which with --kind"):
        guess_kind(inputs)


def test_kinds_of_jsonl_that_is_not_utf8(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", b"\xff\xfe{")
    with pytest.raises(DataError, match=r"x\.jsonl:1: not UTF-8"):
        guess_kind([file])


@pytest.mark.parametrize(
    ("key", "expected"),
    [("0", 0), ("12", 12), ("007", "007"), ("-1", "-1"), ("１２", "１２"), ("", ""), ("9" * 5000, "9" * 5000)],
)
def test_ids_lose_nothing(key: str, expected: str | int, tmp_path: Path) -> None:
    file = write(tmp_path / "x.tsv", f"{key}\tAAAA\n")
    assert [record.id for record in image_records([file])] == [expected]
    assert [record.id for record in text_records([file])] == [expected]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["image", "text", "x"]), inner),
    max_leaves=6,
)  # fmt: skip
LINES = st.lists(
    st.binary(max_size=40)
    | st.text(max_size=40).map(lambda text: text.encode(errors="replace"))
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.tuples(st.text(max_size=4), st.binary(max_size=9)).map(
        lambda pair: f"{pair[0]}\t".encode(errors="replace") + base64.b64encode(pair[1])
    ),
    max_size=6,
)


@pytest.mark.parametrize("name", ["x.jsonl", "x.tsv", "x.txt"])
@pytest.mark.parametrize("reader", [image_records, text_records])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES)
def test_any_line_is_a_record_or_a_data_error(reader: Reader, name: str, lines: list[bytes], tmp_path: Path) -> None:
    content = b"\n".join(lines)
    file = write(tmp_path / name, content)
    kept, bad = kept_and_bad(reader, file)
    filled = [line for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip(b"\r\n")]
    assert len(kept) + len(bad) == len(filled)
    for record in kept:
        assert isinstance(record.value, bytes if (reader, name) == (image_records, "x.tsv") else str)
    if bad:
        with pytest.raises(DataError, match=r"x\.\w+:\d+: "):
            list(reader([file]))


def test_the_default_raises() -> None:
    with pytest.raises(DataError, match="x"):
        data.fail(DataError("x"))
