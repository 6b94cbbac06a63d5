"""Every key that may stand in a training recipe: what its value may be, its default, and what it does.

The one list that :mod:`.recipe` checks against and that the table of ``configuration/README.md`` is printed from.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

LR, WEIGHT_DECAY = 5e-5, 1e-3  # peak and decay of upstream's finetuning scripts
BETAS = {"vit": (0.9, 0.98, 1e-6), "resnet": (0.9, 0.999, 1e-8)}  # arXiv 2211.01335, table 8: beta1, beta2, epsilon
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BY_STAGE = "as `train`"


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        path: with dots; ``[]`` is any position of a list, a last ``*`` anything below.
        kind: what its value may be, as people read it; looked up in :data:`KINDS`.
        default: what is taken if it isn't there, as people read it.
        text: what it does.
    """

    path: str
    kind: str
    default: str
    text: str


def _stage_keys() -> Iterator[Key]:
    """Keys that stand in ``train.stages[]``."""
    for name, kind, default, text in (
        ("name", "text", "`stage 1`, …", "what the logs call it"),
        ("freeze", "list of texts", "nothing", "what isn't trained, see *Freezing*"),
        ("max_epochs", "number", BY_STAGE, "passes over the data"),
        ("max_steps", "number", BY_STAGE, "optimizer steps; a stage may end in the middle of a pass"),
        ("lr", "number", BY_STAGE, "peak learning rate"),
        ("lr_scale", "mapping", "none", "`{pattern: factor}`: parts that learn slower or faster"),
        ("weight_decay", "number", BY_STAGE, "decoupled weight decay"),
        ("lr_scheduler", "schedule", BY_STAGE, "as `train.lr_scheduler`, with the same keys"),
        ("lr_scheduler.*", "anything", "", "see `train.lr_scheduler`"),
        ("batch_size_per_gpu", "number", BY_STAGE, "pairs per rank and forward pass"),
        ("cumulative_iters", "number", BY_STAGE, "forward passes per optimizer step"),
        ("augmentation", "augmentation", BY_STAGE, "as `train.augmentation`"),
        ("augmentation.*", "anything", "", "see `train.augmentation`"),
        (
            "cache_features",
            "yes or no",
            "true",
            "keep the features of a frozen image tower, where that is exact",
        ),
        ("cached_views", "number", "0", "augmented views per picture to keep; 0 keeps none and augments afresh"),
        ("precision", "precision", BY_STAGE, "as `train.precision`"),
        ("patch_dropout", "share below 1", "0", "share of patches dropped (FLIP); ViT only"),
        ("restart_optimizer", "yes or no", "true", "forget the optimizer's moments at the start of this stage"),
        ("restart_schedule", "yes or no", "true", "start with its own warm-up; false goes on along the last schedule"),
        ("stop_on_plateau.metric", "text", "`mean_recall`", "end the stage when this stops rising …"),
        ("stop_on_plateau.patience", "number", "2", "… for so many evaluations …"),
        ("stop_on_plateau.min_delta", "number", "0", "… by more than this"),
    ):
        yield Key(f"train.stages[].{name}", kind, default, text)


