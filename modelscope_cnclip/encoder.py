"""Pictures and Chinese text to vectors, from any model, over anything iterable.

    from modelscope_cnclip import Encoder

    encoder = Encoder.from_pretrained("damo/multi-modal_clip-vit-base-patch16_zh")
    images = encoder.encode_image(["cat.jpg", "https://example.com/dog.png"])  # (2, D) float32
    texts = encoder.encode_text(["一只猫", "一条狗"])                            # (2, D) float32
    scores = texts @ images.T                                                    # cosines

Everything else in this package that needs a vector (pipelines, command line, evaluation, search) asks an Encoder.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar, overload

import numpy as np
from PIL import Image
from tqdm import tqdm

from . import checkpoint
from .backends import BACKENDS, PRECISIONS, Backend, TorchBackend, pick_device, pick_precision
from .images import ImageSource, describe
from .preprocessor import ImageTransform, Tokenizer, as_list, pad, tokenizer_of
from .towers import TowerConfig

logger = logging.getLogger("modelscope_cnclip")

Item = TypeVar("Item")
OnError = Literal["raise", "skip"]

_TEXTS_AT_ONCE = 64  # batches of texts that are sorted by length together
_IMAGES_AHEAD = 2  # batches of pictures decoded before the model asks for them

# Pillow reads the file of an open picture when the pixels are first asked for. Two threads that ask at once, because
# the picture is in a list twice, break it; a lock per picture, or nearly.
_OPENED = tuple(Lock() for _ in range(64))


class ItemError(ValueError):
    """One item of many that can't be embedded.

    Attributes:
        index: its position in what was given, from 0.
        source: its path, address or a description.
    """

    def __init__(self, index: int, source: str, reason: str) -> None:
        super().__init__(f"item {index}: {reason}" if source in reason else f"item {index}: {source}: {reason}")
        self.index, self.source = index, source


class Encoder:
    """Embeds pictures and texts with one model. Threads may share it.

    Attributes:
        model_id: the name that it was loaded under.
        embed_dim: D, the length of a vector.
        logit_scale: what cosines are multiplied by before a softmax, 1 / temperature.
        backend, tokenizer, transform: the parts.
    """

    def __init__(self, backend: Backend, tokenizer: Tokenizer, transform: ImageTransform, model_id: str = "") -> None:
        self.backend, self.tokenizer, self.transform, self.model_id = backend, tokenizer, transform, model_id
        self.embed_dim, self.logit_scale = backend.embed_dim, backend.logit_scale

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        backend: str = "auto",
        precision: str = "auto",
        device: str | None = None,
        *,
        revision: str | None = None,
        resolution: int | None = None,
        context_length: int | None = None,
        exif: bool = False,
    ) -> Encoder:
        """Load a model.

        Args:
            model: a ModelScope Hub id, a folder (ModelScope's or transformers' layout), a cn_clip ``.pt`` file, or
                ``tiny``.
            backend: ``auto`` or ``torch``.
            precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: the fastest that gives up no accuracy on this
                device (cosine to fp32 ≥ 0.999). fp32 gives cn_clip's numbers to 1e-5.
            device: ``cpu``, ``cuda``, ``cuda:1``, ``mps`` …; None takes a GPU if there is one.
            revision: of a Hub id.
            resolution: another picture size in pixels; the position table is resized to it.
            context_length: another number of tokens, up to the model's position table.
            exif: turn pictures as their EXIF tag says; upstream doesn't.

        Raises:
            hub.HubError: there is no such model. checkpoint.CheckpointError: its files are wrong.
            preprocessor.VocabularyError: its vocabulary is. ValueError: an unknown backend, precision or device.
        """
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend {backend!r}: there are auto, {', '.join(BACKENDS)}")
        device = pick_device(device)
        precision = pick_precision(precision, device)
        loaded = checkpoint.read(checkpoint.locate(model, revision=revision))
        tokenizer = tokenizer_of(loaded.config, loaded.vocab, loaded.path, context_length)
        towers = loaded.build(PRECISIONS[precision], resolution=resolution)
        transform = _transform_of(towers.config, exif)
        return cls(TorchBackend(towers, transform, device, precision), tokenizer, transform, str(model))

    @overload
    def encode_image(
        self, images: Any, batch_size: int = ..., show_progress: bool | None = ..., *, on_error: Literal["raise"] = ...
    ) -> np.ndarray: ...

    @overload
    def encode_image(
        self, images: Any, batch_size: int = ..., show_progress: bool | None = ..., *, on_error: Literal["skip"]
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def encode_image(
        self,
        images: ImageSource | Iterable[ImageSource],
        batch_size: int = 32,
        show_progress: bool | None = None,
        *,
        on_error: OnError = "raise",
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Vectors of pictures, in their order.

        Args:
            images: paths, ``http(s)://`` or ``oss://`` addresses, bytes, PIL images or (H, W, 3) uint8 arrays, in any
                iterable, a generator too; or one of them. They are decoded in threads ahead of the model.
            batch_size: pictures per forward pass.
            show_progress: a tqdm bar; None shows one on a terminal when there is more than one batch.
            on_error: ``raise`` stops at the first bad picture; ``skip`` logs it and goes on.

        Returns:
            (N, D) float32, L2-normalised; (0, D) for no pictures. With ``on_error="skip"`` also the positions of the
            rows that worked, (N,) int64.

        Raises:
            ItemError: with the picture's position and source.
        """
        parts, kept = _collect(self.iter_image(images, batch_size, show_progress, on_error=on_error))
        return self._result(parts, kept, on_error)

    @overload
    def encode_text(
        self, texts: Any, batch_size: int = ..., show_progress: bool | None = ..., *, on_error: Literal["raise"] = ...
    ) -> np.ndarray: ...

    @overload
    def encode_text(
        self, texts: Any, batch_size: int = ..., show_progress: bool | None = ..., *, on_error: Literal["skip"]
    ) -> tuple[np.ndarray, np.ndarray]: ...

    def encode_text(
        self,
        texts: str | Iterable[str],
        batch_size: int = 256,
        show_progress: bool | None = None,
        *,
        on_error: OnError = "raise",
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Vectors of texts, in their order; an empty text has one too.

        Texts of similar length share a batch, which is cut to the longest of them. Texts longer than the context
        length are cut, with one warning that counts them.

        Args, returns and errors: as :meth:`encode_image`, for ``str`` items (UTF-8 ``bytes`` are decoded).
        """
        parts, kept = _collect(self.iter_text(texts, batch_size, show_progress, on_error=on_error))
        return self._result(parts, kept, on_error)

    def iter_image(
        self,
        images: ImageSource | Iterable[ImageSource],
        batch_size: int = 32,
        show_progress: bool | None = None,
        *,
        on_error: OnError = "raise",
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """:meth:`encode_image` piece by piece: (positions (n,) int64, vectors (n, D)), for more than memory holds."""
        images = _items(images)
        check = _Errors(on_error)
        with (
            _progress(images, batch_size, show_progress, "images") as bar,
            closing(_ahead(self._decode, images, _IMAGES_AHEAD * batch_size)) as decoded,
        ):
            for batch in _batches(check.good(decoded), batch_size):
                vectors = self.backend.image(np.stack([pixels for _, pixels in batch]))
                bar.update(len(batch))
                yield np.array([index for index, _ in batch]), vectors

    def iter_text(
        self,
        texts: str | Iterable[str],
        batch_size: int = 256,
        show_progress: bool | None = None,
        *,
        on_error: OnError = "raise",
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """:meth:`encode_text` piece by piece: (positions (n,) int64, vectors (n, D)), in order."""
        texts = _items(texts)
        check = _Errors(on_error)
        with _progress(texts, batch_size, show_progress, "texts") as bar:
            good = check.good((i, text, _checked(text)) for i, text in enumerate(texts))
            for window in _batches(good, batch_size * _TEXTS_AT_ONCE):
                ids = self.tokenizer([text for _, text in window])
                vectors = np.empty((len(ids), self.embed_dim), dtype=np.float32)
                by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
                for rows in _batches(by_length, batch_size):
                    vectors[rows] = self.backend.text(pad([ids[row] for row in rows]))
                    bar.update(len(rows))
                yield np.array([index for index, _ in window]), vectors

    def _decode(self, image: ImageSource) -> np.ndarray:
        if not isinstance(image, Image.Image):
            return self.transform.to_uint8(image)
        with _OPENED[id(image) // 64 % len(_OPENED)]:
            return self.transform.to_uint8(image)

    def _result(self, parts: list[np.ndarray], kept: list[np.ndarray], on_error: OnError) -> Any:
        vectors = np.concatenate(parts) if parts else np.empty((0, self.embed_dim), dtype=np.float32)
        if on_error == "raise":
            return vectors
        return vectors, np.concatenate(kept) if kept else np.empty(0, dtype=np.int64)

    def __repr__(self) -> str:
        backend = self.backend
        return f"Encoder({self.model_id!r}, {backend.name}, {backend.precision}, {backend.device}, D={self.embed_dim})"


def _transform_of(config: TowerConfig, exif: bool = False) -> ImageTransform:
    return ImageTransform(config.image_resolution, config.vision_mean, config.vision_std, exif=exif)


def _items(items: Any) -> Iterable[Any]:
    """One picture or text becomes a list; any other iterable stays as it is and is read as it goes."""
    if items is None:
        raise TypeError("expected pictures or texts, got None")
    one = isinstance(items, (str, bytes, bytearray, memoryview, Image.Image, np.ndarray))
    return items if isinstance(items, Iterable) and not one else as_list(items)


def _checked(text: Any) -> str | Exception:
    if isinstance(text, (bytes, bytearray)):
        try:
            return bytes(text).decode("utf-8")
        except UnicodeDecodeError as error:
            return ValueError(f"bytes that are not UTF-8 ({error.reason} at byte {error.start})")
    if not isinstance(text, str):
        return TypeError(f"expected a str, got {type(text).__name__}")
    return text


class _Errors:
    """What to do about items that failed: raise with their position, or log and leave them out."""

    def __init__(self, on_error: OnError) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error {on_error!r}: there are raise and skip")
        self.skip = on_error == "skip"

    def good(self, results: Iterable[tuple[int, Any, Any]]) -> Iterator[tuple[int, Any]]:
        for index, source, value in results:
            if not isinstance(value, Exception):
                yield index, value
                continue
            error = ItemError(index, describe(source), str(value) or type(value).__name__)
            if not self.skip:
                raise error from value
            logger.warning("skipped %s", error)


def _ahead(
    work: Callable[[Item], Any], items: Iterable[Item], lead: int
) -> Generator[tuple[int, Item, Any | Exception], None, None]:
    """(position, item, result or exception) in order, with up to ``lead`` items worked on in threads beforehand."""
    waiting: deque[tuple[int, Item, Future]] = deque()
    with ThreadPoolExecutor(max_workers=min(8, (os.cpu_count() or 1) + 1), thread_name_prefix="decode") as pool:
        try:
            for index, item in enumerate(items):
                waiting.append((index, item, pool.submit(work, item)))
                if len(waiting) > lead:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _finished(index: int, item: Item, future: Future) -> tuple[int, Item, Any | Exception]:
    error = future.exception()
    if error is not None and not isinstance(error, Exception):
        raise error
    return index, item, error if error is not None else future.result()


def _batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    if size < 1:
        raise ValueError(f"batch_size {size}: must be 1 or more")
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _collect(pieces: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    kept, parts = [], []
    for positions, vectors in pieces:
        kept.append(positions)
        parts.append(vectors)
    return parts, kept


def _progress(items: Iterable[Any], batch_size: int, show: bool | None, unit: str) -> tqdm:
    total = len(items) if hasattr(items, "__len__") else None
    hide = total is not None and total <= batch_size if show is None else not show
    return tqdm(total=total, unit=f" {unit}", disable=None if show is None and not hide else hide)
