"""Pictures and Chinese text to what the towers take, equal to cn_clip's own preprocessing.

    tokenizer = Tokenizer("vocab.txt")
    ids = tokenizer(["一只猫", "一条狗"])                  # lists of ids, [CLS] … [SEP], not padded
    pixels = ImageTransform(224).to_uint8("photo.jpg")      # (224, 224, 3) uint8

:class:`CnclipPreprocessor` puts both behind ModelScope's Preprocessor interface, for the host's trainers.
"""

from __future__ import annotations

import logging
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modelscope.preprocessors.base import Preprocessor
from modelscope.utils.constant import ModeKeys
from PIL import Image
from torch import Tensor

from . import checkpoint, layouts, registry
from .images import ImageSource, open_image
from .towers import CLIP_MEAN, CLIP_STD, TowerConfig

logger = logging.getLogger("modelscope_cnclip")

PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"

# Everything that `tokenizers` and cn_clip's BasicTokenizer treat alike: ASCII without the control characters, Latin-1
# letters, general and CJK punctuation, kana, the common ideographs, full-width forms. Other text takes a slower way.
_ALIKE = re.compile(
    "[\t\n\r\x20-\x7e\u00b7\u00d7\u2013-\u2027\u3000-\u301b\u3041-\u3096\u30a1-\u30fc\u4e00-\u9fa5\uff01-\uff5e]*"
)
_QUOTES = str.maketrans({"“": '"', "”": '"'})


class VocabularyError(ValueError):
    """A vocabulary that can't be used. The text names the file."""


