"""Encoder over anything iterable: order, batches, bad items, threads, precision, and how little it reads ahead."""

from __future__ import annotations

import gc
import io
import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modelscope_cnclip import checkpoint
from modelscope_cnclip.encoder import Encoder, ItemError
from modelscope_cnclip.towers import ConfigError

from .conftest import PICTURES

TEXTS = [
    "猫",
    "一只橘色的猫趴在窗台上晒太阳，旁边放着一盆绿植和一本翻开的书",
    "",
    "a photo of a cat",
    "两条狗在草地上追一只红色的球",
    "咖啡",
    "雨天的街道，行人打着伞",
    "2024年北京车展",
]
ALONE = 2e-6  # fp32 sums are ordered differently in batches of other shapes


def close(a: np.ndarray, b: np.ndarray, atol: float = ALONE) -> None:
    assert a.dtype == b.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def many(count: int) -> list[str]:
    """Texts of 1 to 40 characters, long and short ones in turn."""
    return [f"{i}" + "猫狗鱼鸟花" * (i * 7 % 8) for i in range(count)]


@pytest.fixture(scope="module")
def image_vectors(encoder: Encoder, pictures: list[Path]) -> np.ndarray:
    return np.concatenate([encoder.encode_image(path) for path in pictures])


# What comes out.


def test_texts_keep_their_order(encoder: Encoder) -> None:
    texts = many(50)
    together = encoder.encode_text(texts, batch_size=4)
    close(together, np.concatenate([encoder.encode_text(text) for text in texts]))


def test_pictures_keep_their_order(encoder: Encoder, pictures: list[Path], image_vectors: np.ndarray) -> None:
    order = [7, 0, 11, 3, 3, 5, 1, 0, 9]
    close(encoder.encode_image([pictures[i] for i in order], batch_size=4), image_vectors[order])


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_the_batch_size_changes_nothing(
    batch_size: int, encoder: Encoder, pictures: list[Path], image_vectors: np.ndarray
) -> None:
    close(encoder.encode_image(pictures, batch_size), image_vectors, atol=1e-5)
    close(encoder.encode_text(TEXTS, batch_size), encoder.encode_text(TEXTS), atol=1e-5)


def test_vectors_have_length_one(encoder: Encoder, image_vectors: np.ndarray) -> None:
    assert image_vectors.shape == (12, encoder.embed_dim)
    for vectors in (image_vectors, encoder.encode_text(TEXTS)):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    "form",
    [list, tuple, iter, lambda x: (i for i in x), lambda x: map(type(x[0]), x), lambda x: np.array(x, dtype=object)],
    ids=["list", "tuple", "iterator", "generator", "map", "array of objects"],
)
def test_any_iterable(
    form: Callable[[list], Iterable], encoder: Encoder, pictures: list[Path], image_vectors: np.ndarray
) -> None:
    close(encoder.encode_image(form([str(path) for path in pictures])), image_vectors)
    close(encoder.encode_text(form(TEXTS)), encoder.encode_text(TEXTS))


def test_one_item_is_a_list_of_one(encoder: Encoder, pictures: list[Path], image_vectors: np.ndarray) -> None:
    with Image.open(pictures[2]) as picture:
        rgba = np.array(picture.convert("RGBA"))
        for one in (pictures[2], str(pictures[2]), pictures[2].read_bytes(), picture):
            close(encoder.encode_image(one), image_vectors[2:3])
    close(encoder.encode_image(rgba[..., :3]), encoder.encode_image([Image.fromarray(rgba[..., :3])]))
    close(encoder.encode_text("猫"), encoder.encode_text(["猫"]))
    close(encoder.encode_text("猫".encode()), encoder.encode_text(["猫"]))


@pytest.mark.parametrize(
    "nothing", [[], (), iter(()), np.empty(0, dtype=object)], ids=["list", "tuple", "iterator", "array"]
)
def test_nothing_in_nothing_out(nothing: Any, encoder: Encoder) -> None:
    for encode in (encoder.encode_image, encoder.encode_text):
        vectors = encode(nothing)
        assert (vectors.shape, vectors.dtype) == ((0, encoder.embed_dim), np.float32)
        vectors, positions = encode(nothing, on_error="skip")
        assert (vectors.shape, positions.shape, positions.dtype) == ((0, encoder.embed_dim), (0,), np.int64)


def test_an_empty_text_has_a_vector_of_its_own(encoder: Encoder) -> None:
    empty = encoder.encode_text("")
    np.testing.assert_allclose(np.linalg.norm(empty), 1, atol=1e-6)
    close(encoder.encode_text("  \t\n"), empty)
    assert np.abs(encoder.encode_text("猫") - empty).max() > 1e-3


