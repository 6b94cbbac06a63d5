"""Files of image-text pairs: what they hold, what is left out, and who can read them at once."""

from __future__ import annotations

import base64
import csv
import io
import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelscope.msdatasets import MsDataset

from modelscope_cnclip.data import DataError
from modelscope_cnclip.pairs import Pair, read_pairs

from .conftest import assert_shows
from .pair_sources import assert_consistent, cnclip, jsonl, kept_and_bad, refused, write

# ---------------------------------------------------------------- jsonl and csv


def test_jsonl(tmp_path: Path) -> None:
    content = (
        '\ufeff{"image": "a.png", "text": "一只猫"}\r\n\n'
        '{"image": "https://example.com/b.png", "text": ["猫", "a cat"], "image_id": 7, "other": null}\n'
        '{"image": "../c.png", "text": "猫\u2028一\x85二", "image_id": "猫"}\n'
        '{"image": "/d.png", "text": "dog", "image_id": null}'
    )
    file = write(tmp_path / "x" / "a.jsonl", content)
    pairs = read_pairs(file)
    assert list(pairs) == [
        Pair(str(tmp_path / "x/a.png"), ("一只猫",), str(tmp_path / "x/a.png"), f"{file}:1"),
        Pair("https://example.com/b.png", ("猫", "a cat"), 7, f"{file}:3"),
        Pair(str(tmp_path / "x/../c.png"), ("猫\u2028一\x85二",), "猫", f"{file}:4"),
        Pair("/d.png", ("dog",), "/d.png", f"{file}:5"),
    ]
    assert_consistent(pairs)
    assert list(read_pairs(Path(file))) == list(pairs)
    assert read_pairs(pairs) is pairs


def test_csv(tmp_path: Path) -> None:
    content = (
        "\ufeffimage_id,text,image\r\n"
        '7,"一只猫,\n\n一条""狗""",a.png\r\n\r\n'
        "007,dog,https://example.com/b.png\n"
        ",没有编号,c.png"
    )
    file = write(tmp_path / "a.CSV", content)
    pairs = read_pairs(file)
    assert list(pairs) == [
        Pair(str(tmp_path / "a.png"), ('一只猫,\n\n一条"狗"',), 7, f"{file}:2"),
        Pair("https://example.com/b.png", ("dog",), "007", f"{file}:6"),
        Pair(str(tmp_path / "c.png"), ("没有编号",), str(tmp_path / "c.png"), f"{file}:7"),
    ]
    assert_consistent(pairs)


@pytest.mark.parametrize("image", ["image", "image:FILE", "img", "image_path"])
@pytest.mark.parametrize("text", ["text", "query", "caption", "title"])
def test_usual_names_of_columns(image: str, text: str, tmp_path: Path) -> None:
    row = {image: "/a.png", text: "猫"}
    for source in (jsonl(tmp_path / "a.jsonl", row), write(tmp_path / "a.csv", f"{image},{text}\n/a.png,猫\n"), [row]):
        assert (read_pairs(source)[0].image, read_pairs(source).texts(0)) == ("/a.png", ("猫",))


@pytest.mark.parametrize("role", ["img", "image"])
def test_column_map(role: str, tmp_path: Path) -> None:
    row = {"image": "/wrong.png", "text": "错", "picture": "/a.png", "words": "猫", "key": 3}
    table = write(tmp_path / "a.csv", ",".join(row) + "\n" + ",".join(map(str, row.values())))
    hf = datasets.Dataset.from_list([row])
    for source in (jsonl(tmp_path / "a.jsonl", row), table, [row], hf, MsDataset(hf)):
        pairs = read_pairs(source, column_map={role: "picture", "text": "words", "image_id": "key"})
        assert (pairs[0].image, pairs[0].texts, pairs[0].image_id) == ("/a.png", ("猫",), 3)
        assert_consistent(pairs)


def test_column_map_of_something_else() -> None:
    refused([], "column_map: 'label': 'x'", "img, text or image_id", column_map={"label": "x"})
    refused([], "column_map: 'img': 3", column_map={"img": 3})


