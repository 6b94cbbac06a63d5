"""Freezing: which parameters each pattern names, and that what is frozen stays as it is and costs nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import PatchDropout
from torch import Tensor, nn

from modelscope_cnclip.preprocessor import ImageTransform
from modelscope_cnclip.towers import ChineseCLIP
from modelscope_cnclip.trainers.live import PairForward
from modelscope_cnclip.trainers.recipe import RecipeError
from modelscope_cnclip.trainers.two_stage import (
    LOGIT_SCALE_MAX,
    clamp_logit_scale,
    freeze,
    frozen_names,
    set_modes,
    wholly_frozen,
)

from .conftest import CONFIGS, TIMM, make_model

MODELS = {name: make_model(config) for name, config in CONFIGS.items()}
# More kinds of towers for what is counted in blocks.
OTHERS = ("test_vit", "test_convnext", "test_resnet", "test_nfnet", "test_byobnet")
HEADS = {"vit": "visual.head.", "resnet": "visual.head.", "timm": "visual.proj."}


@pytest.fixture(params=CONFIGS)
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(tower: str) -> ChineseCLIP:
    return copy.deepcopy(MODELS[tower])


def names(model: nn.Module, *starts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


def refused(model: ChineseCLIP, patterns: list[str], *says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        frozen_names(model, patterns, "a.json: stage 1: freeze")
    text = str(caught.value)
    assert text.startswith("a.json: stage 1: freeze: ")
    assert "\n" not in text
    for part in says:
        assert part in text


# ---------------------------------------------------------------- patterns


def test_towers_and_projections(tower: str, model: ChineseCLIP) -> None:
    everything, head = names(model, ""), HEADS[tower]
    image, text = names(model, "visual."), names(model, "bert.", "text_projection")
    assert everything == image | text | {"logit_scale"}
    for patterns, wanted in (
        ([], set()),
        (["visual"], image),
        (["image"], image),
        (["text"], text),
        (["projections"], names(model, head, "text_projection")),
        (["logit_scale"], {"logit_scale"}),
        (["all", "!logit_scale"], image | text),
        (["all", "!projections"], everything - names(model, head, "text_projection")),
        (["visual", "text"], image | text),
        (["bert.encoder"], names(model, "bert.encoder.")),
        (["bert.encoder.layer.1"], names(model, "bert.encoder.layer.1.")),
        (["text_projection"], {"text_projection"}),
        (["bert.embeddings.word_embeddings.weight"], {"bert.embeddings.word_embeddings.weight"}),
        ([r"re:LayerNorm\.(weight|bias)$"], {n for n in everything if "LayerNorm." in n}),
        (["re:layer.0", "!re:bias"], {n for n in everything if "layer.0" in n and "bias" not in n}),
    ):
        assert frozen_names(model, patterns) == wanted, patterns


def test_order_counts(model: ChineseCLIP) -> None:
    image, head = names(model, "visual."), frozen_names(model, ["projections"])
    assert frozen_names(model, ["visual", "!projections"]) == image - head
    assert frozen_names(model, ["!projections", "visual"]) == image
    assert frozen_names(model, ["all", "!text", "text_projection"]) == image | {"logit_scale", "text_projection"}


def test_first_blocks(tower: str, model: ChineseCLIP) -> None:
    stem = {
        "vit": ("visual.cls_token", "visual.pos_embed", "visual.patch_embed.", "visual.norm_pre."),
        "resnet": ("visual.stem.",),
        "timm": ("visual.trunk.conv_stem.", "visual.trunk.bn1."),
    }[tower]
    blocks = {
        "vit": [f"visual.blocks.{i}." for i in range(2)],
        "resnet": [f"visual.stages.{i}.0." for i in range(4)],
        "timm": [f"visual.trunk.blocks.{i}.0." for i in range(5)],
    }[tower]
    for count in range(len(blocks) + 1):
        assert frozen_names(model, [f"visual:{count}"]) == names(model, *stem, *blocks[:count])
        assert frozen_names(model, [f"image:{count}"]) == frozen_names(model, [f"visual:{count}"])
    refused(model, ["visual:99"], "'visual:99': ", f"this tower has {len(blocks)} blocks")
    for count in range(3):
        layers = [f"bert.encoder.layer.{i}." for i in range(count)]
        assert frozen_names(model, [f"text:{count}"]) == names(model, "bert.embeddings.", *layers)
    refused(model, ["text:3"], "'text:3': ", "this tower has 2 blocks")


@contextmanager
def watching(model: nn.Module, seen: dict[str, bool]) -> Iterator[None]:
    """Notes of every module that has parameters of its own and is frozen whether its input carries a graph."""

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = any(isinstance(one, Tensor) and one.requires_grad for one in args)

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name))
        for name, module in model.named_modules()
        if wholly_frozen(module) and list(module.parameters(recurse=False))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", [*CONFIGS, *OTHERS])
def test_first_blocks_are_the_first_that_a_picture_passes(name: str) -> None:
    """Nothing in front of them is trained: no graph runs through a frozen module."""
    model = copy.deepcopy(MODELS[name]) if name in MODELS else make_model(replace(TIMM, vision_timm=name))
    before: frozenset[str] = frozenset()
    for count in range(100):
        try:
            frozen = frozen_names(model, [f"visual:{count}"])
        except RecipeError as error:
            assert str(error).endswith(f"this tower has {count - 1} blocks")  # noqa: PT017
            break
        assert before < frozen
        freeze(model, frozen)
        seen: dict[str, bool] = {}
        with watching(model.visual, seen):
            assert model.encode_image(torch.randn(2, 3, 64, 64)).requires_grad
        assert seen
        assert not any(seen.values()), [name for name, graph in seen.items() if graph]
        before = frozen
    assert count >= 3
    assert before < names(model, "visual.")  # something is left, the projection at least


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("visul", "visual"),
        ("projection", "projections"),
        ("bert.encodr", "bert.encoder"),
        ("bert.encoder.layer.2", "bert.encoder.layer.1"),
        ("!text_projektion", "text_projection"),
        ("logitscale", "logit_scale"),
        ("re:layer\\.7", "bert.encoder.layer"),
        ("Visual", "visual"),
        ("", "visual"),
        ("!", "visual"),
        ("猫", "visual"),
        ("text:x", "text"),
        ("visual:-1", "visual"),
    ],
)
def test_what_matches_nothing(pattern: str, near: str, model: ChineseCLIP) -> None:
    refused(model, ["logit_scale", pattern], f"{pattern!r} matches nothing", "near it are ", near)


def test_other_mistakes(model: ChineseCLIP) -> None:
    refused(model, ["re:("], "'re:(' is no regular expression")
    refused(model, ["all"], "freezes everything; nothing is left to train")
    refused(model, ["visual", "text", "logit_scale"], "freezes everything")
    refused(model, ["all", "!visual", "visual"], "freezes everything")


# ---------------------------------------------------------------- modes


def test_gradients_are_dropped_and_come_back(model: ChineseCLIP) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    frozen = frozen_names(model, ["visual", "text:1"])
    freeze(model, frozen)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (name not in frozen)
        assert (parameter.grad is None) is (name in frozen)
    freeze(model, frozenset())
    assert all(parameter.requires_grad for parameter in model.parameters())


def modes(model: ChineseCLIP, patterns: list[str]) -> dict[str, bool]:
    freeze(model, frozen_names(model, patterns))
    set_modes(model)
    return {name: module.training for name, module in model.named_modules()}


def test_only_what_is_frozen_is_in_eval_mode(tower: str, model: ChineseCLIP) -> None:
    assert all(modes(model, []).values())
    found = modes(model, ["visual"])
    assert {name for name, training in found.items() if not training} == {
        name for name in found if name == "visual" or name.startswith("visual.")
    }
    found = modes(model, ["text:1"])
    assert not any(found[name] for name in found if name.startswith(("bert.embeddings", "bert.encoder.layer.0")))
    assert not found["bert.encoder.layer.0.attention.self.dropout"]
    assert found["bert.encoder.layer.1.attention.self.dropout"]
    assert all(found[name] for name in found if name.startswith(("visual", "bert.encoder.layer.1")))
    assert found["bert"]
    assert all(modes(model, []).values())  # and back


def test_patch_dropout_is_off_in_a_frozen_trunk() -> None:
    model = copy.deepcopy(MODELS["vit"])
    model.set_patch_dropout(0.5)
    assert isinstance(model.visual.patch_drop, PatchDropout)
    assert modes(model, [])["visual.patch_drop"]
    assert modes(model, ["text"])["visual.patch_drop"]
    pixels = torch.randn(3, 3, 64, 64)
    wanted = MODELS["vit"].encode_image(pixels)
    assert not torch.allclose(model.encode_image(pixels), wanted)  # drops
    for patterns in (["visual"], ["visual", "!projections"], ["visual", "text"]):
        assert not modes(model, patterns)["visual.patch_drop"], patterns
        torch.testing.assert_close(model.encode_image(pixels), wanted)


@pytest.mark.parametrize("tower", ["resnet", "timm"])  # a ViT keeps no statistics
@pytest.mark.parametrize("patterns", [["visual"], ["visual", "!projections"], ["visual:2"], ["re:bn", "!re:stem"]])
def test_frozen_statistics_stay(patterns: list[str], tower: str, model: ChineseCLIP) -> None:
    freeze(model, frozen := frozen_names(model, [p for p in patterns if not (tower == "timm" and p == "!re:stem")]))
    before = {name: value.clone() for name, value in model.visual.named_buffers()}
    for _ in range(2):
        set_modes(model)
        model.encode_image(torch.randn(4, 3, 64, 64) * 3 + 1)
    changed = {name.rpartition(".")[0] for name, v in model.visual.named_buffers() if not torch.equal(v, before[name])}
    norms = {name for name, module in model.visual.named_modules() if isinstance(module, nn.BatchNorm2d)}
    still = {name for name in norms if f"visual.{name}.weight" in frozen}
    assert still
    assert changed == norms - still  # every other norm has moved


# ---------------------------------------------------------------- the forward pass


def forward(model: ChineseCLIP, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(seed)
    transform = ImageTransform(config.image_resolution, config.vision_mean, config.vision_std)
    pixels = torch.randint(256, (2, 64, 64, 3), generator=generator, dtype=torch.uint8)
    text = torch.randint(1, 21128, (2, 6), generator=generator)
    return PairForward(model, transform)(pixels, text, None)


def test_a_frozen_tower_leaves_no_graph(model: ChineseCLIP) -> None:
    for patterns, image_graph, text_graph in (
        ([], True, True),
        (["visual"], False, True),
        (["text"], True, False),
        (["visual", "!projections"], True, True),
        (["visual", "text", "!text_projection"], False, True),
    ):
        modes(model, patterns)
        image, text, scale = forward(model)
        assert (image.requires_grad, text.requires_grad, scale.requires_grad) == (image_graph, text_graph, True)
        assert (image.grad_fn is not None, text.grad_fn is not None) == (image_graph, text_graph)


def test_no_graph_in_frozen_layers(model: ChineseCLIP) -> None:
    modes(model, ["visual:1", "text:1"])
    seen: dict[str, bool] = {}
    with watching(model, seen):
        image, text, _ = forward(model)
    assert image.requires_grad
    assert text.requires_grad
    assert seen
    assert not any(seen.values())


def test_a_frozen_text_tower_drops_nothing(model: ChineseCLIP) -> None:
    modes(model, ["bert"])
    assert torch.equal(forward(model)[1], forward(model)[1])
    modes(model, ["visual"])
    assert not torch.equal(forward(model)[1], forward(model)[1])


def test_training_leaves_frozen_weights_alone(model: ChineseCLIP) -> None:
    """Bit for bit, with an optimizer over everything that would decay them."""
    frozen = frozen_names(model, ["visual", "text:1"])
    before = copy.deepcopy(model.state_dict())
    freeze(model, frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for step in range(2):
        set_modes(model)
        image, text, scale = forward(model, step)
        (scale * image @ text.T).diagonal().sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        fixed = name in frozen or name.startswith("visual.")
        assert torch.equal(value, before[name]) is fixed or value.dtype == torch.int64, name


def test_the_temperature_is_clamped(model: ChineseCLIP) -> None:
    for value, wanted in ((-1.0, 0.0), (0.0, 0.0), (2.5, 2.5), (99.0, LOGIT_SCALE_MAX)):
        model.logit_scale.data.fill_(value)
        clamp_logit_scale(model)
        assert model.logit_scale.item() == pytest.approx(wanted)
    assert np.exp(LOGIT_SCALE_MAX) == pytest.approx(100, abs=0.01)
