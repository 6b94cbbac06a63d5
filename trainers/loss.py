"""The contrastive loss of CLIP, over the pairs of all ranks, with repeated captions and pictures taken into account.

    loss = clip_loss(image_features, text_features, logit_scale, image_ids=…, text_ids=…)
    loss.backward()

Shape suffixes: B pairs on this rank, G pairs on all ranks, D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def clip_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    aggregate: bool = True,
) -> Tensor:
    """Symmetric InfoNCE of this rank's pairs against the pairs of all ranks.

    With s = ``logit_scale``, the image half is the mean over this rank's pictures i of
    ``-Σ_j t_ij · log softmax_j(s · image_i · text_j)``, the text half the same with the sides exchanged, and the loss
    their mean. t is 1 for the own pair. Pairs that carry the same caption or show the same picture are not negatives
    of one another: t is then spread evenly over all of them. Without such repeats this is cn_clip's loss
    (``training/train.py``, ``get_loss`` with ``gather_with_grad``). The mean over ranks is the loss of the whole
    batch, and so is its gradient once DDP has averaged it: the features of other ranks carry gradients.

    Memory: two (B, G) matrices of logits per rank, where cn_clip holds (G, G).

    Args:
        image_BD, text_BD: L2-normalised features, any float dtype; the loss is computed in fp32.
        logit_scale: (), the factor itself, not its log.
        image_ids, text_ids: (B,) int64; equal numbers mean the same picture, or the same caption. None: all differ.
        label_smoothing: share of the target spread over all G pairs.
        aggregate: False contrasts against this rank's pairs only, as cn_clip's ``skip-aggregate``.

    Returns:
        () float32.
    """
    image_BD, text_BD, scale = image_BD.float(), text_BD.float(), logit_scale.float()
    gathered = aggregate and dist.is_initialized() and dist.get_world_size() > 1
    image_GD, text_GD = (_gather(x) if gathered else x for x in (image_BD, text_BD))
    target_BG = _targets(len(image_BD), image_ids, text_ids, gathered, image_BD.device)
    if label_smoothing:
        target_BG = target_BG * (1 - label_smoothing) + label_smoothing / target_BG.shape[1]
    image_half = F.cross_entropy(scale * image_BD @ text_GD.T, target_BG)
    text_half = F.cross_entropy(scale * text_BD @ image_GD.T, target_BG)
    return (image_half + text_half) / 2


def _targets(
    size: int, image_ids: Tensor | None, text_ids: Tensor | None, gathered: bool, device: torch.device
) -> Tensor:
    """(B, G): row i is spread over i's own pair and every pair of the same picture or caption. Rows sum to 1."""
    offset = size * dist.get_rank() if gathered else 0
    total = size * dist.get_world_size() if gathered else size
    same_BG = torch.zeros(size, total, dtype=torch.bool, device=device)
    same_BG[torch.arange(size), torch.arange(size) + offset] = True
    for ids in (image_ids, text_ids):
        if ids is not None:
            ids = ids.to(device)
            same_BG |= ids[:, None] == (_gather(ids) if gathered else ids)[None]
    return same_BG.float() / same_BG.sum(1, keepdim=True)


def _gather(x: Tensor) -> Tensor:
    """(B, …) of every rank -> (G, …), in rank order; floats with a gradient."""
    return _Gather.apply(x) if x.is_floating_point() else _all_gather(x)


def _all_gather(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    """all_gather whose gradient is what all ranks' losses say about this rank's features.

    torch.distributed.nn's own needs a reduce-scatter or an all-to-all, which gloo lacks on some systems.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.size = len(x)
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        start = ctx.size * dist.get_rank()
        return grad[start : start + ctx.size]