class Tokenizer:
    """BERT WordPiece with the ids of cn_clip's ``tokenize``.

    Curly quotes become straight ones first, as upstream's training data had it (``_preprocess_text``); its
    ``tokenize`` alone gives [UNK] for them. Markers such as ``[MASK]`` in a text are plain characters.

    Args:
        vocab: file with one piece per line; the line number is the id.
        context_length: tokens that the model takes, [CLS] and [SEP] included.

    Raises:
        VocabularyError: no such file, not UTF-8, or [PAD] (as id 0), [UNK], [CLS], [SEP] are not in it.
    """

    def __init__(self, vocab: str | Path, context_length: int = 52) -> None:
        from tokenizers import Tokenizer as Fast
        from tokenizers.models import WordPiece
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        self.file, self.context_length = Path(vocab), context_length
        try:
            text = self.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise VocabularyError(f"{vocab}: {getattr(error, 'strerror', None) or error}") from None
        self.vocab = {line.strip(): i for i, line in enumerate(text.removesuffix("\n").split("\n"))}
        missing = [piece for piece in (PAD, UNK, CLS, SEP) if piece not in self.vocab]
        if missing or self.vocab[PAD] != 0:
            what = f"{', '.join(missing)} missing" if missing else f"{PAD} must be the first line"
            raise VocabularyError(f"{vocab}: not a BERT vocabulary: {what}")
        self.cls_id, self.sep_id = self.vocab[CLS], self.vocab[SEP]
        self._fast = Fast(WordPiece(self.vocab, unk_token=UNK, max_input_chars_per_word=200))
        self._fast.normalizer = BertNormalizer(
            clean_text=True, handle_chinese_chars=True, strip_accents=True, lowercase=True
        )
        self._fast.pre_tokenizer = BertPreTokenizer()
        self._alphabet = frozenset("".join(self.vocab))
        self._unknown = next(chr(c) for c in range(0xA000, 0xA48D) if chr(c) not in self._alphabet)  # a Yi syllable

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, ``[CLS] … [SEP]``, at most ``context_length`` of them; longer texts are cut.

        One warning counts the texts that were cut.

        Raises:
            TypeError: a text is no str; its position is named.
        """
        ids, lengths = self.encode(texts)
        if cut := sum(length > self.context_length for length in lengths):
            logger.warning(
                "%d of %d texts were cut to %d tokens (the longest has %d)",
                cut, len(ids), self.context_length, max(lengths),
            )  # fmt: skip
        return ids

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """The same without a warning, and how many ids each text has before it is cut."""
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"text {i}: expected a str, got {type(text).__name__}")
        encoded = self._fast.encode_batch_fast([self.clean(text) for text in texts], add_special_tokens=False)
        room = self.context_length - 2
        ids = [[self.cls_id, *one.ids[:room], self.sep_id] for one in encoded]
        return ids, [len(one.ids) + 2 for one in encoded]

    def padded(self, texts: Sequence[str], length: int | None = None) -> Tensor:
        """(N, L) int64, padded with 0 to ``length``, by default to the longest of these texts."""
        return pad(self(texts), length)

    def clean(self, text: str) -> str:
        """Quotes straightened, and what ``tokenizers`` would read in another way than cn_clip rewritten."""
        text = text.translate(_QUOTES)
        return text if _ALIKE.fullmatch(text) else self._as_upstream(text)

    def _as_upstream(self, text: str) -> str:
        """cn_clip's cleaning, lower-casing and accent-stripping, with Python's Unicode tables as it uses them.

        `tokenizers` has tables of its own age. Where they could matter nothing is left for it to decide: punctuation
        is set apart, and a character that no piece contains becomes one letter that no piece contains, for the word
        is [UNK] either way.
        """
        kept = []
        for char in text:
            kind = unicodedata.category(char)
            if char in "\t\n\r" or kind == "Zs":
                kept.append(" ")
            elif char not in "\0\ufffd" and kind not in ("Cc", "Cf"):
                kept.append(" " if char.isspace() else char)
        # Lower-casing a final sigma depends on its neighbours, so ideographs are set apart first, as upstream does.
        text = _IDEOGRAPH.sub(r" \g<0> ", "".join(kept)).lower()
        out = []
        for char in unicodedata.normalize("NFD", text):
            kind = unicodedata.category(char)
            if char.isascii():
                out.append(char)
            elif kind[0] == "P":
                out += (" ", char if char in self._alphabet else self._unknown, " ")
            elif kind != "Mn":
                out.append(char if char in self._alphabet else self._unknown)
        return "".join(out)


_IDEOGRAPH = re.compile(
    "[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
)


def pad(ids: Sequence[Sequence[int]], length: int | None = None) -> Tensor:
    """(N, L) int64 of lists of ids, zeros behind the shorter ones."""
    out = torch.zeros(len(ids), length or max(map(len, ids), default=0), dtype=torch.long)
    for row, one in zip(out, ids):
        row[: len(one)] = torch.tensor(one)
    return out


class ImageTransform:
    """A picture to the pixels that CN-CLIP's image tower takes.

    Squashed to a square with Pillow's bicubic filter, *then* converted to RGB, without a crop, as cn_clip's
    ``image_transform`` does; the order shows on palette and CMYK pictures.

    Args:
        resolution: side of the square, in pixels.
        mean, std: per channel, of values scaled to 0–1.
        exif: turn pictures as their EXIF tag says. Upstream doesn't.
    """

    def __init__(
        self,
        resolution: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        *,
        exif: bool = False,
    ) -> None:
        self.resolution, self.exif = resolution, exif
        self.mean = torch.tensor(mean).reshape(3, 1, 1)
        self.std = torch.tensor(std).reshape(3, 1, 1)

    def __call__(self, source: ImageSource) -> Tensor:
        """(3, r, r) float32, normalised. Raises ImageError."""
        return self.normalise(torch.from_numpy(self.to_uint8(source))[None])[0]

    def to_uint8(self, source: ImageSource) -> np.ndarray:
        """(r, r, 3) uint8: decoded, squashed, RGB. Raises ImageError."""
        image = open_image(source, exif=self.exif)
        square = image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC)
        return np.array(square.convert("RGB"))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, r, r, 3) uint8 -> (B, 3, r, r) float32 on the same device."""
        values = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        return values.sub_(self.mean.to(values.device)).div_(self.std.to(values.device))


def augmentation(
    resolution: int,
    *,
    scale: Sequence[float] = (0.9, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    auto_augment: str = "original",
    color_jitter: float = 0.0,
    gray: float = 0.0,
    background: float = 0.0,
) -> Callable[[Image.Image], Image.Image]:
    """A training transform: picture -> RGB picture of r × r pixels. The defaults are upstream's.

    Those are a random crop of 90-100%, mirroring and AutoAugment; source: cn_clip ``training/data.py``, which crops
    before it converts to RGB. Random numbers come from Python's ``random``, numpy and torch.

    Args:
        resolution: side of the square, in pixels.
        scale, ratio: share of the picture that a crop keeps, and the crop's width by height.
        flip: probability of mirroring.
        auto_augment: a policy of timm's (``original``, ``rand-m6-mstd0.5`` …), empty for none.
        color_jitter: strength of changes in brightness, contrast, saturation and hue.
        gray: probability of grey.
        background: probability of a random plain colour under transparent pixels, white otherwise. With 0, as
            upstream, they come out black, or in whatever colour a palette has for them.
    """
    from timm.data.transforms_factory import transforms_imagenet_train

    steps = transforms_imagenet_train(
        resolution,
        scale=tuple(scale),
        ratio=tuple(ratio),
        hflip=flip,
        color_jitter=color_jitter or None,
        force_color_jitter=bool(color_jitter),
        grayscale_prob=gray,
        auto_augment=auto_augment or None,
        interpolation="bicubic",
    ).transforms[:-2]  # without the conversion to a tensor and the normalisation
    geometry = [step for step in steps if type(step).__name__.startswith(("RandomResizedCrop", "RandomHorizontalFlip"))]

    def transform(image: Image.Image) -> Image.Image:
        if background and image.has_transparency_data:
            chosen = random.random() < background
            colour = tuple(random.randrange(256) for _ in range(3)) if chosen else (255, 255, 255)
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*colour, 255)), image.convert("RGBA"))
        for step in geometry:
            image = step(image)
        image = image.convert("RGB")
        for step in steps[len(geometry) :]:
            image = step(image)
        return image

    return transform