GOOD = '{"image": "a.png", "text": "猫"}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "猫", "id": 1}', "needs an image ('image' or 'image:FILE' or 'img' or 'image_path') and a text"),
        ('{"text": "猫", "id": 1}', "has 'text', 'id'"),
        ('{"text": "猫", "image_ids": [1]}', "has 'text', 'image_ids'"),
        ('{"image": "a.png"}', "has 'image'; column_map can name others"),
        ("{}", "has nothing"),
        ('{"image": 5, "text": "猫"}', "the image must be a path or an address, not 5"),
        ('{"image": ["a.png"], "text": "猫"}', "not ['a.png']"),
        ('{"image": null, "text": "猫"}', "not None"),
        ('{"image": "", "text": "猫"}', "not ''"),
        ('{"image": "a.png", "text": 5}', "the text must be a str that isn't empty, or a list of them, not 5"),
        ('{"image": "a.png", "text": null}', "not None"),
        ('{"image": "a.png", "text": " \\n"}', "not ' \\n'"),
        ('{"image": "a.png", "text": ["猫", 5]}', "not ['猫', 5]"),
        ('{"image": "a.png", "text": ["猫", ""]}', "not ['猫', '']"),
        ('{"image": "a.png", "text": []}', "the list of texts is empty"),
        ('{"image": "a.png", "text": "\\ud83d"}', "lone surrogate"),
        ('{"image": "a.png", "text": "猫", "image_id": 1.5}', "an image id must be a str or a whole number, not 1.5"),
        ('{"image": "a.png", "text": "猫", "image_id": true}', "not True"),
        ('{"image": "a.png", "text": "猫", "image_id": [1]}', "not [1]"),
        ("{oops", "not a JSON object"),
        ("[1, 2]", "expected an object, found '[1, 2]'"),
        ("[" * 100_000, "not a JSON object"),
        ('{"image": "a.png", "text": "狗"}'.encode("gbk"), "not UTF-8"),
    ],
)
def test_bad_lines_of_jsonl(line: str | bytes, says: str, tmp_path: Path) -> None:
    """Between good ones, which are kept."""
    line = line.encode() if isinstance(line, str) else line
    file = write(tmp_path / "a.jsonl", b"\n".join([GOOD.encode(), b"", line, GOOD.encode()]))
    pairs, bad = kept_and_bad(file)
    assert [pair.source for pair in pairs] == [f"{file}:1", f"{file}:4"]
    assert len(bad) == 1
    refused(file, bad[0])
    assert bad[0].startswith(f"{file}:3: ")
    assert says in bad[0]
    assert len(bad[0]) < 400
    assert_consistent(pairs)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("b.png,一只猫, 一条狗", '3 cells where the first line has 2; a text with a comma in it needs "quotes"'),
        ("b.png", "1 cells where the first line has 2"),
        ("b.png,", "the text must be a str"),
        (",猫", "the image must be a path"),
        ('b.png,"猫"狗', "not CSV: ',' expected after '\"'"),
        ('b.png,"猫', "not CSV: "),
        ("b.png," + "猫" * 200_000, "not CSV: field larger than field limit"),
        ("b.png,狗".encode("gbk"), "not UTF-8"),
    ],
)
def test_bad_lines_of_csv(line: str | bytes, says: str, tmp_path: Path) -> None:
    line = line.encode() if isinstance(line, str) else line
    file = write(tmp_path / "a.csv", b"image,text\na.png,dog\n\n" + line + b"\nc.png,cat\n")
    pairs, bad = kept_and_bad(file)
    assert [pair.source for pair in pairs] == [f"{file}:2", f"{file}:5"]
    assert len(bad) == 1
    assert bad[0].startswith(f"{file}:4: ")
    assert says in bad[0]
    refused(file, bad[0])


def test_csv_without_its_header(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "a.png,猫\nb.png,狗\n")
    refused(file, f"{file}:1: needs an image", "has 'a.png', '猫'")
    file = write(tmp_path / "b.csv", "image,label\nb.png,狗\n")
    refused(file, f"{file}:1: needs an image", "has 'image', 'label'")


