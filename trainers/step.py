"""One optimizer step: forward and backward over its batches, agreement between ranks, and the update."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

from torch import Tensor, nn

from . import checkpointing, optim, two_stage
from .batches import Batch
from .live import autocast
from .loss import clip_loss

if TYPE_CHECKING:
    from .trainer import CnclipTrainer


class TrainingError(FloatingPointError):
    """A run that can't go on. The text says why, and names the last good checkpoint."""


def train_step(trainer: CnclipTrainer, model: nn.Module, inputs: list[Batch]) -> None:
    """One optimizer step over one or more batches.

    Each batch's loss counts by its share of the pairs, so the gradient is the mean over all of them.
    """
    progress, optimizer = trainer.progress, trainer.optimizer
    rate = optim.learning_rate(trainer.schedule, progress.schedule_step, trainer.schedule_steps)
    optim.set_learning_rate(optimizer, rate)
    pairs = sum(len(batch.text) for batch in inputs)
    mean = 0.0
    for number, batch in enumerate(inputs, 1):
        trainer.broken.note(batch.bad)
        last = number == len(inputs) or trainer.ranks.count == 1
        with nullcontext() if last else model.no_sync():
            loss = loss_of(trainer, model, batch) * (len(batch.text) / pairs)
            trainer.scaler.scale(loss).backward()
        mean += loss.item()
    loss = _agree(trainer, mean)
    trainer.scaler.unscale_(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = float(nn.utils.get_total_norm(grads)) if trainer.wants_norm else None
    trainer.scaler.step(optimizer)
    trainer.scaler.update()
    optimizer.zero_grad(set_to_none=True)
    two_stage.clamp_logit_scale(trainer.towers)
    progress.step, progress.stage_step = progress.step + 1, progress.stage_step + 1
    progress.schedule_step += 1
    world_pairs = pairs * trainer.ranks.count
    trainer.train_outputs = {
        "loss": loss,
        "logit_scale": float(trainer.towers.logit_scale.detach().exp()),
        "lr": {group["name"]: group["lr"] for group in optimizer.param_groups},
        "grad_norm": norm,
        "pairs": world_pairs,
        "cut": sum(batch.cut for batch in inputs),
    }
    trainer.log_buffer.update({"loss": loss, "logit_scale": trainer.train_outputs["logit_scale"]})
    trainer.log_buffer.output["lr"] = rate


def loss_of(trainer: CnclipTrainer, model: nn.Module, batch: Batch) -> Tensor:
    """() float32, of one rank's batch against the pairs of all ranks."""
    pixels = kept = None
    if trainer.cache is not None:
        kept = trainer.cache(batch.rows, batch.views).to(trainer.device, non_blocking=True)
    else:
        pixels = batch.pixels.to(trainer.device, non_blocking=True)
    with autocast(trainer.device, trainer.precision):
        text_ids = batch.text.to(trainer.device, non_blocking=True)
        image, text, scale = model(pixels, text_ids, kept, trainer.cache is not None and trainer.cache.trunk)
    return clip_loss(
        image,
        text,
        scale,
        image_ids=batch.image_ids,
        text_ids=batch.text_ids,
        label_smoothing=trainer.recipe.get("train.loss_cfg.label_smoothing", 0.0),
        aggregate=trainer.recipe.get("train.loss_cfg.aggregate", True),
    )


def _agree(trainer: CnclipTrainer, loss: float) -> float:
    """What all ranks must know before they step: the mean loss, and whether one of them has to stop."""
    finite = math.isfinite(loss)
    total, lost, stop, untold = trainer.ranks.sum(
        [loss if finite else 0.0, float(not finite), float(trainer.sigterm.came), float(trainer.broken.untold)]
    )
    if lost:
        good = checkpointing.newest(trainer.work_dir)
        raise TrainingError(
            f"the loss is {loss} at step {trainer.progress.step + 1} ({trainer.stage.name}); "
            f"{f'the last good checkpoint is {good}' if good else 'there is no checkpoint yet'}. "
            "A lower lr, more warm-up or precision fp32 may help"
        )
    trainer.interrupted = bool(stop)
    if untold:
        trainer.share_broken()
    return total / trainer.ranks.count
