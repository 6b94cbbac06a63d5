"""Token ids and pixels, equal to cn_clip's own; and the class that hands both to ModelScope's trainers."""

from __future__ import annotations

import io
import logging
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cn_clip.clip import image_transform, tokenize
from cn_clip.clip.bert_tokenizer import FullTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from modelscope.preprocessors import Preprocessor
from PIL import Image, ImageOps

from modelscope_cnclip import layouts
from modelscope_cnclip.images import ImageError
from modelscope_cnclip.preprocessor import CnclipPreprocessor, ImageTransform, Tokenizer, VocabularyError, tokenizer_of
from modelscope_cnclip.towers import CLIP_MEAN, CLIP_STD, TowerConfig

from .conftest import VIT

# Code points whose ids differ from cn_clip's. Keep it exact: a difference that goes away must leave this list too.
KNOWN_DIFFERENCES: set[int] = set()

# Ranges that random strings are made of: ideographs and their extensions, full-width forms, kana, emoji with joiners
# and flags, Latin with accents, digits, controls, surrogates, combining marks, Greek, Hangul, spaces, any at all.
ALPHABETS = [
    range(0x4E00, 0xA000), range(0x3400, 0x4DC0), range(0x20000, 0x2CEB0), range(0xF900, 0xFB00),
    range(0x2F800, 0x2FA20), range(0xFF00, 0xFFF0), range(0x3040, 0x3100), range(0x1F1E6, 0x1FB00),
    range(0x2600, 0x2800), range(0x200B, 0x2010), range(0xC0, 0x250), range(0x30, 0x3A), range(0x00, 0x20),
    range(0x7F, 0xA1), range(0xD800, 0xE000), range(0x300, 0x370), range(0x370, 0x400), range(0xAC00, 0xD7A4),
    range(0x1100, 0x1200), range(0x2000, 0x2070), range(0x20, 0x7F), range(0x110000),
]  # fmt: skip


def upstream(texts: Sequence[str], context_length: int = 52) -> torch.Tensor:
    """cn_clip's ids, curly quotes straightened first as its training data had it."""
    return tokenize([text.replace("“", '"').replace("”", '"') for text in texts], context_length=context_length)


def different(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """Positions of the texts whose ids aren't upstream's."""
    ours = tokenizer.padded(texts, tokenizer.context_length)
    return (ours != upstream(texts, tokenizer.context_length)).any(dim=1).nonzero().flatten().tolist()


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)

    def text() -> str:
        alphabets = rng.sample(ALPHABETS, rng.randint(1, 4))
        return "".join(chr(rng.choice(rng.choice(alphabets))) for _ in range(rng.randint(0, 40)))

    return [text() for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(layouts.default_vocab())


@pytest.mark.parametrize("context", ["c{}", "a{}cb", "中{}cc", "{}Σ", "é{}\u0301"])
def test_every_bmp_code_point_has_upstreams_ids(context: str, tokenizer: Tokenizer) -> None:
    assert set(different(tokenizer, [context.format(chr(code)) for code in range(0x10000)])) == KNOWN_DIFFERENCES


def test_astral_code_points_have_upstreams_ids(tokenizer: Tokenizer) -> None:
    codes = range(0x10000, 0x110000, 17)
    wrong = {codes[i] for i in different(tokenizer, [f"a{chr(code)}b中" for code in codes])}
    assert wrong == {code for code in KNOWN_DIFFERENCES if code in codes}


def test_random_texts_have_upstreams_ids(tokenizer: Tokenizer) -> None:
    texts = random_texts(6000)
    assert [texts[i] for i in different(tokenizer, texts)] == []


@settings(max_examples=500, deadline=None)
@given(st.text(st.characters(), max_size=60))
def test_any_text_has_upstreams_ids(tokenizer: Tokenizer, text: str) -> None:
    assert different(tokenizer, [text]) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \t\r\n\u3000",
        "一只猫坐在“垫子”上。",
        "[MASK] [CLS]猫[SEP] [PAD] [UNK] ##s",
        "a" * 200,
        "a" * 201,
        "中" + "é" * 201 + "文",
        "ΟΔΥΣΣΕΥΣ ΣΑΣ中ΣΑΣ. Σ",
        "ＡＢＣ１２３！？",
        "カ\u3099ガｶﾞ",
        "👨‍👩‍👧‍👦🇨🇳❤️",
        "İstanbul STRASSE ẞ ǅ ﬁ",
        "𠀀𫝀丽",
        "a\u2028b\u2029c\u0085d\u001ce\u00adf\u200bg",
    ],
)
def test_texts_that_trip_tokenizers_up(text: str, tokenizer: Tokenizer) -> None:
    assert different(tokenizer, [text]) == []


