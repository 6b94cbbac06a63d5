"""Recall over the whole evaluation pool, as a ModelScope metric and for the trainer.

``cnclip-retrieval-recall`` gives, as shares of 1: ``text_to_image_recall@1/5/10`` and their mean
``text_to_image_mean_recall``, the same for ``image_to_text``, and ``mean_recall`` over all six. Pairs that show the
same picture or concept, or carry the same caption, count as found for one another, and each distinct picture and
caption is in its pool once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from modelscope.metrics import build_metric
from modelscope.metrics.base import Metric
from modelscope.outputs import OutputKeys
from modelscope.trainers.hooks.hook import Hook
from modelscope.trainers.hooks.priority import Priority

from modelscope_cnclip import registry
from modelscope_cnclip.data import DataError
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.pairs import PairDataset
from modelscope_cnclip.retrieval import KS, first_hit, recall

from .distributed import Ranks
from .live import evaluating, live_encoder
from .two_stage import wholly_frozen

if TYPE_CHECKING:
    from .trainer import CnclipTrainer


@registry.register
class RetrievalRecallMetric(Metric):
    """Recall@k of text to image and image to text over everything that was added.

    ``inputs`` may carry ``image_key``, ``image_id`` and ``text`` per row, to say which rows show the same file, the
    same thing and say the same; without them each row is a picture and a caption of its own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._image: list[np.ndarray] = []
        self._text: list[np.ndarray] = []
        self._names: list[tuple[Any, Any, Any]] = []

    def add(self, outputs: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Take (B, D) L2-normalised ``img_embedding`` and ``text_embedding``, row for row a pair."""
        image, text = (
            np.asarray(outputs[key].detach().cpu() if hasattr(outputs[key], "detach") else outputs[key], np.float32)
            for key in (OutputKeys.IMG_EMBEDDING, OutputKeys.TEXT_EMBEDDING)
        )
        keys, nameless = ("image_key", "image_id", "text"), [None] * len(image)
        self._image.append(image)
        self._text.append(text)
        self._names += zip(*(inputs[key] if isinstance(inputs.get(key), list) else nameless for key in keys))

    def evaluate(self) -> dict[str, float]:
        """See the module. Raises DataError if nothing was added."""
        if not self._names:
            raise DataError("no pairs to evaluate: none of the evaluation data's pictures can be read")
        image, text = np.concatenate(self._image), np.concatenate(self._text)
        named = ([("row", i) if name is None else name for name in row] for i, row in enumerate(self._names))
        keys, ids, texts = zip(*named)
        pictures, captions = (np.sort(np.unique(_codes(names), return_index=True)[1]) for names in (keys, texts))
        shown: dict[Any, set[Any]] = {}  # caption -> what it is said of
        said: dict[Any, set[Any]] = {}  # what is shown -> its captions
        for name, caption in zip(ids, texts):
            shown.setdefault(caption, set()).add(name)
            said.setdefault(name, set()).add(caption)
        to_image = first_hit(
            text[captions], image[pictures], [shown[texts[i]] for i in captions], [ids[i] for i in pictures]
        )
        to_text = first_hit(
            image[pictures], text[captions], [said[ids[i]] for i in pictures], [texts[i] for i in captions]
        )
        out = {}
        for name, ranks in (("text_to_image", to_image), ("image_to_text", to_text)):
            out |= {f"{name}_recall@{k}": recall(ranks, k) for k in KS}
            out[f"{name}_mean_recall"] = float(np.mean([out[f"{name}_recall@{k}"] for k in KS]))
        out["mean_recall"] = (out["text_to_image_mean_recall"] + out["image_to_text_mean_recall"]) / 2
        return out

    def merge(self, other: RetrievalRecallMetric) -> None:
        self._image += other._image
        self._text += other._text
        self._names += other._names


def _codes(names: tuple[Any, ...]) -> np.ndarray:
    """(N,) int64, equal where the names are."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def pool_features(
    encoder: Encoder, pairs: PairDataset, batch_size: int, ranks: Ranks, images: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
    """Features of every pair's picture and of every caption, each rank a part of the work.

    Args:
        images: features of the pictures, where they are known already.

    Returns:
        (N, D) image features, NaN where a picture can't be read; (T, D) text features; for each of the T captions the
        pair that it belongs to and the text.
    """
    captions = [(i, text) for i in range(len(pairs)) for text in pairs.texts(i)]
    if images is None:
        keys: dict[Any, int] = {}
        row_of = np.array([keys.setdefault(pairs.image_key(i) or i, len(keys)) for i in range(len(pairs))])
        firsts = np.unique(row_of, return_index=True)[1]
        mine = np.array_split(firsts, ranks.count)[ranks.number]
        part = np.full((len(mine), encoder.embed_dim), np.nan, dtype=np.float32)
        vectors, kept = encoder.encode_image(
            (_image(pairs, int(i)) for i in mine), batch_size, show_progress=False, on_error="skip"
        )
        part[kept] = vectors
        images = np.concatenate(ranks.gather(part))[row_of]
    mine = np.array_split(np.arange(len(captions)), ranks.count)[ranks.number]
    part = encoder.encode_text([captions[int(i)][1] for i in mine], batch_size, show_progress=False)
    return images, np.concatenate(ranks.gather(part)), captions


def _image(pairs: PairDataset, i: int) -> Any:
    try:
        return pairs[i].image
    except ValueError as error:  # a record that is broken before there is a picture; the Encoder reports and skips it
        return str(error)


def feed(
    metrics: list[Metric],
    pairs: PairDataset,
    images: np.ndarray,
    texts: np.ndarray,
    captions: list[tuple[int, str]],
    batch_size: int,
) -> None:
    """Show features to metrics, batch by batch in the data's order; pairs whose picture is broken are left out."""
    import torch

    good = [row for row, (pair, _) in enumerate(captions) if not np.isnan(images[pair, 0])]
    for start in range(0, len(good), batch_size):
        rows = good[start : start + batch_size]
        owners = [captions[row][0] for row in rows]
        outputs = {
            OutputKeys.IMG_EMBEDDING: torch.from_numpy(images[owners]),
            OutputKeys.TEXT_EMBEDDING: torch.from_numpy(texts[rows]),
        }
        inputs = {
            "image_key": [pairs.image_key(i) or i for i in owners],
            "image_id": [pairs.image_id(i) for i in owners],
            "text": [captions[row][1] for row in rows],
        }
        for metric in metrics:
            metric.add(outputs, inputs)


def evaluate(trainer: CnclipTrainer, saving_fn: Any = None) -> dict[str, float]:
    """Every metric of the trainer over its evaluation data, by name; all ranks together."""
    size = trainer.recipe.get("evaluation.dataloader.batch_size_per_gpu", 64)
    encoder = live_encoder(trainer.towers, trainer.tokenizer, trainer.transform, trainer.device, trainer.precision)
    with evaluating(trainer.towers):
        images, texts, captions = pool_features(
            encoder, trainer.eval_dataset, size, trainer.ranks, trainer.evaluated_images
        )
    if wholly_frozen(trainer.towers.visual):
        trainer.evaluated_images = images  # they won't change in this stage
    metrics = [build_metric(metric) for metric in trainer.metrics]
    if saving_fn is not None:
        from modelscope.metrics.prediction_saving_wrapper import PredictionSavingWrapper

        metrics.append(PredictionSavingWrapper(saving_fn=saving_fn))
    for metric in metrics:
        metric.trainer = trainer
    feed(metrics, trainer.eval_dataset, images, texts, captions, size)
    return {name: float(value) for metric in metrics for name, value in (metric.evaluate() or {}).items()}


@registry.register
class CnclipEvaluationHook(Hook):
    """Evaluates at intervals and at the end of every stage. The trainer registers it by itself."""

    PRIORITY = Priority.ABOVE_NORMAL  # before everything that looks at the metrics

    def __init__(self, interval: int = 1, by_epoch: bool = True) -> None:
        self.interval, self.by_epoch = interval, by_epoch

    def after_train_iter(self, trainer: CnclipTrainer) -> None:
        if not self.by_epoch and trainer.progress.step % self.interval == 0 and trainer.eval_dataset is not None:
            trainer.evaluate()

    def after_train_epoch(self, trainer: CnclipTrainer) -> None:
        if trainer.eval_dataset is None:
            return
        due = self.by_epoch and trainer.progress.epoch % self.interval == 0
        fresh = not self.by_epoch and trainer.progress.step % self.interval == 0  # after the pass's last step
        over = trainer.progress.stage_step >= trainer.stage_steps
        if due or (over and not fresh):
            trainer.evaluate()