KEYS: tuple[Key, ...] = (
    Key("framework", "text", "`pytorch`", "for ModelScope"),
    Key("task", "text", "`multi-modal-embedding`", "for ModelScope"),
    Key("model.*", "anything", "", "for ModelScope; goes into the output's configuration.json"),
    Key("pipeline.*", "anything", "", "for ModelScope; goes into the output's configuration.json"),
    Key("preprocessor", "anything", "", "for ModelScope; the trainer's own is used"),
    Key("preprocessor.*", "anything", "", "as above"),
    Key("log_level", "text", "`INFO`", "of the log"),
    Key("pretrained_model.model_name", "text", "", "start from this: Hub id, folder, `.pt` file or `tiny`"),
    Key("pretrained_model.vision.timm", "text", "", "or compose: an image tower by timm's name …"),
    Key("pretrained_model.vision.weights", "text", "random", "… its weights: a safetensors or torch file"),
    Key("pretrained_model.vision.resolution", "number", "timm's", "… its picture size in pixels"),
    Key("pretrained_model.vision.mean", "three numbers", "timm's", "… per channel"),
    Key("pretrained_model.vision.std", "three numbers", "timm's", "… per channel"),
    Key("pretrained_model.text.bert", "text", "", "… and a BERT: a transformers folder with vocab.txt, or a Hub id"),
    Key("pretrained_model.embed_dim", "number", "512", "… in a shared space of so many dimensions"),
    Key("pretrained_model.context_length", "number", "52", "… with so many tokens"),
    Key("dataset.train", "source", "", "pairs to train on, see *Data*"),
    Key("dataset.val", "source", "none", "pairs to evaluate on"),
    Key("dataset.column_map.*", "text", "found by name", "`img`, `text` and `image_id`: the data's own column names"),
    Key("data.max_bad_fraction", "share", "0.01", "stop when more of the pictures seen can't be read"),
    Key("train.work_dir", "text", "`./work_dir`", "checkpoints, logs, `output/` and `output_best/`"),
    Key("train.seed", "number", "42", "of data order, augmentation and dropout"),
    Key("train.max_epochs", "number", "", "passes over the data; this or max_steps"),
    Key("train.max_steps", "number", "", "optimizer steps"),
    Key("train.precision", "precision", "`auto`", "`fp32`, `bf16`, `fp16`; auto: bf16 where there is hardware for it"),
    Key("train.use_fp16", "yes or no", "false", "ModelScope's spelling: fp16 on a GPU, auto on a CPU"),
    Key("train.launcher", "text", "none", "ModelScope's spelling; torchrun's environment decides by itself"),
    Key("train.resume", "resume", "`auto`", "`auto` goes on from the work dir's newest checkpoint, `never` refuses to"),
    Key("train.dist_timeout", "number", "600", "seconds after which ranks that wait for another give up"),
    Key("train.dataloader.batch_size_per_gpu", "number", "32", "pairs per rank and forward pass"),
    Key("train.dataloader.workers_per_gpu", "number", "0", "processes that decode"),
    Key("train.dataloader.shuffle", "yes or no", "true", "another order in every pass"),
    Key("train.dataloader.drop_last", "yes or no", "true", "leave out a pass's last, smaller batch"),
    Key("train.optimizer.type", "text", "`AdamW`", "a class of torch.optim"),
    Key("train.optimizer.lr", "number", str(LR), "peak learning rate"),
    Key("train.optimizer.weight_decay", "number", str(WEIGHT_DECAY), "decoupled weight decay"),
    Key("train.optimizer.betas", "two shares below 1", "0.9, 0.98 (ResNet 0.999)", "AdamW's"),
    Key("train.optimizer.eps", "number", "1e-6 (ResNet 1e-8)", "AdamW's"),
    Key("train.optimizer.decay_layer_norm", "yes or no", "true", "decay BERT's LayerNorm weights, as upstream does"),
    Key("train.optimizer.options.cumulative_iters", "number", "1", "forward passes per optimizer step"),
    *(
        Key(f"train.optimizer_hparams.{name}", kind, "", "ModelScope's spelling of `train.optimizer.*`")
        for names, kind in ((("lr", "weight_decay", "eps"), "number"), (("beta1", "beta2"), "share below 1"))
        for name in names
    ),
    Key("train.optimizer_hook.type", "text", "", "ModelScope's spelling; the trainer has its own"),
    Key("train.optimizer_hook.cumulative_iters", "number", "1", "as `train.optimizer.options.cumulative_iters`"),
    Key("train.optimizer_hook.loss_keys", "anything", "", "ModelScope's spelling; there is one loss"),
    Key("train.lr_scheduler.name", "schedule name", "`cosine`", "`cosine`, `linear` (both to 0) or `constant`"),
    Key("train.lr_scheduler.warmup_steps", "number", "0", "optimizer steps of linear warm-up"),
    Key("train.lr_scheduler.warmup_proportion", "share", "0", "or as a share of the stage's steps"),
    Key("train.lr_scheduler_hook.type", "text", "", "ModelScope's spelling; the trainer has its own"),
    Key("train.lr_scheduler_hook.by_epoch", "no", "false", "rates change with every optimizer step"),
    Key("train.loss_cfg.aggregate", "yes or no", "true", "contrast against the pairs of all ranks"),
    Key("train.loss_cfg.label_smoothing", "share", "0", "share of the target spread over all pairs"),
    Key("train.augmentation", "augmentation", "false", "true is upstream's; or a mapping of these:"),
    Key("train.augmentation.scale", "two numbers", "0.9, 1", "share of the picture that a crop keeps"),
    Key("train.augmentation.ratio", "two numbers", "0.75, 1.33", "of a crop's sides"),
    Key("train.augmentation.flip", "share", "0.5", "probability of mirroring"),
    Key("train.augmentation.auto_augment", "text", "`original`", "timm's policy; empty for none"),
    Key("train.augmentation.color_jitter", "number", "0", "strength"),
    Key("train.augmentation.gray", "share", "0", "probability of grey"),
    Key("train.augmentation.background", "share", "0", "probability of a plain colour under transparent pixels"),
    Key("train.checkpoint.period.interval", "number", "1", "epochs (or steps) between checkpoints"),
    Key("train.checkpoint.period.by_epoch", "yes or no", "true", "false counts optimizer steps"),
    Key("train.checkpoint.period.save_strategy", "text", "", "ModelScope's spelling: `by_epoch` or `by_step`"),
    Key("train.checkpoint.period.max_checkpoint_num", "number", "2", "checkpoints to keep"),
    Key("train.checkpoint.best.metric_key", "text", "`mean_recall`", "`output_best/` is the model with most of this"),
    Key("train.checkpoint.best.rule", "rule", "`max`", "or `min`"),
    Key("train.checkpoint.best.interval", "anything", "", "ModelScope's; every evaluation is looked at"),
    Key("train.logging.interval", "number", "10", "optimizer steps between two lines"),
    Key("train.logging.by_epoch", "yes or no", "true", "ModelScope's spelling; intervals are always optimizer steps"),
    Key("train.logging.tensorboard", "yes or no", "false", "write `tensorboard/` too; needs the extra `train`"),
    Key("train.hooks", "hooks", "", "ModelScope's list of hooks; yours run beside the trainer's own"),
    *_stage_keys(),
    Key("evaluation.dataloader.batch_size_per_gpu", "number", "64", "pictures or texts per forward pass"),
    Key("evaluation.dataloader.*", "anything", "", "ModelScope's; the pool is always whole and in order"),
    Key("evaluation.metrics", "anything", "`cnclip-retrieval-recall`", "names or mappings of registered metrics"),
    Key("evaluation.period.interval", "number", "1", "epochs (or steps) between evaluations"),
    Key("evaluation.period.by_epoch", "yes or no", "true", "false counts optimizer steps"),
)


