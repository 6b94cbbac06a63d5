"""What a run starts from: the model, how its pictures and texts are prepared, device, precision and hooks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from modelscope.trainers.hooks.hook import Hook

from modelscope_cnclip import checkpoint
from modelscope_cnclip.backends import cpu_has_bf16, pick_device
from modelscope_cnclip.model import CnclipModel
from modelscope_cnclip.preprocessor import CnclipPreprocessor, ImageTransform, Tokenizer, tokenizer_of

from . import composed
from .checkpointing import CnclipCheckpointHook
from .distributed import Ranks
from .evaluation import CnclipEvaluationHook
from .logs import CnclipLogHook
from .recipe import Recipe, RecipeError, Stage
from .two_stage import CnclipTwoStageHook

# Hooks of the host whose work the trainer's own do; their settings are read from where the host keeps them.
OURS = ("CheckpointHook", "BestCkptSaverHook", "EvaluationHook", "TextLoggerHook", "LrSchedulerHook", "OptimizerHook",
        "TorchAMPOptimizerHook", "DDPHook", "ClipClampLogitScaleHook", "CnclipClampLogitScaleHook",
        "CnclipTwoStageHook", "CnclipCheckpointHook", "CnclipLogHook", "CnclipEvaluationHook")  # fmt: skip
REFUSED = ("ApexAMPOptimizerHook", "DeepspeedHook", "MegatronHook", "NoneLrSchedulerHook", "NoneOptimizerHook",
           "PlateauLrSchedulerHook", "SparsityHook", "SwiftHook", "LoadCheckpointHook")  # fmt: skip


def model_of(given: Any, recipe: Recipe, seed: int, revision: str | None) -> CnclipModel:
    """The model that was given or, for None, the recipe's ``pretrained_model``; in fp32.

    Raises:
        RecipeError: neither says which, or a composed one doesn't fit together.
        checkpoint.CheckpointError, hub.HubError: there is no such model.
    """
    given = recipe.get("pretrained_model") if given is None else given
    if given is None:
        raise RecipeError(f"{recipe.where}: no model: give one, or pretrained_model.model_name")
    if isinstance(given, Mapping) and given.get("model_name"):
        given = given["model_name"]
    if isinstance(given, CnclipModel):
        return given.float()
    if isinstance(given, Mapping):
        start = composed.compose(given, seed, f"{recipe.where}: pretrained_model")
        return CnclipModel(str(start.path), loaded=start)
    if not isinstance(given, (str, Path)):
        raise TypeError(f"model: expected a name, a mapping or a CnclipModel, got {type(given).__name__}")
    return CnclipModel(str(checkpoint.locate(str(given), revision=revision)))


def preparation_of(model: CnclipModel, preprocessor: Any) -> tuple[Tokenizer, ImageTransform]:
    """How texts and pictures are prepared: as the model has it, or as a CnclipPreprocessor says.

    Raises:
        RecipeError: the preprocessor makes pictures of another size than the model takes.
    """
    config, context, exif = model.clip_model.config, None, False
    given = preprocessor.get("train") if isinstance(preprocessor, Mapping) else preprocessor
    if given is not None:
        if not isinstance(given, CnclipPreprocessor):
            raise TypeError(f"preprocessor: expected a CnclipPreprocessor, got {type(given).__name__}")
        if given.image_resolution != config.image_resolution:
            raise RecipeError(
                f"preprocessor: makes pictures of {given.image_resolution} pixels, the model takes "
                f"{config.image_resolution}; load the model with resolution={given.image_resolution}"
            )
        context, exif = given.tokenizer.context_length, given.transform.exif
    tokenizer = tokenizer_of(config, model.vocab, model.model_dir, context)
    return tokenizer, ImageTransform(config.image_resolution, config.vision_mean, config.vision_std, exif=exif)


def device_of(name: str | None, ranks: Ranks) -> torch.device:
    """A GPU per rank if there are GPUs, else the CPU; ``gpu``, the host's default, means the same."""
    cuda = torch.cuda.is_available()
    if name in (None, "gpu", "cuda"):
        if ranks.count > 1:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        name = None if name == "gpu" else name
    return torch.device(pick_device(name))


def precision_of(recipe: Recipe, device: torch.device, stage: Stage | None = None) -> str:
    """``fp32``, ``bf16`` or ``fp16``: as the stage or recipe says, or what trains fastest and well on this device."""
    precision = (stage and stage.precision) or recipe.get("train.precision")
    if precision is None and recipe.get("train.use_fp16", False) and device.type == "cuda":
        return "fp16"
    if precision not in (None, "auto"):
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"


def others(hooks: list[dict[str, Any]], recipe: Recipe) -> list[dict[str, Any]]:
    """Of the configuration's hooks, those that have other work than the trainer.

    Raises:
        RecipeError: a hook that would do the trainer's work in another way.
    """
    for hook in hooks:
        if hook["type"] in REFUSED:
            raise RecipeError(f"{recipe.where}: train.hooks: {hook['type']} isn't for this trainer; leave it out")
    return [hook for hook in hooks if hook["type"] not in OURS]


def own_hooks(recipe: Recipe) -> list[Hook]:
    """The trainer's own hooks, with the recipe's settings."""
    get = recipe.get
    by_epoch = get("train.checkpoint.period.save_strategy", "by_epoch") == "by_epoch"
    return [
        CnclipEvaluationHook(get("evaluation.period.interval", 1), get("evaluation.period.by_epoch", True)),
        CnclipLogHook(get("train.logging.interval", 10), get("train.logging.tensorboard", False)),
        CnclipTwoStageHook(),
        CnclipCheckpointHook(
            get("train.checkpoint.period.interval", 1),
            get("train.checkpoint.period.by_epoch", by_epoch),
            get("train.checkpoint.period.max_checkpoint_num", 2),
            get("train.checkpoint.best.metric_key", "mean_recall"),
            get("train.checkpoint.best.rule", "max"),
        ),
    ]
