"""The registered model: forward as the host calls it, saving, and folders that the built-in class loads too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from modelscope.models.multi_modal.clip.model import CLIPForMultiModalEmbedding
from modelscope.utils.config import Config

from modelscope_cnclip import checkpoint, keymaps, layouts
from modelscope_cnclip.checkpoint import Checkpoint
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.model import CnclipModel
from modelscope_cnclip.preprocessor import CnclipPreprocessor

from .conftest import CONFIGS, make_model

TEXTS = ["猫", "一只橘色的猫趴在窗台上晒太阳", ""]


def as_official(tower: str, folder: Path, *, resave: bool) -> Path:
    """A folder of ours with weights that fp16 holds exactly, as the official ones: the built-in rounds to that."""
    state = keymaps.from_towers(dict(make_model(CONFIGS[tower]).state_dict()))
    state = {key: value.half().float() if value.is_floating_point() else value for key, value in state.items()}
    checkpoint.write(Checkpoint(folder, "modelscope", CONFIGS[tower], state, layouts.default_vocab()), folder)
    if resave:
        CnclipModel(str(folder)).save_pretrained(folder / "again")
        return folder / "again"
    return folder


@pytest.mark.parametrize("resave", [False, True], ids=["written", "save_pretrained"])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_our_folders_load_in_the_built_in_class(tower: str, resave: bool, tmp_path: Path, pictures: list[Path]) -> None:
    """Its loading is strict: a BERT pooler is demanded, and nothing else may be there."""
    folder = as_official(tower, tmp_path, resave=resave)
    builtin = CLIPForMultiModalEmbedding(str(folder))
    inputs = CnclipPreprocessor(str(folder))({"img": pictures[:3], "text": TEXTS})
    theirs, ours = builtin(inputs), CnclipModel(str(folder))(inputs)
    for key in ("img_embedding", "text_embedding"):
        np.testing.assert_allclose(ours[key].numpy(), theirs[key].numpy(), rtol=0, atol=1e-5)
    torch.testing.assert_close(CnclipModel(str(folder)).temperature, builtin.temperature.detach())


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_forward_equals_the_encoder(
    layout: str, make_folder: Callable[..., Path], encoder: Encoder, pictures: list[Path]
) -> None:
    folder = str(make_folder("vit", layout))
    out = CnclipModel(folder)(CnclipPreprocessor(folder)({"img": pictures, "text": TEXTS}))
    assert not out["img_embedding"].requires_grad
    np.testing.assert_allclose(out["img_embedding"], encoder.encode_image(pictures), rtol=0, atol=1e-5)
    np.testing.assert_allclose(out["text_embedding"], encoder.encode_text(TEXTS), rtol=0, atol=1e-5)


def test_an_absent_side_is_none(model_folder: Path) -> None:
    model, size = CnclipModel(str(model_folder)), 64
    assert model({"text": torch.tensor([[101, 102]])})["img_embedding"] is None
    assert model({"img": torch.zeros(1, 3, size, size), "text": None})["text_embedding"] is None


def test_the_hosts_collate_dimension_is_dropped(model_folder: Path) -> None:
    model = CnclipModel(str(model_folder))
    image, text = torch.randn(3, 3, 64, 64), torch.tensor([[101, 5000, 102]] * 3)
    flat, stacked = model({"img": image, "text": text}), model({"img": image[:, None], "text": text[:, None]})
    for key in flat:
        assert torch.equal(flat[key], stacked[key])


def test_train_mode_keeps_the_graph(model_folder: Path) -> None:
    model = CnclipModel(str(model_folder)).train()
    inputs = {"img": torch.randn(3, 3, 64, 64), "text": torch.tensor([[101, 5000 + i, 102] for i in range(3)])}
    out = model(inputs | {"mode": "train"})
    logits = out["logit_scale"] * out["img_embedding"] @ out["text_embedding"].T
    torch.nn.functional.cross_entropy(logits, torch.arange(3)).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    torch.testing.assert_close(out["logit_scale"].detach(), 1 / model.temperature)


def test_another_resolution_is_saved_with_the_model(model_folder: Path, tmp_path: Path) -> None:
    CnclipModel(str(model_folder), resolution=96).save_pretrained(tmp_path)
    again = CnclipModel(str(tmp_path))
    assert again.clip_model.config.image_resolution == 96
    assert again({"img": torch.zeros(1, 3, 96, 96)})["img_embedding"].shape == (1, 32)


def test_saving_as_the_hosts_trainer_does(model_folder: Path, tmp_path: Path) -> None:
    """It passes a file name and functions of its own, and the configuration that the folder shall have."""
    config = Config({"framework": "pytorch", "task": "multi-modal-embedding", "model": {"type": "cnclip"}})
    CnclipModel(str(model_folder)).save_pretrained(
        tmp_path, "pytorch_model.bin", save_function=None, config=config, save_config_function=None
    )
    assert json.loads((tmp_path / "configuration.json").read_text())["model"]["type"] == "cnclip"
    assert checkpoint.read(tmp_path).config == checkpoint.read(model_folder).config


def test_weights_keep_the_built_ins_prefix(model_folder: Path) -> None:
    assert all(name.startswith("clip_model.") for name in CnclipModel(str(model_folder)).state_dict())