def test_markers_in_a_text_are_plain_characters(tokenizer: Tokenizer) -> None:
    special = {tokenizer.vocab[name] for name in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    for marker in ("[MASK]", "[CLS]", "[SEP]", "[PAD]"):
        (ids,) = tokenizer([marker])
        assert special.isdisjoint(ids[1:-1])
        assert len(ids) > 4


def test_long_texts_are_cut_with_one_warning(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["猫" * 10_000, "短", "狗" * 51, "鸟" * 50]
    with caplog.at_level(logging.WARNING, "modelscope_cnclip"):
        ids = tokenizer.padded(texts)
    assert torch.equal(ids, upstream(texts))
    assert (ids[:, -1] == tokenizer.sep_id).tolist() == [True, False, True, True]
    told = [record.getMessage() for record in caplog.records]
    assert told == ["2 of 4 texts were cut to 52 tokens (the longest has 10002)"]


@pytest.mark.parametrize("length", [3, 12, 77, 512])
def test_other_context_lengths(length: int) -> None:
    tokenizer = tokenizer_of(VIT, layouts.default_vocab(), "x", length)
    texts = ["猫" * 600, "一只猫 and a dog", ""]
    assert torch.equal(tokenizer.padded(texts, length), upstream(texts, length))


@pytest.mark.parametrize("length", [-1, 0, 2, 513])
def test_context_lengths_that_the_model_has_not(length: int) -> None:
    with pytest.raises(ValueError, match=f"context_length {length}: this model takes 3 to 512"):
        tokenizer_of(VIT, layouts.default_vocab(), "x", length)


def test_padding_is_to_the_longest_or_as_asked(tokenizer: Tokenizer) -> None:
    texts = ["猫", "一只猫"]
    assert torch.equal(tokenizer.padded(texts), upstream(texts)[:, :5])
    assert tokenizer.padded([]).shape == (0, 0)
    assert tokenizer([]) == []


@pytest.mark.parametrize("wrong", [None, 5, b"bytes", ["猫"]])
def test_what_is_no_text_is_named_by_position(wrong: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(TypeError, match=rf"text 1: expected a str, got {type(wrong).__name__}"):
        tokenizer(["猫", wrong])


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "猫", "cat", "##s", "ca", "##t", "cat"]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", "{end}", "{end}{end}{end}"])
def test_other_vocabularies_are_read_as_upstream_reads_them(end: str, tail: str, tmp_path: Path) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes((end.join(PIECES) + tail.format(end=end)).encode())
    theirs, ours = FullTokenizer(str(file)), Tokenizer(file)
    assert ours.vocab == dict(theirs.vocab)
    for text in ("猫cats", "cat catss", "狗 cat"):
        assert ours([text])[0][1:-1] == theirs.convert_tokens_to_ids(theirs.tokenize(text))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        (b"\x80\x04\x95\xff", "utf-8"),
        (b"", r"\[PAD\], \[UNK\], \[CLS\], \[SEP\] missing"),
        (b"[PAD]\n[UNK]\n[CLS]\n", r"\[SEP\] missing"),
        (b"a\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n", r"\[PAD\] must be the first line"),
        (b"<html>not found</html>", "not a BERT vocabulary"),
    ],
    ids=["missing", "binary", "empty", "no SEP", "PAD not first", "HTML"],
)
def test_vocabularies_that_are_none(content: bytes | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(VocabularyError, match=says) as caught:
        Tokenizer(file)
    assert str(file) in str(caught.value)


def test_a_folder_is_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="directory"):
        Tokenizer(tmp_path)


def test_vocabularies_that_do_not_fit_the_model() -> None:
    small: TowerConfig = replace(VIT, vocab_size=21127)
    with pytest.raises(VocabularyError, match=r"chinese_bert\.txt: 21128 pieces, but the model knows 21127"):
        tokenizer_of(small, layouts.default_vocab(), "x")
    with pytest.raises(VocabularyError, match=r"some/model: no vocab\.txt"):
        tokenizer_of(VIT, None, "some/model")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(image: Image.Image, mode: str) -> Image.Image:
    """A gradient from see-through to solid over the picture, its colours kept."""
    alpha = Image.linear_gradient("L").resize(image.size)
    image = image.convert(mode[:-1])
    image.putalpha(alpha)
    assert image.mode == mode
    return image


def sixteen_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


