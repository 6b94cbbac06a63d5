"""Reading, writing and converting checkpoints: bit-exact round trips, and files that lie."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelscope_cnclip import checkpoint, keymaps, layouts
from modelscope_cnclip.checkpoint import Checkpoint, CheckpointError

from .conftest import CONFIGS, VIT, make_model

State = dict[str, torch.Tensor]


def cn_clip_state(tower: str = "vit", dtype: torch.dtype = torch.float32) -> State:
    """Weights under cn_clip's names; in fp16 the norms stay fp32, as cn_clip's ``convert_weights`` leaves them."""
    state = keymaps.from_towers(dict(make_model(CONFIGS[tower]).state_dict()))
    return {
        key: value.to(dtype) if value.is_floating_point() and "ln_" not in key and key != "logit_scale" else value
        for key, value in state.items()
    }


def path_for(folder: Path, layout: str) -> Path:
    return folder / f"{layout}.pt" if layout == "cn_clip" else folder / layout


def assert_same(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(checkpoint.LAYOUTS, 2)))
def test_round_trips_are_bit_exact(first: str, second: str, dtype: torch.dtype, tmp_path: Path) -> None:
    state = cn_clip_state(dtype=dtype)
    a, b, again = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for folder in (a, b, again):
        folder.mkdir()
    checkpoint.write(Checkpoint(a, "modelscope", VIT, dict(state), layouts.default_vocab()), path_for(a, first), first)
    checkpoint.convert(path_for(a, first), path_for(b, second), second)
    checkpoint.convert(path_for(b, second), path_for(again, first), first)
    read = checkpoint.read(path_for(again, first))
    assert read.config == VIT
    assert_same(read.state, state)


@pytest.mark.parametrize("tower", ["resnet", "timm"])
@pytest.mark.parametrize("weights", ["bin", "safetensors", "both"])
def test_other_towers_round_trip_in_our_folder(tower: str, weights: str, tmp_path: Path) -> None:
    state = cn_clip_state(tower)
    written = Checkpoint(tmp_path, "modelscope", CONFIGS[tower], state, layouts.default_vocab())
    checkpoint.write(written, tmp_path / "out", weights=weights)
    read = checkpoint.read(tmp_path / "out")
    assert read.config == CONFIGS[tower]
    assert_same(read.state, state)
    assert {p.name for p in (tmp_path / "out").glob("*model.*")} == {
        "bin": {"pytorch_model.bin"},
        "safetensors": {"model.safetensors"},
        "both": {"pytorch_model.bin", "model.safetensors"},
    }[weights]


def test_a_real_pooler_survives_and_a_placeholder_does_not(tmp_path: Path) -> None:
    state = cn_clip_state()
    state["bert.pooler.dense.weight"], state["bert.pooler.dense.bias"] = torch.randn(64, 64), torch.randn(64)
    for layout in checkpoint.LAYOUTS:
        path = path_for(tmp_path, layout)
        checkpoint.write(Checkpoint(path, "modelscope", VIT, state, layouts.default_vocab()), path, layout)
        assert_same(checkpoint.read(path).state, state)
        model = checkpoint.read(path).build()
        assert_same(Checkpoint.of(model, None).state, state)
    checkpoint.write(Checkpoint.of(make_model(VIT), None), tmp_path / "without")
    assert "bert.pooler.dense.weight" in torch.load(tmp_path / "without/pytorch_model.bin", weights_only=True)
    assert not any("pooler" in key for key in checkpoint.read(tmp_path / "without").state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3, "optimizer": {"state": {}}},
        lambda s: {f"clip_model.{k}": v for k, v in s.items()},
        lambda s: {"state_dict": {f"module.clip_model.{k}": v for k, v in s.items()}},
        lambda s: s | {"bert.embeddings.position_ids": torch.arange(512)[None]},
    ],
    ids=["bare", "state_dict", "cn_clip training", "clip_model", "module.clip_model", "old position_ids"],
)
def test_wrappings_that_occur(wrap: Callable[[State], dict], tmp_path: Path) -> None:
    torch.save(wrap(cn_clip_state()), tmp_path / "x.pt")
    read = checkpoint.read(tmp_path / "x.pt")
    assert read.config == VIT
    model, reference = read.build(), make_model(VIT)
    for key, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_sharded_safetensors_and_bin(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import ChineseCLIPModel

    source = make_folder("vit", "transformers")
    ChineseCLIPModel.from_pretrained(source).save_pretrained(tmp_path / "shards", max_shard_size="3MB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert_same(checkpoint.read(tmp_path / "shards").state, checkpoint.read(source).state)

    from safetensors.torch import load_file

    (tmp_path / "bin").mkdir()
    shutil.copy(source / "config.json", tmp_path / "bin")
    state = load_file(source / "model.safetensors")
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, keys in shards.items():
        torch.save({key: state[key] for key in keys}, tmp_path / "bin" / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (tmp_path / "bin/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(checkpoint.read(tmp_path / "bin").state, checkpoint.read(source).state)


def test_dtype_and_no_random_weights_left(model_folder: Path) -> None:
    model = checkpoint.read(model_folder).build(torch.bfloat16)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds.pop("logit_scale") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert not model.training


def test_layouts_without_a_place_for_a_tower(tmp_path: Path) -> None:
    resnet, timm = (Checkpoint.of(make_model(CONFIGS[t]), None) for t in ("resnet", "timm"))
    with pytest.raises(CheckpointError, match="ResNet"):
        checkpoint.write(resnet, tmp_path / "a", "transformers")
    for layout in ("transformers", "cn_clip"):
        with pytest.raises(CheckpointError, match="test_efficientnet"):
            checkpoint.write(timm, tmp_path / "b.pt", layout)
    with pytest.raises(CheckpointError, match="onnx"):
        checkpoint.write(resnet, tmp_path / "c", "onnx")
    assert not any(tmp_path.iterdir())


def test_nothing_is_written_over(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "x.pt").touch()
    for target, layout in (("full", "modelscope"), ("x.pt", "cn_clip")):
        with pytest.raises(CheckpointError, match="exists already"):
            checkpoint.convert(model_folder, tmp_path / target, layout)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Checkpoint.of(make_model(VIT), layouts.default_vocab())
    checkpoint.write(model, tmp_path)
    before = (tmp_path / "pytorch_model.bin").read_bytes()

    def full_disk(values: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write(model, tmp_path)
    assert (tmp_path / "pytorch_model.bin").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


class Payload:
    """Runs code when an unrestricted pickle reads it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "legacy.pt", "plain.pt"])
