"""The two towers of Chinese CLIP and nothing else: pure torch, no files, no registry.

    config = TowerConfig.named("vit-b-16")
    model = ChineseCLIP(config)
    image_features = model.encode_image(pixels)   # (B, 3, r, r) normalised -> (B, D), not L2-normalised
    text_features = model.encode_text(token_ids)  # (B, L) int64 -> (B, D), not L2-normalised

The image tower is timm's: the CLIP ViT (pre-norm, QuickGELU), CLIP's ResNet with attention pooling, or any other
timm backbone by name. The text tower is transformers' ``BertModel`` without its pooler: the raw [CLS] vector times
``text_projection``. Architecture: arXiv 2211.01335, table 6; shapes per size: ``configuration/towers``.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# No real tower comes near these; a configuration file that does is damaged or hostile.
_LIMITS = {"vision_layers": 256, "text_num_hidden_layers": 256, "image_resolution": 4096, "vocab_size": 2**21}
_LIMIT = 2**16


class ConfigError(ValueError):
    """A tower configuration that makes no sense. The text names the key and its value."""


@dataclass(frozen=True)
class TowerConfig:
    """Shapes of both towers, under cn_clip's own key names (its ``model_configs``, ModelScope's two JSON files).

    ``vision_layers`` is an int for a ViT and four ints for a ResNet. A tower that CLIP didn't have is named by
    ``vision_timm`` instead, a name that ``timm.create_model`` knows; the ``vision_*`` shapes are then unused.
    """

    embed_dim: int
    image_resolution: int
    vocab_size: int
    text_hidden_size: int
    text_intermediate_size: int
    text_num_attention_heads: int
    text_num_hidden_layers: int
    vision_layers: int | tuple[int, ...] | None = None
    vision_width: int | None = None
    vision_patch_size: int | None = None
    vision_head_width: int = 64
    vision_timm: str | None = None
    vision_mean: tuple[float, float, float] = CLIP_MEAN
    vision_std: tuple[float, float, float] = CLIP_STD
    text_max_position_embeddings: int = 512
    text_type_vocab_size: int = 2
    text_hidden_act: str = "gelu"
    text_attention_probs_dropout_prob: float = 0.1
    text_hidden_dropout_prob: float = 0.1
    text_initializer_range: float = 0.02
    context_length: int = 52

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type.startswith("int") and value is not None:
                limit = _LIMITS.get(field.name, _LIMIT)
                for number in value if isinstance(value, tuple) else (value,):
                    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= limit:
                        raise ConfigError(f"{field.name}: expected an integer from 1 to {limit}, got {value!r}")
        if self.vision_timm is None and (self.vision_layers is None or self.vision_width is None):
            raise ConfigError("vision_layers and vision_width (or vision_timm) are missing")
        if self.is_vit and self.vision_patch_size is None:
            raise ConfigError("vision_patch_size is missing")
        if self.is_vit and (
            self.vision_width % self.vision_head_width or self.image_resolution % self.vision_patch_size
        ):
            raise ConfigError(
                f"vision_width {self.vision_width} must be a multiple of vision_head_width {self.vision_head_width}, "
                f"image_resolution {self.image_resolution} of vision_patch_size {self.vision_patch_size}"
            )
        if self.is_resnet and len(self.vision_layers) != 4:
            raise ConfigError(f"vision_layers: a ResNet has four stages, got {list(self.vision_layers)}")
        if self.text_hidden_size % self.text_num_attention_heads:
            raise ConfigError(
                f"text_hidden_size {self.text_hidden_size} is no multiple of "
                f"text_num_attention_heads {self.text_num_attention_heads}"
            )
        if not 3 <= self.context_length <= self.text_max_position_embeddings:
            raise ConfigError(
                f"context_length {self.context_length}: must be from 3 to the position table's "
                f"{self.text_max_position_embeddings}"
            )

    @property
    def is_resnet(self) -> bool:
        return self.vision_timm is None and isinstance(self.vision_layers, tuple)

    @property
    def is_vit(self) -> bool:
        return self.vision_timm is None and isinstance(self.vision_layers, int)

    @classmethod
    def named(cls, name: str) -> TowerConfig:
        """One of the shipped sizes: ``rn50``, ``vit-b-16``, ``vit-l-14``, ``vit-l-14-336``, ``vit-h-14`` …"""
        known = configured_towers()
        if name.lower() not in known:
            raise ConfigError(f"no tower configuration {name!r}; there are {', '.join(known)}")
        return cls.from_dict(json.loads(known[name.lower()].read_text(encoding="utf-8")))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TowerConfig:
        """From cn_clip's keys, both files merged. Keys that say nothing about shapes are passed over.

        cn_clip's RN50.json holds its layers as the string ``"[3,4,6,3]"`` and evaluates it; it is parsed here.
        """
        known = {field.name: field for field in fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        missing = [f.name for f in known.values() if f.default is MISSING and f.name not in given]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: missing")
        layers = given.get("vision_layers")
        if isinstance(layers, str):
            try:
                layers = json.loads(layers)
            except ValueError:
                raise ConfigError(f"vision_layers: expected a list of four integers, got {layers!r}") from None
        if layers is not None:
            given["vision_layers"] = tuple(layers) if isinstance(layers, list) else layers
        for key in ("vision_mean", "vision_std"):
            if key in given:
                given[key] = tuple(float(x) for x in given[key])
        return cls(**given)

    def vision_dict(self) -> dict[str, Any]:
        """What belongs into ``vision_model_config.json``."""
        own = {k: v for k, v in self._as_json().items() if k.startswith(("vision_", "image_", "embed_dim"))}
        if (self.vision_mean, self.vision_std) == (CLIP_MEAN, CLIP_STD):
            del own["vision_mean"], own["vision_std"]  # the built-in passes every key on to its own class
        if self.vision_timm is None:
            del own["vision_timm"]
        return own

    def text_dict(self) -> dict[str, Any]:
        """What belongs into ``text_model_config.json``."""
        own = {k: v for k, v in self._as_json().items() if k.startswith(("text_", "vocab_", "context_"))}
        if self.context_length == type(self).context_length:
            del own["context_length"]
        return own

    def _as_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def configured_towers() -> dict[str, Any]:
    """Name -> file of every shipped tower configuration."""
    folder = files("modelscope_cnclip.configuration") / "towers"
    return {
        item.name[:-5]: item for item in sorted(folder.iterdir(), key=lambda f: f.name) if item.name.endswith(".json")
    }


class ChineseCLIP(nn.Module):
    """Image tower, text tower, two projections and the temperature.

    Parameters: ``visual.*`` (timm's names), ``bert.*`` (transformers' names), ``text_projection`` (H, D) and
    ``logit_scale`` (), the log of 1/temperature, which starts at ln(1/0.07).

    Attributes:
        config: the shapes.
        spare_weights: weights that a checkpoint had and no tower uses (BERT's pooler), kept so that a folder
            written from this model still loads where they are demanded.
    """

    def __init__(self, config: TowerConfig, *, patch_dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.visual = _image_tower(config)
        self.bert = _text_tower(config)
        self.text_projection = nn.Parameter(torch.empty(config.text_hidden_size, config.embed_dim))
        nn.init.normal_(self.text_projection, std=config.text_hidden_size**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.spare_weights: dict[str, Tensor] = {}
        if patch_dropout:
            self.set_patch_dropout(patch_dropout)

    @classmethod
    def empty(cls, config: TowerConfig) -> ChineseCLIP:
        """A model whose weights are still to come: parameters on the meta device take no memory and no time.

        Other timm backbones are built in full, for they may compute buffers that no checkpoint holds.
        """
        if config.vision_timm is not None:
            return cls(config)
        with torch.device("meta"):
            model = cls(config)
        embeddings = model.bert.embeddings  # BERT's only buffers, and not in any checkpoint
        embeddings.position_ids = torch.arange(config.text_max_position_embeddings)[None]
        embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids, device="cpu")
        return model

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, r, r) normalised pixels in the towers' dtype -> (B, D)."""
        return self.visual(image)

    @property
    def splits_image(self) -> bool:
        """Whether the image tower is a trunk and a linear projection. CLIP's ResNet projects within its pooling."""
        return not self.config.is_resnet

    def image_trunk(self, image: Tensor) -> Tensor:
        """(B, 3, r, r) -> (B, W), what :meth:`project_image` takes; only where :attr:`splits_image`."""
        if isinstance(self.visual, TimmTower):
            return self.visual.trunk(image)
        return self.visual.forward_head(self.visual.forward_features(image), pre_logits=True)

    def project_image(self, trunk: Tensor) -> Tensor:
        """(B, W) of :meth:`image_trunk` -> (B, D), equal to :meth:`encode_image` of the picture."""
        return self.visual.proj(trunk) if isinstance(self.visual, TimmTower) else self.visual.head(trunk)

    def encode_text(self, text: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) token ids -> (B, D). Without a mask, id 0 is padding, as upstream has it."""
        if attention_mask is None:
            attention_mask = text.ne(0)
        hidden = self.bert(input_ids=text, attention_mask=attention_mask).last_hidden_state
        return hidden[:, 0] @ self.text_projection

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> dict[str, Tensor | None]:
        """L2-normalised ``image_features`` and ``text_features`` (None if absent), ``logit_scale``'s exp."""
        return {
            "image_features": None if image is None else F.normalize(self.encode_image(image), dim=-1),
            "text_features": None if text is None else F.normalize(self.encode_text(text), dim=-1),
            "logit_scale": self.logit_scale.exp(),
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in both towers while training."""
        trunk = getattr(self.visual, "trunk", self.visual)
        trunk.set_grad_checkpointing(enable)
        if enable:
            self.bert.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.bert.gradient_checkpointing_disable()

    def set_patch_dropout(self, rate: float) -> None:
        """Share of patches dropped while training (FLIP, arXiv 2212.00794); 0 turns it off. ViT only."""
        from timm.layers import PatchDropout

        trunk = getattr(self.visual, "trunk", self.visual)
        if not hasattr(trunk, "patch_drop"):
            raise ConfigError(f"patch dropout needs a ViT; this image tower is {type(trunk).__name__}")
        trunk.patch_drop = PatchDropout(rate, num_prefix_tokens=trunk.num_prefix_tokens) if rate else nn.Identity()


class TimmTower(nn.Module):
    """Any timm backbone with a linear projection to the shared space; a name CLIP itself never used."""

    def __init__(self, name: str, embed_dim: int, resolution: int) -> None:
        super().__init__()
        import timm

        try:
            self.trunk = timm.create_model(name, pretrained=False, num_classes=0, img_size=resolution)
        except TypeError:  # convolutional backbones take any size and have no such argument
            self.trunk = timm.create_model(name, pretrained=False, num_classes=0)
        except RuntimeError as error:
            raise ConfigError(f"vision_timm: {error}") from None
        self.proj = nn.Linear(self.trunk.num_features, embed_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=self.trunk.num_features**-0.5)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(self.trunk(image))


def _image_tower(config: TowerConfig) -> nn.Module:
    if config.vision_timm is not None:
        return TimmTower(config.vision_timm, config.embed_dim, config.image_resolution)
    if config.is_resnet:
        return _clip_resnet(config)
    from timm.models.vision_transformer import VisionTransformer

    tower = VisionTransformer(
        img_size=config.image_resolution,
        patch_size=config.vision_patch_size,
        embed_dim=config.vision_width,
        depth=config.vision_layers,
        num_heads=config.vision_width // config.vision_head_width,
        pre_norm=True,
        norm_layer=nn.LayerNorm,  # eps 1e-5, where timm's own default is 1e-6
        act_layer="quick_gelu",
        num_classes=0,
    )
    tower.head = nn.Linear(config.vision_width, config.embed_dim, bias=False)
    nn.init.normal_(tower.head.weight, std=config.vision_width**-0.5)
    return tower


def _clip_resnet(config: TowerConfig) -> nn.Module:
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    width = config.vision_width
    shape = ByoModelCfg(
        blocks=tuple(
            ByoBlockCfg(type="bottle", d=depth, c=width * 4 * 2**i, s=1 if i == 0 else 2, br=0.25)
            for i, depth in enumerate(config.vision_layers)
        ),
        stem_chs=(width // 2, width // 2, width),
        stem_type="",
        stem_pool="avg2",
        downsample="avg",
        aa_layer="avg",
        head_type="attn_abs",
    )
    tower = ByobNet(shape, num_classes=config.embed_dim, img_size=config.image_resolution)
    heads = width * 32 // config.vision_head_width
    tower.head.num_heads, tower.head.head_dim = heads, tower.head.embed_dim // heads
    tower.head.scale = tower.head.head_dim**-0.5
    return tower


def _text_tower(config: TowerConfig) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.text_hidden_size,
            num_hidden_layers=config.text_num_hidden_layers,
            num_attention_heads=config.text_num_attention_heads,
            intermediate_size=config.text_intermediate_size,
            hidden_act=config.text_hidden_act,
            hidden_dropout_prob=config.text_hidden_dropout_prob,
            attention_probs_dropout_prob=config.text_attention_probs_dropout_prob,
            max_position_embeddings=config.text_max_position_embeddings,
            type_vocab_size=config.text_type_vocab_size,
            initializer_range=config.text_initializer_range,
            layer_norm_eps=1e-12,
            pad_token_id=0,
        ),
        add_pooling_layer=False,
    )


def resize_position_embedding(table: Tensor, positions: int) -> Tensor:
    """A learned (1 + g·g, W) position table for another grid, as upstream does it for another resolution.

    Bicubic with ``align_corners=True`` on the grid; the class token's row is kept. ``positions`` is 1 + G·G.
    Source: cn_clip ``clip/model.py``, ``resize_pos_embed``. open_clip uses ``align_corners=False``.
    """
    old, new = math.isqrt(table.shape[0] - 1), math.isqrt(positions - 1)
    if old * old != table.shape[0] - 1 or new * new != positions - 1:
        raise ConfigError(f"position table of {table.shape[0]} rows can't become {positions}: a grid must be square")
    grid = table[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=True)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(new * new, -1).to(table.dtype)])
