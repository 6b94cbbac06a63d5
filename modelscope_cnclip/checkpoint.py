"""Read and write Chinese CLIP checkpoints in the three layouts that people have, safely.

    checkpoint = read("clip_cn_vit-b-16.pt")       # or a ModelScope folder, or a transformers folder
    model = checkpoint.build(torch.bfloat16)       # ChineseCLIP, straight in that dtype
    write(checkpoint, "out", "transformers")

In memory a checkpoint always has cn_clip's names (see :mod:`.keymaps`). Nothing in a file is executed: ``.pt`` and
``.bin`` are read with ``weights_only=True``, the rest is safetensors and JSON. Tensors stay on disk, mapped, until they
are used; the towers are laid out on the meta device and given the file's own tensors, so a model needs its weights'
size and not twice that.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from . import hub, keymaps, layouts
from .layouts import BIN, CARD, CONFIGURATION, SAFETENSORS, TEXT_CONFIG, VISION_CONFIG, VOCAB
from .towers import ChineseCLIP, ConfigError, TowerConfig, configured_towers, resize_position_embedding

logger = logging.getLogger("modelscope_cnclip")

Layout = Literal["modelscope", "cn_clip", "transformers"]
Weights = Literal["bin", "safetensors", "both"]
LAYOUTS: tuple[Layout, ...] = ("modelscope", "cn_clip", "transformers")


_POOLER = "bert.pooler."
_POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")


class CheckpointError(ValueError):
    """A checkpoint that can't be used. The text names the file and what is wrong in it."""


