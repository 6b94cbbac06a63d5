"""Forward passes of a model in training: both towers for a step, and behind the Encoder's interface to evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelscope_cnclip.backends import PRECISIONS
from modelscope_cnclip.encoder import Encoder
from modelscope_cnclip.preprocessor import ImageTransform, Tokenizer
from modelscope_cnclip.towers import ChineseCLIP

from .two_stage import wholly_frozen


class PairForward(nn.Module):
    """Both towers in one forward pass, as DistributedDataParallel wants it. A frozen tower leaves no graph behind."""

    def __init__(self, towers: ChineseCLIP, transform: ImageTransform) -> None:
        super().__init__()
        self.towers, self.transform = towers, transform

    def forward(
        self, pixels: Tensor | None, text: Tensor, kept: Tensor | None, trunk: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, r, r, 3) uint8 or kept features, and (B, L) ids -> normalised (B, D) twice, and the scale ().

        Kept features are (B, D) and finished or, with ``trunk``, (B, W) and still to be projected.
        """
        towers = self.towers
        if kept is not None and not trunk:
            image = kept
        else:
            frozen = wholly_frozen(towers.visual)
            with torch.no_grad() if frozen else nullcontext():
                if kept is None:
                    image = towers.encode_image(self.transform.normalise(pixels))
                else:
                    image = towers.project_image(kept)
                image = F.normalize(image.float(), dim=-1)
        frozen = not towers.text_projection.requires_grad and wholly_frozen(towers.bert)
        with torch.no_grad() if frozen else nullcontext():
            text_features = F.normalize(towers.encode_text(text).float(), dim=-1)
        return image, text_features, towers.logit_scale.exp()


class LiveBackend:
    """A :class:`~modelscope_cnclip.backends.Backend` over weights that stay fp32: lower precisions by autocast.

    Args:
        model, transform: as they are.
        device, precision: of the forward passes.
        trunk: give what the image tower has before its projection instead, (B, W) and not normalised.
    """

    name = "live"

    def __init__(
        self, model: ChineseCLIP, transform: ImageTransform, device: torch.device, precision: str, trunk: bool = False
    ) -> None:
        self.model, self.transform, self.precision, self.device = model, transform, precision, str(device)
        self.trunk, self.embed_dim, self.logit_scale = (
            trunk,
            model.config.embed_dim,
            float(model.logit_scale.detach().exp()),
        )

    def image(self, pixels: np.ndarray) -> np.ndarray:
        values = self.transform.normalise(torch.from_numpy(pixels).to(self.device))
        if self.trunk:
            return self._run(self.model.image_trunk, values).cpu().numpy()
        return F.normalize(self._run(self.model.encode_image, values), dim=-1).cpu().numpy()

    def text(self, ids: Tensor) -> np.ndarray:
        return F.normalize(self._run(self.model.encode_text, ids.to(self.device)), dim=-1).cpu().numpy()

    def _run(self, encode: Any, values: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self.device, self.precision):
            return encode(values).float()


def live_encoder(
    model: ChineseCLIP,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    device: torch.device,
    precision: str,
    trunk: bool = False,
) -> Encoder:
    """An Encoder over a model in training. Use it within :func:`evaluating`."""
    return Encoder(LiveBackend(model, transform, device, precision, trunk), tokenizer, transform, "<in training>")


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """The context for a forward pass in this precision; fp32 changes nothing."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=PRECISIONS[precision], enabled=precision != "fp32")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
