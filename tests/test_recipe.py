"""Recipes: what is refused and how it is told, what is filled in, and the table that documents every key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelscope_cnclip.trainers.keys import KEYS, LR, table
from modelscope_cnclip.trainers.recipe import Plateau, Recipe, RecipeError, Stage, locate_recipe, read_recipe

ROOT = Path(__file__).parent.parent / "configuration"
SHIPPED = sorted((ROOT / "recipes").glob("*.json"))


def recipe(train: dict[str, Any] | None = None, **top: Any) -> Recipe:
    """With a length, so that only what is given can be wrong."""
    return Recipe.of({"train": {"max_epochs": 1, **(train or {})}, **top}, "a.json")


def stage(**keys: Any) -> Stage:
    return recipe({"stages": [keys]}).stages[0]


def refused(values: Any, *says: str) -> None:
    """A RecipeError of one line that says all of this."""
    with pytest.raises(RecipeError) as caught:
        Recipe.of(values, "a.json")
    text = str(caught.value)
    assert text.startswith("a.json: ")
    assert "\n" not in text
    for part in says:
        assert part in text


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("train.max_epoch", "train.max_epochs"),
        ("train.optimizer.learning_rate", "train.optimizer."),
        ("train.optimizer.weightdecay", "train.optimizer.weight_decay"),
        ("train.optimizer_hparams.beta3", "train.optimizer_hparams.beta"),
        ("train.dataloader.batchsize_per_gpu", "train.dataloader.batch_size_per_gpu"),
        ("train.lr_scheduler.warm_up_steps", "train.lr_scheduler.warmup_steps"),
        ("train.loss_cfg.aggregated", "train.loss_cfg.aggregate"),
        ("train.augmentation.flipp", "train.augmentation.flip"),
        ("train.stages[0].freese", "train.stages[].freeze"),
        ("train.stages[1].stop_on_plateau.patients", "train.stages[].stop_on_plateau.patience"),
        ("train.stages[0].batch_size", "train.stages[].batch_size_per_gpu"),
        ("dataset.vall", "dataset.val"),
        ("pretrained_model.vision.tim", "pretrained_model.vision.timm"),
        ("evaluation.period.intervall", "evaluation.period.interval"),
        ("frame_work", "framework"),
    ],
)
def test_an_unknown_key_names_the_nearest(path: str, nearest: str) -> None:
    values: dict[str, Any] = {"train": {"max_epochs": 1, "stages": [{}, {"stop_on_plateau": {}}]}}
    *parents, last = re.sub(r"\[(\d+)\]", r".\1", path).split(".")
    place: Any = values
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    place[last] = 1
    refused(values, f"{path}: there is no such key; the nearest is {nearest}")


@pytest.mark.parametrize(("name", "where"), [("scal", "augmentation"), ("warmup", "lr_scheduler")])
def test_unknown_keys_within_a_stages_own_sections(name: str, where: str) -> None:
    refused({"train": {"max_epochs": 1, "stages": [{}, {where: {name: 1}}]}}, "stages[1]", f"{where}.{name}", "nearest")


def test_dots_are_no_path() -> None:
    """A key that looks right and would be passed over in silence."""
    refused({"train": {"max_epochs": 1}, "train.max_steps": 3}, '"train.max_steps": there is no such key')
    refused({"train": {"max_epochs": 1, "stages[0]": {"lr": 1}}}, 'train."stages[0]".lr: there is no such key')
    refused({"train": {"max_epochs": 1}, "": {"": 1}}, "there is no such key")


# ---------------------------------------------------------------- bad values

BAD = {
    "text": [3, True, ["a"], {"a": 1}],
    "number": ["1", True, [1], -1, float("nan"), float("inf"), 10**400],
    "share": ["1", True, -0.1, 1.1],
    "share below 1": [1, 1.0, -0.1, "0"],
    "yes or no": [0, 1, "true", [True]],
    "no": [True, 0],
    "list of texts": ["visual", [1], {"a": 1}, [["a"]]],
    "two numbers": [1, [1], [1, 2, 3], ["1", "2"], [0, -1]],
    "two shares below 1": [0.9, [0.9], [0.9, 1], [0.9, 0.98, 0.99]],
    "three numbers": [0.5, [0.5, 0.5], [0.5, 0.5, "0.5"], [0, 0, -1]],
    "mapping": ["bert", ["bert", 1], {"bert": "0.1"}, {"bert": None}, {"bert": {"encoder": 0.1}}],
    "source": [3, True],
    "hooks": ["EarlyStopHook", ["EarlyStopHook"], [{"interval": 1}]],
    "augmentation": ["original", 1, ["flip"]],
    "schedule": ["cosine", 3, ["cosine"]],
    "schedule name": ["step", 3, ["cosine"], {}],
    "precision": ["fp8", 16, ["fp16"]],
    "resume": [True, "always"],
    "rule": ["less", 1],
}
SPELT = [(key, value) for key in KEYS if key.kind != "anything" for value in BAD[key.kind]]


def build(path: str, value: Any) -> dict[str, Any]:
    """A recipe with this value at a path of KEYS."""
    values: dict[str, Any] = {"train": {"max_epochs": 1, "stages": [{"lr": 1e-4}]}}
    *parents, last = path.replace("[]", "").replace("*", "img").split(".")
    place: Any = values
    for name in parents:
        place = place.setdefault(name, {})
        place = place[0] if isinstance(place, list) else place
    place[last] = value
    return values


@pytest.mark.parametrize(("key", "value"), SPELT, ids=lambda x: getattr(x, "path", None) or repr(x)[:20])
def test_every_key_refuses_values_of_another_kind(key: Any, value: Any) -> None:
    name = key.path.removesuffix(".*").removeprefix("train.stages[].")
    refused(build(key.path, value), name)


@pytest.mark.parametrize("key", [key for key in KEYS if key.kind == "number"], ids=lambda key: key.path)
def test_numbers_that_count_are_whole_and_positive(key: Any) -> None:
    count = re.search(
        "steps|batch_size|cumulative|interval|max_checkpoint_num|embed_dim|resolution|context|workers|views|seed"
        "|patience", key.path
    )  # fmt: skip
    if count:
        refused(build(key.path, 1.5), f"{key.path.replace('[]', '[0]')}: must be a whole number, got 1.5")
        assert Recipe.of(build(key.path, 2.0)).stages  # 1e3 is a float in JSON's eyes and a whole number in ours
    if count and not re.search("workers|views|seed|warmup", key.path):
        refused(build(key.path, 0), f"{key.path.replace('[]', '[0]')}: must be more than 0, got 0")
    else:
        assert key.path.endswith(("max_epochs", "dist_timeout")) or Recipe.of(build(key.path, 0)).stages
    if key.path != "train.max_epochs":
        assert Recipe.of(build(key.path, None)).stages  # null is as if it weren't there


@pytest.mark.parametrize("where", ["stage", "train"])
@pytest.mark.parametrize("key", ["max_epochs", "max_steps"])
@pytest.mark.parametrize("value", [0, 0.0, -3])
def test_a_stage_of_no_length(where: str, key: str, value: float) -> None:
    values = {"train": {key: value, "stages": [{}, {}]}}
    if where == "stage":
        values = {"train": {"max_epochs": 1, "stages": [{}, {key: value}]}}
    refused(values, f"{key}: must be more than 0, got {int(value)}")


@pytest.mark.parametrize("train", [{}, {"stages": [{}]}, {"max_epochs": None, "stages": [{"lr": 1}]}])
def test_no_length(train: dict[str, Any]) -> None:
    refused({"train": train}, "train.stages[0]: how long? Give max_epochs or max_steps")
    refused({"train": {"stages": [{"max_steps": 1}, *train.get("stages", [{}])]}}, "train.stages[1]: how long?")


def test_stages_that_are_none() -> None:
    for value in ([], {}, {"lr": 1}, "visual", 3):
        refused({"train": {"max_epochs": 1, "stages": value}}, "train.stages: expected a list of one or more stages")
    for value in (3, "visual", [], None):
        refused({"train": {"max_epochs": 1, "stages": [{}, value]}}, "train.stages[1]: expected a mapping, got")


@pytest.mark.parametrize(
    "path", ["train", "train.optimizer", "train.lr_scheduler", "dataset", "pretrained_model.vision"]
)
def test_a_value_where_a_section_belongs(path: str) -> None:
    refused(build(path, "x"), f"{path}: expected a mapping, got 'x'")
    assert path == "train" or Recipe.of(build(path, {})).stages == Recipe.of(build(path, None)).stages


KNOWN = sorted({part for key in KEYS for part in re.split(r"\.|\[\]", key.path) if part not in ("", "*")})
NAMES = st.sampled_from(KNOWN) | st.text(max_size=3)
LEAF = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["cosine", "fp16", "visual", "max", "auto", 10**400, -(10**400)])
)
ANY = st.recursive(
    LEAF,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)
# Keys that are known, with a value that is anything.
NEARLY = st.builds(build, st.sampled_from([key.path for key in KEYS]), ANY)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(NAMES, ANY, max_size=4) | NEARLY)
def test_whatever_is_given_is_taken_or_refused(values: dict[str, Any]) -> None:
    try:
        made = Recipe.of(values)
    except RecipeError:
        return
    assert made.stages
    for one in made.stages:
        assert (one.max_epochs or one.max_steps) > 0
        assert isinstance(one.lr, (int, float))
        assert isinstance(one.batch_size, int)
        assert one.batch_size > 0
        assert isinstance(one.cumulative_iters, int)


# ---------------------------------------------------------------- what is filled in


def test_one_stage_without_stages() -> None:
    (only,) = recipe({"optimizer": {"lr": 1}, "dataloader": {"batch_size_per_gpu": 7}}).stages
    assert (only.name, only.freeze, only.lr, only.batch_size, only.max_epochs) == ("stage 1", (), 1, 7, 1)
    assert recipe({"stages": None}).stages == recipe().stages


def test_stages_take_what_they_dont_say_from_train() -> None:
    first, second, third = recipe(
        {
            "max_steps": 9,
            "optimizer": {"lr": 0.1, "weight_decay": 0.2, "options": {"cumulative_iters": 3}},
            "lr_scheduler": {"name": "linear", "warmup_steps": 4},
            "augmentation": True,
            "stages": [
                {},
                {"max_epochs": 2, "lr": 0.3, "weight_decay": 0, "lr_scheduler": {"warmup_proportion": 0.5}},
                {"name": "c", "max_steps": 5, "augmentation": False, "cumulative_iters": 1, "lr": None,
                 "stop_on_plateau": {"patience": 3, "metric": None}},
            ],
        }
    ).stages  # fmt: skip
    assert [(s.max_epochs, s.max_steps) for s in (first, second, third)] == [(1, 9), (2, None), (None, 5)]
    assert [s.lr for s in (first, second, third)] == [0.1, 0.3, 0.1]
    assert [s.weight_decay for s in (first, second, third)] == [0.2, 0, 0.2]
    assert [s.cumulative_iters for s in (first, second, third)] == [3, 3, 1]
    assert [(s.schedule, s.warmup_steps, s.warmup_proportion) for s in (first, second)] == [
        ("linear", 4, 0),
        ("cosine", 0, 0.5),
    ]
    assert [s.augmentation for s in (first, second, third)] == [{}, {}, None]
    assert [s.name for s in (first, second, third)] == ["stage 1", "stage 2", "c"]
    assert (first.plateau, third.plateau) == (None, Plateau("mean_recall", 3, 0))


def test_modelscopes_spellings() -> None:
    """The keys of ModelScope's own finetuning configuration do what they did."""
    (only,) = recipe(
        {
            "optimizer_hparams": {"lr": 0.5, "weight_decay": 0.25, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6},
            "optimizer_hook": {"type": "TorchAMPOptimizerHook", "cumulative_iters": 4, "loss_keys": "loss"},
            "lr_scheduler": {"name": "cosine", "warmup_proportion": 0.01},
            "lr_scheduler_hook": {"type": "LrSchedulerHook", "by_epoch": False},
            "loss_cfg": {"aggregate": True},
            "use_fp16": True,
        },
        framework="pytorch",
        model={"type": "clip-multi-modal-embedding"},
        preprocessor=[],
        evaluation={"metrics": [{"type": "inbatch_recall"}], "dataloader": {"shuffle": True}},
    ).stages
    assert (only.lr, only.weight_decay, only.cumulative_iters) == (0.5, 0.25, 4)
    refused({"train": {"max_epochs": 1, "lr_scheduler_hook": {"by_epoch": True}}}, "by_epoch: expected no")