TEXT = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2028\u2029\x85\x0b\x0c\x1c\r\n\t\"'\ufeff,猫")
)
CAPTION = TEXT.filter(str.strip)
fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fast
@given(
    rows=st.lists(
        st.tuples(TEXT.filter(len), st.lists(CAPTION, min_size=1), st.integers() | TEXT.filter(len)), min_size=1
    )
)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_round_trip(rows: list[tuple], ascii_only: bool, tmp_path: Path) -> None:
    lines = [{"image": f"/{a}", "text": b, "image_id": c} for a, b, c in rows]
    file = write(tmp_path / "a.jsonl", "\n".join(json.dumps(line, ensure_ascii=ascii_only) for line in lines))
    pairs = pickle.loads(pickle.dumps(read_pairs(file)))
    assert [(pair.image, pair.texts, pair.image_id, pair.source) for pair in pairs] == [
        (str(Path(f"/{a}")), tuple(b), c, f"{file}:{i}") for i, (a, b, c) in enumerate(rows, 1)
    ]


@fast
@given(rows=st.lists(st.tuples(TEXT.filter(len), CAPTION), min_size=1))
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_round_trip(rows: list[tuple[str, str]], end: str, tmp_path: Path) -> None:
    content = io.StringIO(newline="")
    writer = csv.writer(content, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("image", "text"), *((f"/{a}", b) for a, b in rows)])
    pairs = read_pairs(write(tmp_path / "a.csv", content.getvalue()))
    assert [(pair.image, pair.texts) for pair in pairs] == [(str(Path(f"/{a}")), (b,)) for a, b in rows]


# ---------------------------------------------------------------- cn_clip's files


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode], ids=["plain", "url-safe"])
def test_files_of_cnclip(encode: Callable, data: bytes, pixels: np.ndarray, tmp_path: Path) -> None:
    images = [(5, b"\xfb\xff\xfe" * 5), ("007", data), ("x.jpg", b"x")]
    texts = [("猫", [5, "007"]), ("没有图", []), ("狗", ["5"]), ("x", ["x.jpg"])]
    prefix = cnclip(tmp_path, images, texts, encode)
    pairs = read_pairs(prefix)
    lines = f"{prefix}_texts.jsonl"
    assert list(pairs) == [
        Pair(b"\xfb\xff\xfe" * 5, ("猫",), 5, f"{lines}:1"),
        Pair(data, ("猫",), "007", f"{lines}:1"),
        Pair(b"\xfb\xff\xfe" * 5, ("狗",), 5, f"{lines}:3"),
        Pair(b"x", ("x",), "x.jpg", f"{lines}:4"),
    ]
    assert_shows(pairs[1].image, pixels)
    assert pairs.texts_without_image == 1
    assert_consistent(pairs)
    assert list(read_pairs({"images": f"{prefix}_imgs.tsv", "texts": Path(lines)})) == list(pairs)
    assert read_pairs(Path(prefix)).image_key(0) == pairs.image_key(2) != pairs.image_key(1)


