"""Pairs to batches: the order of a pass, broken pictures, augmentation, and a position that can be taken up again.

Everything random about a sample follows from the seed, the stage, the pass and the pair, and from nothing else: not
from the number of workers, not from what was read before. So a run that is resumed in the middle of a pass sees what
it would have seen.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from modelscope_cnclip.data import DataError
from modelscope_cnclip.images import ImageError, ImageSource, open_image
from modelscope_cnclip.pairs import PairDataset
from modelscope_cnclip.preprocessor import ImageTransform, Tokenizer, augmentation, pad

from .distributed import Ranks

logger = logging.getLogger("modelscope_cnclip")

IN_A_ROW = 64  # broken pictures in a row that are passed over before the data set itself must be wrong

Visit = tuple[int, int]  # a pair's position, and the seed of what is random about this visit


@dataclass
class Batch:
    """One rank's pairs of one forward pass.

    Attributes:
        pixels: (B, r, r, 3) uint8, None where features are kept.
        rows: (B,) int64, positions of the pairs in the data set.
        views: (B,) int64, a number per visit that picks one of the kept views.
        text: (B, L) int64, padded with 0 to the longest.
        image_ids, text_ids: (B,) int64, equal for the same picture and the same caption.
        cut: captions that were longer than the context.
        bad: (position, reason) of pairs whose picture could not be read; another pair took their place.
    """

    pixels: Tensor | None
    rows: Tensor
    views: Tensor
    text: Tensor
    image_ids: Tensor
    text_ids: Tensor
    cut: int
    bad: list[tuple[str, str]]

    def pin_memory(self) -> Batch:
        for name in ("pixels", "text", "image_ids", "text_ids"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.pin_memory())
        return self


@dataclass(frozen=True)
class View:
    """A picture as one visit sees it: what :class:`Pixels` takes."""

    source: ImageSource
    seed: int


class Pixels(ImageTransform):
    """The towers' transform, with a stage's augmentation in front of it. The same seed gives the same pixels.

    Args:
        transform: the model's own.
        options: keywords of :func:`~modelscope_cnclip.preprocessor.augmentation`, None for no augmentation.
    """

    # timm draws from the interpreter's global generators, so two threads must not.
    _lock = threading.Lock()

    def __init__(self, transform: ImageTransform, options: dict[str, Any] | None) -> None:
        mean, std = transform.mean.flatten().tolist(), transform.std.flatten().tolist()
        super().__init__(transform.resolution, mean, std, exif=transform.exif)
        self.options = options
        self._augment = None if options is None else augmentation(transform.resolution, **options)

    def to_uint8(self, source: View | ImageSource) -> np.ndarray:
        """(r, r, 3) uint8. Raises ImageError."""
        if not isinstance(source, View):
            return super().to_uint8(source)
        if self._augment is None:
            return super().to_uint8(source.source)
        image = open_image(source.source, exif=self.exif)
        with self._lock, seeded(source.seed):
            return np.array(self._augment(image))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_augment"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._augment = None if self.options is None else augmentation(self.resolution, **self.options)


class Visits(Dataset):
    """Pairs as the model takes them, one :data:`Visit` at a time; for a DataLoader.

    Args:
        pairs: the data set.
        tokenizer: of the model.
        pixels: None leaves pictures alone, for features that are kept.
        broken: positions whose pictures are known to be broken.
    """

    def __init__(
        self, pairs: PairDataset, tokenizer: Tokenizer, pixels: Pixels | None, broken: frozenset[int] = frozenset()
    ) -> None:
        self.pairs, self.tokenizer, self.pixels, self.broken = pairs, tokenizer, pixels, broken

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, visit: Visit) -> dict[str, Any]:
        """Pixels (or None), row, caption and identities. A broken picture gives way to the next pair that isn't.

        Raises:
            DataError: many pictures in a row are broken.
        """
        first, seed = visit
        bad: list[tuple[str, str]] = []
        for step in range(min(IN_A_ROW, len(self.pairs))):
            row = (first + step) % len(self.pairs)
            if row in self.broken:
                continue
            pixels = None
            if self.pixels is not None:
                try:
                    pixels = self.pixels.to_uint8(View(self.pairs[row].image, seed))
                except (ImageError, DataError) as error:
                    bad.append((str(row), str(error)))
                    continue
            texts = self.pairs.texts(row)
            text = texts[np.random.default_rng(seed).integers(len(texts))] if len(texts) > 1 else texts[0]
            return {
                "pixels": pixels,
                "row": row,
                "view": seed,
                "text": text,
                "image_id": _number(repr(self.pairs.image_id(row))),
                "text_id": _number(text),
                "bad": bad,
            }
        last = bad[-1][1] if bad else f"pair {first}"
        raise DataError(f"{min(IN_A_ROW, len(self.pairs))} pictures in a row can't be read; the last: {last}")

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        ids, lengths = self.tokenizer.encode([sample["text"] for sample in samples])
        pixels = [sample["pixels"] for sample in samples]
        numbers = (torch.tensor([sample[key] for sample in samples]) for key in ("row", "view", "image_id", "text_id"))
        row, view, image_id, text_id = numbers
        return Batch(
            pixels=torch.from_numpy(np.stack(pixels)) if self.pixels is not None else None,
            rows=row,
            views=view,
            text=pad(ids),
            image_ids=image_id,
            text_ids=text_id,
            cut=sum(length > self.tokenizer.context_length for length in lengths),
            bad=[one for sample in samples for one in sample["bad"]],
        )


class PassSampler(Sampler[list[Visit]]):
    """One rank's batches of one pass over the data, from a given batch on.

    A pass is a permutation of the pairs. Batch b of all ranks together is its b-th slice, and a rank has an equal part
    of that; so two ranks see, together, what one rank with twice the batch would. Without ``drop_last`` the last batch
    is what is left, shortened to a multiple of the number of ranks.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: tuple[int, ...],
        start: int = 0,
        rank: int = 0,
        ranks: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        self.size, self.batch_size, self.seed, self.start = size, batch_size, seed, start
        self.rank, self.ranks, self.shuffle, self.drop_last = rank, ranks, shuffle, drop_last

    def __len__(self) -> int:
        return max(0, batches_of(self.size, self.batch_size * self.ranks, self.ranks, self.drop_last) - self.start)

    def __iter__(self) -> Iterator[list[Visit]]:
        generator = np.random.default_rng(self.seed)
        order = generator.permutation(self.size) if self.shuffle else np.arange(self.size)
        visits = generator.integers(2**62, size=self.size)
        world = self.batch_size * self.ranks
        for number in range(self.start, self.start + len(self)):
            rows = order[number * world : (number + 1) * world]
            share = len(rows) // self.ranks
            mine = rows[self.rank * share : (self.rank + 1) * share]
            yield [(int(row), int(visits[row])) for row in mine]


