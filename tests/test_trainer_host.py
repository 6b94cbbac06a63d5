"""The trainer as ModelScope's programs use it: official configuration, hooks, local folders; and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from modelscope.metainfo import Metrics, Trainers
from modelscope.msdatasets import MsDataset
from modelscope.pipelines import pipeline
from modelscope.trainers import EpochBasedTrainer, build_trainer
from modelscope.trainers.hooks.hook import Hook
from modelscope.utils.constant import Tasks

from modelscope_cnclip import checkpoint, layouts
from modelscope_cnclip.data import DataError
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.model import CnclipModel
from modelscope_cnclip.trainers.recipe import RecipeError
from modelscope_cnclip.trainers.step import TrainingError
from modelscope_cnclip.trainers.trainer import CnclipTrainer

from .loopback_hub import LoopbackHub
from .test_trainer import Record

Make = Callable[..., CnclipTrainer]


OFFICIAL = {
    "framework": "pytorch",
    "task": "multi-modal-embedding",
    "pipeline": {"type": "multi-modal-embedding"},
    "pretrained_model": {"model_name": "damo/multi-modal_clip-vit-base-patch16_zh"},
    "dataset": {"column_map": {"img": "image", "text": "query"}},
    "train": {
        "work_dir": "./workspace/ckpts/clip",
        "max_epochs": 1,
        "use_fp16": True,
        "dataloader": {"batch_size_per_gpu": 8, "workers_per_gpu": 0, "shuffle": True, "drop_last": True},
        "lr_scheduler": {"name": "cosine", "warmup_proportion": 0.01},
        "lr_scheduler_hook": {"type": "LrSchedulerHook", "by_epoch": False},
        "optimizer": {"type": "AdamW"},
        "optimizer_hparams": {"lr": 5e-05, "weight_decay": 0.01},
        "optimizer_hook": {"type": "TorchAMPOptimizerHook", "cumulative_iters": 1, "loss_keys": "loss"},
        "loss_cfg": {"aggregate": True},
        "hooks": [
            {"type": "BestCkptSaverHook", "metric_key": "inbatch_t2i_recall_at_1", "interval": 100},
            {"type": "TextLoggerHook", "interval": 1},
            {"type": "IterTimerHook"},
            {"type": "EvaluationHook", "by_epoch": True, "interval": 1},
            {"type": "ClipClampLogitScaleHook"},
        ],
    },
    "evaluation": {
        "dataloader": {"batch_size_per_gpu": 8, "workers_per_gpu": 0, "shuffle": True, "drop_last": True},
        "metrics": [{"type": "inbatch_recall"}],
    },
    "preprocessor": [],
}


def test_the_official_finetuning_code(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path, rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelScope's own tests/trainers/test_clip_trainer.py, whose data is MUGE, from a Hub on loopback."""
    hub.add_model("damo/multi-modal_clip-vit-base-patch16_zh", model_folder)
    monkeypatch.chdir(tmp_path)
    work = Path("workspace/ckpts/clip")
    work.mkdir(parents=True)
    (work / "configuration.json").write_text(json.dumps(OFFICIAL))
    data = tmp_path / "muge.jsonl"
    data.write_text("".join(json.dumps({"image": row["image"], "query": row["text"]}) + "\n" for row in rows))
    trainer = build_trainer(
        name=Trainers.clip_multi_modal_embedding,
        default_args={
            "model": "damo/multi-modal_clip-vit-base-patch16_zh",
            "work_dir": str(work),
            "train_dataset": MsDataset.load("json", data_files=str(data), split="train"),
            "eval_dataset": MsDataset.load("json", data_files=str(data), split="train"),
            "metrics": [Metrics.inbatch_recall],
            "cfg_file": str(work / "configuration.json"),
        },
    )
    assert isinstance(trainer, CnclipTrainer)
    assert isinstance(trainer, EpochBasedTrainer)
    trainer.train()
    assert "pytorch_model.bin" in {path.name for path in (work / "output").iterdir()}
    assert trainer.progress.best == trainer.metric_values["inbatch_t2i_recall_at_1"]
    pipe = pipeline(Tasks.multi_modal_embedding, model=str(work / "output"))
    assert pipe({"img": rows[0]["image"]})["img_embedding"].shape == (1, 32)