def test_texts_without_images_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", []), ("b", [1]), ("c", [])])
    with caplog.at_level("INFO", "modelscope_cnclip"):
        read_pairs(prefix)
    assert f"{prefix}_texts.jsonl: 2 texts name no image" in caplog.text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "猫", "image_ids": [9]}', "image id 9 is not in"),
        ('{"text": "猫", "image_ids": [null]}', "image id '' is not in"),
        ('{"text": "猫", "image_ids": [1.0]}', "an image id must be a str or a whole number, not 1.0"),
        ('{"text": "猫", "image_ids": 1}', 'needs a str "text" and a list "image_ids"'),
        ('{"text": "猫"}', 'needs a str "text" and a list "image_ids"'),
        ('{"text": ["猫"], "image_ids": [1]}', 'needs a str "text"'),
        ('{"text": "", "image_ids": [1]}', "the text must be a str that isn't empty"),
        ("nonsense", "not a JSON object"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_bad_texts_of_cnclip(line: str | bytes, says: str, tmp_path: Path) -> None:
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", [1])])
    file = Path(f"{prefix}_texts.jsonl")
    file.write_bytes(file.read_bytes() + b"\n" + (line.encode() if isinstance(line, str) else line))
    pairs, bad = kept_and_bad(prefix)
    assert (len(pairs), len(bad)) == (1, 1)
    assert bad[0].startswith(f"{file}:3: ")
    assert says in bad[0]
    refused(prefix, bad[0])


def test_one_unknown_id_leaves_the_others_of_its_text(tmp_path: Path) -> None:
    pairs, bad = kept_and_bad(cnclip(tmp_path, [(1, b"x"), (2, b"y")], [("a", [1, 9, 2])]))
    assert [(pair.image_id, pair.image) for pair in pairs] == [(1, b"x"), (2, b"y")]
    assert len(bad) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"1\tAAAA", "image id 1 has another picture in line 1"),
        (b"no tab", "expected ID, a tab and base64"),
        (b"\xff\tAAAA", "not UTF-8"),
    ],
)
def test_bad_pictures_of_cnclip(line: bytes, says: str, tmp_path: Path) -> None:
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", [1])])
    file = Path(f"{prefix}_imgs.tsv")
    file.write_bytes(file.read_bytes() + b"\n" + line + b"\n")
    pairs, bad = kept_and_bad(prefix)
    assert [pair.image for pair in pairs] == [b"x"]
    assert len(bad) == 1
    assert bad[0].startswith(f"{file}:3: ")
    assert says in bad[0]
    refused(prefix, bad[0])


def test_the_same_line_twice_is_no_error(tmp_path: Path) -> None:
    prefix = cnclip(tmp_path, [(1, b"x"), (2, b"y"), (1, b"x")], [("a", [1])])
    assert read_pairs(prefix)[0].image == b"x"


def test_broken_base64_is_told_when_the_picture_is_used(tmp_path: Path) -> None:
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", [1]), ("b", [2])], lambda data: base64.b64encode(data))
    file = Path(f"{prefix}_imgs.tsv")
    file.write_bytes(file.read_bytes() + b"2\t!!!!\n")
    pairs = read_pairs(prefix)
    assert (pairs[0].image, pairs.texts(1), pairs.image_id(1)) == (b"x", ("b",), 2)
    with pytest.raises(DataError, match=r"train_imgs\.tsv:2: .*base64"):
        pairs[1]


KEY = st.integers(0, 10**20) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)


@fast
@given(
    images=st.dictionaries(KEY.map(str), st.binary(max_size=30), min_size=1),
    texts=st.lists(st.tuples(CAPTION, st.lists(st.integers(0, 99))), min_size=1),
)
def test_cnclip_round_trip(images: dict[str, bytes], texts: list[tuple[str, list[int]]], tmp_path: Path) -> None:
    images = {key.removeprefix("\ufeff") or "k": content for key, content in images.items()}
    keys = list(images)
    texts = [("first", [0]), *texts]
    named = [(text, [keys[i % len(keys)] for i in ids]) for text, ids in texts]
    pairs = read_pairs(cnclip(tmp_path, list(images.items()), named))
    found = [(pair.texts, str(pair.image_id), pair.image) for pair in pickle.loads(pickle.dumps(pairs))]
    assert found == [((text,), key, images[key]) for text, ids in named for key in ids]
    assert pairs.texts_without_image == sum(not ids for _, ids in named)


# ---------------------------------------------------------------- files that are not there, or hold nothing


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "", "no pairs: nothing is in it"),
        ("a.jsonl", "\n\r\n", "no pairs: nothing is in it"),
        ("a.csv", "", "no pairs: nothing is in it"),
        ("a.csv", "image,text\n\n", "no pairs: nothing is in it"),
        ("a.json", "[]", "not a kind of file that is read; expected a .jsonl, a .csv, or DIR/train"),
        ("a.tsv", "image\ttext\n", "not a kind of file that is read"),
        ("train_imgs.tsv", "", "only the pictures of a data set of cn_clip; for both its files say"),
    ],
)
def test_files_of_no_use(name: str, content: str, says: str, tmp_path: Path) -> None:
    file = write(tmp_path / name, content)
    refused(file, file, says)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv", "gone/train", "gone", "a\0b", "a\0b.jsonl", "猫" * 300])
