"""Parameter groups, learning rates per optimizer step, and optimizer state that survives a change of stage."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelscope_cnclip import keymaps
from modelscope_cnclip.towers import ChineseCLIP

from .keys import BETAS
from .recipe import Recipe, RecipeError, Stage

State = dict[str, dict[str, Tensor]]  # parameter name -> what the optimizer keeps about it


def build_optimizer(model: ChineseCLIP, stage: Stage, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of one stage, over the parameters that aren't frozen.

    Groups are cn_clip's (``training/main.py``): no weight decay for weights whose name has ``bn``, ``ln``, ``bias`` or
    ``logit_scale`` in it. That is by cn_clip's names, in which BERT's ``LayerNorm.weight`` matches none of these, so
    upstream decays it, most likely by accident. ``train.optimizer.decay_layer_norm: false`` doesn't. A tower that
    cn_clip never had decays its matrices and kernels only.

    Defaults: AdamW, β and ε per kind of image tower as in the paper's table 8. ``lr_scale`` makes further groups.

    Raises:
        RecipeError: no such class in torch.optim, or an ``lr_scale`` pattern that matches nothing.
    """
    kind = recipe.get("train.optimizer.type", "AdamW")
    maker = getattr(torch.optim, kind, None)
    if not (isinstance(maker, type) and issubclass(maker, torch.optim.Optimizer)):
        raise RecipeError(f"{recipe.where}: train.optimizer.type: torch.optim has no {kind!r}")
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    used: set[str] = set()
    decayed = decays(model, layer_norm=recipe.get("train.optimizer.decay_layer_norm", True))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        for pattern, factor in stage.lr_scale.items():
            if name == pattern or name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern):
                scale = float(factor)
                used.add(pattern)
        groups.setdefault((scale, stage.weight_decay if decayed[name] else 0.0), []).append((name, parameter))
    unused = [pattern for pattern in stage.lr_scale if pattern not in used]
    if unused:
        some = ", ".join(list(dict.fromkeys(n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad)))
        raise RecipeError(
            f"{recipe.where}: {stage.name}: lr_scale: {unused[0]!r} matches nothing that is trained; it trains {some}"
        )
    options: dict[str, Any] = {"lr": stage.lr}
    if kind in ("Adam", "AdamW"):
        beta1, beta2, eps = BETAS["resnet" if model.config.is_resnet else "vit"]
        beta1, beta2 = recipe.get("train.optimizer.betas", (beta1, beta2))
        options |= {
            "betas": (
                recipe.get("train.optimizer_hparams.beta1", beta1),
                recipe.get("train.optimizer_hparams.beta2", beta2),
            ),
            "eps": recipe.first("train.optimizer.eps", "train.optimizer_hparams.eps", default=eps),
            "fused": model.logit_scale.device.type
            in ("cpu", "cuda"),  # one pass over the weights; several times faster on a CPU, where it counts
        }
    return maker(
        [
            {"params": members, "weight_decay": decay, "lr_scale": scale, "name": _group_name(members, scale, decay)}
            for (scale, decay), members in groups.items()
        ],
        **options,
    )


def decays(model: ChineseCLIP, *, layer_norm: bool = True) -> dict[str, bool]:
    """Whether weight decay applies, by parameter name; see :func:`build_optimizer`."""
    out, parameters = {}, dict(model.named_parameters())
    # All at once and in order: one name alone doesn't say which kind of image tower it is from.
    upstreams = keymaps.from_towers({name: torch.empty_like(p, device="meta") for name, p in parameters.items()})
    for (name, parameter), upstream in zip(parameters.items(), upstreams, strict=True):
        if model.config.vision_timm is not None and name.startswith("visual."):
            out[name] = parameter.ndim > 1
            continue
        out[name] = not any(part in upstream for part in ("bn", "ln", "bias", "logit_scale"))
        if not layer_norm and "LayerNorm" in name:
            out[name] = False
    return out


def _group_name(members: list[tuple[str, nn.Parameter]], scale: float, decay: float) -> str:
    towers = "+".join(dict.fromkeys(name.split(".")[0] for name, _ in members))
    return f"{towers}{'' if scale == 1 else f' ×{scale:g}'}{'' if decay else ', no decay'}"


def learning_rate(stage: Stage, step: int, total: int) -> float:
    """The rate of the step with this number, from 0, of a schedule of ``total`` steps.

    Warm-up is ``(step + 1) / warmup`` of the peak; then cosine or linear to 0, or constant. Source: cn_clip
    ``training/scheduler.py``.
    """
    warmup = stage.warmup_steps or round(stage.warmup_proportion * total)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if stage.schedule == "cosine":
        return stage.lr * 0.5 * (1 + math.cos(math.pi * done))
    return stage.lr * (1 - done) if stage.schedule == "linear" else stage.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def get_state(optimizer: torch.optim.Optimizer) -> State:
    """What the optimizer keeps, by parameter name; tensors are shared, not copied."""
    return {
        name: {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"])
        if parameter in optimizer.state
    }


def set_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give back what :func:`get_state` took, to the parameters that are still there."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"]):
            for key, value in state.get(name, {}).items():
                if value.shape == parameter.shape:  # in the parameter's own memory format, as the fused kernels want it
                    value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
                else:  # the count of steps, which fused kernels want where the parameters are
                    value = value.to(parameter.device if group.get("fused") else value.device, copy=True)
                optimizer.state[parameter][key] = value