def test_a_pickle_with_code_is_refused_and_not_run(name: str, model_folder: Path, tmp_path: Path) -> None:
    marker, target = tmp_path / "ran", tmp_path / "model"
    shutil.copytree(model_folder, target)
    payload = {"state_dict": cn_clip_state() | {"x": Payload(marker)}}
    if name == "plain.pt":
        (target / name).write_bytes(pickle.dumps(payload["state_dict"]["x"]))
    else:
        torch.save(payload, target / name, _use_new_zipfile_serialization=name != "legacy.pt")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        checkpoint.read(target if name.endswith(".bin") else target / name)
    assert not marker.exists()


def _broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Damage a ModelScope folder in one way each; name -> (what to read, what the message says)."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, folder.parent / name))

    cases = {}
    for name, file, content, says in (
        ("configuration.json isn't JSON", "configuration.json", b"{oops", "configuration.json: not JSON"),
        ("vision config isn't JSON", "vision_model_config.json", b"\xff\xfe", "vision_model_config.json: not JSON"),
        ("vision config is a list", "vision_model_config.json", b"[]", "expected a JSON object"),
        ("vision config lacks keys", "vision_model_config.json", b"{}", "embed_dim"),
        ("weights empty", "pytorch_model.bin", b"", "empty file"),
        ("weights are text", "pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\n", "pytorch_model.bin"),
    ):
        target = copy(name)
        (target / file).write_bytes(content)
        cases[name] = (target, says)
    target = copy("truncated")
    data = (target / "pytorch_model.bin").read_bytes()
    (target / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    cases["truncated"] = (target, "truncated")
    target = copy("no weights")
    (target / "pytorch_model.bin").unlink()
    cases["no weights"] = (target, "neither")
    for name, values in (("a list", [1]), ("numbers", {"a": 1}), ("nothing", {})):
        target = copy(f"holds {name}")
        torch.save(values, target / "pytorch_model.bin")
        cases[f"holds {name}"] = (target, "not a mapping")
    target = copy("truncated safetensors")
    checkpoint.write(checkpoint.read(folder), target, weights="safetensors")
    data = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(data[:-100])
    cases["truncated safetensors"] = (target, "truncated or not safetensors")
    (folder.parent / "empty").mkdir()
    cases["empty folder"] = (folder.parent / "empty", "no Chinese CLIP in this folder")
    cases["no such folder"] = (folder.parent / "nowhere", "no such file or folder")
    torch.save({"conv.weight": torch.zeros(1)}, folder.parent / "resnet.pt")
    cases["another model"] = (folder.parent / "resnet.pt", "no visual.conv1.weight in it, but conv.weight")
    return cases


def test_damaged_checkpoints_say_what_is_wrong(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "good"))
    for name, (path, says) in _broken(folder).items():
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read(path)
        assert says in str(caught.value), name
        assert str(path) in str(caught.value), name


