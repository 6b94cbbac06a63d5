"""Exact resume: in this process after every single step, and after SIGKILL on one rank and two; and bad checkpoints."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from modelscope.trainers.hooks.hook import Hook
from safetensors.torch import load_file

from modelscope_cnclip.checkpoint import CheckpointError
from modelscope_cnclip.trainers import checkpointing
from modelscope_cnclip.trainers.logs import read_metrics
from modelscope_cnclip.trainers.recipe import RecipeError
from modelscope_cnclip.trainers.trainer import CnclipTrainer

from .conftest import PICTURES

# Everything that makes a resume hard: dropout, augmentation, accumulation with a tail, a stage that ends in the middle
# of a pass, kept features, moments that survive the switch, a plateau that counts, a best model.
RECIPE = {
    "task": "multi-modal-embedding",
    "train": {
        "precision": "fp32",
        "dataloader": {"batch_size_per_gpu": 2},
        "optimizer": {"lr": 1e-3, "options": {"cumulative_iters": 2}},
        "logging": {"interval": 1},
        "checkpoint": {"period": {"interval": 2, "by_epoch": False}},
        "stages": [
            {"name": "locked", "freeze": ["visual"], "max_steps": 5, "lr_scheduler": {"warmup_steps": 2}},
            {
                "name": "thawed",
                "max_steps": 7,
                "augmentation": True,
                "restart_optimizer": False,
                "restart_schedule": False,
                "stop_on_plateau": {"patience": 9},
            },
        ],
    },
}
STEPS = 12


class Stop(Exception):
    pass


class StopAt(Hook):
    PRIORITY = "LOWEST"

    def __init__(self, step: int) -> None:
        self.step = step

    def after_train_iter(self, trainer: Any) -> None:
        if trainer.progress.step == self.step:
            raise Stop


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = (PICTURES / "captions.tsv").read_text(encoding="utf-8").splitlines()[:10]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"image": str(PICTURES / name), "text": [text, text[-1]]} for name, text in (x.split("\t") for x in lines)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def recipe(tmp_path: Path, data: Path, model_folder: Path) -> Callable[..., Path]:
    """Writes the recipe for a work dir; ``changes`` go over ``train``."""

    def write(work: str, **changes: Any) -> Path:
        values = json.loads(json.dumps(RECIPE))
        values["train"] |= {"work_dir": str(tmp_path / work)} | changes
        values["pretrained_model"] = {"model_name": str(model_folder)}
        values["dataset"] = {"train": str(data), "val": str(data)}
        file = tmp_path / f"{work}.json"
        file.write_text(json.dumps(values))
        return file

    return write


def run(file: Path, *hooks: Hook, **options: Any) -> CnclipTrainer:
    trainer = CnclipTrainer(cfg_file=str(file), callbacks=list(hooks))
    trainer.train(**options)
    return trainer


def final(work_dir: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    folder = checkpointing.newest(work_dir)
    assert folder is not None
    return load_file(folder / checkpointing.WEIGHTS), load_file(folder / checkpointing.OPTIMIZER)


def assert_same(a: Path, b: Path) -> None:
    for left, right in zip(final(a), final(b)):
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_a_run_stopped_after_any_step_ends_the_same(recipe: Callable[..., Path], tmp_path: Path) -> None:
    whole = run(recipe("whole"))
    assert whole.progress.step == STEPS
    for step in range(1, STEPS + 1):
        file = recipe(f"stopped-{step}")
        with pytest.raises(Stop):
            run(file, StopAt(step))
        again = run(file)
        assert_same(tmp_path / "whole", tmp_path / f"stopped-{step}")
        assert again.progress == whole.progress
        assert again.metric_values == whole.metric_values
        shutil.rmtree(tmp_path / f"stopped-{step}")


def test_a_resumed_log_has_every_step_once(recipe: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe("work")
    with pytest.raises(Stop):
        run(file, StopAt(7))
    run(file)
    steps = [line["step"] for line in read_metrics(tmp_path / "work" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


def test_a_finished_run_stays_finished(recipe: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe("work")
    run(file)
    before = final(tmp_path / "work")[0]
    again = run(file)
    assert again.progress.step == STEPS
    assert all(torch.equal(before[name], tensor) for name, tensor in again.towers.state_dict().items())
    assert checkpointing.newest(tmp_path / "work").name == f"step_{STEPS:08d}"


def test_only_the_newest_are_kept(recipe: Callable[..., Path], tmp_path: Path) -> None:
    run(recipe("work", checkpoint={"period": {"interval": 1, "by_epoch": False, "max_checkpoint_num": 3}}))
    assert sorted(path.name for path in (tmp_path / "work" / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (10, 11, 12)
    ]


# ---------------------------------------------------------------------------------------- killed processes


def start(file: Path, *options: str, ranks: int = 1) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "tests.train_run", str(file), *options]
    return [
        subprocess.Popen(
            command,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    """(exit code, standard error) of each; none is left behind. Ranks that finish have the same weights."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
        if all(process.returncode == 0 for process in processes):
            assert len({out.splitlines()[-1] for out, _ in told}) == 1
            assert told[0][0].splitlines()[-1].startswith("weights ")
        return [(process.returncode, error) for process, (_, error) in zip(processes, told)]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("ranks", [1, 2])