def test_patterns_of_lr_scale_may_hold_anything() -> None:
    scale = {"bert.encoder": 0.1, "visual.*[0-9].x": 2, "": 0}
    assert stage(lr_scale=scale).lr_scale == scale


def test_values_that_json_knows_otherwise(tmp_path: Path) -> None:
    """Tuples and paths come from Python code; nothing else does."""
    made = recipe({"work_dir": tmp_path, "stages": ({"freeze": ("visual",)},)})
    assert made.values["train"]["work_dir"] == str(tmp_path)
    assert made.stages[0].freeze == ("visual",)
    refused({("a", "b"): 1}, "not what JSON can hold")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes(file: Path) -> None:
    found = locate_recipe(file.stem)
    assert found.samefile(file)
    made = Recipe.of(read_recipe(found), file.name)
    assert made.stages
    assert made.get("dataset.train")
    assert made.get("pretrained_model")


# ---------------------------------------------------------------- files and overrides


def written(tmp_path: Path, values: Any) -> Path:
    file = tmp_path / "a.json"
    file.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return file


def test_overrides(tmp_path: Path) -> None:
    file = written(tmp_path, {"train": {"max_epochs": 1, "stages": [{"lr": 1}, {"lr": 2}]}})
    values = read_recipe(
        file,
        {"train.stages[1].lr": 3, "train.stages.0.freeze": ["visual"], "train.optimizer.options.cumulative_iters": 2},
    )
    first, second = Recipe.of(values).stages
    assert (first.lr, second.lr, first.freeze, second.cumulative_iters) == (1, 3, ("visual",), 2)
    assert read_recipe(file)["train"]["stages"][1] == {"lr": 2}


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("train.stages[2].lr", "the list has 2 entries"),
        ("train.stages.x.lr", "the list has 2 entries"),
        ("train.stages[0]", "name a key of a list's entry"),
        ("train.max_epochs.x", "max_epochs is 1 and has nothing below it"),
        ("train.stages[0].lr.x", "lr is 1 and has nothing below it"),
    ],
)
def test_overrides_of_what_is_not_there(key: str, says: str, tmp_path: Path) -> None:
    file = written(tmp_path, {"train": {"max_epochs": 1, "stages": [{"lr": 1}, {"lr": 2}]}})
    with pytest.raises(RecipeError, match=re.escape(f"{file}: {key}: ")) as caught:
        read_recipe(file, {key: 1})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "not JSON"), ("{", "not JSON"), ("[]", "expected a JSON object, found list"), ("[" * 10**5, "not JSON")],
)  # fmt: skip
def test_files_that_are_no_recipe(content: str, says: str, tmp_path: Path) -> None:
    file = written(tmp_path, content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert says in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.json: No such file"):
        read_recipe(tmp_path / "gone.json")
    with pytest.raises(RecipeError, match=r"gone: no such file; shipped recipes are .*tiny"):
        locate_recipe("gone")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not JSON"):
        read_recipe(tmp_path / "a.json")


# ---------------------------------------------------------------- what changed


def test_changes_are_listed() -> None:
    before = {"train": {"max_epochs": 1, "optimizer": {"lr": 1}, "stages": [{"lr": 1}, {"freeze": ["visual"]}]}}
    after = {"train": {"max_epochs": 2, "seed": 3, "stages": [{"lr": 1}, {"freeze": ["text"]}, {"lr": 5}]}}
    assert Recipe.of(after).changes(before) == [
        "train.max_epochs: 1 then, 2 now",
        "train.optimizer.lr: 1 then, 'absent' now",
        "train.stages[1].freeze: ['visual'] then, ['text'] now",
        "train.seed: 'absent' then, 3 now",
        "train.stages[2].lr: 'absent' then, 5 now",
    ]
    assert Recipe.of(after).changes(json.loads(json.dumps(after))) == []


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("train.work_dir", False),
        ("train.resume", False),
        ("train.dist_timeout", False),
        ("train.logging.interval", False),
        ("train.logging.tensorboard", False),
        ("train.checkpoint.period.interval", False),
        ("train.dataloader.workers_per_gpu", False),
        ("log_level", False),
        ("train.dataloader.shuffle", True),
        ("train.checkpoint.best.metric_key", True),
        ("train.loss_cfg.label_smoothing", True),
        ("train.precision", True),
        ("dataset.train", True),
    ],
)
def test_what_changes_nothing_does_not_count(path: str, counts: bool) -> None:
    values = {"log_level": "auto", "train.resume": "auto", "train.precision": "fp32", "train.work_dir": "x"}
    kind = next(key.kind for key in KEYS if key.path == path)
    value = values.get(path, {"yes or no": True, "text": "x", "source": "x"}.get(kind, 1))
    assert bool(Recipe.of(build(path, value)).changes(recipe({"stages": [{"lr": 1e-4}]}).values)) is counts


