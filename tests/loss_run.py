"""One process of several that compute the same loss: ``python -m tests.loss_run RANK RANKS FOLDER``.

Reads ``cases.pt`` from the folder and writes ``RANK.pt``: for each case and number of ranks this rank's loss, the
gradients that DDP averages, and the same of cn_clip's own loss where there are no repeats.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from modelscope_cnclip.trainers.loss import clip_loss


class Towers(nn.Module):
    """Two linear towers of the same weight, and a temperature; called as cn_clip calls its model."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.shared = nn.Linear(*weight.T.shape, bias=False)
        self.shared.weight.data = weight.clone()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor, mask_ratio: float = 0) -> tuple[Tensor, Tensor, Tensor]:
        image, text = (F.normalize(self.shared(x), dim=-1) for x in (image, text))
        return image, text, self.logit_scale.exp()


def upstream(model: nn.Module, image: Tensor, text: Tensor, smoothing: float = 0.0, *, aggregate: bool) -> Tensor:
    """cn_clip's ``get_loss`` with the gradient through the gather; ``Tensor.cuda``, which it calls, must be a stub."""
    from cn_clip.training.train import get_loss

    args = SimpleNamespace(accum_freq=1, mask_ratio=0, distillation=False, aggregate=aggregate, gather_with_grad=True,
                           local_device_rank=0, report_training_batch_acc=False)  # fmt: skip
    entropy = nn.CrossEntropyLoss(label_smoothing=smoothing)
    return get_loss(model, image, text, entropy, entropy, args)[0]


def ours(model: nn.Module, image: Tensor, text: Tensor, **options: Any) -> Tensor:
    return clip_loss(*model(image, text), **options)


def result(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {"loss": loss.detach(), **{name.removeprefix("module."): p.grad for name, p in model.named_parameters()}}


def main(rank: int, most: int, folder: Path) -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    # torch.distributed.nn, which cn_clip's module imports, keeps the group that there is when it is first imported.
    import cn_clip.training.train  # noqa: F401

    cases, out = torch.load(folder / "cases.pt", weights_only=True), {}
    for ranks in (2, 4):
        if rank >= ranks or ranks > most:
            continue
        dist.init_process_group("gloo", f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks)
        for name, case in cases.items():
            mine = {key: value.chunk(ranks)[rank] for key, value in case["tensors"].items()}
            image, text = mine.pop("image"), mine.pop("text")
            model = DistributedDataParallel(Towers(case["weight"]))
            out[ranks, name] = result(model, ours(model, image, text, **mine, **case["options"]))
            if not mine:
                model = DistributedDataParallel(Towers(case["weight"]))
                aggregate = case["options"].get("aggregate", True)
                smoothing = case["options"].get("label_smoothing", 0.0)
                out[ranks, name, "cn_clip"] = result(
                    model, upstream(model, image, text, smoothing, aggregate=aggregate)
                )
        dist.destroy_process_group()
    torch.save(out, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
