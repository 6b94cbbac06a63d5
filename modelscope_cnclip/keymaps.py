"""What each weight is called in cn_clip, in our towers (timm), and in transformers' ChineseCLIPModel.

One table; every conversion goes through cn_clip's names, which is also what ModelScope folders use. Values change
only where the frameworks hold the same numbers in another shape, so every round trip is bit-exact in any dtype.
The functions take the tensors *out of* the mapping that they are given, so that nothing is in memory twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

State = dict[str, Tensor]

CN_CLIP, TOWERS, TRANSFORMERS = 0, 1, 2

# cn_clip, towers, transformers; {n} is a number and {x} the rest of the name. None: that side has no such weight.
_VIT = [
    ("visual.conv1.weight", "visual.patch_embed.proj.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.class_embedding", "visual.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "visual.pos_embed", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.{x}", "visual.norm_pre.{x}", "vision_model.pre_layrnorm.{x}"),  # the typo is transformers' own
    ("visual.ln_post.{x}", "visual.norm.{x}", "vision_model.post_layernorm.{x}"),
    ("visual.proj", "visual.head.weight", "visual_projection.weight"),
    *(
        (
            f"visual.transformer.resblocks.{{n}}.{a}",
            f"visual.blocks.{{n}}.{b}",
            c and f"vision_model.encoder.layers.{{n}}.{c}",
        )
        for a, b, c in (
            ("ln_1.{x}", "norm1.{x}", "layer_norm1.{x}"),
            ("attn.in_proj_{x}", "attn.qkv.{x}", None),  # three tensors in transformers, see below
            ("attn.out_proj.{x}", "attn.proj.{x}", "self_attn.out_proj.{x}"),
            ("ln_2.{x}", "norm2.{x}", "layer_norm2.{x}"),
            ("mlp.c_fc.{x}", "mlp.fc1.{x}", "mlp.fc1.{x}"),
            ("mlp.c_proj.{x}", "mlp.fc2.{x}", "mlp.fc2.{x}"),
        )
    ),
]
_TEXT = [
    ("bert.{x}", "bert.{x}", "text_model.{x}"),
    ("text_projection", "text_projection", "text_projection.weight"),
    ("logit_scale", "logit_scale", "logit_scale"),
]
_RESNET = [
    *((f"visual.conv{i}.weight", f"visual.stem.conv{i}.conv.weight", None) for i in (1, 2, 3)),
    *((f"visual.bn{i}.{{x}}", f"visual.stem.conv{i}.bn.{{x}}", None) for i in (1, 2, 3)),
    *(
        (f"visual.layer{stage + 1}.{{n}}.{a}", f"visual.stages.{stage}.{{n}}.{b}", None)
        for stage in range(4)
        for a, b in (
            *((f"conv{i}.weight", f"conv{i}_{kind}.conv.weight") for i, kind in ((1, "1x1"), (2, "kxk"), (3, "1x1"))),
            *((f"bn{i}.{{x}}", f"conv{i}_{kind}.bn.{{x}}") for i, kind in ((1, "1x1"), (2, "kxk"), (3, "1x1"))),
            ("downsample.0.weight", "shortcut.conv.conv.weight"),
            ("downsample.1.{x}", "shortcut.conv.bn.{x}"),
        )
    ),
    ("visual.attnpool.positional_embedding", "visual.head.pos_embed", None),
    *(
        (f"visual.attnpool.{a}_proj.{{x}}", f"visual.head.{b}.{{x}}", None)
        for a, b in zip("qkvc", ("q", "k", "v", "proj"))
    ),
]

# Any other backbone keeps timm's names in our folders; cn_clip and transformers have no place for it.
_OTHER = [("visual.trunk.{x}", "visual.trunk.{x}", None), ("visual.proj.weight", "visual.proj.weight", None)]

# cn_clip name -> what its tensor looks like in the towers and, second, in transformers; each is (to, from).
_Change = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
_TRANSPOSE: _Change = (lambda t: t.t().contiguous(), lambda t: t.t().contiguous())
_RESHAPED: dict[int, dict[str, _Change]] = {
    TOWERS: {
        "visual.class_embedding": (lambda t: t[None, None], lambda t: t[0, 0]),
        "visual.positional_embedding": (lambda t: t[None], lambda t: t[0]),
        "visual.proj": _TRANSPOSE,
    },
    TRANSFORMERS: {"visual.proj": _TRANSPOSE, "text_projection": _TRANSPOSE},
}

# Counters that old files carry and today's modules rebuild.
_BUFFERS = re.compile(r".*\.(position_ids|token_type_ids)")
_QKV = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_IN_PROJ = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def to_towers(state: State) -> State:
    """cn_clip's names -> the names of :class:`~modelscope_cnclip.towers.ChineseCLIP`."""
    return _convert(state, CN_CLIP, TOWERS)


def from_towers(state: State) -> State:
    """The towers' names -> cn_clip's."""
    return _convert(state, TOWERS, CN_CLIP)


def to_transformers(state: State) -> State:
    """cn_clip's names -> those of ``transformers.ChineseCLIPModel``; the attention's one matrix becomes three."""
    out: State = {}
    for key in [key for key in state if _IN_PROJ.fullmatch(key)]:
        layer, kind = _IN_PROJ.fullmatch(key).groups()
        for letter, part in zip("qkv", state.pop(key).chunk(3)):
            out[f"vision_model.encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] = part.clone()
    return out | _convert(state, CN_CLIP, TRANSFORMERS)


def from_transformers(state: State) -> State:
    """The names of ``transformers.ChineseCLIPModel`` -> cn_clip's."""
    out: State = {}
    for key in [key for key in state if _QKV.fullmatch(key)]:
        layer, letter, kind = _QKV.fullmatch(key).groups()
        trio = [f"vision_model.encoder.layers.{layer}.self_attn.{x}_proj.{kind}" for x in "qkv"]
        if letter == "q" and all(name in state for name in trio):
            joined = torch.cat([state.pop(name) for name in trio])
            out[f"visual.transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
    return out | _convert(state, TRANSFORMERS, CN_CLIP)


def _convert(state: State, source: int, target: int) -> State:
    """Rename and reshape; a name that no row knows is kept, for the loader to report."""
    resnet = any(key.startswith(("visual.layer1.", "visual.stem.")) for key in state)
    out: State = {}
    for key in list(state):
        tensor = state.pop(key)
        if _BUFFERS.fullmatch(key):
            continue
        name = _rename(key, _rules(source, target, resnet)) or key
        cn_clip_name = name if target == CN_CLIP else key
        direction, other = (1, source) if target == CN_CLIP else (0, target)
        if change := _RESHAPED[other].get(cn_clip_name):
            tensor = change[direction](tensor)
        out[name] = tensor
    return out


def _rename(key: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(key):
            return template.format(**match.groupdict())
    return None


@cache
def _rules(source: int, target: int, resnet: bool) -> list[tuple[re.Pattern, str]]:
    """The rows of one kind of image tower: both kinds have a ``visual.conv1.weight``, and it isn't the same."""
    rows = (*(_RESNET if resnet else _VIT), *_OTHER, *_TEXT)
    return [(_pattern(row[source]), row[target]) for row in rows if row[source] and row[target]]


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{x\}", "(?P<x>.+)"))
