"""Parameter groups, rates and moments, beside cn_clip's own rule and scheduler."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cn_clip.training.scheduler import cosine_lr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modelscope_cnclip import keymaps
from modelscope_cnclip.towers import ChineseCLIP, TowerConfig
from modelscope_cnclip.trainers.optim import (
    build_optimizer,
    decays,
    get_state,
    learning_rate,
    set_learning_rate,
    set_state,
)
from modelscope_cnclip.trainers.recipe import Recipe, RecipeError
from modelscope_cnclip.trainers.two_stage import freeze, frozen_names

from .conftest import CONFIGS, make_model

MODELS = {name: make_model(config) for name, config in CONFIGS.items()}


def recipe(train: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    return Recipe.of({"train": {"max_epochs": 1, **(train or {}), "stages": [stage]}}, "a.json")


def build(model: ChineseCLIP, train: dict[str, Any] | None = None, **stage: Any) -> torch.optim.Optimizer:
    made = recipe(train, **stage)
    return build_optimizer(model, made.stages[0], made)


def groups(optimizer: torch.optim.Optimizer) -> dict[tuple[float, float], set[str]]:
    """(scale, decay) -> names."""
    return {(g["lr_scale"], g["weight_decay"]): set(g["param_names"]) for g in optimizer.param_groups}


def rule() -> Callable[[str], bool]:
    """cn_clip's own line, out of its source: which names it leaves without decay."""
    import cn_clip.training

    file = inspect.getfile(cn_clip.training).replace("__init__.py", "main.py")
    with open(file, encoding="utf-8") as source:  # noqa: PTH123
        line = re.search(r"exclude = (lambda n ?:.*)", source.read())[1]
    return eval(line)


# ---------------------------------------------------------------- groups


def on_meta(config: TowerConfig) -> ChineseCLIP:
    with torch.device("meta"):
        return ChineseCLIP(config)


@pytest.mark.parametrize("tower", ["vit", "resnet", "vit-b-16", "rn50"])
def test_groups_are_upstreams(tower: str) -> None:
    model = MODELS[tower] if tower in MODELS else on_meta(TowerConfig.named(tower))
    ours = {name: parameter for name, parameter in model.named_parameters()}  # noqa: C416
    numbered = {name: torch.tensor([[i]]) for i, name in enumerate(ours)}
    theirs = {name: int(value) for name, value in keymaps.from_towers(dict(numbered)).items()}
    names = list(ours)
    exclude = rule()
    plain = {names[i] for name, i in theirs.items() if exclude(name)}
    decayed = {names[i] for name, i in theirs.items() if not exclude(name)}
    found = groups(build(copy.deepcopy(model), weight_decay=0.25))
    assert found == {(1.0, 0.25): decayed, (1.0, 0.0): plain}
    assert len(plain) + len(decayed) == len(ours)
    assert "bert.embeddings.LayerNorm.weight" in decayed  # by accident, most likely
    assert "logit_scale" in plain


def test_layer_norms_decay_only_if_wanted() -> None:
    model = MODELS["vit"]
    before, after = decays(model), decays(model, layer_norm=False)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name, _ in model.named_parameters() if name.endswith("LayerNorm.weight")}
    assert len(changed) == 5
    found = groups(build(copy.deepcopy(model), {"optimizer": {"decay_layer_norm": False}}, weight_decay=1))
    assert changed <= found[1.0, 0.0]
    assert not changed & found[1.0, 1.0]


def test_other_backbones_decay_matrices_and_kernels_only() -> None:
    model = MODELS["timm"]
    for name, parameter in model.visual.named_parameters(prefix="visual"):
        assert decays(model)[name] is (parameter.ndim > 1), name
    assert decays(model)["visual.trunk.bn1.weight"] is False
    assert decays(model)["bert.embeddings.LayerNorm.weight"] is True


@pytest.mark.parametrize("tower", CONFIGS)
def test_what_is_frozen_has_no_place(tower: str) -> None:
    model = copy.deepcopy(MODELS[tower])
    frozen = frozen_names(model, ["visual", "!projections", "text:1"])
    freeze(model, frozen)
    trained = {name for name, _ in model.named_parameters()} - frozen
    assert set().union(*groups(build(model)).values()) == trained


def test_factors() -> None:
    model = copy.deepcopy(MODELS["vit"])
    optimizer = build(
        model, weight_decay=0.5, lr=0.25,
        lr_scale={"bert": 0.5, "bert.encoder.layer.1": 2, "*.bias": 3, "logit_scale": 0},
    )  # fmt: skip
    names = {name for name, _ in model.named_parameters()}
    biases = {name for name in names if name.endswith(".bias")}
    last = {name for name in names if name.startswith("bert.encoder.layer.1.")} - biases
    bert = {name for name in names if name.startswith("bert.")} - biases - last
    found = groups(optimizer)
    assert found[3.0, 0.0] == biases  # the last pattern that fits has its way
    assert found[2.0, 0.5] == last
    assert found[0.5, 0.5] == bert
    assert found[0.0, 0.0] == {"logit_scale"}
    assert set().union(*found.values()) == names
    set_learning_rate(optimizer, 0.125)
    assert {group["lr_scale"]: group["lr"] for group in optimizer.param_groups} == {
        scale: 0.125 * scale for scale, _ in found
    }


@pytest.mark.parametrize("pattern", ["bert.encoder.layer.2", "visual", "*.gamma", "bert.encode"])
def test_a_factor_of_nothing(pattern: str) -> None:
    model = copy.deepcopy(MODELS["vit"])
    freeze(model, frozen_names(model, ["visual"]))
    with pytest.raises(RecipeError, match="lr_scale") as caught:
        build(model, lr_scale={"bert": 0.5, pattern: 0.1})
    for part in ("a.json", "stage 1", repr(pattern), "it trains text_projection, logit_scale, bert"):
        assert part in str(caught.value)


