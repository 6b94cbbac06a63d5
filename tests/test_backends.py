"""Running the towers: half precision points the same way, and which device and precision are picked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from modelscope_cnclip.backends import PRECISIONS, cpu_has_bf16, pick_device, pick_precision
from modelscope_cnclip.encoder import Encoder

TEXTS = ["猫", "一只橘色的猫趴在窗台上晒太阳，旁边放着一盆绿植和一本翻开的书", "", "a photo of a cat", "2024年北京车展"]


@pytest.mark.parametrize("tower", ["vit", "resnet", "timm"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_points_the_same_way(
    tower: str, precision: str, make_folder: Callable[..., Path], pictures: list[Path]
) -> None:
    full, half = (
        Encoder.from_pretrained(make_folder(tower), precision=name, device="cpu") for name in ("fp32", precision)
    )
    for one, other in (
        (full.encode_image(pictures), half.encode_image(pictures)),
        (full.encode_text(TEXTS), half.encode_text(TEXTS)),
    ):
        assert other.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(other, axis=1), 1, atol=1e-6)
        assert (one * other).sum(1).min() >= 0.999
    assert half.logit_scale == full.logit_scale
    assert torch.equal(half.backend.model.logit_scale, full.backend.model.logit_scale)
    assert {p.dtype for n, p in half.backend.model.named_parameters() if n != "logit_scale"} == {PRECISIONS[precision]}


def test_auto_gives_up_no_accuracy(model_folder: Path, encoder: Encoder) -> None:
    auto = Encoder.from_pretrained(model_folder, device="cpu")
    assert auto.backend.precision == ("bf16" if cpu_has_bf16() else "fp32")
    assert (auto.encode_text(TEXTS) * encoder.encode_text(TEXTS)).sum(1).min() >= 0.999


def test_the_logit_scale_is_the_checkpoints(model_folder: Path, encoder: Encoder) -> None:
    stored = torch.load(model_folder / "pytorch_model.bin", weights_only=True)["logit_scale"]
    assert encoder.logit_scale == pytest.approx(stored.exp().item(), rel=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu", "gpu:0"])
def test_a_gpu_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}': .*no CUDA device here; use device='cpu'"):
        pick_device(device)


def test_a_precision_for_each_device() -> None:
    assert pick_precision("auto", "cuda:1") == "fp16"
    assert pick_precision("auto", "mps") == "fp32"
    assert pick_precision("bf16", "mps") == "bf16"
    assert pick_device(torch.device("cpu")) == "cpu"
