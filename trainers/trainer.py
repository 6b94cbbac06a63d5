"""The registered trainer: Chinese CLIP in stages, on a CPU, a GPU or several processes of either.

    from modelscope.trainers import build_trainer
    import modelscope_cnclip

    trainer = build_trainer("cnclip-trainer", dict(model="damo/multi-modal_clip-vit-base-patch16_zh",
                            cfg_file="recipe.json", train_dataset=…, eval_dataset=…, work_dir="out"))
    trainer.train()                  # run it again after an interruption: it goes on where it was

A subclass of ModelScope's EpochBasedTrainer with the same configuration, hooks and folders. The loop is its own,
because (modelscope 1.40.2) the host's places models and losses on CUDA, shuffles once for all epochs, drops the tail of
an accumulation, steps learning rates per forward pass, can't read its own checkpoints back, and asks the Hub about
local folders. An *iteration* in the sense of hooks is one optimizer step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from modelscope.trainers.hooks.hook import Hook
from modelscope.trainers.trainer import EpochBasedTrainer
from modelscope.utils.config import Config
from modelscope.utils.constant import ModeKeys, TrainerStages
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from modelscope_cnclip import checkpoint, layouts, registry
from modelscope_cnclip.data import DataError
from modelscope_cnclip.model import CnclipModel
from modelscope_cnclip.pairs import read_pairs
from modelscope_cnclip.preprocessor import CnclipPreprocessor

from . import checkpointing, evaluation, features, optim, start, step, two_stage
from .batches import Batch, Broken, PassSampler, Pixels, Visits, loader
from .distributed import SIGTERM_EXIT, Ranks, Sigterm
from .live import PairForward, evaluating, live_encoder
from .plan import Plan
from .recipe import Recipe, RecipeError, Stage

BAD = 0.01  # share of records or pictures that may be broken
_TAKEN = ("where", "max_epochs", "use_fp16", "launcher", "device", "work_dir", "cfg_options", "trust_remote_code",
          "third_party")  # fmt: skip
_NOT_TAKEN = ("optimizers", "data_collator", "samplers", "efficient_tuners", "compile", "compile_options",
              "remove_unused_data", "train_iters_per_epoch", "val_iters_per_epoch", "arg_parse_fn")  # fmt: skip


@registry.register
class CnclipTrainer(EpochBasedTrainer):
    """See the module, and :mod:`.recipe` for the configuration.

    Args:
        model: a Hub id, a folder, a ``.pt`` file or ``tiny``; a :class:`~modelscope_cnclip.model.CnclipModel`; or a
            mapping for :func:`.composed.compose`. None takes the configuration's ``pretrained_model``.
        cfg_file: the configuration; None takes the model's own.
        cfg_modify_fn, cfg_options: change it, as in the host.
        train_dataset, eval_dataset: what :func:`~modelscope_cnclip.pairs.read_pairs` takes; None takes the
            configuration's ``dataset.train`` and ``dataset.val``.
        preprocessor: a CnclipPreprocessor with a resolution, context length or ``exif`` of its own.
        metrics: instead of the configuration's ``evaluation.metrics``.
        model_revision: of a Hub id.
        seed, work_dir, max_epochs, use_fp16: instead of the configuration's.
        device: ``cpu``, ``gpu``, ``cuda:1`` …; None takes a GPU if there is one.
        callbacks: hooks to run beside the trainer's own.

    Attributes:
        recipe, stage, progress: what is to be done, the stage at work, and how far it is.
        towers: the model's :class:`~modelscope_cnclip.towers.ChineseCLIP`.
        metric_values: of the last evaluation.

    Raises:
        recipe.RecipeError, DataError, CheckpointError, HubError: with the file, the value and what to do.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any] | CnclipModel | None = None,
        cfg_file: str | None = None,
        cfg_modify_fn: Callable[[Config], Config] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        preprocessor: CnclipPreprocessor | Mapping[str, CnclipPreprocessor] | None = None,
        metrics: list[Any] | None = None,
        model_revision: str | None = None,
        seed: int | None = None,
        callbacks: list[Hook] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in _NOT_TAKEN:
            if kwargs.pop(name, None) not in (None, (None, None), False):
                raise TypeError(f"{name}: this trainer doesn't take it; the recipe says how it trains")
        for name in kwargs:
            if name not in _TAKEN:
                raise TypeError(f"{name}: this trainer takes no such argument")
        located = None
        if cfg_file is None:
            if not isinstance(model, (str, Path)):
                raise RecipeError("cfg_file: give a configuration, unless the model is a name or a folder that has one")
            located = checkpoint.locate(str(model), revision=model_revision)
            cfg_file = str(Path(located) / layouts.CONFIGURATION)
        self.where = str(kwargs.pop("where", None) or cfg_file)
        self._given = (located or model, preprocessor, metrics, model_revision)
        self._overrides = {"max_epochs": kwargs.pop("max_epochs", None), "use_fp16": kwargs.pop("use_fp16", None),
                           "seed": seed}  # fmt: skip
        self.progress = two_stage.Progress()
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler = None
        self.new_metrics: dict[str, float] | None = None
        self.interrupted = self.end_pass = self.wants_norm = False
        self.cache: features.FeatureCache | None = None
        self.evaluated_images: Any = None
        launcher, device = kwargs.pop("launcher", None), kwargs.pop("device", None)
        if launcher not in (None, "pytorch"):
            raise RecipeError(f"launcher: {launcher!r}: processes are started with torchrun ('pytorch'), not otherwise")
        self.ranks = Ranks.join(_timeout(cfg_file))
        # The host builds the model, data and hooks in its constructor, through the methods below.
        super().__init__(
            model=None,
            cfg_file=cfg_file,
            cfg_modify_fn=cfg_modify_fn,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            preprocessor=None,
            callbacks=callbacks,
            seed=seed if seed is not None else 42,
            max_epochs=1,  # the host insists on a number; stages say how long a run is
            **kwargs,
        )
        self._dist = self.ranks.count > 1
        if not self.ranks.first:
            self.logger.setLevel("WARNING")
        self.model_dir = self.model.model_dir
        self.device = start.device_of(device, self.ranks)
        self.precision = start.precision_of(self.recipe, self.device)
        self.model.to(self.device)
        if not self.towers.config.is_vit:  # convolutions run faster so: a third, where it was measured
            self.towers.visual.to(memory_format=torch.channels_last)
        torch.manual_seed(self._seed + self.ranks.number)  # dropout differs between ranks

    # ------------------------------------------------------------------ what the host's constructor calls

    def rebuild_config(self, cfg: Config) -> Config:
        cfg = super().rebuild_config(cfg)
        if "train" not in cfg:
            cfg["train"] = {}
        for key, value in self._overrides.items():
            if value is not None:
                cfg.train[key] = value
        return cfg

    def build_model(self) -> CnclipModel:
        """The model that was given, in fp32; also where the configuration is checked, for it is complete now."""
        self.recipe = Recipe.of(self.cfg._cfg_dict, self.where)
        self._seed = int(self.recipe.get("train.seed", 42))
        given, preprocessor, _, revision = self._given
        model = start.model_of(given, self.recipe, self._seed, revision)
        self.towers = model.clip_model
        self.tokenizer, self.transform = start.preparation_of(model, preprocessor)
        return model

    def get_preprocessors(self, preprocessor: Any) -> tuple[None, None]:
        """None: pairs are prepared by :mod:`.batches`."""
        return None, None

    def build_dataset(self, datasets: Any, model_cfg: Config, mode: str, *args: Any, **kwargs: Any) -> Any:
        name = "train" if mode == ModeKeys.TRAIN else "val"
        source = datasets if datasets is not None else self.recipe.get(f"dataset.{name}")
        if source is None:
            return None
        bad: list[DataError] = []
        pairs = read_pairs(source, column_map=self.recipe.get("dataset.column_map"), on_bad=bad.append)
        limit, records = self.recipe.get("data.max_bad_fraction", BAD), len(pairs) + len(bad)
        if len(bad) > limit * records:
            raise DataError(
                f"{bad[0]}; {len(bad)} of {records} records are bad, more than data.max_bad_fraction = {limit} allows"
            )
        for error in bad:
            self.logger.warning(f"left out {error}")
        return pairs

    def get_metrics(self) -> list[Any]:
        metrics = self._given[2] or self.recipe.get("evaluation.metrics") or []
        metrics = [metrics] if isinstance(metrics, (str, Mapping)) else list(metrics)
        return [registry.RECALL, *(one for one in metrics if one != registry.RECALL)]

    def register_hook_from_cfg(self, hook_cfg: list[dict[str, Any]]) -> list[Hook]:
        """The configuration's hooks that have other work than the trainer, and the trainer's own."""
        hooks = super().register_hook_from_cfg(start.others(hook_cfg, self.recipe))
        own = start.own_hooks(self.recipe)
        for hook in own:
            self.register_hook(hook)
        return [*hooks, *own]

    def print_cfg(self) -> None:
        """The recipe goes into the work dir instead of onto the screen."""

    # ------------------------------------------------------------------ stages

    def enter_stage(self) -> None:
        """Freeze, build the optimizer, wrap for other ranks and look for kept features, as the stage at hand says."""
        stage = self.stage = self.recipe.stages[self.progress.stage]
        where = f"{self.where}: {stage.name}"
        two_stage.freeze(self.towers, two_stage.frozen_names(self.towers, stage.freeze, f"{where}: freeze"))
        if stage.patch_dropout or getattr(self.towers.visual, "patch_drop", None):
            self.towers.set_patch_dropout(stage.patch_dropout)
        self.stage_steps = self.plan.steps_in(stage)
        self.precision = start.precision_of(self.recipe, self.device, stage)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        kept = {} if stage.restart_optimizer or self.optimizer is None else optim.get_state(self.optimizer)
        self.optimizer = optim.build_optimizer(self.towers, stage, self.recipe)
        optim.set_state(self.optimizer, kept)
        if self.progress.stage_step == 0 and stage.restart_schedule:
            self.progress.schedule_step = 0
        self.schedule, self.schedule_steps = self.plan.schedule(self.progress.stage)
        # The last stage's wrapper knows only the parameters that were trained then: ranks would drift apart.
        forward = PairForward(self.towers, self.transform)
        self.parallel = forward
        if self.ranks.count > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(forward, device_ids=devices)
        self.evaluated_images = None
        self.cache = self._kept_features(stage)
        trained = sum(p.numel() for p in self.towers.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.towers.parameters())
        frozen = f", frozen: {', '.join(stage.freeze)}" if stage.freeze else ""
        self.logger.info(
            f"{stage.name}: {self.stage_steps} steps, {trained / 1e6:.1f} of {total / 1e6:.1f} M parameters trained"
            f"{frozen}, {self.precision} on {self.device}"
        )

    def _kept_features(self, stage: Stage) -> features.FeatureCache | None:
        reason = features.why_not(stage, self.towers)
        if reason is not None:
            if stage.cached_views:
                raise RecipeError(f"{self.where}: {stage.name}: cached_views: can't keep features: {reason}")
            self.logger.info(f"{stage.name}: image features are computed in every step: {reason}")
            return None
        trunk = not two_stage.wholly_frozen(self.towers.visual)
        encoder = live_encoder(self.towers, self.tokenizer, self.transform, self.device, self.precision, trunk)
        with evaluating(self.towers):
            cache = features.FeatureCache.build(
                Path(self.work_dir) / "features", encoder, self.train_dataset, stage, self._seed, self.ranks
            )
        self.logger.info(f"{stage.name}: image features are kept in {cache.file}")
        self.broken.note((str(pair), reason) for pair, reason in cache.reasons.items())
        self.share_broken()
        return cache

    # ------------------------------------------------------------------ the loop

    def train(
        self,
        checkpoint_path: str | None = None,
        load_all_state: bool = True,
        *,
        allow_changed_recipe: bool = False,
    ) -> None:
        """Train, from where the work dir's newest checkpoint stopped if there is one.

        Args:
            checkpoint_path: a checkpoint folder of this trainer to go on from instead.
            load_all_state: False takes only its weights, and starts over.
            allow_changed_recipe: go on although the recipe isn't the one that the checkpoint was made with.

        Raises:
            TrainingError: the loss is no longer a number. DataError: too many broken pictures.
            RecipeError, CheckpointError: the checkpoint doesn't fit. OSError: a checkpoint can't be written.
            SystemExit: 143 after SIGTERM, when a checkpoint has been written.
        """
        if self.train_dataset is None:
            raise DataError(f"{self.where}: no training data: give train_dataset or dataset.train")
        self._mode = ModeKeys.TRAIN
        self.plan = Plan(self.recipe, len(self.train_dataset), self.ranks.count)
        for stage in self.recipe.stages:  # every mistake in a later stage is told now
            self.plan.steps_in(stage)
            two_stage.frozen_names(self.towers, stage.freeze, f"{self.where}: {stage.name}: freeze")
        saved = self._saved(checkpoint_path)
        if saved is not None:
            self.logger.info(f"going on from {saved.folder}")
            checkpointing.restore(self, saved, allow_changed=allow_changed_recipe or not load_all_state)
            self._metric_values = saved.state["metrics"]
            if not load_all_state:
                self.progress, saved = two_stage.Progress(), None
        if self.ranks.first:
            layouts.save_json(self.recipe.values, Path(self.work_dir) / "recipe.json")
        self.model.train()
        with Sigterm() as self.sigterm:
            self.train_loop(saved)

    def _saved(self, given: str | None) -> checkpointing.Saved | None:
        if given is not None:
            return checkpointing.Saved(given)
        found = checkpointing.newest(self.work_dir)
        if found is not None and self.recipe.get("train.resume", "auto") == "never":
            raise RecipeError(f"{self.where}: train.resume is never, but {found} is there; use another work dir")
        return None if found is None else checkpointing.Saved(found)

    def train_loop(self, saved: checkpointing.Saved | None = None) -> None:
        """Passes over the data until the last stage is over."""
        progress = self.progress
        limit = self.recipe.get("data.max_bad_fraction", BAD)
        self.broken = Broken(progress.bad, len(self.train_dataset), limit, self.logger.warning)
        self.invoke_hook(TrainerStages.before_run)
        self._iter, self._epoch = progress.step, progress.epoch
        if progress.stage == len(self.recipe.stages):
            self.logger.info(f"this run is over: {progress.step} steps in {self.work_dir}")
        elif saved is not None:
            checkpointing.restore_rest(self, saved)
        while progress.stage < len(self.recipe.stages):
            self.end_pass = False
            two_stage.set_modes(self.towers)
            self.data_loader = self.train_dataloader = self._loader()
            self.invoke_hook(TrainerStages.before_train_epoch)
            for batches in self._steps():
                self._inner_iter = (progress.batches - 1) // self.stage.cumulative_iters
                self.invoke_hook(TrainerStages.before_train_iter)
                self.train_step(self.parallel, batches)
                self.invoke_hook(TrainerStages.after_train_iter)
                self._iter = progress.step
                if self.interrupted:
                    self.logger.info("stopped by SIGTERM; run it again to go on")
                    raise SystemExit(SIGTERM_EXIT)
                if self.end_pass or self._stop_training:
                    break
            progress.passes, progress.epoch, progress.batches = progress.passes + 1, progress.epoch + 1, 0
            self.ranks.share_buffers(self.towers)
            self.invoke_hook(TrainerStages.after_train_epoch)
            self._inner_iter, self._epoch = 0, progress.epoch
            if self._stop_training:  # a hook of the host's, for early stopping
                break
        self.invoke_hook(TrainerStages.after_run)

    def _loader(self) -> Any:
        stage, progress = self.stage, self.progress
        pixels = Pixels(self.transform, stage.augmentation) if self.cache is None else None
        broken = frozenset() if self.cache is None else self.cache.broken
        visits = Visits(self.train_dataset, self.tokenizer, pixels, broken)
        self._sampler = PassSampler(
            len(self.train_dataset),
            stage.batch_size,
            seed=(self._seed, progress.stage, progress.passes),
            start=progress.batches,
            rank=self.ranks.number,
            ranks=self.ranks.count,
            shuffle=self.recipe.get("train.dataloader.shuffle", True),
            drop_last=self.plan.drop_last,
        )
        workers = self.recipe.get("train.dataloader.workers_per_gpu", 0)
        return loader(visits, self._sampler, workers, pin_memory=self.device.type == "cuda")

    def _steps(self) -> Iterator[list[Batch]]:
        """The batches of one optimizer step after another; the last step of a pass takes what is left."""
        progress, stage = self.progress, self.stage
        group: list[Batch] = []
        left = len(self._sampler)
        if self.stage_over:
            return  # a checkpoint of the stage's very end
        for batch in self.train_dataloader:
            group.append(batch)
            left -= 1
            if len(group) == stage.cumulative_iters or not left:
                progress.batches += len(group)
                yield group
                group = []

    @property
    def stage_over(self) -> bool:
        """Whether the stage has had its steps, or its metric has stopped rising."""
        plateau, progress = self.stage.plateau, self.progress
        return progress.stage_step >= self.stage_steps or (plateau is not None and progress.flat >= plateau.patience)

    def train_step(self, model: nn.Module, inputs: list[Batch]) -> None:
        """One optimizer step over one or more batches; see :func:`.step.train_step`."""
        step.train_step(self, model, inputs)

    def share_broken(self) -> None:
        """Tell all ranks which pictures are broken. Raises DataError when there are too many."""
        self.broken.share(self.ranks)
        self.progress.bad = sorted(self.broken.pairs)

    # ------------------------------------------------------------------ evaluation and output

    def evaluate(self, checkpoint_path: str | None = None, saving_fn: Any = None) -> dict[str, float]:
        """Recall over the whole evaluation pool, and whatever other metrics are configured.

        Args:
            checkpoint_path: a checkpoint folder of this trainer, or a model as :func:`.checkpoint.locate` takes it, to
                evaluate instead of the present weights.
            saving_fn: called with (inputs, outputs) of each batch, as in the host.
        """
        if self.eval_dataset is None:
            raise DataError(f"{self.where}: no evaluation data: give eval_dataset or dataset.val")
        if checkpoint_path is not None:
            self._load_weights(checkpoint_path)
        self._mode = ModeKeys.EVAL
        self.invoke_hook(TrainerStages.before_val)
        self.ranks.share_buffers(self.towers)
        self._metric_values = self.new_metrics = evaluation.evaluate(self, saving_fn)
        self.invoke_hook(TrainerStages.after_val)
        self._mode = ModeKeys.TRAIN
        return self._metric_values

    def _load_weights(self, path: str) -> None:
        if (Path(path) / checkpointing.STATE).exists():
            self.towers.load_state_dict(checkpointing.Saved(path).tensors(checkpointing.WEIGHTS))
        else:
            self.towers.load_state_dict(checkpoint.read(checkpoint.locate(path)).build().state_dict())
        self.evaluated_images = None

    def write_output(self, name: str) -> None:
        """The present model as a folder of the work dir that ``pipeline()`` loads; the first rank writes."""
        if self.ranks.first:
            config = layouts.configuration(self.towers.config)
            for key in ("framework", "task", "model", "pipeline", "preprocessor"):
                if self.recipe.get(key):
                    config[key] = self.recipe.get(key)
            self.model.save_pretrained(Path(self.work_dir) / name, config=config)
        self.ranks.wait()

    # ------------------------------------------------------------------ for hooks and checkpoints

    @property
    def iters_per_epoch(self) -> int:
        return self.plan.steps_in_pass(self.stage)

    @property
    def max_iters(self) -> int:
        return self.plan.steps

    @property
    def max_epochs(self) -> int:
        return self.plan.passes

    def data_identity(self) -> str:
        """Says whether the training data is still the same, from its length and a thousand pairs."""
        data, digest = self.train_dataset, hashlib.sha256()
        for i in sorted({len(data) * k // 1000 for k in range(1000)}):
            digest.update(repr((data.image_id(i), data.texts(i))).encode("utf-8", "surrogatepass"))
        return f"{len(data)} pairs {digest.hexdigest()[:16]}"


def _timeout(cfg_file: str) -> float:
    """Seconds that ranks wait for one another; needed before the host has read the configuration."""
    config = Config.from_file(cfg_file)
    return float(config.safe_get("train.dist_timeout") or 600)
