"""The trainer itself: stages, frozen parts, kept features, accumulation, evaluation and output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modelscope.metainfo import Metrics
from modelscope.pipelines import pipeline
from modelscope.trainers.hooks.hook import Hook
from modelscope.utils.constant import Tasks
from PIL import Image

from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.trainers.logs import read_metrics
from modelscope_cnclip.trainers.recipe import RecipeError
from modelscope_cnclip.trainers.step import loss_of
from modelscope_cnclip.trainers.trainer import CnclipTrainer

Make = Callable[..., CnclipTrainer]


TWO_STAGES = [
    {"name": "locked", "freeze": ["visual"], "max_steps": 5, "lr": 1e-3},
    {"name": "thawed", "max_epochs": 2, "lr": 5e-4, "augmentation": True},
]


class Record(Hook):
    """What a hook of the user's sees at the end of every step."""

    PRIORITY = "HIGHEST"

    def __init__(self, look: Callable[[Any], Any]) -> None:
        self.look, self.seen = look, []

    def after_train_iter(self, trainer: Any) -> None:
        self.seen.append(self.look(trainer))


def weights(trainer: CnclipTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.towers.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("tower", ["vit", "resnet", "timm"])
def test_a_frozen_tower_stays_bit_identical(tower: str, make: Make) -> None:
    trainer = make(tower=tower, train={"stages": [TWO_STAGES[0]]})
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    frozen = [name for name in before if name.startswith("visual.")]  # BatchNorm's buffers among them
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    moved = [name for name in before if name.startswith(("bert.", "text_projection"))]
    assert all(not torch.equal(before[name], after[name]) for name in moved if "position" not in name)
    assert not any(parameter in trainer.optimizer.state for parameter in trainer.towers.visual.parameters())


@pytest.mark.parametrize("tower", ["vit", "resnet", "timm"])
def test_the_second_stage_trains_everything(tower: str, make: Make) -> None:
    trainer = make(tower=tower, train={"stages": TWO_STAGES})
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    still = [name for name in before if before[name].is_floating_point() and torch.equal(before[name], after[name])]
    assert still == []
    assert trainer.progress.step == 5 + 6
    assert trainer.progress.stage == 2


def test_no_graph_is_kept_for_a_frozen_tower(make: Make) -> None:
    stage = {"freeze": ["visual"], "max_steps": 1, "cache_features": False}
    seen = []
    trainer = make(train={"stages": [stage]})
    trainer.towers.visual.register_forward_hook(
        lambda module, args, out: seen.append((out.requires_grad, module.training))
    )
    trainer.train()
    assert seen == [(False, False)]


@pytest.mark.parametrize("freeze", [["visual"], ["visual", "!projections"]])
@pytest.mark.parametrize("tower", ["vit", "timm"])
def test_kept_features_change_nothing(freeze: list[str], tower: str, make: Make) -> None:
    losses = {}
    for kept in (True, False):
        record = Record(lambda trainer: trainer.train_outputs["loss"])
        stage = {"freeze": freeze, "max_epochs": 3, "lr": 1e-3, "cache_features": kept}
        trainer = make(f"kept-{kept}", tower, train={"stages": [stage]}, callbacks=[record])
        trainer.train()
        assert (trainer.cache is not None) == kept
        losses[kept] = record.seen, weights(trainer)
    assert np.allclose(losses[True][0], losses[False][0], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(losses[True][1].values(), losses[False][1].values()))


def test_kept_views_are_drawn_and_never_decoded_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = {"freeze": ["visual"], "max_epochs": 3, "augmentation": True, "cached_views": 3}
    trainer = make(train={"stages": [stage]}, callbacks=[])
    decoded = []
    from modelscope_cnclip.trainers import batches

    real = batches.Pixels.to_uint8
    monkeypatch.setattr(batches.Pixels, "to_uint8", lambda self, source: decoded.append(source) or real(self, source))
    trainer.train()
    assert len(decoded) == 12 * 3
    assert np.load(trainer.cache.file).shape == (36, 32)


def test_cached_views_need_a_frozen_tower(make: Make) -> None:
    stage = {"max_epochs": 1, "augmentation": True, "cached_views": 3}
    with pytest.raises(RecipeError, match="cached_views: can't keep features: the image tower, or a part of it, is"):
        make(train={"stages": [stage]}).train()


def test_thawing_keeps_the_other_parameters_moments(make: Make) -> None:
    stages = [TWO_STAGES[0], {"max_steps": 1, "lr": 0.0001, "restart_optimizer": False}]
    seen = []

    def look(trainer: Any) -> None:
        state = trainer.optimizer.state
        seen.append((state[trainer.towers.text_projection]["step"].item(), len(state)))

    make(train={"stages": stages}, callbacks=[Record(look)]).train()
    steps, sizes = zip(*seen)
    assert steps == (1, 2, 3, 4, 5, 6)  # not 1 again
    assert sizes[5] > sizes[4]
    restarted = []
    stages[1]["restart_optimizer"] = True
    look_again = Record(
        lambda trainer: restarted.append(trainer.optimizer.state[trainer.towers.text_projection]["step"].item())
    )
    make("again", train={"stages": stages}, callbacks=[look_again]).train()
    assert restarted == [1, 2, 3, 4, 5, 1]


def test_learning_rates_follow_the_optimizer_step_of_their_stage(make: Make) -> None:
    stages = [
        {"freeze": ["visual"], "max_steps": 4, "lr": 1.0, "lr_scheduler": {"warmup_steps": 2}},
        {"max_steps": 4, "lr": 0.5, "lr_scheduler": {"name": "linear"}},
        {"max_steps": 4, "lr": 0.1, "restart_schedule": False},
    ]
    record = Record(lambda trainer: trainer.log_buffer.output["lr"])
    make(
        train={"stages": stages, "optimizer": {"type": "SGD", "options": {"cumulative_iters": 2}}}, callbacks=[record]
    ).train()
    first = [0.5, 1.0, 1.0, 0.5]
    second = [0.5 * (1 - step / 8) for step in range(4)]
    third = [0.1 * (1 - step / 8) for step in range(4, 8)]
    assert np.allclose(record.seen, [*first, *second, *third])


def test_a_stage_ends_when_recall_stops_rising(make: Make, rows: list[dict[str, str]]) -> None:
    flat = {"freeze": ["visual"], "max_epochs": 50, "lr": 1e-12, "stop_on_plateau": {"patience": 3}}
    trainer = make(train={"stages": [flat, {"max_steps": 1, "lr": 1e-12}]}, eval_dataset=rows)
    trainer.train()
    assert trainer.progress.step == 4 * 3 + 1  # the first evaluation, three without a rise, then the second stage
    flat["stop_on_plateau"]["metric"] = "accuracy"
    other = make("other", train={"stages": [flat]}, eval_dataset=rows)
    with pytest.raises(RecipeError, match=r"stop_on_plateau.metric: no 'accuracy' in .*mean_recall"):
        other.train()


# ---------------------------------------------------------------------------------------- steps


def test_accumulation_is_exact_and_takes_the_tail(make: Make) -> None:
    """One step over batches of 5, 5 and 2 has the gradient of their losses' mean, weighted by pairs."""
    grads: list[dict[str, torch.Tensor]] = []
    sgd = {"type": "SGD", "lr": 0.0, "weight_decay": 0.0, "options": {"cumulative_iters": 3}}
    loader = {"batch_size_per_gpu": 5, "drop_last": False}
    trainer = make(train={"max_steps": 1, "dataloader": loader, "optimizer": sgd})
    seen = []
    step = trainer.train_step

    def spy(model: Any, inputs: list[Any]) -> None:
        seen.append(inputs)
        real = trainer.optimizer.zero_grad
        trainer.optimizer.zero_grad = lambda **k: (
            grads.append({n: p.grad.clone() for n, p in trainer.towers.named_parameters()}), real(**k)
        )  # fmt: skip
        step(model, inputs)

    trainer.train_step = spy
    for module in trainer.towers.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer.train()
    assert [len(batch.text) for batch in seen[0]] == [5, 5, 2]
    total = sum(loss_of(trainer, trainer.parallel, batch) * len(batch.text) / 12 for batch in seen[0])
    total.backward()
    for name, parameter in trainer.towers.named_parameters():
        assert torch.allclose(parameter.grad, grads[0][name], atol=1e-6), name


@pytest.mark.parametrize(
    ("batch", "accumulate", "drop_last", "steps"), [(4, 2, True, 2), (5, 1, True, 2), (5, 1, False, 3), (4, 5, True, 1)]
)
def test_steps_in_a_pass(batch: int, accumulate: int, drop_last: bool, steps: int, make: Make) -> None:
    loader = {"batch_size_per_gpu": batch, "drop_last": drop_last}
    trainer = make(
        train={"max_epochs": 2, "dataloader": loader, "optimizer": {"options": {"cumulative_iters": accumulate}}}
    )
    trainer.train()
    assert trainer.progress.step == 2 * steps == trainer.max_iters
    assert trainer.iters_per_epoch == steps


def test_every_pass_has_another_order(make: Make) -> None:
    record = Record(lambda trainer: None)
    trainer = make(train={"max_epochs": 3}, callbacks=[record])
    rows: list[list[int]] = []
    step = trainer.train_step
    trainer.train_step = lambda model, inputs: (rows.append(inputs[0].rows.tolist()), step(model, inputs))
    trainer.train()
    passes = [[row for batch in rows[i : i + 3] for row in batch] for i in (0, 3, 6)]
    assert all(sorted(one) == list(range(12)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_logit_scale_is_clamped(make: Make) -> None:
    trainer = make(train={"max_steps": 3, "optimizer": {"lr": 5.0, "type": "SGD"}})
    trainer.towers.logit_scale.data.fill_(4.6)
    trainer.train()
    assert 0 <= trainer.towers.logit_scale.item() <= 4.6052 + 1e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train_alike_with_fp32_weights(precision: str, make: Make) -> None:
    losses = {}
    for name in ("fp32", precision):
        record = Record(lambda trainer: trainer.train_outputs["loss"])
        trainer = make(name, train={"max_steps": 6, "precision": name, "optimizer": {"lr": 1e-3}}, callbacks=[record])
        before = weights(trainer)
        trainer.train()
        losses[name] = record.seen
        assert all(parameter.dtype == torch.float32 for parameter in trainer.towers.parameters())
        assert not torch.equal(before["text_projection"], trainer.towers.text_projection)
    assert np.allclose(losses["fp32"], losses[precision], rtol=0.02)
    assert losses["fp32"] != losses[precision]


# ---------------------------------------------------------------------------------------- what comes out


def test_output_is_what_was_trained_and_pipelines_load_it(
    make: Make, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    top = {"pipeline": {"type": "cnclip-multi-modal-embedding"}}
    trainer = make(train={"stages": TWO_STAGES}, top=top, eval_dataset=rows)
    trainer.train()
    for name in ("output", "output_best"):
        folder = tmp_path / "work" / name
        assert json.loads((folder / "configuration.json").read_text())["pipeline"] == top["pipeline"]  # not rewritten
        assert (folder / "pytorch_model.bin").exists()
    pipe = pipeline(Tasks.multi_modal_embedding, model=str(tmp_path / "work" / "output"))
    trainer.towers.eval()
    with torch.no_grad():
        expected = F.normalize(trainer.towers.encode_text(trainer.tokenizer.padded([rows[0]["text"]])), dim=-1)
    assert np.allclose(pipe(rows[0]["text"])["text_embedding"], expected.numpy(), atol=1e-6)


def test_best_is_the_best_evaluation(make: Make, rows: list[dict[str, str]], tmp_path: Path) -> None:
    trainer = make(train={"max_epochs": 6, "optimizer": {"lr": 2e-3}}, eval_dataset=rows)
    trainer.train()
    values = [
        line["metrics"]["mean_recall"]
        for line in read_metrics(tmp_path / "work" / "metrics.jsonl")
        if "metrics" in line
    ]
    assert len(values) == 6
    assert trainer.progress.best == max(values)
    again = trainer.evaluate(str(tmp_path / "work" / "output_best"))
    assert again["mean_recall"] == max(values)


def test_evaluation_is_over_the_whole_pool(make: Make, rows: list[dict[str, str]]) -> None:
    trainer = make(
        train={"max_steps": 1}, eval_dataset=rows, top={"evaluation": {"dataloader": {"batch_size_per_gpu": 5}}}
    )
    values = trainer.evaluate()
    encoder = Encoder.from_pretrained(trainer.model_dir, precision="fp32", device="cpu")
    scores = encoder.encode_text([row["text"] for row in rows]) @ encoder.encode_image([row["image"] for row in rows]).T
    order = (-scores).argsort(axis=1, kind="stable")
    for k in (1, 5, 10):
        expected = np.mean([i in order[i, :k] for i in range(12)])
        assert values[f"text_to_image_recall@{k}"] == pytest.approx(expected)


def test_evaluation_feeds_other_metrics_and_saving_functions(make: Make, rows: list[dict[str, str]]) -> None:
    saved = []
    trainer = make(train={"max_steps": 1}, eval_dataset=rows, metrics=[Metrics.inbatch_recall])
    values = trainer.evaluate(saving_fn=lambda inputs, outputs: saved.append((inputs["text"], outputs)))
    assert set(values) >= {"inbatch_t2i_recall_at_1", "mean_recall"}
    assert [text for texts, _ in saved for text in texts] == [row["text"] for row in rows]


def test_logs(make: Make, rows: list[dict[str, str]], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(train={"stages": TWO_STAGES, "logging": {"interval": 1, "tensorboard": True}}, eval_dataset=rows).train()
    lines = read_metrics(tmp_path / "work" / "metrics.jsonl")
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == list(range(1, 12))
    assert [line["stage"] for line in training] == ["locked"] * 5 + ["thawed"] * 6
    for key in ("loss", "logit_scale", "lr", "grad_norm", "pairs_per_second", "data_wait"):
        assert all(np.isfinite(line[key] if key != "lr" else list(line[key].values())).all() for line in training)
    assert Image.open(tmp_path / "work" / "curves.png").size > (400, 300)
    assert list((tmp_path / "work" / "tensorboard").glob("events*"))
    assert json.loads((tmp_path / "work" / "recipe.json").read_text())["train"]["stages"] == TWO_STAGES
