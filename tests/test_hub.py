"""Models by Hub id through the genuine client: what is fetched, what breaks, and names that are no model at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import modelscope_hub._download
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import ChineseCLIPModel

from modelscope_cnclip import checkpoint
from modelscope_cnclip.checkpoint import Checkpoint, CheckpointError
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.hub import HubError, locate

from .conftest import VIT, make_model
from .loopback_hub import LoopbackHub

ID = "damo/multi-modal_clip-vit-base-patch16_zh"
TEXTS = ["一只猫", "一条狗"]
OFFICIAL = {
    "README.md",
    "configuration.json",
    "pytorch_model.bin",
    "text_model_config.json",
    "vision_model_config.json",
    "vocab.txt",
}


def fetched(hub: LoopbackHub) -> list[str]:
    """The files that were downloaded so far, in order."""
    return [request.query["FilePath"] for request in hub.requests if "FilePath" in request.query]


def clutter(source: Path, target: Path, *names: str) -> Path:
    """A copy of a repository with more files in it."""
    shutil.copytree(source, target)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(b"not needed")
    return target


def load(model: str | Path) -> Encoder:
    return Encoder.from_pretrained(model, precision="fp32", device="cpu")


@pytest.mark.parametrize("model_id", [ID, "iic/multi-modal_clip-vit-base-patch16_zh", "someone/My.Model_2"])
def test_an_id_is_downloaded_once_and_is_the_model(
    model_id: str, hub: LoopbackHub, model_folder: Path, encoder: Encoder
) -> None:
    hub.add_model(model_id, model_folder)
    for _ in range(2):
        loaded = load(model_id)
        np.testing.assert_array_equal(loaded.encode_text(TEXTS), encoder.encode_text(TEXTS))
        assert sorted(fetched(hub)) == sorted(OFFICIAL)
    assert loaded.model_id == model_id
    assert locate(model_id).is_relative_to(os.environ["MODELSCOPE_CACHE"])


def test_only_one_copy_of_the_weights_is_fetched(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    """The official repositories also hold a .pt, exported models and pictures."""
    more = (
        "clip_cn_vit-b-16.pt",
        "img.fp32.onnx",
        "model.onnx",
        "resources/pokemon.jpeg",
        "onnx/model.onnx",
        "x.msgpack",
    )
    hub.add_model(ID, clutter(model_folder, tmp_path / "repo", *more))
    load(ID)
    assert set(fetched(hub)) == OFFICIAL


def test_safetensors_are_preferred(hub: LoopbackHub, tmp_path: Path) -> None:
    written = Checkpoint.of(make_model(VIT), checkpoint.layouts.default_vocab())
    hub.add_model(ID, checkpoint.write(written, tmp_path / "both", weights="both"))
    load(ID)
    assert set(fetched(hub)) == OFFICIAL - {"pytorch_model.bin"} | {"model.safetensors"}


def test_a_transformers_repository(
    hub: LoopbackHub, make_folder: Callable[..., Path], tmp_path: Path, encoder: Encoder
) -> None:
    repository = clutter(make_folder("vit", "transformers"), tmp_path / "repo", "pytorch_model.bin", "tf_model.h5")
    hub.add_model("someone/converted", repository)
    np.testing.assert_allclose(load("someone/converted").encode_text(TEXTS), encoder.encode_text(TEXTS), atol=1e-6)
    assert not {"pytorch_model.bin", "tf_model.h5"} & set(fetched(hub))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_transformers_repository_in_shards(
    kind: str, hub: LoopbackHub, make_folder: Callable[..., Path], tmp_path: Path, encoder: Encoder
) -> None:
    source, target = make_folder("vit", "transformers"), tmp_path / "shards"
    if kind == "safetensors":
        ChineseCLIPModel.from_pretrained(source).save_pretrained(target, max_shard_size="3MB")
    else:  # as older versions of transformers wrote them
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
        state = load_file(source / "model.safetensors")
        halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": sorted(state)[i::2] for i in range(2)}
        for name, keys in halves.items():
            torch.save({key: state[key] for key in keys}, target / name)
        index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
        (target / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    shutil.copy(source / "vocab.txt", target)
    hub.add_model("someone/sharded", target)
    np.testing.assert_allclose(load("someone/sharded").encode_text(TEXTS), encoder.encode_text(TEXTS), atol=1e-6)
    assert sum("-of-0" in name for name in fetched(hub)) == len(list(target.glob("*-of-*"))) > 1


def test_a_repository_that_holds_one_pt(
    hub: LoopbackHub, make_folder: Callable[..., Path], tmp_path: Path, encoder: Encoder
) -> None:
    (tmp_path / "repo").mkdir()
    shutil.copy(make_folder("vit", "cn_clip"), tmp_path / "repo/clip_cn_vit-b-16.pt")
    (tmp_path / "repo/README.md").write_text("# a finetune", encoding="utf-8")
    hub.add_model("someone/finetuned", tmp_path / "repo")
    np.testing.assert_array_equal(load("someone/finetuned").encode_text(TEXTS), encoder.encode_text(TEXTS))


def test_a_repository_without_a_model(hub: LoopbackHub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# nothing here", encoding="utf-8")
    hub.add_model("someone/empty", tmp_path)
    with pytest.raises(CheckpointError, match="no Chinese CLIP in this folder"):
        load("someone/empty")


def test_a_cut_download_goes_on_where_it_stopped(hub: LoopbackHub, model_folder: Path, encoder: Encoder) -> None:
    hub.add_model(ID, model_folder)
    hub.cut("pytorch_model.bin", after=1_000_000)
    np.testing.assert_array_equal(load(ID).encode_text(TEXTS), encoder.encode_text(TEXTS))
    ranges = [r.headers["Range"] for r in hub.requests if r.query.get("FilePath") == "pytorch_model.bin"]
    assert ranges == [None, "bytes=1000000-"]


def test_a_corrupt_download_is_refused_and_not_kept(
    hub: LoopbackHub, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_INTEGRITY_RETRY_BACKOFF", 0)
    hub.add_model(ID, model_folder)
    hub.corrupt("pytorch_model.bin")
    with pytest.raises(HubError, match=f"{ID}: download failed"):
        load(ID)
    assert not list(Path(os.environ["MODELSCOPE_CACHE"]).rglob("pytorch_model.bin*"))
    hub.stop()
    with pytest.raises((HubError, CheckpointError)):  # the small files alone make no model
        load(ID)


def test_a_model_that_changed_on_the_hub_is_fetched_again(hub: LoopbackHub, model_folder: Path, tmp_path: Path) -> None:
    hub.add_model(ID, model_folder)
    before = load(ID).encode_text(TEXTS)
    written = Checkpoint.of(make_model(VIT, seed=1), checkpoint.layouts.default_vocab())
    other = checkpoint.write(written, tmp_path / "other")
    hub.add_model(ID, other)
    after = load(ID).encode_text(TEXTS)
    np.testing.assert_array_equal(after, load(other).encode_text(TEXTS))
    assert not np.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("revision", [None, "v9.9.9"])
def test_an_unknown_id_or_revision_is_named(revision: str | None, hub: LoopbackHub, model_folder: Path) -> None:
    model_id = "damo/no-such-model"
    if revision is not None:
        hub.add_model(model_id, model_folder)
    with pytest.raises(HubError, match=f"{model_id}: no such model or revision"):
        locate(model_id, revision=revision)


def test_without_the_hub_the_cache_is_used_and_said(
    hub: LoopbackHub, model_folder: Path, encoder: Encoder, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_model(ID, model_folder)
    load(ID)
    hub.stop()
    with caplog.at_level(logging.WARNING, "modelscope_cnclip"):
        again = load(ID)
    np.testing.assert_array_equal(again.encode_text(TEXTS), encoder.encode_text(TEXTS))
    said = [record.getMessage() for record in caplog.records if record.name == "modelscope_cnclip"]
    assert len(said) == 1
    assert ID in said[0]
    assert "can't be reached" in said[0]


def test_without_the_hub_and_without_a_cache(hub: LoopbackHub) -> None:
    hub.stop()
    with pytest.raises(HubError, match=f"{ID}: not in the cache, and the Hub can't be reached"):
        load(ID)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nofile.pt",
        "a/b/c",
        "org/name.pt",
        "./model",
        "../model",
        "/no/such/folder",
        "~/no-such-folder-of-mine",
        "~nobody-of-that-name/model",
        "模型/中文",
        "org/",
        "/name",
        "org/name\n",
        "a\0b",
        "x" * 300,
        Path("org/name"),
    ],
    ids=lambda name: repr(str(name)[:30]),
)
def test_names_that_are_neither_path_nor_id(name: str | Path, hub: LoopbackHub) -> None:
    with pytest.raises(HubError) as caught:
        locate(name)
    assert str(name) in str(caught.value)
    assert hub.requests == []


def test_a_local_folder_comes_before_an_id(
    hub: LoopbackHub, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    hub.add_model("org/name", model_folder)
    assert locate("org/name") == Path("org/name")
    assert hub.requests == []


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate("~/model") == tmp_path / "model"
