"""One process of a training run, for the tests that kill it: ``python -m tests.train_run RECIPE [--kill STEP] …``.

With RANK and WORLD_SIZE in the environment it is one of several.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from modelscope.trainers.hooks.hook import Hook

from modelscope_cnclip.trainers import checkpointing
from modelscope_cnclip.trainers.trainer import CnclipTrainer


class Kill(Hook):
    """SIGKILL to this process after a step, or within the writing of the checkpoint behind it."""

    PRIORITY = "HIGHEST"

    def __init__(self, step: int | None, while_saving: bool) -> None:
        self.step, self.while_saving = step, while_saving

    def after_train_iter(self, trainer: Any) -> None:
        if trainer.progress.step != self.step:
            return
        if not self.while_saving:
            os.kill(os.getpid(), signal.SIGKILL)
        write = checkpointing._tensors

        def die(tensors: Any, file: Path) -> None:
            if file.name == checkpointing.OPTIMIZER:
                os.kill(os.getpid(), signal.SIGKILL)
            write(tensors, file)

        checkpointing._tensors = die


class Tell(Hook):
    """A line on standard output per step, so that a test can wait for one; at the end a digest of the weights."""

    PRIORITY = "LOWEST"

    def after_train_iter(self, trainer: Any) -> None:
        print("step", trainer.progress.step, flush=True)

    def after_run(self, trainer: Any) -> None:
        digest = hashlib.sha256()
        for tensor in trainer.towers.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
        print("weights", digest.hexdigest(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("--kill", type=int)
    parser.add_argument("--while-saving", action="store_true")
    parser.add_argument("--only-rank", type=int, help="which rank dies; by default every one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    mine = args.only_rank is None or args.only_rank == int(os.environ.get("RANK", "0"))
    hooks = [Tell(), Kill(args.kill if mine else None, args.while_saving)]
    trainer = CnclipTrainer(cfg_file=args.recipe, callbacks=hooks)
    trainer.train()


if __name__ == "__main__":
    sys.exit(main())
