"""What is frozen, when it thaws, and the hook that moves a run from one stage to the next.

The paper's two stages (arXiv 2211.01335, section 2.2) are two entries of ``train.stages``::

    {"freeze": ["visual"], "max_epochs": 20, "lr": 1e-4},      # locked-image tuning
    {"max_epochs": 10, "lr": 2e-5}                              # everything

``freeze`` is a list of patterns over the towers' parameters, applied in order; a leading ``!`` thaws again:

===================  ===================================================================================
``visual``           the image tower with its projection (also ``image``)
``text``             the text tower with its projection
``projections``      both projections
``visual:6``         the image tower's stem and first 6 blocks; ``text:6`` embeddings and first 6 layers
``all``              everything
``bert.encoder``     a module or parameter by its name
``re:REGEX``         whatever matches the regular expression somewhere in its name
===================  ===================================================================================

Frozen means: no gradient, no optimizer state or weight decay, BatchNorm statistics fixed, dropout and patch dropout
off, and no autograd graph kept.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelscope.trainers.hooks.hook import Hook
from modelscope.trainers.hooks.priority import Priority
from torch import nn

from modelscope_cnclip import registry
from modelscope_cnclip.towers import ChineseCLIP

from .recipe import RecipeError

if TYPE_CHECKING:
    from .trainer import CnclipTrainer

LOGIT_SCALE_MAX = 4.6052  # cn_clip clamps to this after every step: the temperature stays above 0.01


@dataclass
class Progress:
    """Where a run is. A checkpoint holds it; what is done next depends on nothing else.

    Attributes:
        stage: number of the stage, from 0; ``len(stages)`` when the run is over.
        stage_step: optimizer steps done in it.
        passes: whole passes over the data done in it.
        batches: forward passes done in the present pass.
        schedule_step: optimizer steps since the learning-rate schedule started.
        step, epoch: optimizer steps and passes of the run, over all stages.
        flat: evaluations without a rise, for ``stop_on_plateau``; ``top`` is the best so far in this stage.
        best: value of the metric of ``output_best/``, None before the first evaluation.
        bad: pictures that could not be read, by name.
    """

    stage: int = 0
    stage_step: int = 0
    passes: int = 0
    batches: int = 0
    schedule_step: int = 0
    step: int = 0
    epoch: int = 0
    flat: int = 0
    top: float | None = None
    best: float | None = None
    bad: list[str] = field(default_factory=list)


def frozen_names(model: ChineseCLIP, patterns: Iterable[str], where: str = "freeze") -> frozenset[str]:
    """Names of the parameters that the patterns freeze; see the module.

    Raises:
        RecipeError: a pattern that matches nothing (near names are given), or nothing left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        thaw, bare = pattern.startswith("!"), pattern.removeprefix("!")
        matched = _match(model, names, bare, where)
        if not matched:
            modules = {*names, *(name for name, _ in model.named_modules() if name), *_ALIASES, "projections"}
            near = ", ".join(difflib.get_close_matches(bare, modules, n=3, cutoff=0.3) or sorted(_ALIASES))
            raise RecipeError(f"{where}: {pattern!r} matches nothing in this model; near it are {near}")
        frozen = frozen - matched if thaw else frozen | matched
    if len(frozen) == len(names):
        raise RecipeError(f"{where}: {list(patterns)} freezes everything; nothing is left to train")
    return frozenset(frozen)


_ALIASES = {
    "all": "",
    "image": r"visual\.",
    "visual": r"visual\.",
    "text": r"bert\.|text_projection$",
    "logit_scale": r"logit_scale$",
}


def _match(model: ChineseCLIP, names: list[str], pattern: str, where: str) -> set[str]:
    if pattern in _ALIASES:
        return {name for name in names if re.match(_ALIASES[pattern], name)}
    if pattern == "projections":
        image = "visual.proj." if model.config.vision_timm is not None else "visual.head."
        return {name for name in names if name.startswith((image, "text_projection"))}
    if pattern.startswith("re:"):
        try:
            regex = re.compile(pattern[3:])
        except re.error as error:
            raise RecipeError(f"{where}: {pattern!r} is no regular expression: {error}") from None
        return {name for name in names if regex.search(name)}
    if match := re.fullmatch(r"(visual|image|text):(\d+)", pattern):
        return _first_blocks(model, names, match[1], int(match[2]), f"{where}: {pattern!r}")
    return {name for name in names if name == pattern or name.startswith(f"{pattern}.")}