def test_texts_in_bytes_are_decoded(encoder: Encoder) -> None:
    close(encoder.encode_text([text.encode() for text in TEXTS]), encoder.encode_text(TEXTS), atol=0)


def test_long_texts_are_cut_with_one_warning(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    long = "猫" * 60
    with caplog.at_level(logging.WARNING, "modelscope_cnclip"):
        vectors = encoder.encode_text([long, "狗", long + "猫"])
    close(vectors[:1], encoder.encode_text("猫" * 50))
    close(vectors[2:], vectors[:1])
    said = [record.getMessage() for record in caplog.records if record.name == "modelscope_cnclip"]
    assert said == ["2 of 3 texts were cut to 52 tokens (the longest has 63)"]


def test_iterators_give_positions_and_vectors(
    encoder: Encoder, pictures: list[Path], image_vectors: np.ndarray
) -> None:
    pieces = list(encoder.iter_image(iter(pictures), batch_size=5))
    assert [positions.tolist() for positions, _ in pieces] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
    close(np.concatenate([vectors for _, vectors in pieces]), image_vectors)
    texts = many(150)
    pieces = list(encoder.iter_text(texts, batch_size=1))
    assert len(pieces) > 1
    assert np.concatenate([positions for positions, _ in pieces]).tolist() == list(range(150))
    close(np.concatenate([vectors for _, vectors in pieces]), encoder.encode_text(texts), atol=1e-5)


# Bad items.


@pytest.mark.parametrize("side", ["encode_image", "encode_text", "iter_image", "iter_text"])
def test_none_is_no_list(side: str, encoder: Encoder) -> None:
    with pytest.raises(TypeError, match="got None"):
        list(getattr(encoder, side)(None))


@pytest.fixture
def broken(pictures: list[Path], tmp_path: Path) -> list[Any]:
    """Good pictures at 0, 2, 5; at the other positions what can't be one."""
    text, cut = tmp_path / "text.jpg", tmp_path / "cut.png"
    text.write_text("not a picture")
    cut.write_bytes(pictures[0].read_bytes()[:2000])
    return [pictures[0], text, pictures[1], str(tmp_path / "gone.png"), cut, pictures[2], b"", np.zeros((4, 4)), None]


def test_bad_pictures_are_skipped_and_told_once_each(
    broken: list[Any], encoder: Encoder, image_vectors: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "modelscope_cnclip"):
        vectors, positions = encoder.encode_image(iter(broken), batch_size=2, on_error="skip")
    assert positions.dtype == np.int64
    assert positions.tolist() == [0, 2, 5]
    close(vectors, image_vectors[:3])
    said = [record.getMessage() for record in caplog.records if record.name == "modelscope_cnclip"]
    assert [text.split(":")[0] for text in said] == [f"skipped item {i}" for i in (1, 3, 4, 6, 7, 8)]
    assert "text.jpg" in said[0]
    assert "gone.png: no such file" in said[1]


@pytest.mark.parametrize(
    ("at", "source"), [(1, "text.jpg"), (3, "gone.png"), (4, "cut.png"), (6, "0 bytes"), (8, "None")]
)
def test_a_bad_picture_stops_it_by_default(at: int, source: str, broken: list[Any], encoder: Encoder) -> None:
    with pytest.raises(ItemError) as caught:
        encoder.encode_image([*broken[:1], broken[at]])
    assert caught.value.index == 1
    assert source in caught.value.source
    assert str(caught.value).startswith("item 1: ")
    assert str(caught.value).count(caught.value.source) == 1
    assert caught.value.__cause__ is not None


BAD_TEXTS = [(b"\xff\xfe", "not UTF-8"), (None, "got NoneType"), (3.5, "got float"), (["猫"], "got list")]


@pytest.mark.parametrize(("bad", "reason"), BAD_TEXTS, ids=[reason for _, reason in BAD_TEXTS])
def test_a_bad_text_stops_it_by_default(bad: Any, reason: str, encoder: Encoder) -> None:
    with pytest.raises(ItemError, match=f"item 2: .*{reason}") as caught:
        encoder.encode_text(["猫", "狗", bad, "鱼"])
    assert caught.value.index == 2


def test_bad_texts_are_skipped_and_told_once_each(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    texts = list(itertools.chain.from_iterable((text, bad) for text, (bad, _) in zip(TEXTS, BAD_TEXTS)))
    with caplog.at_level(logging.WARNING, "modelscope_cnclip"):
        vectors, positions = encoder.encode_text(texts, batch_size=2, on_error="skip")
    assert positions.tolist() == [0, 2, 4, 6]
    close(vectors, encoder.encode_text(TEXTS[:4]))
    said = [record.getMessage() for record in caplog.records if record.name == "modelscope_cnclip"]
    assert len(said) == len(BAD_TEXTS)
    for text, at, (_, reason) in zip(said, (1, 3, 5, 7), BAD_TEXTS):
        assert text.startswith(f"skipped item {at}: ")
        assert reason in text


def test_all_of_them_bad(encoder: Encoder) -> None:
    vectors, positions = encoder.encode_image([b"", b"x"], on_error="skip")
    assert (vectors.shape, positions.tolist()) == ((0, encoder.embed_dim), [])


@pytest.mark.parametrize("items", [[], ["x"]])
def test_arguments_that_make_no_sense(items: list, encoder: Encoder) -> None:
    for encode in (encoder.encode_image, encoder.encode_text):
        with pytest.raises(ValueError, match="on_error 'ignore': there are raise and skip"):
            encode(items, on_error="ignore")
        with pytest.raises(ValueError, match="batch_size 0"):
            encode(items, batch_size=0)


def test_an_error_of_the_callers_own_iterable_comes_through(encoder: Encoder, pictures: list[Path]) -> None:
    def failing() -> Iterator[Path]:
        yield pictures[0]
        raise ConnectionResetError("the data set went away")

    with pytest.raises(ConnectionResetError, match="went away"):
        encoder.encode_image(failing())


# Threads, and reading ahead.


def decoding_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_threads_may_share_an_encoder(encoder: Encoder, pictures: list[Path], image_vectors: np.ndarray) -> None:
    expected = encoder.encode_text(TEXTS)

    def work(i: int) -> tuple[np.ndarray, np.ndarray]:
        images, texts = np.roll(np.arange(12), i), np.roll(np.arange(len(TEXTS)), i)
        found = encoder.encode_image([pictures[k] for k in images]), encoder.encode_text([TEXTS[k] for k in texts])
        return found[0][np.argsort(images)], found[1][np.argsort(texts)]

    with ThreadPoolExecutor(8) as pool:
        for images, texts in pool.map(work, range(8)):
            close(images, image_vectors)
            close(texts, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_one_open_picture_many_times(kind: str, encoder: Encoder, tmp_path: Path) -> None:
    """Pillow reads the file of an open picture when it is first needed, and two threads at once break that."""
    noise = np.random.default_rng(0).integers(0, 255, (800, 800, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, kind)
    expected = encoder.encode_image(data.getvalue())
    for _ in range(3):
        close(encoder.encode_image([Image.open(io.BytesIO(data.getvalue()))] * 6), np.repeat(expected, 6, axis=0))


def test_pictures_are_read_as_they_are_needed(encoder: Encoder, pictures: list[Path]) -> None:
    """However many there are, only a few batches have been taken when the first vectors come."""
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        for path in itertools.cycle(pictures):
            taken += 1
            yield path

    pieces = encoder.iter_image(endless(), batch_size=4)
    for done in range(1, 6):
        positions, _ = next(pieces)
        assert positions[-1] == 4 * done - 1
        assert taken <= 4 * (done + 3)
    pieces.close()
    assert decoding_threads() == []


def test_texts_are_read_as_they_are_needed(encoder: Encoder) -> None:
    counter = itertools.count()
    pieces = encoder.iter_text((f"第{i}张" for i in counter), batch_size=2)
    positions, _ = next(pieces)
    assert len(positions) <= next(counter) <= 2 * 100


@pytest.mark.parametrize("how", ["closed", "dropped", "bad item", "bad backend", "read to the end"])
def test_no_thread_is_left_behind(
    how: str, encoder: Encoder, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = encoder.iter_image([*pictures, b"", *pictures], batch_size=2, on_error="skip")
    next(pieces)
    assert decoding_threads()
    if how == "closed":
        pieces.close()
    elif how == "dropped":
        del pieces
        gc.collect()
    elif how == "read to the end":
        list(pieces)
    elif how == "bad backend":
        monkeypatch.setattr(encoder.backend, "image", None)
        with pytest.raises(TypeError):
            next(pieces)
    else:
        pieces.close()
        with pytest.raises(ItemError) as caught:  # kept alive, and with it the frames it went through
            encoder.encode_image([b"", *pictures])
        assert caught.value.index == 0
    assert decoding_threads() == []


# Progress.


@pytest.mark.parametrize(
    ("show", "terminal", "count", "seen"),
    [
        (True, False, 2, True),
        (False, True, 12, False),
        (None, True, 12, True),
        (None, True, 4, False),
        (None, False, 12, False),
    ],
    ids=["asked for", "refused", "terminal", "terminal, one batch", "no terminal"],
)
def test_a_bar_where_it_helps(
    show: bool | None,
    terminal: bool,
    count: int,
    seen: bool,
    encoder: Encoder,
    pictures: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    for encode, items, unit in (
        (encoder.encode_image, pictures, "images"),
        (encoder.encode_text, many(count), "texts"),
    ):
        stream = Stream()
        monkeypatch.setattr("sys.stderr", stream)
        encode(items[:count], batch_size=4, show_progress=show)
        assert (unit in stream.getvalue()) is seen
        if seen:
            assert f"{count}/{count}" in stream.getvalue()


# Loading.


@pytest.mark.parametrize("layout", ["cn_clip", "transformers"])
def test_the_layout_changes_nothing(
    layout: str, make_folder: Callable[..., Path], encoder: Encoder, pictures: list[Path], image_vectors: np.ndarray
) -> None:
    loaded = Encoder.from_pretrained(make_folder("vit", layout), precision="fp32", device="cpu")
    close(loaded.encode_image(pictures), image_vectors)
    close(loaded.encode_text(TEXTS), encoder.encode_text(TEXTS))
    assert loaded.logit_scale == pytest.approx(encoder.logit_scale)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "precision 'fp8': there are auto, fp32, bf16, fp16"),
        ({"backend": "tensorrt"}, "backend 'tensorrt': there are auto, torch"),
        ({"device": "cpuu"}, "device 'cpuu'"),
        ({"device": "meta"}, "device 'meta'"),
        ({"device": ""}, "device ''"),
        ({"context_length": 2}, "context_length 2"),
        ({"context_length": 513}, "context_length 513"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str, model_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Encoder.from_pretrained(model_folder, **settings)


@pytest.mark.parametrize("resolution", [0, 63, 10_000])
def test_resolutions_that_make_no_sense(resolution: int, model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="image_resolution"):
        Encoder.from_pretrained(model_folder, resolution=resolution)


def test_another_resolution(model_folder: Path, pictures: list[Path], encoder: Encoder) -> None:
    larger = Encoder.from_pretrained(model_folder, precision="fp32", device="cpu", resolution=96)
    sizes: list[tuple[int, ...]] = []
    genuine = larger.backend.image
    larger.backend.image = lambda pixels: sizes.append(pixels.shape) or genuine(pixels)
    vectors = larger.encode_image(pictures)
    assert sizes == [(12, 96, 96, 3)]
    model = checkpoint.read(model_folder).build(resolution=96)
    with torch.no_grad():
        expected = model.encode_image(torch.stack([larger.transform(path) for path in pictures]))
    close(vectors, torch.nn.functional.normalize(expected, dim=-1).numpy(), atol=1e-5)
    close(larger.encode_text(TEXTS), encoder.encode_text(TEXTS))


def test_another_context_length(model_folder: Path, encoder: Encoder) -> None:
    short = Encoder.from_pretrained(model_folder, precision="fp32", device="cpu", context_length=8)
    close(short.encode_text("猫" * 20), encoder.encode_text("猫" * 6))
    long = Encoder.from_pretrained(model_folder, precision="fp32", device="cpu", context_length=64)
    close(long.encode_text("猫" * 50), encoder.encode_text("猫" * 60))
    assert np.abs(long.encode_text("猫" * 60) - encoder.encode_text("猫" * 60)).max() > 1e-4


def test_exif_is_followed_if_asked(model_folder: Path, encoder: Encoder, pictures: list[Path]) -> None:
    upright = Image.open(pictures[0]).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    data = io.BytesIO()
    upright.rotate(180).save(data, "PNG", exif=exif)
    turning = Encoder.from_pretrained(model_folder, precision="fp32", device="cpu", exif=True)
    close(turning.encode_image(data.getvalue()), encoder.encode_image(upright))
    close(encoder.encode_image(data.getvalue()), encoder.encode_image(upright.rotate(180)))


def test_tiny_knows_what_it_sees() -> None:
    """Pictures of the repository by their names, and photographs that are from neither source of its training."""
    tiny = Encoder.from_pretrained("tiny", precision="fp32", device="cpu")
    gallery = PICTURES.parent / "gallery"
    names = {"panda": "熊猫", "elephant": "大象", "piano": "钢琴", "ship": "轮船", "tiger": "老虎",
             "watermelon": "西瓜", "snowman": "雪人", "tree": "大树", "rainbow": "彩虹"}  # fmt: skip
    scores = tiny.encode_text(list(names.values())) @ tiny.encode_image([gallery / f"{name}.png" for name in names]).T
    assert scores.argmax(1).tolist() == scores.argmax(0).tolist() == list(range(len(names)))
    labels = ["猫", "一杯咖啡", "火箭", "狗", "汽车", "花", "山", "书"]
    photographs = tiny.encode_image([gallery / f"photo-{name}.jpg" for name in ("cat", "coffee", "rocket")])
    assert (photographs @ tiny.encode_text(labels).T).argmax(1).tolist() == [0, 1, 2]


def test_it_says_what_it_is(encoder: Encoder, model_folder: Path) -> None:
    assert repr(encoder) == f"Encoder({str(model_folder)!r}, torch, fp32, cpu, D=32)"