def is_number(value: Any) -> bool:
    """Neither NaN nor infinite, nor an int that no float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _numbers(count: int, below: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: (
        isinstance(v, (list, tuple)) and len(v) == count and all(is_number(x) and 0 <= x < below for x in v)
    )


KINDS = {
    "anything": lambda v: True,
    "text": lambda v: isinstance(v, str),
    "number": is_number,
    "yes or no": lambda v: isinstance(v, bool),
    "no": lambda v: v is False,
    "list of texts": lambda v: isinstance(v, (list, tuple)) and all(isinstance(x, str) for x in v),
    "two numbers": _numbers(2),
    "two shares below 1": _numbers(2, 1),
    "three numbers": _numbers(3),
    "share": lambda v: is_number(v) and 0 <= v <= 1,
    "share below 1": lambda v: is_number(v) and 0 <= v < 1,
    "mapping": lambda v: isinstance(v, Mapping) and all(map(is_number, v.values())),
    "source": lambda v: isinstance(v, (str, list, tuple, Mapping)),
    "hooks": lambda v: isinstance(v, (list, tuple)) and all(isinstance(x, Mapping) and "type" in x for x in v),
    "augmentation": lambda v: isinstance(v, (bool, Mapping)),
    "schedule": lambda v: isinstance(v, Mapping),
    "schedule name": lambda v: v in SCHEDULES,
    "precision": lambda v: v in PRECISIONS,
    "resume": lambda v: v in ("auto", "never"),
    "rule": lambda v: v in ("max", "min"),
}
POSITIVE = re.compile(
    r".*(max_epochs|max_steps|batch_size_per_gpu|cumulative_iters|interval|max_checkpoint_num|embed_dim|resolution"
    r"|context_length|dist_timeout|patience)"
)
COUNTS = re.compile(r".*(workers_per_gpu|cached_views|warmup_steps|seed)|" + POSITIVE.pattern)
LEAVES = frozenset(key.path for key in KEYS if "*" not in key.path)


def table() -> str:
    """The Markdown table of every key."""
    rows = ["| key | value | default | what it does |", "|---|---|---|---|"]
    rows += [f"| `{key.path}` | {key.kind} | {key.default} | {key.text} |" for key in KEYS]
    return "\n".join(rows)
