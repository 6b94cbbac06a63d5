"""Image features of a frozen tower, computed once and kept in a file.

In a stage that freezes the whole image tower a picture's features never change, so from the second pass on, a step
costs the text tower alone. Where only the tower's projection is trained, what goes into the projection is kept.
Without augmentation they are exactly what the plain path computes. With augmentation
they aren't kept, unless the stage says ``cached_views: K``: then K augmented views of each picture are, and every visit
draws one of them, where the plain path would see a new view every time.

The file is named by a hash of all that its numbers depend on: the tower's weights, precision, preprocessing, views and
their seed, and the identity of every picture (:meth:`~modelscope_cnclip.pairs.PairDataset.image_key`). It is used again
by whoever comes to the same name, a resumed run for one.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.pairs import PairDataset
from modelscope_cnclip.towers import ChineseCLIP

from .batches import Pixels, View
from .distributed import Ranks
from .recipe import Stage
from .two_stage import trunk_frozen, wholly_frozen


def why_not(stage: Stage, model: ChineseCLIP) -> str | None:
    """Why a stage can't keep image features, or None if it can."""
    if not wholly_frozen(model.visual) and not trunk_frozen(model):
        return "the image tower, or a part of it, is trained"
    if not stage.cache_features:
        return "cache_features is false"
    if stage.augmentation is not None and not stage.cached_views:
        return "pictures are augmented afresh; cached_views would keep some views of each"
    return None


class FeatureCache:
    """(pictures × views, D) float32 features in a memory-mapped ``.npy`` file, L2-normalised.

    Attributes:
        file: where they are.
        trunk: they are (…, W) and what the projection takes, not normalised.
        broken: positions of pairs whose picture could not be read; their rows hold NaN.
    """

    def __init__(self, file: Path, row_of: np.ndarray, views: int, reasons: dict[int, str], trunk: bool) -> None:
        self.file, self.views, self._row_of, self.trunk = file, views, row_of, trunk
        self._features = np.load(file, mmap_mode="r")
        self.reasons = {pair: reasons[row] for pair, row in enumerate(row_of.tolist()) if row in reasons}
        self.broken = frozenset(self.reasons)

    def __call__(self, pairs: Tensor, visits: Tensor) -> Tensor:
        """(B,) positions of pairs and (B,) visit numbers -> (B, D) float32 on the CPU."""
        rows = self._row_of[pairs.numpy()] * self.views + visits.numpy() % self.views
        return torch.from_numpy(self._features[rows])

    @classmethod
    def build(
        cls, folder: Path, encoder: Encoder, pairs: PairDataset, stage: Stage, seed: int, ranks: Ranks
    ) -> FeatureCache:
        """Find the file for this stage, or compute it, all ranks a part each.

        Args:
            folder: where such files are kept.
            encoder: over the model, in the precision of the run; its transform says how pictures are read.
            pairs, stage: whose pictures, and how they are augmented.
            seed: of the augmentation.
            ranks: this process among the others; they must share the folder.
        """
        row_of, firsts, keys = _pictures(pairs, ranks)
        views = stage.cached_views if stage.augmentation is not None else 1
        pixels = Pixels(encoder.transform, stage.augmentation)
        name = _fingerprint(encoder, stage.augmentation, views, seed, keys)
        folder.mkdir(parents=True, exist_ok=True)
        file, notes = folder / f"{name}.npy", folder / f"{name}.json"
        if not ranks.agree(notes.exists() and file.exists()):
            _compute(file, notes, encoder, pixels, pairs, firsts, views, seed, ranks)
        _seen_by_all(notes, ranks)
        reasons = json.loads(notes.read_text(encoding="utf-8"))["broken"]
        return cls(file, row_of, views, {int(row): reason for row, reason in reasons.items()}, encoder.backend.trunk)


def _pictures(pairs: PairDataset, ranks: Ranks) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Row of each pair's picture (N,), first pair of each picture (M,), and the pictures' identities.

    A pair whose picture has no identity has a row to itself, and a name that no other run has.
    """
    rows: dict[str, int] = {}
    row_of, firsts = np.empty(len(pairs), dtype=np.int64), []
    run = ranks.agree(time.time_ns())
    for i in range(len(pairs)):
        key = pairs.image_key(i) or f"pair {i} of run {run}"
        if key not in rows:
            rows[key] = len(rows)
            firsts.append(i)
        row_of[i] = rows[key]
    return row_of, np.array(firsts), list(rows)


def _fingerprint(encoder: Encoder, augmentation: Any, views: int, seed: int, keys: list[str]) -> str:
    digest = hashlib.sha256()
    model, transform, trunk = encoder.backend.model, encoder.transform, encoder.backend.trunk
    for name, tensor in sorted(model.visual.state_dict().items()):
        if trunk and name.startswith(("proj.", "head.")):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    settings = [trunk, encoder.backend.precision, transform.resolution, transform.exif, transform.mean.tolist(),
                transform.std.tolist(), augmentation, views, seed if augmentation is not None else None]  # fmt: skip
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for key in keys:
        digest.update(key.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:32]


def _compute(
    file: Path,
    notes: Path,
    encoder: Encoder,
    pixels: Pixels,
    pairs: PairDataset,
    firsts: np.ndarray,
    views: int,
    seed: int,
    ranks: Ranks,
) -> None:
    rows = len(firsts) * views
    part = file.with_suffix(".part.npy")
    if ranks.first:
        blank = np.zeros((1, encoder.transform.resolution, encoder.transform.resolution, 3), dtype=np.uint8)
        np.lib.format.open_memmap(part, "w+", np.float32, (rows, encoder.backend.image(blank).shape[1]))[:] = np.nan
    ranks.wait()
    _seen_by_all(part, ranks)
    features = np.lib.format.open_memmap(part, "r+")
    mine = np.array_split(np.arange(rows), ranks.count)[ranks.number]

    def pictures() -> Any:
        for row in mine:
            pair = int(firsts[row // views])
            try:
                source = pairs[pair].image
            except ValueError as error:  # unreadable base64; the Encoder reports it as any other broken picture
                source = str(error)
            yield View(source, int(np.random.default_rng((seed, int(row))).integers(2**62)))

    live = Encoder(encoder.backend, encoder.tokenizer, pixels, encoder.model_id)
    done = np.zeros(len(mine), dtype=bool)
    for positions, vectors in live.iter_image(pictures(), on_error="skip"):
        features[mine[positions]] = vectors
        done[positions] = True
    features.flush()
    del features  # Windows renames no file that is open
    missing = {int(row // views): _source(pairs, int(firsts[row // views])) for row in mine[~done]}
    broken = {row: source for part_of in ranks.gather(missing) for row, source in part_of.items()}
    if ranks.first:
        part.replace(file)
        temporary = notes.with_suffix(".tmp")
        temporary.write_text(json.dumps({"pictures": len(firsts), "views": views, "broken": broken}), encoding="utf-8")
        temporary.replace(notes)
    ranks.wait()


def _seen_by_all(file: Path, ranks: Ranks) -> None:
    if not ranks.all(file.exists()):
        raise OSError(f"{file}: not there for every rank; ranks that share no folder need cache_features: false")


def _source(pairs: PairDataset, i: int) -> str:
    try:
        return pairs[i].source
    except ValueError as error:  # as above
        return str(error)