def test_kill_9_in_both_stages_and_at_the_switch(ranks: int, recipe: Callable[..., Path], tmp_path: Path) -> None:
    lengths = [
        {**stage, "cumulative_iters": 1, "batch_size_per_gpu": 4 // ranks} for stage in RECIPE["train"]["stages"]
    ]
    assert [code for code, _ in finish(start(recipe("whole", stages=lengths), ranks=ranks))] == [0] * ranks
    file = recipe("killed", stages=lengths)
    seed = random.randrange(2**32)
    pick = random.Random(seed)
    kills = [
        ("--kill", str(pick.randint(1, 4))),
        ("--kill", "5"),
        ("--kill", str(pick.randint(3, 5) * 2), "--while-saving"),
    ]
    for kill in kills:
        codes = [code for code, _ in finish(start(file, *kill, ranks=ranks))]
        assert -signal.SIGKILL in codes, (seed, kill, codes)
    for code, error in finish(start(file, ranks=ranks)):
        assert code == 0, (seed, error[-2000:])
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_sigterm_writes_a_checkpoint(recipe: Callable[..., Path], tmp_path: Path) -> None:
    file = recipe("work", checkpoint={"period": {"interval": 1000, "by_epoch": False}})
    (process,) = start(file)
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    ((code, error),) = finish([process])
    assert code == 128 + signal.SIGTERM, error[-2000:]
    stopped = checkpointing.Saved(checkpointing.newest(tmp_path / "work")).progress.step
    assert 1 <= stopped < STEPS
    run(file)
    run(recipe("whole", checkpoint={"period": {"interval": 1000, "by_epoch": False}}))
    assert_same(tmp_path / "whole", tmp_path / "work")


def test_a_rank_that_dies_stops_the_others(recipe: Callable[..., Path]) -> None:
    file = recipe("work", dist_timeout=60)
    (first, _), (other, error) = finish(start(file, "--kill", "3", "--only-rank", "0", ranks=2), timeout=200)
    assert first == -signal.SIGKILL
    assert other not in (0, None)
    assert error.strip()


def test_two_ranks_are_one_rank_with_twice_the_batch(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Twenty steps through a switch, without dropout, which differs between ranks."""
    from modelscope_cnclip import layouts
    from modelscope_cnclip.checkpoint import Checkpoint, write
    from modelscope_cnclip.towers import TowerConfig

    from .conftest import TEXT, make_model

    quiet = {"text_hidden_dropout_prob": 0.0, "text_attention_probs_dropout_prob": 0.0}
    config = TowerConfig(
        embed_dim=32, image_resolution=32, vision_layers=1, vision_width=64, vision_patch_size=16, **TEXT, **quiet
    )
    model = write(Checkpoint.of(make_model(config), layouts.default_vocab()), tmp_path / "quiet")
    losses = {}
    for ranks in (1, 2):
        stages = [
            {"freeze": ["visual"], "max_steps": 10, "lr": 1e-3, "batch_size_per_gpu": 4 // ranks},
            {"max_steps": 10, "lr": 1e-3, "batch_size_per_gpu": 4 // ranks},
        ]
        file = recipe(f"ranks-{ranks}", stages=stages)
        values = json.loads(file.read_text())
        values["pretrained_model"]["model_name"] = str(model)
        values["train"]["optimizer"] = {"lr": 1e-3, "eps": 1e-3}  # Adam's division blows rounding up where v is 0
        file.write_text(json.dumps(values))
        for code, error in finish(start(file, ranks=ranks)):
            assert code == 0, error[-2000:]
        losses[ranks] = [x["loss"] for x in read_metrics(tmp_path / f"ranks-{ranks}" / "metrics.jsonl") if "loss" in x]
    assert len(losses[1]) == 20
    assert losses[1] == pytest.approx(losses[2], abs=1e-5)
    one, two = final(tmp_path / "ranks-1")[0], final(tmp_path / "ranks-2")[0]
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5


# ---------------------------------------------------------------------------------------- bad checkpoints


@pytest.fixture
def stopped(recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """A work dir with checkpoints of steps 4 and 6 of the recipe ``work``."""
    with pytest.raises(Stop):
        run(recipe("work"), StopAt(7))
    return tmp_path / "work"


@pytest.mark.parametrize("name", [checkpointing.WEIGHTS, checkpointing.OPTIMIZER, checkpointing.RANDOM])
def test_a_truncated_file(name: str, stopped: Path, recipe: Callable[..., Path]) -> None:
    file = checkpointing.newest(stopped) / name
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        CheckpointError, match=rf"{name}: truncated: \d+ bytes where \d+ .*Delete this folder"
    ) as caught:
        run(recipe("work"))
    assert str(file) in str(caught.value)
    shutil.rmtree(file.parent)
    assert run(recipe("work")).progress.step == STEPS


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "damaged"), ("[]", "not a training checkpoint"), ('{"format": "other"}', "not a training checkpoint")],
)
def test_a_damaged_state(text: str, says: str, stopped: Path, recipe: Callable[..., Path]) -> None:
    file = checkpointing.newest(stopped) / checkpointing.STATE
    file.write_text(text)
    with pytest.raises(CheckpointError, match=says) as caught:
        run(recipe("work"))
    assert str(file) in str(caught.value)


def test_a_damaged_weights_file_of_the_right_size(stopped: Path, recipe: Callable[..., Path]) -> None:
    file = checkpointing.newest(stopped) / checkpointing.WEIGHTS
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="damaged"):
        run(recipe("work"))


def test_a_foreign_folder_and_no_folder(recipe: Callable[..., Path], model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a training checkpoint of this package: it has no state.json"):
        run(recipe("work"), checkpoint_path=str(model_folder))
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        run(recipe("work"), checkpoint_path=str(tmp_path / "nowhere"))


def test_a_checkpoint_of_another_model(
    stopped: Path, recipe: Callable[..., Path], make_folder: Callable[..., Path]
) -> None:
    file = recipe("other")
    values = json.loads(file.read_text())
    values["pretrained_model"]["model_name"] = str(make_folder("timm"))
    file.write_text(json.dumps(values))
    given = str(checkpointing.newest(stopped))
    with pytest.raises(RecipeError, match=r"pretrained_model\.model_name"):
        run(file, checkpoint_path=given)
    with pytest.raises(CheckpointError, match=r"weights of another model: visual\."):
        run(file, checkpoint_path=given, allow_changed_recipe=True)


def test_a_changed_recipe(stopped: Path, recipe: Callable[..., Path], tmp_path: Path) -> None:
    changed = recipe("work", seed=7, optimizer={"lr": 1e-3, "options": {"cumulative_iters": 1}})
    with pytest.raises(RecipeError) as caught:
        run(changed)
    text = str(caught.value)
    assert "train.seed: 'absent' then, 7 now" in text
    assert "train.optimizer.options.cumulative_iters: 2 then, 1 now" in text
    assert "--allow-changed-recipe" in text
    assert run(changed, allow_changed_recipe=True).progress.step == STEPS


def test_other_data(stopped: Path, recipe: Callable[..., Path], data: Path) -> None:
    file = recipe("work")
    values = json.loads(file.read_text())
    lines = data.read_text().splitlines()
    rows = [json.loads(line) for line in lines[:9]]
    trainer = CnclipTrainer(cfg_file=str(file), train_dataset=rows)
    with pytest.raises(RecipeError, match=r"training data: '10 pairs .*' then, '9 pairs .*' now"):
        trainer.train()
    assert values["dataset"]["train"] == str(data)


def test_harmless_changes_are_no_changes(stopped: Path, recipe: Callable[..., Path]) -> None:
    assert run(recipe("work", logging={"interval": 5}, dist_timeout=9)).progress.step == STEPS


def test_resume_never(stopped: Path, recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"train.resume is never, but .*step_00000006 is there; use another work dir"):
        run(recipe("work", resume="never"))


def test_only_the_weights(stopped: Path, recipe: Callable[..., Path]) -> None:
    saved = checkpointing.newest(stopped)
    trainer = CnclipTrainer(cfg_file=str(recipe("fresh")), callbacks=[StopAt(1)])
    with pytest.raises(Stop):
        trainer.train(str(saved), load_all_state=False)
    assert trainer.progress.step == 1
    start = load_file(saved / checkpointing.WEIGHTS)
    assert torch.equal(trainer.towers.visual.pos_embed, start["visual.pos_embed"])  # frozen in the first stage


def test_a_full_disk_leaves_the_checkpoint_before(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpointing._tensors
    calls = []

    def full(tensors: Any, file: Path) -> None:
        calls.append(file)
        if len(calls) == 8:  # the optimizer's file of the third checkpoint
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, file)

    monkeypatch.setattr(checkpointing, "_tensors", full)
    with pytest.raises(OSError, match=r"not written: No space left on device; the last good one is .*step_00000004"):
        run(recipe("work"))
    folder = tmp_path / "work" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000002", "step_00000004"]
    monkeypatch.setattr(checkpointing, "_tensors", write)
    run(recipe("work"))
    run(recipe("whole"))
    assert_same(tmp_path / "whole", tmp_path / "work")


def test_a_run_that_died_while_it_saved_leaves_nothing_behind(stopped: Path, recipe: Callable[..., Path]) -> None:
    left = stopped / "checkpoints" / ".step_00000008.tmp"
    left.mkdir()
    (left / checkpointing.WEIGHTS).write_bytes(b"half")
    run(recipe("work"))
    assert not left.exists()
