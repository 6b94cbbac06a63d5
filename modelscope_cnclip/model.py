"""The model as ModelScope sees it: a TorchModel around the towers, called with a preprocessor's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from modelscope.models.base import TorchModel
from modelscope.outputs import OutputKeys
from modelscope.utils.constant import ModeKeys
from torch import Tensor

from . import checkpoint, registry


@registry.register
class CnclipModel(TorchModel):
    """Chinese CLIP for ``Model.from_pretrained``, the pipelines and the trainers.

    Args:
        model_dir: a checkpoint as :func:`.checkpoint.locate` takes it.
        resolution: another picture size in pixels.
        loaded: a checkpoint in memory, used instead of the files in ``model_dir``.
        **kwargs: the host's own (``device``, ``trust_remote_code`` …); the weights stay fp32 on the CPU until a
            pipeline or trainer moves them.

    Attributes:
        clip_model: the towers. Named as in the built-in, whose finetuned checkpoints carry that prefix.
        vocab: the vocabulary file, None if the checkpoint has none.
    """

    def __init__(
        self,
        model_dir: str,
        *args: Any,
        resolution: int | None = None,
        loaded: checkpoint.Checkpoint | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model_dir, *args, **kwargs)
        loaded = loaded or checkpoint.read(checkpoint.locate(model_dir))
        self.vocab = loaded.vocab
        self.clip_model = loaded.build(torch.float32, resolution=resolution)

    def forward(self, input: dict[str, Any]) -> dict[str, Tensor | None]:
        """Features of preprocessed tensors.

        Args:
            input: ``img`` (N, 3, r, r) float and ``text`` (N, L) int64, either or both; a dimension of 1 behind the
                first, as the host's collate leaves it, is dropped. ``mode`` ``train`` keeps the graph.

        Returns:
            ``img_embedding`` and ``text_embedding``, (N, D), L2-normalised, None for an absent side; in train mode
            ``logit_scale`` too (the factor itself, not its log).
        """
        training = input.get("mode", ModeKeys.INFERENCE) == ModeKeys.TRAIN
        weight = self.clip_model.text_projection
        image, text = input.get("img"), input.get("text")
        output: dict[str, Tensor | None] = {OutputKeys.IMG_EMBEDDING: None, OutputKeys.TEXT_EMBEDDING: None}
        with torch.set_grad_enabled(training):
            if isinstance(image, Tensor):
                image = (image.squeeze(1) if image.dim() == 5 else image).to(weight.device, weight.dtype)
                output[OutputKeys.IMG_EMBEDDING] = F.normalize(self.clip_model.encode_image(image), dim=-1)
            if isinstance(text, Tensor):
                text = (text.squeeze(1) if text.dim() == 3 else text).to(weight.device)
                output[OutputKeys.TEXT_EMBEDDING] = F.normalize(self.clip_model.encode_text(text), dim=-1)
            if training:
                output["logit_scale"] = self.clip_model.logit_scale.exp()
        return output

    @property
    def temperature(self) -> Tensor:
        """() 1 / logit_scale: cosines are divided by it before a softmax."""
        return 1.0 / self.clip_model.logit_scale.detach().exp()

    def save_pretrained(
        self,
        target_folder: str | Path,
        save_checkpoint_names: Any = None,
        save_function: Any = None,
        config: dict | None = None,
        save_config_function: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that ``pipeline()`` loads, in ModelScope's layout.

        ``config`` becomes its ``configuration.json``; the host's other hooks into saving are not needed and not used.
        """
        folder = checkpoint.write(checkpoint.Checkpoint.of(self.clip_model, self.vocab, self.model_dir), target_folder)
        if config is not None:
            from modelscope.utils.checkpoint import save_configuration

            (save_config_function or save_configuration)(str(folder), config)
