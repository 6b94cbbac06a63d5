"""Training recipes: every key that may stand in one, checked, with defaults; and the table that explains them.

    recipe = Recipe.of(values, "two_stage.json")     # values: a ModelScope configuration as a dict
    recipe.stages                                    # [Stage, …], at least one
    python -m modelscope_cnclip.trainers.recipe      # prints the table of configuration/README.md

A recipe is a ModelScope configuration. :data:`KEYS` is the one list of what is known; a key that isn't in it is an
error that names the nearest one that is.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

LR, WEIGHT_DECAY = 5e-5, 1e-3  # peak and decay of upstream's finetuning scripts
BETAS = {"vit": (0.9, 0.98, 1e-6), "resnet": (0.9, 0.999, 1e-8)}  # arXiv 2211.01335, table 8: beta1, beta2, epsilon
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BY_STAGE = "as `train`"


class RecipeError(ValueError):
    """A recipe that can't be used. The text names the file, the key and its value."""


@dataclass(frozen=True)
class Key:
    """One key of a recipe.

    Attributes:
        path: with dots; ``[]`` is any position of a list, a last ``*`` anything below.
        kind: what its value may be, as people read it; looked up in :data:`_KINDS`.
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


def _number(value: Any) -> bool:
    """Neither NaN nor infinite, nor an int that no float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _numbers(count: int, below: float = math.inf) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, (list, tuple)) and len(v) == count and all(_number(x) and 0 <= x < below for x in v)


_KINDS = {
    "anything": lambda v: True,
    "text": lambda v: isinstance(v, str),
    "number": _number,
    "yes or no": lambda v: isinstance(v, bool),
    "no": lambda v: v is False,
    "list of texts": lambda v: isinstance(v, (list, tuple)) and all(isinstance(x, str) for x in v),
    "two numbers": _numbers(2),
    "two shares below 1": _numbers(2, 1),
    "three numbers": _numbers(3),
    "share": lambda v: _number(v) and 0 <= v <= 1,
    "share below 1": lambda v: _number(v) and 0 <= v < 1,
    "mapping": lambda v: isinstance(v, Mapping) and all(map(_number, v.values())),
    "source": lambda v: isinstance(v, (str, list, tuple, Mapping)),
    "hooks": lambda v: isinstance(v, (list, tuple)) and all(isinstance(x, Mapping) and "type" in x for x in v),
    "augmentation": lambda v: isinstance(v, (bool, Mapping)),
    "schedule": lambda v: isinstance(v, Mapping),
    "schedule name": lambda v: v in SCHEDULES,
    "precision": lambda v: v in PRECISIONS,
    "resume": lambda v: v in ("auto", "never"),
    "rule": lambda v: v in ("max", "min"),
}
_POSITIVE = re.compile(
    r".*(max_epochs|max_steps|batch_size_per_gpu|cumulative_iters|interval|max_checkpoint_num|embed_dim|resolution"
    r"|context_length|dist_timeout|patience)"
)
_COUNTS = re.compile(r".*(workers_per_gpu|cached_views|warmup_steps|seed)|" + _POSITIVE.pattern)
_LEAVES = frozenset(key.path for key in KEYS if "*" not in key.path)


