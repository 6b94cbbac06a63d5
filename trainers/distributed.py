"""This process among the others that train the same model: gloo on CPUs, NCCL on GPUs, or alone."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@dataclass
class Ranks:
    """The processes of a run.

    Attributes:
        number: of this one, from 0.
        count: of all.
        group: for small messages between CPUs, whatever the gradients travel by.
    """

    number: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def join(cls, timeout: float) -> Ranks:
        """Meet the processes that torchrun (or whoever set RANK and WORLD_SIZE) started; alone if there are none.

        Args:
            timeout: seconds after which a rank that waits for a dead one gives up with an error.
        """
        if not dist.is_initialized():
            if int(os.environ.get("WORLD_SIZE", "1")) < 2:
                return cls()
            cuda = torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
        group = None
        if dist.get_backend() == "nccl":
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and logs."""
        return self.number == 0

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier(group=self.group)

    def sum(self, values: list[float]) -> list[float]:
        """Of each value over all ranks."""
        if self.count == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def all(self, value: bool) -> bool:
        """Whether it holds on every rank."""
        return self.sum([float(value)])[0] == self.count

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share_buffers(self, module: nn.Module) -> None:
        """The first rank's buffers on every rank: between steps, each has BatchNorm statistics of its own pictures."""
        if self.count > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def agree(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        return self.gather(value)[0]


SIGTERM_EXIT = 128 + signal.SIGTERM  # what a shell reports of a process that SIGTERM ended


class Sigterm:
    """While this context is open SIGTERM only sets :attr:`came`, so that a step can finish and a checkpoint be written.

    Only the main thread may ask for signals; in another one SIGTERM does what it always does.
    """

    came = False

    def __enter__(self) -> Sigterm:
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:
            self._before = None
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: Any) -> None:
        self.came = True