def test_a_local_folder_asks_no_hub_and_starts_no_process(
    model_folder: Path, rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing
    import socket

    file = tmp_path / "recipe.json"
    file.write_text(json.dumps({"train": {"max_steps": 1, "dataloader": {"batch_size_per_gpu": 4}}}))
    given = {"model": str(model_folder), "cfg_file": str(file), "train_dataset": rows, "work_dir": str(tmp_path / "w")}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection or a process was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(multiprocessing.Process, "start", refuse)
    build_trainer("cnclip-trainer", given).train()
    assert (tmp_path / "w" / "output" / "pytorch_model.bin").exists()


def test_a_model_in_memory_and_one_that_is_composed(make: Make, model_folder: Path, tmp_path: Path) -> None:
    model = CnclipModel(str(model_folder))
    trainer = make(train={"max_steps": 1}, model=model)
    assert trainer.model is model
    trainer.train()

    from transformers import BertConfig, BertModel

    bert = tmp_path / "bert"
    config = BertConfig(
        vocab_size=21128, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(bert)
    (bert / "vocab.txt").write_bytes(layouts.default_vocab().read_bytes())
    spec = {"vision": {"timm": "test_efficientnet", "resolution": 64}, "text": {"bert": str(bert)}, "embed_dim": 16}
    trainer = make("composed", train={"max_steps": 1}, top={"pretrained_model": spec}, model=None)
    trainer.train()
    written = checkpoint.read(tmp_path / "composed" / "output")
    assert (written.config.vision_timm, written.config.embed_dim) == ("test_efficientnet", 16)
    assert Encoder.from_pretrained(tmp_path / "composed" / "output").encode_text("猫").shape == (1, 16)


def test_hooks_of_the_host_and_early_stopping(make: Make, rows: list[dict[str, str]]) -> None:
    hooks = [
        {"type": "IterTimerHook"},
        {"type": "EarlyStopHook", "metric_key": "mean_recall", "rule": "max", "patience": 1},
    ]
    record = Record(lambda trainer: (trainer.epoch, trainer.iter, trainer.inner_iter))
    trainer = make(
        train={"max_epochs": 20, "hooks": hooks, "optimizer": {"lr": 1e-12}}, eval_dataset=rows, callbacks=[record]
    )
    trainer.train()
    assert record.seen[:4] == [(0, 0, 0), (0, 1, 1), (0, 2, 2), (1, 3, 0)]
    assert len(record.seen) < 20 * 3


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"max_epochs": 1, "hooks": [{"type": "DeepspeedHook"}]}, "DeepspeedHook isn't for this trainer"),
        ({"max_epochs": 1, "learning_rate": 1}, "train.learning_rate: there is no such key; the nearest is"),
        ({}, "how long\\? Give max_epochs or max_steps"),
        ({"stages": [{"max_steps": 0}]}, r"train.stages\[0\].max_steps: must be more than 0, got 0"),
        ({"stages": [{"max_steps": 1, "freeze": ["visuel"]}]}, "'visuel' matches nothing .* near it are visual"),
        ({"stages": [{"max_steps": 1}, {"max_steps": 1, "freeze": ["all"]}]}, "freezes everything"),
        ({"max_epochs": 1, "optimizer": {"type": "Adamw"}}, "torch.optim has no 'Adamw'"),
        ({"max_epochs": 1, "checkpoint": {"best": {"metric_key": "accuracy"}}}, "metric_key: no 'accuracy' among"),
        ({"max_epochs": 1, "lr_scheduler_hook": {"by_epoch": True}}, "expected no .*every optimizer step"),
    ],
)  # fmt: skip
def test_bad_recipes(train: dict[str, Any], says: str, make: Make, rows: list[dict[str, str]]) -> None:
    with pytest.raises(RecipeError, match=says):
        make(train=train, eval_dataset=rows).train()


@pytest.mark.parametrize("argument", [{"optimizers": (1, 2)}, {"data_collator": list}, {"learning_rate": 1}])
def test_arguments_it_does_not_take(argument: dict[str, Any], make: Make) -> None:
    with pytest.raises(TypeError, match=next(iter(argument))):
        make(train={"max_epochs": 1}, **argument)


def test_data_that_is_no_data(make: Make, rows: list[dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training data"):
        make(train={"max_epochs": 1}, train_dataset=None).train()
    with pytest.raises(DataError, match="no evaluation data"):
        make(train={"max_epochs": 1}).evaluate()
    with pytest.raises(DataError, match=r"12 pairs are fewer than one batch of 16 .*drop_last to false"):
        make(train={"max_epochs": 1, "dataloader": {"batch_size_per_gpu": 16}}).train()
    make("small", train={"max_epochs": 1, "dataloader": {"batch_size_per_gpu": 16, "drop_last": False}}).train()
    for name, text in (("empty", ""), ("one_column", '{"image": "a.png"}\n')):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(text)
        with pytest.raises(DataError, match=f"{name}.jsonl"):
            make(train={"max_epochs": 1}, train_dataset=str(file))


def test_broken_records_are_left_out_and_limited(make: Make, rows: list[dict[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    trainer = make(train={"max_steps": 1}, top={"data": {"max_bad_fraction": 0.1}}, train_dataset=str(file))
    assert len(trainer.train_dataset) == 12
    with pytest.raises(
        DataError, match=r"pairs.jsonl:13: .*; 1 of 13 records are bad, more than data.max_bad_fraction"
    ):
        make(train={"max_steps": 1}, train_dataset=str(file))


@pytest.mark.parametrize("kept", [True, False])
def test_broken_pictures_are_skipped_counted_and_limited(
    kept: bool, make: Make, rows: list[dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*rows, {"image": "nowhere.png", "text": "不存在"}]
    stage = {"freeze": ["visual"], "max_epochs": 3, "cache_features": kept}
    trainer = make(
        f"run-{kept}", train={"stages": [stage]}, top={"data": {"max_bad_fraction": 0.1}}, train_dataset=rows
    )
    trainer.train()
    assert trainer.progress.bad == ["12"]
    with pytest.raises(DataError, match=r"1 of 13 pictures can't be read so far.*data.max_bad_fraction = 0.01"):
        make(f"strict-{kept}", train={"stages": [stage]}, train_dataset=rows).train()


def test_a_loss_that_is_no_number(make: Make) -> None:
    class Spoil(Hook):
        def before_train_iter(self, trainer: Any) -> None:
            if trainer.progress.step == 4:
                trainer.towers.text_projection.data.fill_(float("nan"))

    trainer = make(train={"max_epochs": 3}, callbacks=[Spoil()])
    with pytest.raises(TrainingError, match=r"the loss is nan at step 5 .* good checkpoint is .*step_00000003"):
        trainer.train()