def test_files_that_are_not_there(name: str, tmp_path: Path) -> None:
    refused(str(tmp_path / name), name)


def test_a_folder_names_its_splits(tmp_path: Path) -> None:
    refused(tmp_path, "a folder; no *_imgs.tsv is in it")
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", [1])])
    refused(tmp_path, f"a folder; say {prefix}")


@pytest.mark.parametrize("gone", ["train_imgs.tsv", "train_texts.jsonl"])
def test_half_of_cnclips_files(gone: str, tmp_path: Path) -> None:
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", [1])])
    (tmp_path / gone).unlink()
    refused(prefix, f"{gone}: No such file")


@pytest.mark.parametrize("empty", ["train_imgs.tsv", "train_texts.jsonl"])
def test_empty_files_of_cnclip(empty: str, tmp_path: Path) -> None:
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", [1])])
    write(tmp_path / empty, "")
    refused(prefix, f"{empty}: no pairs: nothing is in it")


def test_nothing_but_bad_records(tmp_path: Path) -> None:
    def ignore(error: DataError) -> None: ...

    says = "no pairs: all 3 records are bad, the first: "
    rows = [{"text": "猫"}, {"image": "a.png", "text": 3}, {"image": 3, "text": "猫"}]
    refused(jsonl(tmp_path / "a.jsonl", *rows), says, "a.jsonl:1: needs an image", on_bad=ignore)
    refused(write(tmp_path / "a.csv", "image,text\n1\n2\n3\n"), says, "a.csv:2: 1 cells", on_bad=ignore)
    refused(cnclip(tmp_path, [(1, b"")], [("a", [2, 3]), ("b", [4])]), says, "train_texts.jsonl:1", on_bad=ignore)
    refused(rows, says, "item 0 of list: needs an image", on_bad=ignore)
    refused(datasets.Dataset.from_dict({"img": ["a", "b", "c"], "text": [""] * 3}), says, on_bad=ignore)


@pytest.mark.parametrize("name", ["a.jsonl", "train_imgs.tsv", "train_texts.jsonl"])
def test_a_file_that_changes_is_told_to_later_processes(name: str, tmp_path: Path) -> None:
    prefix = cnclip(tmp_path, [(1, b"x")], [("a", [1])])
    file = jsonl(tmp_path / "a.jsonl", {"image": "a.png", "text": "猫"})
    copy = pickle.dumps(read_pairs(file if name == "a.jsonl" else prefix))
    with (tmp_path / name).open("a") as changed:
        changed.write("\n")
    with pytest.raises(DataError, match=f"{name}: changed since it was indexed"):
        pickle.loads(copy)[0]


# ---------------------------------------------------------------- who reads


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    images = [(i, bytes([i % 256]) * (1000 + 97 * i % 5000)) for i in range(300)]
    return cnclip(tmp_path_factory.mktemp("many"), images, [(f"第{i}张", [i % 300]) for i in range(500)])


def expected(i: int) -> tuple[tuple[str], int, bytes]:
    return (f"第{i}张",), i % 300, bytes([i % 300 % 256]) * (1000 + 97 * (i % 300) % 5000)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method: str, many: str) -> None:
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    pairs = read_pairs(many)
    assert (pairs[3].texts, pairs[3].image_id, pairs[3].image) == expected(3)  # the file is open before workers start
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=8, num_workers=2, shuffle=True, collate_fn=list, multiprocessing_context=method
    )
    seen = {}
    for batch in loader:
        for pair in batch:
            i = int(pair.texts[0][1:-1])
            assert (pair.texts, pair.image_id, pair.image) == expected(i)
            seen[i] = pair
    assert len(seen) == len(pairs) == 500


def test_threads_read_at_once(many: str) -> None:
    pairs = pickle.loads(pickle.dumps(read_pairs(many)))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: (pairs[i].texts, pairs[i].image_id, pairs[i].image), range(500))
        assert list(found) == [expected(i) for i in range(500)]