@registry.register
class CnclipPreprocessor(Preprocessor):
    """ModelScope's preprocessor for Chinese CLIP, called as the host's trainers and pipelines call it.

    ``preprocessor({"img": …, "text": …})`` gives ``{"img": (N, 3, r, r) float32, "text": (N, L) int64}`` with what
    was there. In train mode pictures are augmented as upstream does and texts are padded to the context length, so
    that samples can be stacked; otherwise texts are cut to the longest of the call.

    Args:
        model_dir: a checkpoint as :func:`.checkpoint.read_config` takes it.
        mode: ``train``, ``eval`` or ``inference``.
        resolution: another picture size, in pixels.
        context_length: another number of tokens, up to the model's position table.
        exif: turn pictures as their EXIF tag says.
    """

    def __init__(
        self,
        model_dir: str,
        mode: str = ModeKeys.INFERENCE,
        *args: Any,
        resolution: int | None = None,
        context_length: int | None = None,
        exif: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(mode)
        config, vocab = checkpoint.read_config(checkpoint.locate(model_dir))
        self.model_dir, self.config = model_dir, config
        self.tokenizer = tokenizer_of(config, vocab, model_dir, context_length)
        self.image_resolution = resolution or config.image_resolution
        self.transform = ImageTransform(self.image_resolution, config.vision_mean, config.vision_std, exif=exif)
        self.input_keys = {"img": "img", "text": "text"}

    def set_input_img_key(self, new_key: str) -> None:
        self.input_keys["img"] = new_key

    def set_input_text_key(self, new_key: str) -> None:
        self.input_keys["text"] = new_key

    def __call__(self, data: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """See the class. Raises ImageError for a bad picture, TypeError for a text that is no str."""
        out: dict[str, Tensor] = {}
        image, text = (data.get(self.input_keys[key]) for key in ("img", "text"))
        if image is not None:
            out["img"] = torch.stack([self._pixels(one) for one in as_list(image)])
        if text is not None:
            training = self.mode == ModeKeys.TRAIN
            out["text"] = self.tokenizer.padded(as_list(text), self.tokenizer.context_length if training else None)
        return out

    @cached_property
    def _augment(self) -> Callable[[Image.Image], Image.Image]:
        return augmentation(self.image_resolution)

    def _pixels(self, source: ImageSource) -> Tensor:
        if self.mode == ModeKeys.TRAIN:
            pixels = np.array(self._augment(open_image(source, exif=self.transform.exif)))
            return self.transform.normalise(torch.from_numpy(pixels)[None])[0]
        return self.transform(source)


def tokenizer_of(config: TowerConfig, vocab: Path | None, where: Any, context_length: int | None = None) -> Tokenizer:
    """The tokenizer of a model whose files are at ``where``.

    Raises:
        VocabularyError: there is no vocab.txt, or it has more pieces than the model.
    """
    if vocab is None:
        raise VocabularyError(f"{where}: no {layouts.VOCAB} there; every text needs it")
    tokenizer = Tokenizer(vocab, config.context_length if context_length is None else context_length)
    if not 3 <= tokenizer.context_length <= config.text_max_position_embeddings:
        raise ValueError(
            f"context_length {tokenizer.context_length}: this model takes 3 to {config.text_max_position_embeddings}"
        )
    if max(tokenizer.vocab.values()) >= config.vocab_size:
        raise VocabularyError(f"{vocab}: {len(tokenizer.vocab)} pieces, but the model knows {config.vocab_size}")
    return tokenizer


def as_list(value: Any) -> list[Any]:
    """One picture or text, or several of them -> a list. A str, bytes or an array of up to 3 dimensions is one."""
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim == 4 or value.dtype.kind in "OU" else [value]
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, bytearray, memoryview, Image.Image)):
        return list(value)
    return [value]
