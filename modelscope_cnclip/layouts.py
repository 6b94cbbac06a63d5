"""What the files of each checkpoint layout hold beside the weights, and how files are written.

Three programs own a layout: ModelScope (its folders are cn_clip's two JSON files, ``vocab.txt`` and the weights),
cn_clip (one ``.pt``), transformers (``config.json`` and its companions).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .towers import TowerConfig

VISION_CONFIG, TEXT_CONFIG, VOCAB = "vision_model_config.json", "text_model_config.json", "vocab.txt"
CONFIGURATION, CARD = "configuration.json", "README.md"
SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"


def default_configuration() -> Path:
    """The ``configuration.json`` of the official repositories, for checkpoints that have none."""
    return Path(str(files("modelscope_cnclip.configuration") / CONFIGURATION))


def default_vocab() -> Path:
    """Chinese BERT's 21,128 pieces, which every official checkpoint uses and a ``.pt`` doesn't carry."""
    return Path(str(files("modelscope_cnclip.configuration") / "vocab" / "chinese_bert.txt"))


def tiny() -> Path:
    """The small checkpoint that ships: trained, and what its README.md says of it."""
    return Path(str(files("modelscope_cnclip.configuration") / "tiny"))


def configuration(config: TowerConfig) -> dict[str, Any]:
    """``configuration.json`` for a folder of ours.

    Towers that the built-in knows are filed under its names, as the official repositories are, so one folder serves
    both; after ``import modelscope_cnclip`` those names mean this package. Other towers are ours alone.
    """
    values = json.loads(default_configuration().read_text(encoding="utf-8"))
    if config.vision_timm is not None:
        values["model"]["type"] = "cnclip"
        values["pipeline"]["type"] = "cnclip-multi-modal-embedding"
        values["preprocessor"]["type"] = "cnclip-preprocessor"
    return values


def model_card(config: TowerConfig, notes: str = "", licence: str = "") -> str:
    """README.md with the front matter that ModelScope reads. ``notes`` goes under the title."""
    kind = config.vision_timm or ("ResNet" if config.is_resnet else f"ViT, patch {config.vision_patch_size}")
    layers = config.vision_layers if config.vision_timm is None else "its own"
    terms = f"license: {licence}\n" if licence else ""
    return f"""---
tasks:
- multi-modal-embedding
language:
- zh
tags:
- chinese-clip
- CLIP
{terms}---
# Chinese CLIP: {kind} + BERT of {config.text_num_hidden_layers} layers
{notes}
| | |
|---|---|
| image tower | {kind}, layers {layers}, {config.image_resolution} px |
| text tower | BERT, layers {config.text_num_hidden_layers}, width {config.text_hidden_size} |
| text length | up to {config.context_length} tokens |
| embedding | {config.embed_dim} numbers, L2-normalised |

```python
import modelscope_cnclip  # pip install modelscope-cnclip
from modelscope.pipelines import pipeline

pipe = pipeline("multi-modal-embedding", model="THIS/FOLDER")
pipe({{"img": "photo.jpg", "text": ["一只猫", "一条狗"]}})
```
"""


def transformers_config(config: TowerConfig) -> dict[str, Any]:
    return {
        "architectures": ["ChineseCLIPModel"],
        "model_type": "chinese_clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": math.log(1 / 0.07),
        "text_config": {
            "model_type": "chinese_clip_text_model",
            "vocab_size": config.vocab_size,
            "hidden_size": config.text_hidden_size,
            "intermediate_size": config.text_intermediate_size,
            "num_hidden_layers": config.text_num_hidden_layers,
            "num_attention_heads": config.text_num_attention_heads,
            "max_position_embeddings": config.text_max_position_embeddings,
            "type_vocab_size": config.text_type_vocab_size,
            "hidden_act": config.text_hidden_act,
            "hidden_dropout_prob": config.text_hidden_dropout_prob,
            "attention_probs_dropout_prob": config.text_attention_probs_dropout_prob,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "chinese_clip_vision_model",
            "hidden_size": config.vision_width,
            "intermediate_size": 4 * config.vision_width,
            "num_hidden_layers": config.vision_layers,
            "num_attention_heads": config.vision_width // config.vision_head_width,
            "patch_size": config.vision_patch_size,
            "image_size": config.image_resolution,
            "projection_dim": config.embed_dim,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    }


def transformers_preprocessor(config: TowerConfig) -> dict[str, Any]:
    return {
        "image_processor_type": "ChineseCLIPImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_resolution, "width": config.image_resolution},
        "resample": 3,  # bicubic
        "do_center_crop": False,  # the class's own default crops; upstream never does
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.vision_mean),
        "image_std": list(config.vision_std),
    }


def save_json(values: dict[str, Any], file: Path) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    replace_file(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_torch(values: dict[str, Any], file: Path) -> None:
    replace_file(file, lambda temporary: torch.save(values, temporary))


def save_safetensors(state: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    state = {key: tensor.detach().contiguous() for key, tensor in state.items()}
    replace_file(file, lambda temporary: save_file(state, temporary, metadata={"format": "pt"}))


def replace_file(file: Path, save: Callable[[Path], Any]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