def test_group_names_are_told_apart() -> None:
    optimizer = build(copy.deepcopy(MODELS["vit"]), lr_scale={"visual": 0.1, "bert.encoder": 0.3})
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------- the class and its settings


@pytest.mark.parametrize(
    ("tower", "beta2", "eps"), [("vit", 0.98, 1e-6), ("timm", 0.98, 1e-6), ("resnet", 0.999, 1e-8)]
)
def test_defaults_are_the_papers(tower: str, beta2: float, eps: float) -> None:
    """arXiv 2211.01335, table 8."""
    optimizer = build(copy.deepcopy(MODELS[tower]))
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, beta2), eps)


def test_settings_under_both_spellings() -> None:
    model = copy.deepcopy(MODELS["vit"])
    for train in (
        {"optimizer": {"betas": [0.5, 0.25], "eps": 1e-3}},
        {"optimizer_hparams": {"beta1": 0.5, "beta2": 0.25, "eps": 1e-3}},
    ):
        defaults = build(model, train).defaults
        assert (defaults["betas"], defaults["eps"]) == ((0.5, 0.25), 1e-3)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adamax"])
def test_other_classes(kind: str) -> None:
    optimizer = build(copy.deepcopy(MODELS["vit"]), {"optimizer": {"type": kind, "lr": 0.5}})
    assert type(optimizer) is getattr(torch.optim, kind)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("kind", ["AdamX", "lr_scheduler", "", "__doc__"])
def test_classes_that_are_not_there(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"train.optimizer.type: torch.optim has no {kind!r}"):
        build(copy.deepcopy(MODELS["vit"]), {"optimizer": {"type": kind}})


# ---------------------------------------------------------------- rates


@settings(max_examples=60, deadline=None)
@given(total=st.integers(2, 60), warmup=st.integers(0, 59), peak=st.floats(1e-6, 1))
def test_rates_are_upstreams(total: int, warmup: int, peak: float) -> None:
    warmup = min(warmup, total - 1)
    theirs = cosine_lr(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), peak, warmup, total)
    stage = recipe(lr=peak, lr_scheduler={"warmup_steps": warmup}).stages[0]
    for step in range(total):
        assert learning_rate(stage, step, total) == pytest.approx(theirs(step), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_shapes(schedule: str) -> None:
    stage = recipe(lr=8, lr_scheduler={"name": schedule, "warmup_proportion": 0.2}).stages[0]
    rates = [learning_rate(stage, step, 20) for step in range(21)]
    assert rates[:5] == [2, 4, 6, 8, 8]  # a fifth of twenty steps, then the peak
    after = {
        "cosine": lambda x: 4 * (1 + math.cos(math.pi * x)),
        "linear": lambda x: 8 * (1 - x),
        "constant": lambda x: 8,
    }
    assert rates[4:] == pytest.approx([after[schedule](i / 16) for i in range(17)])


def test_a_schedule_that_is_all_warm_up() -> None:
    stage = recipe(lr=1, lr_scheduler={"warmup_steps": 10}).stages[0]
    assert [learning_rate(stage, step, 4) for step in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert learning_rate(recipe(lr=1).stages[0], 0, 1) == 1


# ---------------------------------------------------------------- moments


def step(model: ChineseCLIP, optimizer: torch.optim.Optimizer, number: int) -> None:
    """With gradients that depend on the name and the number alone."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(hash(name) % 1000 + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Adam"])
def test_moments_outlive_a_stage(kind: str) -> None:
    """Thawing adds parameters; what was trained goes on exactly as if nothing had happened."""
    train = {"optimizer": {"type": kind}}
    straight, staged = (copy.deepcopy(MODELS["vit"]) for _ in range(2))
    frozen = frozen_names(straight, ["visual", "text_projection"])
    freeze(straight, frozen)
    freeze(staged, frozen)
    one, two = build(straight, train, lr=0.1, weight_decay=0.1), build(staged, train, lr=0.1, weight_decay=0.1)
    for number in range(2):
        step(straight, one, number)
        step(staged, two, number)
    kept = get_state(two)
    freeze(staged, frozenset())
    two = build(staged, train, lr=0.1, weight_decay=0.1, lr_scale={"visual": 0.5})
    set_state(two, kept)
    for number in range(2, 4):
        step(straight, one, number)
        step(staged, two, number)
    same = {name for name, p in straight.named_parameters() if torch.equal(p, staged.get_parameter(name))}
    assert same == {name for name, _ in straight.named_parameters()} - frozen
    if kind != "SGD":
        steps = {name: int(value["step"]) for name, value in get_state(two).items()}
        assert steps == {name: 2 if name in frozen else 4 for name, _ in staged.named_parameters()}


def test_moments_of_what_is_frozen_now_are_left_behind() -> None:
    model = copy.deepcopy(MODELS["vit"])
    optimizer = build(model)
    step(model, optimizer, 0)
    kept = get_state(optimizer)
    assert kept.keys() == {name for name, _ in model.named_parameters()}
    assert all(value.keys() == {"step", "exp_avg", "exp_avg_sq"} for value in kept.values())
    frozen = frozen_names(model, ["visual"])
    freeze(model, frozen)
    optimizer = build(model)
    set_state(optimizer, kept)
    assert get_state(optimizer).keys() == kept.keys() - frozen
    assert get_state(build(model)) == {}  # nothing before the first step
