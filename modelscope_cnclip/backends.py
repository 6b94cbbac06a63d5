"""What runs the towers, behind two calls that :class:`.encoder.Encoder` knows.

``image(pixels)`` takes (B, r, r, 3) uint8 and ``text(ids, lengths)`` takes (B, L) int64 padded with zeros; both give
(B, D) float32 numpy arrays, L2-normalised. This version has the torch backend.
"""

from __future__ import annotations

import platform
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .preprocessor import ImageTransform
from .towers import ChineseCLIP

BACKENDS = ("torch",)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Backend(Protocol):
    """Both towers, ready to run. Calls from several threads at once are safe."""

    name: str
    precision: str
    device: str
    embed_dim: int
    logit_scale: float

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """(B, r, r, 3) uint8 -> (B, D) float32, L2-normalised."""

    def text(self, ids: Tensor) -> np.ndarray:
        """(B, L) int64, 0 is padding -> (B, D) float32, L2-normalised."""


class TorchBackend:
    """The towers as they are, in eval mode, on one device in one precision.

    Args:
        model: moved to the device and cast in place, unless both are right already.
        transform: for its mean and std.
    """

    name = "torch"

    def __init__(self, model: ChineseCLIP, transform: ImageTransform, device: str, precision: str) -> None:
        scale = model.logit_scale.detach().float()
        self.model = model.to(device=device, dtype=PRECISIONS[precision]).eval()
        self.model.logit_scale.data = scale.to(device)  # bf16 would round 4.6052 to 4.59
        self.transform, self.device, self.precision = transform, device, precision
        self.embed_dim, self.logit_scale = model.config.embed_dim, float(scale.exp())

    @torch.inference_mode()
    def image(self, pixels: np.ndarray) -> np.ndarray:
        values = torch.from_numpy(pixels).to(self.device, non_blocking=True)
        return _unit(self.model.encode_image(self.transform.normalise(values).to(PRECISIONS[self.precision])))

    @torch.inference_mode()
    def text(self, ids: Tensor) -> np.ndarray:
        return _unit(self.model.encode_text(ids.to(self.device, non_blocking=True)))


def pick_device(device: str | None) -> str:
    """``None``, ``gpu`` or ``gpu:1`` as ModelScope writes them -> a torch device name.

    Raises:
        ValueError: a device that this machine or this torch doesn't have.
    """
    cuda = torch.cuda.is_available()
    if device is None:
        device = "cuda" if cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    name = str(device).replace("gpu", "cuda")
    if name.startswith("cuda") and not cuda:
        raise ValueError(f"device {device!r}: torch {torch.__version__} sees no CUDA device here; use device='cpu'")
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # unknown, not built in, or holds no data ("meta")
        reason = str(error).split(". ")[0]
        raise ValueError(f"device {device!r}: torch {torch.__version__} can't use it here: {reason}") from None
    return str(torch.device(name))


def pick_precision(precision: str, device: str) -> str:
    """``auto`` is the fastest precision that gives up no accuracy (cosine to fp32 ≥ 0.999) on this device.

    bf16 on CPUs with bf16 arithmetic, fp16 on CUDA (what upstream runs there), fp32 elsewhere.

    Raises:
        ValueError: an unknown precision.
    """
    if precision == "auto":
        if device.startswith("cuda"):
            return "fp16"
        return "bf16" if torch.device(device).type == "cpu" and cpu_has_bf16() else "fp32"
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: there are auto, {', '.join(PRECISIONS)}")
    return precision


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; where it emulates them, fp32 is faster."""
    if platform.machine() in ("aarch64", "arm64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    tests = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(test() for test in tests if test)


def _unit(features: Tensor) -> np.ndarray:
    return F.normalize(features.float(), dim=-1).cpu().numpy()
