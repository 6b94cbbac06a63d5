"""Training recipes: every key that may stand in one, checked, with defaults; and the table that explains them.

    recipe = Recipe.of(values, "two_stage.json")     # values: a ModelScope configuration as a dict
    recipe.stages                                    # [Stage, …], at least one
    python -m modelscope_cnclip.trainers.recipe      # prints the table of configuration/README.md

A recipe is a ModelScope configuration. :data:`.keys.KEYS` is the one list of what is known; a key that isn't in it is
an error that names the nearest one that is.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from .keys import COUNTS, KEYS, KINDS, LEAVES, LR, POSITIVE, WEIGHT_DECAY, Key, is_number, table


class RecipeError(ValueError):
    """A recipe that can't be used. The text names the file, the key and its value."""


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
        near = difflib.get_close_matches(general, LEAVES, n=1, cutoff=0)
        raise RecipeError(f"{where}: {path}: there is no such key; the nearest is {near[0]}")
    if value is not None and not KINDS[key.kind](value):
        raise RecipeError(f"{where}: {path}: expected {key.kind} ({key.text}), got {value!r}")
    if is_number(value):
        positive = POSITIVE.fullmatch(general)
        if value < 0 or (value == 0 and positive):
            raise RecipeError(f"{where}: {path}: must be {'more than' if positive else 'at least'} 0, got {value!r}")
        if COUNTS.fullmatch(general) and value != int(value) and not general.endswith("max_epochs"):
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


if __name__ == "__main__":
    print(table())
