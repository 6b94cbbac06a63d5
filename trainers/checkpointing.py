"""Everything that a run needs to go on exactly as if it had not stopped: written whole or not at all, read safely.

A checkpoint is a folder ``checkpoints/step_00001234`` of the work dir:

======================  =========================================================================================
``weights.safetensors``    parameters and buffers of both towers, fp32
``optimizer.safetensors``  what the optimizer keeps per parameter, as ``PARAMETER|KEY``
``random.safetensors``     torch's generator of every rank, ``rank0``, … (``rank0.cuda`` for a GPU's)
``state.json``             where the run is, the recipe, the loss scaler, other generators, sizes of the other files
======================  =========================================================================================

It is written under another name and renamed when all of it is on disk, so a run that dies while it saves leaves the
checkpoint before it. The newest ``max_checkpoint_num`` are kept.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from modelscope.trainers.hooks.hook import Hook
from modelscope.trainers.hooks.priority import Priority
from modelscope.utils.constant import ModelFile
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modelscope_cnclip import registry
from modelscope_cnclip.checkpoint import CheckpointError

from . import optim
from .recipe import RecipeError
from .two_stage import Progress

if TYPE_CHECKING:
    from .trainer import CnclipTrainer

FORMAT = "modelscope_cnclip training checkpoint, version 1"
WEIGHTS, OPTIMIZER, RANDOM, STATE = "weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
_NAME = re.compile(r"step_(\d+)")


def folder_of(work_dir: str | Path) -> Path:
    return Path(work_dir) / "checkpoints"


def newest(work_dir: str | Path) -> Path | None:
    """The checkpoint with the most steps, None if there is none."""
    found = [path for path in folder_of(work_dir).glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return max(found, key=lambda path: int(_NAME.fullmatch(path.name)[1]), default=None)


def save(trainer: CnclipTrainer, keep: int) -> Path:
    """Write a checkpoint of this moment, every rank together; the first rank writes.

    Args:
        trainer: between two steps.
        keep: how many to leave in the folder, this one included.

    Raises:
        OSError: it could not be written, on every rank; the text names the checkpoint that is still good.
    """
    generators = trainer.ranks.gather(_generators(trainer.device))
    target = folder_of(trainer.work_dir) / f"step_{trainer.progress.step:08d}"
    problem = None
    if trainer.ranks.first:
        try:
            _write(trainer, target, generators)
        except (OSError, SafetensorError) as error:  # safetensors wraps a full disk in an error of its own
            problem = str(getattr(error, "strerror", None) or error)
    problem = trainer.ranks.agree(problem)
    if problem:
        good = newest(trainer.work_dir)
        told = f"the last good one is {good}" if good else "there is none yet"
        raise OSError(f"{target}: checkpoint not written: {problem}; {told}")
    if trainer.ranks.first:
        for old in sorted(folder_of(trainer.work_dir).glob("step_*"), key=lambda path: path.name)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _write(trainer: CnclipTrainer, target: Path, generators: list[dict[str, Any]]) -> None:
    for left in folder_of(trainer.work_dir).glob(".*.tmp"):  # of a run that died while it saved
        shutil.rmtree(left, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.mkdir(parents=True)
    try:
        _tensors(trainer.towers.state_dict(), temporary / WEIGHTS)
        kept = optim.get_state(trainer.optimizer) if trainer.optimizer is not None else {}
        flat = {f"{name}|{key}": value for name, values in kept.items() for key, value in values.items()}
        _tensors(flat, temporary / OPTIMIZER)
        tensors = {key: tensor for i, one in enumerate(generators) for key, tensor in _named(one["torch"], i)}
        _tensors(tensors, temporary / RANDOM)
        state = {
            "format": FORMAT,
            "progress": asdict(trainer.progress),
            "recipe": trainer.recipe.values,
            "data": trainer.data_identity(),
            "ranks": trainer.ranks.count,
            "scaler": trainer.scaler.state_dict(),
            "metrics": trainer.metric_values,
            "hooks": {type(hook).__name__: state for hook in trainer.hooks if (state := hook.state_dict())},
            "generators": [one["others"] for one in generators],
            "files": {name: (temporary / name).stat().st_size for name in (WEIGHTS, OPTIMIZER, RANDOM)},
        }
        with (temporary / STATE).open("w", encoding="utf-8") as file:
            json.dump(state, file, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():  # the same step again, after the stage's end was worked out: this one knows more
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
    with file.open("rb+") as written:
        os.fsync(written.fileno())


def _generators(device: torch.device) -> dict[str, Any]:
    """States of this rank's random generators."""
    states = {"": torch.random.get_rng_state()}
    if device.type == "cuda":
        states[".cuda"] = torch.cuda.get_rng_state(device)
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": states,
        "others": {"python": [version, list(numbers), gauss], "numpy": [kind, keys.tolist(), *rest]},
    }


def _named(states: dict[str, Tensor], rank: int) -> list[tuple[str, Tensor]]:
    return [(f"rank{rank}{suffix}", tensor) for suffix, tensor in states.items()]