@dataclass
class Checkpoint:
    """Weights, shapes and vocabulary of one model.

    Attributes:
        path: where it was read from, for messages.
        layout: which of the three layouts that was.
        config: the towers' shapes.
        state: weights under cn_clip's names, in the dtypes of the file. :meth:`build` empties it.
        vocab: the WordPiece vocabulary, None if the folder has none.
    """

    path: Path
    layout: Layout
    config: TowerConfig
    state: dict[str, Tensor]
    vocab: Path | None

    def build(self, dtype: torch.dtype | None = torch.float32, *, resolution: int | None = None) -> ChineseCLIP:
        """The towers with these weights, in eval mode, on the CPU.

        Args:
            dtype: of all weights but ``logit_scale``, which stays fp32; None keeps each tensor's own.
            resolution: another input size in pixels; the image tower's position table is resized to it.

        Raises:
            CheckpointError: weights are missing, left over or of another shape; the first three are named.
        """
        if resolution is not None and resolution != self.config.image_resolution:
            self.config = replace(self.config, image_resolution=resolution)
            self._resize_positions()
        model = ChineseCLIP.empty(self.config)
        model.spare_weights = {k: self.state.pop(k) for k in list(self.state) if k.startswith(_POOLER)}
        state = keymaps.to_towers(self.state)
        self._check(state, model.state_dict())
        for key in list(state):
            tensor = state.pop(key)
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if key == "logit_scale" else dtype or tensor.dtype)
            state[key] = tensor
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _check(self, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        problems = {
            "missing": [key for key in wanted if key not in state],
            "not of this model": [key for key in state if key not in wanted],
            "of another shape": [
                f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
                for key in wanted
                if key in state and state[key].shape != wanted[key].shape
            ],
        }
        told = [f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in problems.items() if keys]
        if told:
            raise CheckpointError(f"{self.path}: weights don't fit the model: {'; '.join(told)}")

    def _resize_positions(self) -> None:
        if self.config.vision_timm is not None:
            raise CheckpointError(
                f"{self.path}: a timm tower ({self.config.vision_timm}) keeps the size it was made for"
            )
        step = 32 if self.config.is_resnet else self.config.vision_patch_size
        for key in _POSITIONS:
            if key in self.state:
                positions = (self.config.image_resolution // step) ** 2 + 1
                self.state[key] = resize_position_embedding(self.state[key], positions)

    @classmethod
    def of(cls, model: ChineseCLIP, vocab: Path | None, path: str | Path = "<model>") -> Checkpoint:
        """What :func:`write` needs, from towers in memory; the tensors are shared, not copied."""
        state = keymaps.from_towers(dict(model.state_dict())) | model.spare_weights
        return cls(Path(path), "modelscope", model.config, state, vocab)


def locate(model: str | Path, *, revision: str | None = None) -> Path:
    """A model named as people name it -> the local files that :func:`read` takes.

    Args:
        model: a folder, a ``.pt`` file, a ModelScope Hub id (downloaded once), or ``tiny``.
        revision: of a Hub id.

    Raises:
        CheckpointError, hub.HubError: there is no such model; the text says where was looked.
    """
    if model == "tiny":
        return layouts.tiny()
    return hub.locate(model, revision=revision)


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint; the layout is recognised from the files, the model's size from the tensors.

    Args:
        path: a folder in ModelScope's layout (``vision_model_config.json``, ``text_model_config.json``,
            ``vocab.txt``, ``model.safetensors`` or ``pytorch_model.bin``) or transformers' (``config.json``), a
            folder that holds one ``.pt`` file, or a cn_clip ``.pt`` file.

    Raises:
        CheckpointError: with the file and the reason.
    """
    path = Path(path)
    if path.is_dir():
        _read_json(path / CONFIGURATION, required=False)  # nothing in it is needed here, but a broken one is told early
        if (path / VISION_CONFIG).exists() or (path / TEXT_CONFIG).exists():
            return _read_modelscope(path)
        if (path / "config.json").exists():
            return _read_transformers(path)
        found = sorted(path.glob("*.pt"))
        if len(found) != 1:
            raise CheckpointError(
                f"{path}: no Chinese CLIP in this folder: it has neither {VISION_CONFIG} nor config.json, "
                f"and {len(found)} .pt files"
            )
        path = found[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    return _read_cn_clip(path)


def read_config(path: str | Path) -> tuple[TowerConfig, Path | None]:
    """The shapes and the vocabulary file of a checkpoint, without reading weights that aren't needed for that."""
    folder = Path(path)
    if (folder / VISION_CONFIG).exists():
        return _modelscope_config(folder), _vocab_of(folder)
    checkpoint = read(path)
    return checkpoint.config, checkpoint.vocab


def _read_modelscope(folder: Path) -> Checkpoint:
    config = _modelscope_config(folder)
    state = _bare(_read_weights(folder), folder)
    return Checkpoint(folder, "modelscope", config, state, _vocab_of(folder))


def _modelscope_config(folder: Path) -> TowerConfig:
    values = _read_json(folder / VISION_CONFIG) | _read_json(folder / TEXT_CONFIG)
    try:
        return TowerConfig.from_dict(values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{folder}: {VISION_CONFIG} and {TEXT_CONFIG}: {error}") from None


def _read_cn_clip(file: Path) -> Checkpoint:
    state = _bare(_read_file(file), file)
    config = _recognise(state, file)
    vocab = layouts.default_vocab() if config.vocab_size == 21128 else None
    return Checkpoint(file, "cn_clip", config, state, vocab)


def _read_transformers(folder: Path) -> Checkpoint:
    values = _read_json(folder / "config.json")
    if values.get("model_type") != "chinese_clip":
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {values.get('model_type')!r}, not 'chinese_clip'"
        )
    text, vision = values.get("text_config") or {}, values.get("vision_config") or {}
    acts = text.get("hidden_act", "gelu"), vision.get("hidden_act", "quick_gelu")
    if acts != ("gelu", "quick_gelu"):
        raise CheckpointError(
            f"{folder / 'config.json'}: hidden_act of text and vision are {acts}, not gelu and quick_gelu"
        )
    state = keymaps.from_transformers(_bare(_read_weights(folder), folder))
    config = _recognise(state, folder)
    heads = vision.get("num_attention_heads", 12)
    pictures = _read_json(folder / "preprocessor_config.json", required=False)
    mean, std = (tuple(pictures.get(key) or default) for key, default in
                 (("image_mean", config.vision_mean), ("image_std", config.vision_std)))  # fmt: skip
    try:
        config = replace(
            config,
            vision_head_width=config.vision_width // heads,
            text_num_attention_heads=text.get("num_attention_heads", 12),
            vision_mean=mean,
            vision_std=std,
        )
    except (ConfigError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return Checkpoint(folder, "transformers", config, state, _vocab_of(folder))


def _recognise(state: dict[str, Tensor], where: Path) -> TowerConfig:
    """The shapes of both towers, from the tensors' own; only the number of heads isn't in them."""

    def shape(key: str) -> torch.Size:
        if key not in state:
            some = ", ".join(list(state)[:3]) or "nothing"
            raise CheckpointError(f"{where}: not a Chinese CLIP checkpoint: no {key} in it, but {some}")
        return state[key].shape

    def count(pattern: str) -> int:
        return 1 + max((int(m[1]) for key in state if (m := re.match(pattern, key))), default=-1)

    width = shape("visual.conv1.weight")[0]
    if "visual.layer1.0.conv1.weight" in state:
        width = shape("visual.layer1.0.conv1.weight")[0]
        vision = {
            "vision_layers": [count(rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4)],
            "embed_dim": shape("visual.attnpool.c_proj.weight")[0],
            "image_resolution": 32 * math.isqrt(shape("visual.attnpool.positional_embedding")[0] - 1),
        }
    else:
        patch = shape("visual.conv1.weight")[-1]
        vision = {
            "vision_layers": count(r"visual\.transformer\.resblocks\.(\d+)\."),
            "vision_patch_size": patch,
            "embed_dim": shape("visual.proj")[1],
            "image_resolution": patch * math.isqrt(shape("visual.positional_embedding")[0] - 1),
        }
    vocab_size, hidden = shape("bert.embeddings.word_embeddings.weight")
    values = vision | {
        "vision_width": width,
        "vocab_size": vocab_size,
        "text_hidden_size": hidden,
        "text_num_hidden_layers": count(r"bert\.encoder\.layer\.(\d+)\."),
        "text_intermediate_size": shape("bert.encoder.layer.0.intermediate.dense.weight")[0],
        "text_num_attention_heads": max(1, hidden // 64),
        "text_max_position_embeddings": shape("bert.embeddings.position_embeddings.weight")[0],
        "text_type_vocab_size": shape("bert.embeddings.token_type_embeddings.weight")[0],
    }
    values["context_length"] = min(52, values["text_max_position_embeddings"])
    for file in configured_towers().values():  # ViT-H/14 has heads of 80, and the tensors don't tell
        known = json.loads(file.read_text(encoding="utf-8"))
        if all(known.get(key) == values.get(key) for key in ("vision_width", "vision_layers", "vision_patch_size")):
            values["vision_head_width"] = known.get("vision_head_width", 64)
    try:
        return TowerConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{where}: the tensors' shapes make no Chinese CLIP: {error}") from None


def _bare(state: dict[str, Any], where: Path) -> dict[str, Tensor]:
    """The weights out of what a training script wrapped around them; optimizer and counters are dropped."""
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{where}: holds {type(state).__name__}, not a mapping of names to tensors")
    bad = [str(key) for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if bad:
        raise CheckpointError(f"{where}: not a mapping of names to tensors: {', '.join(bad[:3])}")
    out = {}
    for key in list(state):
        name = key.removeprefix("module.").removeprefix("clip_model.")
        out[name] = state.pop(key)
    pooler = {key for key in out if key.startswith(_POOLER)}
    if pooler and all(not out[key].any() for key in pooler):  # the placeholder that write() puts there
        for key in pooler:
            del out[key]
    return out


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Names and tensors of one safetensors or torch file, nothing else of it; wrappers and ``module.`` are taken off.

    Raises:
        CheckpointError: with the file and the reason.
    """
    return _bare(_read_file(Path(file)), Path(file))


def _read_weights(folder: Path) -> dict[str, Any]:
    for name in (SAFETENSORS, BIN):
        if (folder / name).exists():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(
                isinstance(s, str) and Path(s).name == s for s in shards.values()
            ):
                raise CheckpointError(f"{index}: weight_map must map names to files of this folder")
            state: dict[str, Any] = {}
            for shard in sorted(set(shards.values())):
                state |= _read_file(folder / shard)
            return state
    raise CheckpointError(f"{folder}: has neither {SAFETENSORS} nor {BIN}")


def _read_file(file: Path) -> Any:
    if not file.exists():
        raise CheckpointError(f"{file}: no such file")
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file}: empty file")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file}: truncated or not safetensors: {error}") from None
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)|`?(\S+)`? was not an allowed global|Unsupported global: (\S+)", str(error))
        what = f" ({next(filter(None, wanted.groups()))})" if wanted else ""
        raise CheckpointError(f"{file}: refused: it holds more than tensors{what}, or it is no PyTorch file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file}: truncated or not a PyTorch file: {reason}") from None


def _read_json(file: Path, required: bool = True) -> dict[str, Any]:
    if not file.exists():
        if required:
            raise CheckpointError(f"{file}: no such file")
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(values).__name__}")
    return values


def _vocab_of(folder: Path) -> Path | None:
    return folder / VOCAB if (folder / VOCAB).is_file() else None


def write(checkpoint: Checkpoint, path: str | Path, layout: Layout = "modelscope", *, weights: Weights = "bin") -> Path:
    """Write a checkpoint so that the programs which own that layout load it.

    Args:
        checkpoint: from :func:`read` or :meth:`Checkpoint.of`; left as it is.
        path: a folder, made if need be; for ``cn_clip`` the ``.pt`` file.
        layout: ``modelscope`` (also loads in ModelScope's built-in class, which demands a BERT pooler: zeros stand
            in for one that isn't there), ``cn_clip`` or ``transformers``.
        weights: for ``modelscope``: ``pytorch_model.bin`` as upstream has it, ``model.safetensors``, or both.

    Every file is written under another name and renamed, so a broken run leaves no half file.

    Raises:
        CheckpointError: the layout has no place for these towers.
    """
    path, config, state = Path(path), checkpoint.config, dict(checkpoint.state)
    if layout not in LAYOUTS:
        raise CheckpointError(f"{path}: unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if layout != "modelscope" and config.vision_timm is not None:
        raise CheckpointError(f"{path}: {layout} has no place for a {config.vision_timm} tower; use 'modelscope'")
    if layout == "transformers" and config.is_resnet:
        raise CheckpointError(f"{path}: transformers has no ResNet Chinese CLIP; use 'modelscope' or 'cn_clip'")
    if layout == "cn_clip":
        wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        layouts.save_torch({"epoch": 0, "step": 0, "state_dict": wrapped}, path)
        return path
    path.mkdir(parents=True, exist_ok=True)
    if checkpoint.vocab is not None and checkpoint.vocab.resolve() != (path / VOCAB).resolve():
        vocab = checkpoint.vocab.read_bytes()
        layouts.replace_file(path / VOCAB, lambda file: file.write_bytes(vocab))
    if layout == "transformers":
        layouts.save_json(layouts.transformers_config(config), path / "config.json")
        layouts.save_json(layouts.transformers_preprocessor(config), path / "preprocessor_config.json")
        tokenizer = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": config.context_length,
        }
        layouts.save_json(tokenizer, path / "tokenizer_config.json")
        layouts.save_safetensors(keymaps.to_transformers(state), path / SAFETENSORS)
        return path
    layouts.save_json(config.vision_dict(), path / VISION_CONFIG)
    layouts.save_json(config.text_dict(), path / TEXT_CONFIG)
    if weights in ("bin", "both"):
        layouts.save_torch(_placeholder_pooler(config, state) | state, path / BIN)
    if weights in ("safetensors", "both"):
        layouts.save_safetensors(state, path / SAFETENSORS)
    if not (path / CONFIGURATION).exists():
        layouts.save_json(layouts.configuration(config), path / CONFIGURATION)
    if not (path / CARD).exists():
        layouts.replace_file(path / CARD, lambda file: file.write_text(layouts.model_card(config), encoding="utf-8"))
    return path


def convert(source: str | Path, target: str | Path, layout: Layout, *, weights: Weights = "bin") -> Path:
    """Read one layout, write another. Refuses to write over a file or into a folder that isn't empty."""
    target = Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; name a new file or an empty folder")
    return write(read(source), target, layout, weights=weights)


def _placeholder_pooler(config: TowerConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    width, dtype = config.text_hidden_size, state["text_projection"].dtype
    return {
        f"{_POOLER}dense.weight": torch.zeros(width, width, dtype=dtype),
        f"{_POOLER}dense.bias": torch.zeros(width, dtype=dtype),
    }