@dataclass(frozen=True)
class Plateau:
    """Ends a stage when a metric stops rising."""

    metric: str = "mean_recall"
    patience: int = 2
    min_delta: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One stage with every default filled in; see :data:`KEYS` for what each means."""

    name: str
    freeze: tuple[str, ...]
    max_epochs: float | None
    max_steps: int | None
    lr: float
    lr_scale: dict[str, float]
    weight_decay: float
    schedule: str
    warmup_steps: int
    warmup_proportion: float
    batch_size: int
    cumulative_iters: int
    augmentation: dict[str, Any] | None
    cache_features: bool
    cached_views: int
    precision: str | None
    patch_dropout: float
    restart_optimizer: bool
    restart_schedule: bool
    plateau: Plateau | None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Attributes:
        where: the file, for messages.
        values: as given.
        stages: at least one; a recipe without ``train.stages`` is a single stage that freezes nothing.
    """

    where: str
    values: dict[str, Any] = field(repr=False)
    stages: tuple[Stage, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Check a configuration.

        Raises:
            RecipeError: an unknown key (the nearest known one is named), a value of another kind, no length, or a
                stage that would do nothing.
        """
        try:
            plain = json.loads(json.dumps(values, default=str), parse_float=_float)
        except (TypeError, ValueError, RecursionError) as error:
            raise RecipeError(f"{where}: not what JSON can hold: {error}") from None
        recipe = cls(where, plain)
        stages = recipe.get("train.stages")
        if stages is not None and (not isinstance(stages, list) or not stages):
            raise RecipeError(f"{where}: train.stages: expected a list of one or more stages, got {stages!r}")
        given = stages if stages is not None else [{}]
        for number, stage in enumerate(given):
            if not isinstance(stage, Mapping):
                raise RecipeError(f"{where}: train.stages[{number}]: expected a mapping, got {stage!r}")
        for path, value in _leaves(plain):
            _check(path, value, where)
        return cls(where, plain, tuple(recipe._stage(i, stage) for i, stage in enumerate(given)))

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path, or the default."""
        value: Any = self.values
        for name in path.split("."):
            if not isinstance(value, Mapping) or value.get(name) is None:
                return default
            value = value[name]
        return value

    def first(self, *paths: str, default: Any = None) -> Any:
        """The first of several spellings that is there."""
        return next((value for path in paths if (value := self.get(path)) is not None), default)

    def _stage(self, number: int, given: Any) -> Stage:
        where = f"{self.where}: train.stages[{number}]"
        given = _present(given)
        scheduler = _present(given.get("lr_scheduler") or self.get("train.lr_scheduler", {}))
        own_length = "max_epochs" in given or "max_steps" in given
        epochs = given.get("max_epochs") if own_length else self.get("train.max_epochs")
        steps = given.get("max_steps") if own_length else self.get("train.max_steps")
        if epochs is None and steps is None:
            raise RecipeError(f"{where}: how long? Give max_epochs or max_steps, here or in train")
        augmentation = given.get("augmentation", self.get("train.augmentation", False))
        plateau = given.get("stop_on_plateau")
        accumulate = self.first(
            "train.optimizer.options.cumulative_iters", "train.optimizer_hook.cumulative_iters", default=1
        )
        stage = Stage(
            name=given.get("name") or f"stage {number + 1}",
            freeze=tuple(given.get("freeze") or ()),
            max_epochs=epochs,
            max_steps=steps,
            lr=given.get("lr", self.first("train.optimizer.lr", "train.optimizer_hparams.lr", default=LR)),
            lr_scale=dict(given.get("lr_scale") or {}),
            weight_decay=given.get(
                "weight_decay",
                self.first(
                    "train.optimizer.weight_decay", "train.optimizer_hparams.weight_decay", default=WEIGHT_DECAY
                ),
            ),
            schedule=scheduler.get("name", "cosine"),
            warmup_steps=scheduler.get("warmup_steps", 0),
            warmup_proportion=scheduler.get("warmup_proportion", 0.0),
            batch_size=given.get("batch_size_per_gpu", self.get("train.dataloader.batch_size_per_gpu", 32)),
            cumulative_iters=given.get("cumulative_iters", accumulate),
            augmentation={} if augmentation is True else augmentation or None,
            cache_features=given.get("cache_features", True),
            cached_views=given.get("cached_views", 0),
            precision=given.get("precision"),
            patch_dropout=given.get("patch_dropout", 0.0),
            restart_optimizer=given.get("restart_optimizer", True),
            restart_schedule=given.get("restart_schedule", True),
            plateau=Plateau(**_present(plateau)) if plateau is not None else None,
        )
        for path, value in _leaves(scheduler, "train.lr_scheduler"):
            _check(path, value, where)
        if isinstance(augmentation, Mapping):
            for path, value in _leaves(augmentation, "train.augmentation"):
                _check(path, value, where)
        return stage

    def changes(self, earlier: Mapping[str, Any]) -> list[str]:
        """What differs from an earlier recipe's values, one line a key; lengths of logs and such don't count."""
        before, now = dict(_leaves(earlier)), dict(_leaves(self.values))
        return [
            f"{path}: {before.get(path, 'absent')!r} then, {now.get(path, 'absent')!r} now"
            for path in dict.fromkeys((*before, *now))
            if before.get(path) != now.get(path) and not path.startswith(_HARMLESS)
        ]


# Keys that change nothing about the model that comes out.
_HARMLESS = ("train.logging", "train.checkpoint.period", "train.work_dir", "train.resume", "train.dist_timeout",
             "train.dataloader.workers_per_gpu", "log_level")  # fmt: skip


def _leaves(values: Any, prefix: str | None = None) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything that isn't a mapping with something in it."""
    data = prefix is not None and (prefix in _LEAVES_OF_ANY_FORM or prefix.endswith(".lr_scale"))
    if isinstance(values, Mapping) and values and not data:
        for name, value in values.items():
            plain = name and not set(name) & set('.["')
            name = name if plain else json.dumps(name, ensure_ascii=False)  # "a.b" is a name, not a path
            yield from _leaves(value, name if prefix is None else f"{prefix}.{name}")
    elif prefix == "train.stages" and isinstance(values, (list, tuple)):
        for i, value in enumerate(values):
            yield from _leaves(value, f"train.stages[{i}]")
    elif prefix is not None:
        yield prefix, values


# What is under these is data, not keys; and under a stage's ``lr_scale``.
_LEAVES_OF_ANY_FORM = frozenset({"dataset.train", "dataset.val", "train.hooks", "evaluation.metrics", "preprocessor"})


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null: that is as if the key weren't there, everywhere in a recipe."""
    return {name: value for name, value in values.items() if value is not None}


def _float(text: str) -> float:
    """A number of JSON's; 1e3 is the whole number that a count of steps has to be."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _check(path: str, value: Any, where: str) -> None:
    general = re.sub(r"\[\d+\]", "[]", path)
    key = _find(general)
    if key is None:
        section = any(known.path.startswith((f"{general}.", f"{general}[")) for known in KEYS)
        if section and (value is None or value == {}):
            return
        if section:
            raise RecipeError(f"{where}: {path}: expected a mapping, got {value!r}")
        near = difflib.get_close_matches(general, _LEAVES, n=1, cutoff=0)
        raise RecipeError(f"{where}: {path}: there is no such key; the nearest is {near[0]}")
    if value is not None and not _KINDS[key.kind](value):
        raise RecipeError(f"{where}: {path}: expected {key.kind} ({key.text}), got {value!r}")
    if _number(value):
        positive = _POSITIVE.fullmatch(general)
        if value < 0 or (value == 0 and positive):
            raise RecipeError(f"{where}: {path}: must be {'more than' if positive else 'at least'} 0, got {value!r}")
        if _COUNTS.fullmatch(general) and value != int(value) and not general.endswith("max_epochs"):
            raise RecipeError(f"{where}: {path}: must be a whole number, got {value!r}")


def _find(path: str) -> Key | None:
    exact = next((key for key in KEYS if key.path == path), None)
    return exact or next((key for key in KEYS if key.path.endswith(".*") and path.startswith(key.path[:-1])), None)


def locate_recipe(name: str) -> Path:
    """A recipe's file: the one that is named, or a shipped one, named without its folder and suffix.

    Raises:
        RecipeError: neither is there.
    """
    shipped = Path(str(files("modelscope_cnclip.configuration"))) / "recipes"
    for path in (Path(name), shipped / f"{name}.json"):
        if path.is_file():
            return path
    names = ", ".join(sorted(path.stem for path in shipped.glob("*.json")))
    raise RecipeError(f"{name}: no such file; shipped recipes are {names}")


def read_recipe(file: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's values from a JSON file, with ``{"train.stages[0].lr": 1e-4}`` put over them.

    Raises:
        RecipeError: no such file, not JSON, or an override of something that isn't there.
    """
    path = Path(file)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{file}: expected a JSON object, found {type(values).__name__}")
    for dotted, value in (overrides or {}).items():
        _override(values, dotted, value, str(file))
    return values


def _override(values: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *parents, last = re.sub(r"\[(\d+)\]", r".\1", dotted).split(".")
    place: Any = values
    for name in parents:
        if isinstance(place, list):
            if not name.isdigit() or int(name) >= len(place):
                raise RecipeError(f"{where}: {dotted}: the list has {len(place)} entries")
            place = place[int(name)]
        else:
            place = place.setdefault(name, {})
        if not isinstance(place, (dict, list)):
            raise RecipeError(f"{where}: {dotted}: {name} is {place!r} and has nothing below it")
    if isinstance(place, list):
        raise RecipeError(f"{where}: {dotted}: name a key of a list's entry, not an entry")
    place[last] = value


def table() -> str:
    """The Markdown table of every key."""
    rows = ["| key | value | default | what it does |", "|---|---|---|---|"]
    rows += [f"| `{key.path}` | {key.kind} | {key.default} | {key.text} |" for key in KEYS]
    return "\n".join(rows)


def as_dict(stage: Stage) -> dict[str, Any]:
    """A stage for logs and checkpoints."""
    return asdict(stage)


if __name__ == "__main__":
    print(table())