class Saved:
    """A checkpoint on disk, checked before anything of it is used.

    Raises:
        CheckpointError: it isn't one of these, or a file of it is missing, cut short or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / STATE
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        try:
            self.state = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: not a training checkpoint of this package: it has no {STATE}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: damaged: {error}. {self._advice()}") from None
        if not isinstance(self.state, dict) or self.state.get("format") != FORMAT:
            raise CheckpointError(f"{file}: not a training checkpoint of this package, or of another version of it")
        for name, size in self.state["files"].items():
            there = (self.folder / name).stat().st_size if (self.folder / name).exists() else 0
            if there != size:
                raise CheckpointError(
                    f"{self.folder / name}: truncated: {there} bytes where {size} were written. {self._advice()}"
                )
        known = {f.name for f in fields(Progress)}
        self.progress = Progress(**{key: value for key, value in self.state["progress"].items() if key in known})

    def tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / name}: damaged: {error}. {self._advice()}") from None

    def _advice(self) -> str:
        return "Delete this folder to go on from the checkpoint before it"


def restore(trainer: CnclipTrainer, saved: Saved, *, allow_changed: bool = False) -> None:
    """Put weights and progress back; :func:`restore_rest` does the rest once the stage has been entered.

    Raises:
        RecipeError: the recipe, the data or the number of ranks isn't what the checkpoint was made with, and
            ``allow_changed`` is false; what differs is listed.
        CheckpointError: its weights are of another model.
    """
    changes = trainer.recipe.changes(saved.state["recipe"])
    for what, then, now in (
        ("number of ranks", saved.state["ranks"], trainer.ranks.count),
        ("training data", saved.state["data"], trainer.data_identity()),
    ):
        if then != now:
            changes.append(f"{what}: {then!r} then, {now!r} now")
    if changes and not allow_changed:
        raise RecipeError(
            f"{saved.folder}: was made with another recipe: {'; '.join(changes)}. Use another work dir, or "
            "--allow-changed-recipe (train(allow_changed_recipe=True)) to go on with the new one"
        )
    if saved.progress.stage > len(trainer.recipe.stages):
        raise RecipeError(f"{saved.folder}: is past the recipe's {len(trainer.recipe.stages)} stages")
    weights, wanted = saved.tensors(WEIGHTS), trainer.towers.state_dict()
    wrong = [name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape]
    wrong += [name for name in weights if name not in wanted]
    if wrong:
        raise CheckpointError(f"{saved.folder / WEIGHTS}: weights of another model: {', '.join(wrong[:3])}")
    trainer.towers.load_state_dict(weights)
    trainer.progress = saved.progress


def restore_rest(trainer: CnclipTrainer, saved: Saved) -> None:
    """Optimizer, loss scaler, hooks and every rank's random generators."""
    state: optim.State = {}
    for key, value in saved.tensors(OPTIMIZER).items():
        name, _, what = key.rpartition("|")
        state.setdefault(name, {})[what] = value
    if trainer.optimizer is not None:
        optim.set_state(trainer.optimizer, state)
    trainer.scaler.load_state_dict(saved.state["scaler"])
    for hook in trainer.hooks:
        if (kept := saved.state["hooks"].get(type(hook).__name__)) is not None:
            hook.load_state_dict(kept)
    number = trainer.ranks.number
    if saved.state["ranks"] != trainer.ranks.count:
        return  # allowed by the caller: new ranks have generators of their own
    tensors, others = saved.tensors(RANDOM), saved.state["generators"][number]
    torch.random.set_rng_state(tensors[f"rank{number}"])
    if trainer.device.type == "cuda" and f"rank{number}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rank{number}.cuda"], trainer.device)
    version, numbers, gauss = others["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(others["numpy"]))


@registry.register
class CnclipCheckpointHook(Hook):
    """Writes checkpoints, ``output/`` and ``output_best/``. The trainer registers it by itself.

    Args:
        interval, by_epoch: passes, or optimizer steps, between two checkpoints.
        max_checkpoint_num: how many to keep.
        metric_key, rule: ``output_best/`` is the model with most (``max``) or least of this metric.
    """

    PRIORITY = Priority.VERY_LOW  # last: a checkpoint holds what is done next, not what still has to be worked out

    def __init__(
        self,
        interval: int = 1,
        by_epoch: bool = True,
        max_checkpoint_num: int = 2,
        metric_key: str = "mean_recall",
        rule: str = "max",
    ) -> None:
        self.interval, self.by_epoch, self.keep = interval, by_epoch, max_checkpoint_num
        self.metric_key, self.sign = metric_key, 1 if rule == "max" else -1

    def after_train_iter(self, trainer: CnclipTrainer) -> None:
        if (not self.by_epoch and trainer.progress.step % self.interval == 0) or trainer.interrupted:
            self.save(trainer)
        self._best(trainer)

    def after_train_epoch(self, trainer: CnclipTrainer) -> None:
        self._best(trainer)
        over = trainer.progress.stage_step == 0  # the stage that this pass belonged to
        if over or (self.by_epoch and trainer.progress.epoch % self.interval == 0):
            self.save(trainer)
            trainer.write_output(ModelFile.TRAIN_OUTPUT_DIR)

    def save(self, trainer: CnclipTrainer) -> None:
        trainer.logger.info(f"checkpoint: {save(trainer, self.keep)}")

    def _best(self, trainer: CnclipTrainer) -> None:
        """Looks at each evaluation once, at the next chance to save."""
        metrics, progress = trainer.new_metrics, trainer.progress
        trainer.new_metrics = None
        if not metrics:
            return
        if self.metric_key not in metrics:
            raise RecipeError(
                f"{trainer.recipe.where}: train.checkpoint.best.metric_key: no {self.metric_key!r} among the metrics "
                f"{', '.join(metrics)}"
            )
        value = metrics[self.metric_key]
        if progress.best is None or self.sign * value > self.sign * progress.best:
            progress.best = value
            trainer.write_output(ModelFile.TRAIN_BEST_OUTPUT_DIR)
