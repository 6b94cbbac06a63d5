"""The registered pipelines. Thin: an :class:`~.encoder.Encoder` does the work.

    import modelscope_cnclip
    from modelscope.pipelines import pipeline
    from modelscope.utils.constant import Tasks

    pipe = pipeline(Tasks.multi_modal_embedding, model="damo/multi-modal_clip-vit-base-patch16_zh")
    pipe({"img": "cat.jpg", "text": ["一只猫", "一条狗"]})    # {"img_embedding": (1, D), "text_embedding": (2, D)}
    pipe([{"text": "一只猫"}, {"img": "cat.jpg"}], batch_size=64)  # a list of such, batched

What the published model cards do works too: ``pipe.forward({"text": […]})`` gives torch tensors, and
``pipe.model.temperature`` exists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from modelscope.models.base import Model
from modelscope.outputs import OutputKeys
from modelscope.pipelines.base import Pipeline
from modelscope.utils.constant import Frameworks
from PIL import Image

from . import checkpoint, layouts, registry
from .backends import TorchBackend, pick_device, pick_precision
from .encoder import Encoder
from .model import CnclipModel
from .preprocessor import CnclipPreprocessor, as_list

SIDES = (("img", OutputKeys.IMG_EMBEDDING), ("text", OutputKeys.TEXT_EMBEDDING))


@registry.register
class MultiModalEmbeddingPipeline(Pipeline):
    """Pictures and texts to vectors.

    Args:
        model: what ``Encoder.from_pretrained`` takes, or a ``Model`` that is loaded already.
        preprocessor: a :class:`.preprocessor.CnclipPreprocessor` with settings of its own; by default the model's.
        device: ``cpu``, ``gpu``, ``cuda:1`` … Without a GPU ``gpu``, the host's default, means the CPU.
        precision: as for the Encoder. The default is ``fp32`` on a CPU, so that vectors are the published code's to
            1e-5, and ``fp16`` on a GPU, as the built-in has it; ``auto`` or ``bf16`` is faster on CPUs with bf16.

    Attributes:
        encoder: does the work.
    """

    def __init__(
        self,
        model: str | Model,
        preprocessor: CnclipPreprocessor | None = None,
        device: str = "gpu",
        precision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(model, str):
            model = CnclipModel(str(checkpoint.locate(model)))
        if not isinstance(model, CnclipModel):
            raise TypeError(f"model: expected a name or a CnclipModel, got {type(model).__name__}")
        if preprocessor is None:
            preprocessor = CnclipPreprocessor(model.model_dir, resolution=model.clip_model.config.image_resolution)
        if not (Path(model.model_dir) / layouts.CONFIGURATION).exists():  # a .pt file, a transformers folder
            kwargs["config_file"] = str(layouts.default_configuration())
        super().__init__(model=model, preprocessor=preprocessor, device=device, **kwargs)
        place = pick_device(device if torch.cuda.is_available() else "cpu")
        precision = pick_precision(precision or ("fp16" if place.startswith("cuda") else "fp32"), place)
        backend = TorchBackend(model.clip_model, preprocessor.transform, place, precision)
        self.encoder = Encoder(backend, preprocessor.tokenizer, preprocessor.transform, str(model.model_dir))

    def __call__(self, input: Any, *args: Any, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Vectors of one record or a list of them.

        Args:
            input: a dict with ``img`` (path, http(s) or oss address, bytes, PIL, (H, W, 3) uint8 array, or a list of
                these) and ``text`` (a str or a list), either or both; a bare str is a text, a bare picture a picture.
                A list of such records is embedded in batches across records.
            batch_size: pictures or texts per forward pass; by default the Encoder's.

        Returns:
            ``{"img_embedding": (n, D), "text_embedding": (m, D)}``, float32 numpy, L2-normalised, None for an absent
            side; for a list of records a list of these.

        Raises:
            encoder.ItemError: a bad picture or text, with its position among all pictures or texts of the call.
            TypeError, ValueError: a record of another form.
        """
        single = not isinstance(input, (list, tuple))
        records = [_record(one) for one in ([input] if single else input)]
        results: list[dict[str, Any]] = [dict.fromkeys((key for _, key in SIDES), None) for _ in records]
        for side, key in SIDES:
            encode = self.encoder.encode_image if side == "img" else self.encoder.encode_text
            flat = [item for record in records for item in record.get(side, ())]
            vectors = encode(flat, **({"batch_size": batch_size} if batch_size else {}))
            start = 0
            for record, result in zip(records, results):
                if side in record:
                    result[key] = vectors[start : start + len(record[side])]
                    start += len(record[side])
        return results[0] if single else results

    def forward(self, inputs: dict[str, Any], **forward_params: Any) -> dict[str, Any]:
        """What the published model cards call: raw inputs in, torch tensors (n, D) on the model's device out."""
        result = self(inputs)
        device = self.encoder.backend.device
        return {
            key: None if vectors is None else torch.from_numpy(vectors).to(device) for key, vectors in result.items()
        }

    def _get_framework(self) -> str:
        return Frameworks.torch

    def postprocess(self, inputs: dict[str, Any], **post_params: Any) -> dict[str, Any]:
        return inputs


@registry.register
class ImageTextRetrievalPipeline(MultiModalEmbeddingPipeline):
    """The same vectors under the task ``image-text-retrieval``, whose records say ``image`` where ours say ``img``."""


def _record(value: Any) -> dict[str, list[Any]]:
    """One record as lists: the sides that are there and not None."""
    if isinstance(value, str):
        value = {"text": value}
    elif isinstance(value, (Image.Image, np.ndarray, bytes, bytearray)):
        value = {"img": value}
    if not isinstance(value, dict):
        raise TypeError(f"expected a dict, a str or a picture, got {type(value).__name__}")
    known = {"img": value.get("img", value.get("image")), "text": value.get("text")}
    sides = {side: as_list(items) for side, items in known.items() if items is not None}
    if not sides:
        raise ValueError(f"a record needs 'img' or 'text'; this one has {', '.join(map(repr, value)) or 'nothing'}")
    return sides