def test_wrong_weights_name_the_first_three_keys(model_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "x"))
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    gone = [key for key in state if "bert.encoder.layer.1." in key]
    for key in gone:
        del state[key]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    state["text_projection"] = torch.zeros(64, 33)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(folder).build()
    text = str(caught.value)
    assert f"{len(gone)} missing: {', '.join(gone[:3])}" in text
    assert "5 not of this model: extra.0, extra.1, extra.2" in text
    assert "text_projection (64, 33) instead of (64, 32)" in text
    assert str(folder) in text


def test_an_index_that_points_out_of_its_folder_is_refused(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copy(make_folder("vit", "transformers") / "config.json", tmp_path)
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="files of this folder"):
        checkpoint.read(tmp_path)


def test_transformers_folders_that_are_not_chinese_clip(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="'bert'"):
        checkpoint.read(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "chinese_clip", "vision_config": {"hidden_act": "gelu"}}')
    with pytest.raises(CheckpointError, match="quick_gelu"):
        checkpoint.read(tmp_path)


def test_a_folder_without_vocabulary(model_folder: Path, tmp_path: Path) -> None:
    from modelscope_cnclip.encoder import Encoder
    from modelscope_cnclip.preprocessor import VocabularyError

    folder = Path(shutil.copytree(model_folder, tmp_path / "x"))
    (folder / "vocab.txt").unlink()
    with pytest.raises(VocabularyError, match=r"no vocab\.txt"):
        Encoder.from_pretrained(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000), flips=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), max_size=8))
def test_damaged_weights_never_raise_anything_else(cut: int, flips: list[tuple[int, int]], tmp_path: Path) -> None:
    """Bytes flipped or cut off: the file loads, or it's a CheckpointError. The header is where damage hurts."""
    good = tmp_path / "good.pt"
    if not good.exists():
        torch.save({"visual.conv1.weight": torch.zeros(4, 3, 2, 2), "logit_scale": torch.zeros(())}, good)
    data = bytearray(good.read_bytes())
    for position, value in flips:
        data[position % len(data)] = value
    (tmp_path / "bad.pt").write_bytes(data[: max(0, len(data) - cut)] if cut < len(data) else b"")
    with pytest.raises(CheckpointError, match=r"bad\.pt"):
        checkpoint.read(tmp_path / "bad.pt")


def test_a_zip_that_is_no_checkpoint(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("hello.txt", "hello")
    with pytest.raises(CheckpointError, match="not a PyTorch file"):
        checkpoint.read(tmp_path / "x.pt")


def test_reading_only_the_shapes(make_folder: Callable[..., Path]) -> None:
    for layout in checkpoint.LAYOUTS:
        config, vocab = checkpoint.read_config(make_folder("vit", layout))
        assert config == VIT
        assert vocab is not None