def batches_of(size: int, world_batch: int, ranks: int = 1, drop_last: bool = True) -> int:
    """Forward passes in one pass over the data."""
    whole, rest = divmod(size, world_batch)
    return whole + (not drop_last and rest >= ranks)


def loader(visits: Visits, sampler: PassSampler, workers: int, *, pin_memory: bool = False) -> DataLoader:
    """Batches in order; ``workers`` processes decode, none means this one does."""
    return DataLoader(
        visits,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=visits.collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # it draws a number per pass, which must not come out of dropout's
    )


class Broken:
    """Pairs whose picture can't be read: logged once each, counted over all ranks, and too many are an error.

    Args:
        known: positions that were found before.
        size: pairs in the data set.
        limit: share of the data set that may be broken.
        warn: told of each.
    """

    def __init__(
        self, known: Iterable[str], size: int, limit: float, warn: Callable[[str], Any] = logger.warning
    ) -> None:
        self.pairs, self.size, self.limit, self.warn = set(known), size, limit, warn
        self.untold = 0  # of this rank, that the other ranks don't know of

    def note(self, found: Iterable[tuple[str, str]]) -> None:
        for pair, reason in found:
            if pair not in self.pairs:
                self.pairs.add(pair)
                self.untold += 1
                self.warn(f"skipped a picture: {reason}")

    def share(self, ranks: Ranks) -> None:
        """Tell the other ranks; all of them call this together. Raises DataError past the limit, on all of them."""
        self.pairs = set().union(*ranks.gather(self.pairs))
        self.untold = 0
        if len(self.pairs) > self.limit * self.size:
            raise DataError(
                f"{len(self.pairs)} of {self.size} pictures can't be read so far, more than data.max_bad_fraction = "
                f"{self.limit} allows; the log says which"
            )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of ``random``, numpy and torch from this seed, and afterwards as if nothing had happened."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


def _number(text: str) -> int:
    """63 bits that stand for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