# ---------------------------------------------------------------- the table


def test_the_table_has_every_key() -> None:
    rows = [re.split(r"(?<!\\) ?\| ?", line)[1:-1] for line in table().splitlines()[2:]]
    assert [row[0] for row in rows] == [f"`{key.path}`" for key in KEYS]
    assert len({key.path for key in KEYS}) == len(KEYS)
    assert all(len(row) == 4 and row[3] for row in rows)


def test_the_tables_defaults_are_true() -> None:
    """Those that a Stage shows; the others stand where they are used."""
    only = recipe().stages[0]
    named = {
        "train.optimizer.lr": only.lr, "train.optimizer.weight_decay": only.weight_decay,
        "train.optimizer.options.cumulative_iters": only.cumulative_iters,
        "train.dataloader.batch_size_per_gpu": only.batch_size, "train.lr_scheduler.name": only.schedule,
        "train.lr_scheduler.warmup_steps": only.warmup_steps,
        "train.lr_scheduler.warmup_proportion": only.warmup_proportion,
        "train.stages[].name": only.name, "train.stages[].cache_features": only.cache_features,
        "train.stages[].cached_views": only.cached_views, "train.stages[].patch_dropout": only.patch_dropout,
        "train.stages[].restart_optimizer": only.restart_optimizer,
        "train.stages[].restart_schedule": only.restart_schedule,
        "train.stages[].stop_on_plateau.metric": Plateau.metric,
        "train.stages[].stop_on_plateau.patience": Plateau.patience,
        "train.stages[].stop_on_plateau.min_delta": Plateau.min_delta,
    }  # fmt: skip
    said = {key.path: key.default.split(",")[0].strip("`") for key in KEYS}
    for path, value in named.items():
        written = {"true": True, "false": False}.get(said[path], said[path])
        assert (float(written) if isinstance(value, float) else type(value)(written)) == value, path
    assert only.lr == LR


def test_the_readme_has_the_table() -> None:
    """A difference is written into the file, and told once."""
    file = ROOT / "README.md"
    text = file.read_text(encoding="utf-8")
    now = re.sub(r"(?<=<!-- keys -->\n).*(?=<!-- /keys -->)", lambda _: table() + "\n", text, flags=re.DOTALL)
    if now != text:
        file.write_text(now, encoding="utf-8")
    assert table() in now
    assert now == text, f"{file}: the table wasn't recipe.table(); it is now, please look at it"
    for word in re.findall(r"\*(\w+)\*", table()):
        assert f"## {word}\n" in text, f"the table refers to a section {word}"