FORMATS = {
    "JPEG": lambda rgb: encoded(rgb, "JPEG"),
    "JPEG grey": lambda rgb: encoded(rgb.convert("L"), "JPEG"),
    "JPEG CMYK": lambda rgb: encoded(rgb.convert("CMYK"), "JPEG"),
    "JPEG progressive": lambda rgb: encoded(rgb, "JPEG", progressive=True),
    "PNG": lambda rgb: encoded(rgb, "PNG"),
    "PNG RGBA": lambda rgb: encoded(with_alpha(rgb, "RGBA"), "PNG"),
    "PNG LA": lambda rgb: encoded(with_alpha(rgb, "LA"), "PNG"),
    "PNG palette": lambda rgb: encoded(rgb.quantize(64), "PNG"),
    "PNG palette, one colour clear": lambda rgb: encoded(rgb.quantize(64), "PNG", transparency=0),
    "PNG palette, alpha": lambda rgb: encoded(rgb.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "PNG 1 bit": lambda rgb: encoded(rgb.convert("1"), "PNG"),
    "PNG 16 bit": lambda rgb: encoded(sixteen_bits(rgb), "PNG"),
    "WebP": lambda rgb: encoded(rgb, "WEBP"),
    "WebP RGBA": lambda rgb: encoded(with_alpha(rgb, "RGBA"), "WEBP", lossless=True),
    "GIF": lambda rgb: encoded(rgb, "GIF"),
    "GIF animated": lambda rgb: encoded(rgb, "GIF", save_all=True, append_images=[ImageOps.invert(rgb)]),
    "BMP": lambda rgb: encoded(rgb, "BMP"),
    "TIFF": lambda rgb: encoded(rgb, "TIFF"),
    "TIFF LZW": lambda rgb: encoded(rgb, "TIFF", compression="tiff_lzw"),
    "TIFF CMYK": lambda rgb: encoded(rgb.convert("CMYK"), "TIFF"),
    "TIFF float": lambda rgb: encoded(rgb.convert("F"), "TIFF"),
}  # fmt: skip


@pytest.fixture(scope="module")
def photo(pictures: list[Path]) -> Image.Image:
    """A real picture, not square."""
    return Image.open(pictures[0]).convert("RGB").crop((3, 5, 90, 70))


@pytest.mark.parametrize("resolution", [32, 224])
@pytest.mark.parametrize("name", FORMATS)
def test_pixels_are_upstreams(name: str, resolution: int, photo: Image.Image) -> None:
    data = FORMATS[name](photo)
    theirs = image_transform(resolution)(Image.open(io.BytesIO(data)))
    assert torch.equal(ImageTransform(resolution)(data), theirs)
    assert theirs.std() > 0.1  # a picture, not one colour


def test_every_picture_has_upstreams_pixels(pictures: list[Path]) -> None:
    ours, theirs = ImageTransform(224), image_transform(224)
    for path in pictures:
        assert torch.equal(ours(path), theirs(Image.open(path))), path


def test_batches_are_normalised_like_single_pictures(pictures: list[Path]) -> None:
    transform = ImageTransform(64, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    batch = torch.from_numpy(np.stack([transform.to_uint8(path) for path in pictures[:3]]))
    assert batch.dtype == torch.uint8
    assert torch.equal(transform.normalise(batch), torch.stack([transform(path) for path in pictures[:3]]))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_ignored_as_upstream_does_or_obeyed_on_request(orientation: int, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encoded(photo, "JPEG", exif=exif, quality=95)
    image = Image.open(io.BytesIO(data))
    ignored, obeyed = image_transform(64)(image), image_transform(64)(ImageOps.exif_transpose(image))
    assert torch.equal(ImageTransform(64)(data), ignored)
    assert torch.equal(ImageTransform(64, exif=True)(data), obeyed)
    assert torch.equal(ImageTransform(64, exif=True)(Image.open(io.BytesIO(data))), obeyed)
    assert torch.equal(ignored, obeyed) == (orientation == 1)


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.mark.parametrize("mode", ["inference", "eval"])
def test_preprocessor_without_augmentation(mode: str, model_folder: Path, pictures: list[Path]) -> None:
    preprocessor = CnclipPreprocessor(str(model_folder), mode=mode)
    texts = ["一只猫", "一条狗在跑"]
    out = preprocessor({"img": [str(path) for path in pictures[:3]], "text": texts})
    assert torch.equal(out["img"], torch.stack([image_transform(64)(Image.open(path)) for path in pictures[:3]]))
    assert torch.equal(out["text"], upstream(texts)[:, :7])
    one = preprocessor({"img": Image.open(pictures[0]), "text": "一只猫"})
    assert torch.equal(one["img"], out["img"][:1])
    assert torch.equal(one["text"], upstream(["一只猫"])[:, :5])


def test_preprocessor_gives_what_was_there(model_folder: Path, pictures: list[Path]) -> None:
    preprocessor = CnclipPreprocessor(str(model_folder))
    assert set(preprocessor({"img": str(pictures[0])})) == {"img"}
    assert set(preprocessor({"text": "猫", "img": None, "label": 3})) == {"text"}
    assert preprocessor({}) == {}


def test_preprocessor_with_other_keys(model_folder: Path, pictures: list[Path]) -> None:
    preprocessor = CnclipPreprocessor(str(model_folder))
    usual = preprocessor({"img": pictures[0], "text": "猫"})
    preprocessor.set_input_img_key("image:FILE")
    preprocessor.set_input_text_key("caption")
    renamed = preprocessor({"image:FILE": pictures[0], "caption": "猫", "img": "nowhere.png", "text": 5})
    assert all(torch.equal(usual[key], renamed[key]) for key in ("img", "text"))


def test_preprocessor_settings(model_folder: Path, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    data = encoded(photo, "JPEG", exif=exif)
    preprocessor = CnclipPreprocessor(str(model_folder), resolution=96, context_length=10, exif=True)
    out = preprocessor({"img": data, "text": "猫" * 30})
    assert torch.equal(out["img"][0], image_transform(96)(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    assert torch.equal(out["text"], upstream(["猫" * 30], 10))


@pytest.mark.parametrize("length", [0, 2, 513])
def test_preprocessor_refuses_context_lengths(length: int, model_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"context_length {length}"):
        CnclipPreprocessor(str(model_folder), context_length=length)


def test_preprocessor_names_what_is_bad(model_folder: Path) -> None:
    preprocessor = CnclipPreprocessor(str(model_folder))
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        preprocessor({"img": "nowhere.png"})
    with pytest.raises(TypeError, match="text 1: expected a str, got int"):
        preprocessor({"text": ["猫", 5]})


def test_training_augments_reproducibly_and_in_range(model_folder: Path, pictures: list[Path]) -> None:
    preprocessor = CnclipPreprocessor(str(model_folder), mode="train")
    paths = [str(path) for path in pictures[:6]]
    seed(1)
    first = preprocessor({"img": paths, "text": ["一只猫", "狗"]})
    second = preprocessor({"img": paths})["img"]
    seed(1)
    again = preprocessor({"img": paths})["img"]
    assert first["img"].shape == (6, 3, 64, 64)
    assert torch.equal(first["text"], upstream(["一只猫", "狗"]))  # all 52 columns, so that samples stack
    assert torch.equal(first["img"], again)
    assert not torch.equal(first["img"], second)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    values = first["img"] * std + mean
    assert values.min() >= -1e-6
    assert values.max() <= 1 + 1e-6


@pytest.mark.parametrize("name", ["JPEG", "PNG palette, one colour clear", "PNG RGBA", "JPEG CMYK"])
def test_augmentation_is_upstreams(
    name: str, model_folder: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", ModuleType("lmdb"))  # its module imports it; the transform doesn't need it
    from cn_clip.training.data import LMDBDataset

    theirs = LMDBDataset._build_transform(SimpleNamespace(split="train", use_augment=True), 64)
    preprocessor = CnclipPreprocessor(str(model_folder), mode="train")
    data = FORMATS[name](photo)
    for number in range(8):
        seed(number)
        ours = preprocessor({"img": data})["img"][0]
        seed(number)
        assert torch.equal(ours, theirs(Image.open(io.BytesIO(data)))), number


@pytest.mark.parametrize("mode", ["train", "eval", "inference"])
def test_the_host_builds_it(mode: str, model_folder: Path, pictures: list[Path]) -> None:
    preprocessor = Preprocessor.from_pretrained(str(model_folder), preprocessor_mode=mode)
    assert type(preprocessor) is CnclipPreprocessor
    assert preprocessor.mode == mode
    out = preprocessor({"img": str(pictures[0]), "text": "猫"})
    assert out["img"].shape == (1, 3, 64, 64)
    assert out["text"].shape == (1, 52 if mode == "train" else 3)


@pytest.mark.parametrize("layout", ["cn_clip", "transformers"])
def test_it_takes_the_other_layouts(layout: str, make_folder: Any, model_folder: Path, pictures: list[Path]) -> None:
    record = {"img": pictures[0], "text": "猫"}
    ours = CnclipPreprocessor(str(make_folder("vit", layout)))(record)
    usual = CnclipPreprocessor(str(model_folder))(record)
    assert all(torch.equal(ours[key], usual[key]) for key in ("img", "text"))