def _first_blocks(model: ChineseCLIP, names: list[str], tower: str, count: int, where: str) -> set[str]:
    """Stem and first blocks of a tower, in the order in which a picture or text passes them."""
    if tower == "text":
        starts = [f"bert.encoder.layer.{i}." for i in range(model.config.text_num_hidden_layers)]
        blocks = [{name for name in names if name.startswith(start)} for start in starts]
        stem = {name for name in names if name.startswith("bert.embeddings.")}
    else:
        trunk = model.visual.trunk if model.config.vision_timm is not None else model.visual
        prefix = "visual.trunk." if model.config.vision_timm is not None else "visual."
        stem, blocks = _image_blocks(trunk, prefix)
    if count > len(blocks):
        raise RecipeError(f"{where}: this tower has {len(blocks)} blocks")
    return stem.union(*blocks[:count])


def _image_blocks(trunk: nn.Module, prefix: str) -> tuple[set[str], list[set[str]]]:
    """Names of the stem's parameters and of each block's, as timm orders them."""
    from timm.models import group_parameters

    groups = group_parameters(trunk, trunk.group_matcher(coarse=False))
    stem, *blocks = (groups[key] for key in sorted(groups))
    # Older timm counts the norm in front of CLIP's first block to the group behind the last one, with the norm there.
    early = [name for name, _ in trunk.named_parameters() if name.startswith("norm_pre.")]
    named = ({prefix + name for name in block if re.search(r"\.\d+\.", name)} for block in blocks)
    return {prefix + name for name in (*stem, *early)}, [block for block in named if block]


def freeze(model: ChineseCLIP, frozen: frozenset[str]) -> None:
    """Train the parameters that aren't frozen and no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name in frozen:
            parameter.grad = None


def set_modes(model: ChineseCLIP) -> None:
    """Train mode, but eval mode for every module whose parameters are all frozen."""
    model.train()
    for module in model.modules():
        if wholly_frozen(module):
            module.eval()
    if trunk_frozen(model):  # patch dropout has no parameters, and a ViT's stands beside the projection
        for name, module in model.visual.named_children():
            module.train(name in _PROJECTIONS and module.training)


def wholly_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters and none of them is trained."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


_PROJECTIONS = ("proj", "head")  # of another backbone, and of CLIP's ViT


def trunk_frozen(model: ChineseCLIP) -> bool:
    """Whether everything but the projection of the image tower is frozen."""
    trunk = [p for name, p in model.visual.named_parameters() if name.split(".")[0] not in _PROJECTIONS]
    return model.splits_image and not any(parameter.requires_grad for parameter in trunk)


@registry.register
class CnclipTwoStageHook(Hook):
    """Enters the first stage, notices when one is over, and enters the next.

    The trainer registers it by itself. A stage is over after its steps, after its passes, or when its metric has
    stopped rising (``stop_on_plateau``). Each stage starts with a pass of its own over freshly shuffled data.
    """

    PRIORITY = Priority.LOW  # behind the evaluation and before the checkpoint

    def before_run(self, trainer: CnclipTrainer) -> None:
        if trainer.progress.stage < len(trainer.recipe.stages):
            trainer.enter_stage()

    def after_train_iter(self, trainer: CnclipTrainer) -> None:
        self._look_for_plateau(trainer)
        if trainer.stage_over:
            trainer.end_pass = True

    def after_train_epoch(self, trainer: CnclipTrainer) -> None:
        self._look_for_plateau(trainer)
        if not trainer.stage_over:
            return
        progress = trainer.progress
        trainer.logger.info(f"{trainer.stage.name} is over after {progress.stage_step} steps")
        progress.stage, progress.stage_step, progress.passes, progress.batches = progress.stage + 1, 0, 0, 0
        progress.flat, progress.top = 0, None
        if progress.stage < len(trainer.recipe.stages):
            trainer.enter_stage()

    @staticmethod
    def _look_for_plateau(trainer: CnclipTrainer) -> None:
        """Counts evaluations without a rise; the trainer ends the stage when there were enough."""
        plateau, progress, metrics = trainer.stage.plateau, trainer.progress, trainer.new_metrics
        if plateau is None or metrics is None:
            return
        if plateau.metric not in metrics:
            raise RecipeError(
                f"{trainer.recipe.where}: stop_on_plateau.metric: no {plateau.metric!r} in {', '.join(metrics)}"
            )
        value = metrics[plateau.metric]
        if progress.top is None or value > progress.top + plateau.min_delta:
            progress.top, progress.flat = value, 0
        else:
            progress.flat += 1


@registry.register
class CnclipClampLogitScaleHook(Hook):
    """Keeps ``logit_scale`` within upstream's bounds, for other trainers. This package's own always does."""

    def after_train_iter(self, trainer: Any) -> None:
        clamp_logit_scale(trainer.unwrap_module(trainer.model).clip_model)


def clamp_logit_scale(model: ChineseCLIP) -> None:
    """To [0, 4.6052], as cn_clip does after every step."""
    model.logit_scale.data.clamp_(0, LOGIT_SCALE_MAX)
