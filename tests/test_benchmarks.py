"""The benchmarks run: at tiny shapes, for what they compare and how they count, never for how fast anything is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from modelscope_cnclip import layouts
from modelscope_cnclip.backends import cpu_has_bf16

from .conftest import VIT


def test_training_steps_of_both_sides_are_timed_in_turns(capfd: pytest.CaptureFixture) -> None:
    pytest.importorskip("cn_clip")
    from benchmarks import train

    rows = train.compare(VIT, rounds=2, steps=2)
    ours = 2 if cpu_has_bf16() else 1
    assert [row["group"] for row in rows] == ["stage 1"] * (1 + 2 * ours) + ["full step"] * (1 + ours)
    assert all(len(row["all"]) == 4 for row in rows)  # 2 rounds of 2, warm-up left out
    assert all(seconds > 0 for row in rows for both in row["all"] for seconds in both)
    assert [row["ratio"] for row in rows if row["name"] == "cn_clip fp32"] == [1, 1]
    assert len([row for row in rows if row["held to"]]) == 3
    assert "| stage 1 | ours fp32, features kept |" in capfd.readouterr().out


def test_both_sides_train_the_same_parameters_and_start_from_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cn_clip")
    from dataclasses import replace

    from cn_clip.training import train as theirs

    from benchmarks import train
    from modelscope_cnclip.trainers.trainer import CnclipTrainer

    seen: dict[str, list] = {"theirs": [], "ours": []}
    get_loss, step, build = theirs.get_loss, CnclipTrainer.train_step, torch.optim.AdamW.__init__

    def their_loss(model, *args, **kwargs):
        loss, accuracy = get_loss(model, *args, **kwargs)
        seen["theirs"].append((sum(p.numel() for p in model.parameters() if p.requires_grad), loss.item()))
        return loss, accuracy

    def our_step(self, model, inputs):
        step(self, model, inputs)
        trained = sum(p.numel() for p in self.towers.parameters() if p.requires_grad)
        seen["ours"].append((trained, self.train_outputs["loss"]))

    def still(self, params, **kwargs):  # nothing moves, so that every first loss is that of the same weights
        build(self, params, **kwargs | {"lr": 0.0})

    monkeypatch.setattr(theirs, "get_loss", their_loss)
    monkeypatch.setattr(CnclipTrainer, "train_step", our_step)
    monkeypatch.setattr(torch.optim.AdamW, "__init__", still)
    monkeypatch.setattr(train, "LR", 0.0)
    quiet = replace(VIT, text_hidden_dropout_prob=0.0, text_attention_probs_dropout_prob=0.0)
    monkeypatch.setattr(train, "BATCH", 32)  # all pairs at once: their order doesn't matter
    train.compare(quiet, rounds=1, steps=1)
    assert {trained for trained, _ in seen["theirs"]} == {trained for trained, _ in seen["ours"]}
    reference = seen["theirs"][0][1]
    assert [loss for _, loss in seen["theirs"]] == pytest.approx([reference] * len(seen["theirs"]), abs=1e-5)
    assert [loss for _, loss in seen["ours"]] == pytest.approx([reference] * len(seen["ours"]), abs=2e-2)  # bf16


def test_the_ablation_gives_every_arm_the_same_budget_and_goes_on(
    tmp_path: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    import timm
    from safetensors.torch import save_file
    from transformers import BertConfig, BertModel

    from benchmarks import ablation

    towers, out = tmp_path / "towers", tmp_path / "out"
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=21128, **shape), add_pooling_layer=False).save_pretrained(towers / "bert")
    shutil.copy(layouts.default_vocab(), towers / "bert" / "vocab.txt")
    save_file(timm.create_model("tf_efficientnet_lite0").state_dict(), towers / "efficientnet_lite0.safetensors")
    lines = [json.dumps({"image": str(picture), "text": f"图{i}"}) for i, picture in enumerate(pictures)]
    for name in ("train", *ablation.VAL, *ablation.TESTS):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    out.mkdir()
    costs = {"features": 0.5, "frozen": 0.1, "full": 0.4, "threads": 1, "precision": "fp32"}
    (out / "calibration.json").write_text(json.dumps(costs))
    monkeypatch.setattr(ablation, "BATCH", 4)
    monkeypatch.setattr(ablation, "RESOLUTION", 32)
    few = {arm: settings[:1] for arm, settings in ablation.GRID.items()}
    monkeypatch.setattr(ablation, "GRID", few)
    arguments = [str(tmp_path), str(towers), str(out), "--seconds", "4", "--seeds", "1", "2"]
    for more in (["--pick"], []):
        monkeypatch.setattr("sys.argv", ["ablation", *arguments, *more])
        ablation.main()

    runs = {arm: ablation.read_run(next(out.glob(f"{arm}_*_seed1.jsonl"))) for arm in few}
    assert [run["start"]["steps"] for run in runs.values()] == [[10], [10], [11, 6]]  # two-stage: 0.4 of 4 s are frozen
    assert runs["two-stage"]["final"]["switch"] == pytest.approx(0.5 + 11 * 0.1)
    for run in runs.values():
        assert run["points"][-1]["spent"] == pytest.approx(4)
        assert 0 < run["final"]["cpu"] < run["final"]["wall"] * 3
        assert {*ablation.TESTS, "val"} <= set(run["final"])
    assert not any(ablation.TESTS[0] in ablation.read_run(file)["final"] for file in out.glob("*_seed0.jsonl"))
    table = (out / "ablation.md").read_text()
    assert all(f"| {arm} |" in table for arm in few)
    assert "± " in table
    assert (out / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("run_*"))  # gigabytes, for a real model

    capfd.readouterr()
    monkeypatch.setattr(ablation, "Opened", None)  # nothing is trained any more
    ablation.main()
    assert (out / "ablation.md").read_text() == table
