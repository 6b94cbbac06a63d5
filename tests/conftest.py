"""Tiny models in every layout, real pictures, and a loopback Hub that the genuine client talks to."""

from __future__ import annotations

import os

# The client reads these once, when it is first imported.
os.environ.setdefault("MODELSCOPE_API_MAX_RETRIES", "1")
os.environ.setdefault("MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS", "1")
# Read when torch is imported. OpenMP's threads spin while they wait for one another, and where other programs have the
# cores, each layer of a tiny model then takes milliseconds: a text of 1 ms took 160.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modelscope_cnclip import checkpoint, layouts
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.images import ImageError, open_image
from modelscope_cnclip.towers import ChineseCLIP, TowerConfig

from .loopback_hub import LoopbackHub
from .loopback_site import Site

PICTURES = Path(__file__).parent.parent / "examples" / "pictures"

TEXT = {
    "vocab_size": 21128,
    "text_hidden_size": 64,
    "text_intermediate_size": 128,
    "text_num_attention_heads": 1,
    "text_num_hidden_layers": 2,
}
VIT = TowerConfig(embed_dim=32, image_resolution=64, vision_layers=2, vision_width=128, vision_patch_size=16, **TEXT)
RESNET = TowerConfig(embed_dim=32, image_resolution=64, vision_layers=(1, 1, 1, 1), vision_width=16, **TEXT)
TIMM = TowerConfig(embed_dim=32, image_resolution=64, vision_timm="test_efficientnet", **TEXT)
CONFIGS = {"vit": VIT, "resnet": RESNET, "timm": TIMM}


def make_model(config: TowerConfig, seed: int = 0) -> ChineseCLIP:
    """Random weights that depend on the seed alone; every bias and norm is moved off its initial 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ChineseCLIP(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """``make_folder("vit", "modelscope")`` -> a checkpoint of that tower in that layout; made once per session."""
    made: dict[tuple[str, str], Path] = {}

    def make(tower: str = "vit", layout: str = "modelscope") -> Path:
        if (tower, layout) not in made:
            target = tmp_path_factory.mktemp(f"{tower}-{layout}")
            if layout == "cn_clip":
                target /= "model.pt"
            written = checkpoint.Checkpoint.of(make_model(CONFIGS[tower]), layouts.default_vocab())
            made[tower, layout] = checkpoint.write(written, target, layout)
        return made[tower, layout]

    return make


@pytest.fixture(scope="session")
def model_folder(make_folder: Callable[..., Path]) -> Path:
    """A tiny ViT checkpoint in ModelScope's layout. Don't write into it."""
    return make_folder()


@pytest.fixture(scope="session")
def encoder(model_folder: Path) -> Encoder:
    """A tiny fp32 Encoder on the CPU."""
    return Encoder.from_pretrained(model_folder, precision="fp32", device="cpu")


@pytest.fixture(scope="session")
def pictures() -> list[Path]:
    """The twelve real pictures of ``examples/pictures``."""
    return sorted(PICTURES.glob("*.png"))


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """Twelve real pairs."""
    lines = (PICTURES / "captions.tsv").read_text(encoding="utf-8").splitlines()
    return [{"image": str(PICTURES / name), "text": text} for name, text in (line.split("\t") for line in lines)]


@pytest.fixture
def make(tmp_path: Path, make_folder: Callable[..., Path], rows: list[dict[str, str]]) -> Callable[..., Any]:
    """A trainer over a tiny model and twelve pairs, in fp32; ``train`` is merged into the recipe's section."""

    def build(work: str = "work", tower: str = "vit", *, top: dict | None = None, train: dict, **kwargs: Any) -> Any:
        from modelscope_cnclip.trainers.trainer import CnclipTrainer

        section = {"precision": "fp32", "dataloader": {"batch_size_per_gpu": 4}, "logging": {"interval": 1}} | train
        file = tmp_path / f"{work}.json"
        file.write_text(json.dumps({"task": "multi-modal-embedding", "train": section} | (top or {})))
        given = {"model": str(make_folder(tower)), "train_dataset": rows} | kwargs
        return CnclipTrainer(cfg_file=str(file), work_dir=str(tmp_path / work), **given)

    return build


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """An empty Hub on loopback; the genuine client uses it, with an empty cache, for the length of the test."""
    from modelscope.utils.automodel_utils import _is_model_from_trusted_source
    from modelscope_hub.config import set_default_config

    with LoopbackHub() as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.endpoint)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
        set_default_config(None)
        _is_model_from_trusted_source.cache_clear()
        yield server
    monkeypatch.undo()
    set_default_config(None)
    _is_model_from_trusted_source.cache_clear()


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Site() as server:
        yield server


@pytest.fixture
def bucket(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The same server as the OSS endpoint, without keys. An IP address makes oss2 put the bucket into the path."""
    for name in ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN", "OSS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OSS_ENDPOINT", site.address)
    return site


@pytest.fixture(scope="session")
def path(pictures: list[Path]) -> Path:
    return pictures[0]


@pytest.fixture(scope="session")
def data(path: Path) -> bytes:
    return path.read_bytes()


@pytest.fixture(scope="session")
def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def assert_shows(source: Any, pixels: np.ndarray) -> None:
    assert np.array_equal(np.asarray(open_image(source).convert("RGB")), pixels)


def assert_refused(source: Any, *says: str) -> None:
    """An ImageError of one line that says all of this."""
    with pytest.raises(ImageError) as caught:
        open_image(source)
    text = str(caught.value)
    assert "\n" not in text
    for part in says:
        assert part in text
