"""A new Chinese CLIP out of an image tower and a Chinese BERT that were trained apart, as the paper starts.

    checkpoint = compose({"vision": {"timm": "vit_base_patch16_clip_quickgelu_224", "weights": "vit-b-16.safetensors"},
                          "text": {"bert": "chinese-roberta-wwm-ext"}})

CLIP's own ViTs become this package's native towers, so what is trained can be written in every layout, and a
checkpoint that still has CLIP's projection keeps it. Any other backbone of timm's gets a new projection. BERT loses
its pooler; the text projection is new (arXiv 2211.01335, section 2.2).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modelscope_cnclip import hub
from modelscope_cnclip.checkpoint import Checkpoint, read_tensors
from modelscope_cnclip.towers import (
    CLIP_MEAN,
    CLIP_STD,
    ChineseCLIP,
    ConfigError,
    TowerConfig,
    resize_position_embedding,
)

from .recipe import RecipeError

_CLIP_VIT = re.compile(r"vit_(base|large|huge)_patch(16|32|14)_clip_quickgelu_(224|336|378)(\.\w+)?")
_HEADS = ("head.", "classifier.", "fc.")
_COUNTER = re.compile(r"\.num_batches_tracked$")  # files from before 2018 have none
_CLIP_SHAPES = {"base": (768, 12, 64), "large": (1024, 24, 64), "huge": (1280, 32, 80)}  # width, layers, head width


def compose(spec: Mapping[str, Any], seed: int = 42, where: str = "pretrained_model") -> Checkpoint:
    """Build the start of a training run.

    Args:
        spec: ``vision.timm`` (a name that timm knows) with ``vision.weights`` (a safetensors or torch file under
            timm's names; without it the tower is random), ``vision.resolution``, ``vision.mean``, ``vision.std``;
            ``text.bert`` (a transformers folder with config.json, weights and vocab.txt, or a Hub id); ``embed_dim``;
            ``context_length``.
        seed: of what is new.
        where: for messages.

    Raises:
        RecipeError: a part is missing or doesn't fit. hub.HubError, checkpoint.CheckpointError: a file is.
    """
    vision, text = spec.get("vision") or {}, spec.get("text") or {}
    if not vision.get("timm") or not text.get("bert"):
        raise RecipeError(
            f'{where}: to compose a model, give both {{"vision": {{"timm": …}}}} and {{"text": {{"bert": …}}}}'
        )
    folder = hub.locate(text["bert"])
    bert, text_keys = _bert(folder, where)
    embed_dim, context = spec.get("embed_dim") or 512, spec.get("context_length") or 52
    context = min(context, text_keys["text_max_position_embeddings"])
    try:
        config = TowerConfig.from_dict(
            _vision_keys(vision) | text_keys | {"embed_dim": embed_dim, "context_length": context}
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = ChineseCLIP(config)
    except ConfigError as error:
        raise RecipeError(f"{where}: {error}") from None
    model.bert.load_state_dict(bert)
    if vision.get("weights"):
        _load_image_tower(model, Path(vision["weights"]), where)
    return Checkpoint.of(model, folder / "vocab.txt", folder)


def _vision_keys(vision: Mapping[str, Any]) -> dict[str, Any]:
    if match := _CLIP_VIT.fullmatch(vision["timm"]):
        width, layers, head = _CLIP_SHAPES[match[1]]
        keys = {"vision_width": width, "vision_layers": layers, "vision_head_width": head,
                "vision_patch_size": int(match[2]), "image_resolution": int(match[3])}  # fmt: skip
        defaults = CLIP_MEAN, CLIP_STD
    else:
        import timm

        if not timm.is_model(vision["timm"]):
            near = ", ".join(timm.list_models(f"*{vision['timm'].split('_')[0]}*")[:3])
            raise ConfigError(f"vision.timm: timm has no {vision['timm']!r}{f'; near it are {near}' if near else ''}")
        usual = timm.get_pretrained_cfg(vision["timm"])
        size = usual.input_size[-1] if usual else 224
        keys = {"vision_timm": vision["timm"], "image_resolution": size}
        defaults = (usual.mean, usual.std) if usual else (CLIP_MEAN, CLIP_STD)
    keys["vision_mean"] = list(vision.get("mean") or defaults[0])
    keys["vision_std"] = list(vision.get("std") or defaults[1])
    if vision.get("resolution"):
        keys["image_resolution"] = vision["resolution"]
    return keys


def _bert(folder: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of a BertModel without pooler, and what a TowerConfig says of it."""
    from transformers import BertConfig, BertModel

    if not (folder / "vocab.txt").is_file():
        raise RecipeError(f"{where}.text.bert: {folder}: no vocab.txt there; a BERT needs its vocabulary")
    try:
        config = BertConfig.from_pretrained(folder, local_files_only=True)
        model, report = BertModel.from_pretrained(
            folder, config=config, add_pooling_layer=False, local_files_only=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise RecipeError(f"{where}.text.bert: {folder}: {str(error).splitlines()[0]}") from None
    if report["missing_keys"]:
        raise RecipeError(
            f"{where}.text.bert: {folder}: weights missing: {', '.join(sorted(report['missing_keys'])[:3])}"
        )
    keys = {
        "vocab_size": config.vocab_size,
        "text_hidden_size": config.hidden_size,
        "text_intermediate_size": config.intermediate_size,
        "text_num_attention_heads": config.num_attention_heads,
        "text_num_hidden_layers": config.num_hidden_layers,
        "text_max_position_embeddings": config.max_position_embeddings,
        "text_type_vocab_size": config.type_vocab_size,
        "text_hidden_act": config.hidden_act,
        "text_hidden_dropout_prob": config.hidden_dropout_prob,
        "text_attention_probs_dropout_prob": config.attention_probs_dropout_prob,
    }
    return model.state_dict(), keys


def _load_image_tower(model: ChineseCLIP, file: Path, where: str) -> None:
    """Weights under timm's names. A classifier, or a projection to another size, stays out."""
    native = model.config.vision_timm is None
    tower = model.visual if native else model.visual.trunk
    wanted, state = tower.state_dict(), read_tensors(file)
    try:
        _fit_positions(tower, wanted, state, native)
    except (ConfigError, IndexError, RuntimeError) as error:
        raise RecipeError(f"{where}.vision.weights: {file}: pos_embed: {error}") from None
    optional = {"head.weight"} if native else set()  # CLIP's projection, which becomes ours where it fits
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    fits = {name: shapes.get(name) == tuple(tensor.shape) for name, tensor in state.items()}
    unneeded = {name for name in state if name not in wanted and name.startswith(_HEADS)} | optional
    state = {name: tensor for name, tensor in state.items() if fits[name] or name not in unneeded}
    problems = [
        f"{name} {tuple(tensor.shape)}, where the tower has {shapes.get(name, 'nothing')}"
        for name, tensor in state.items()
        if not fits[name]
    ] + [f"no {name}" for name in wanted if name not in state and name not in optional and not _COUNTER.search(name)]
    if problems:
        raise RecipeError(f"{where}.vision.weights: {file}: not this tower's: {'; '.join(problems[:3])}")
    tower.load_state_dict(state, strict=False)


def _fit_positions(tower: nn.Module, wanted: dict[str, Tensor], state: dict[str, Tensor], native: bool) -> None:
    """The position table to another resolution: upstream's way for CLIP's own ViT, timm's for others."""
    table, target = state.get("pos_embed"), wanted.get("pos_embed")
    if table is None or target is None or table.shape == target.shape:
        return
    if native:
        state["pos_embed"] = resize_position_embedding(table[0], target.shape[1])[None]
    elif hasattr(tower, "patch_embed"):
        from timm.layers import resample_abs_pos_embed

        prefix = 0 if getattr(tower, "no_embed_class", False) else getattr(tower, "num_prefix_tokens", 0)
        grid = list(tower.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(table, new_size=grid, num_prefix_tokens=prefix)
