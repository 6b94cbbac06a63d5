"""How long stages are: optimizer steps and passes, out of the recipe, the size of the data and the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from modelscope_cnclip.data import DataError

from .batches import batches_of
from .recipe import Recipe, Stage


@dataclass(frozen=True)
class Plan:
    """Lengths of one run.

    Attributes:
        recipe: with the stages.
        size: pairs in the data set.
        ranks: processes.
    """

    recipe: Recipe
    size: int
    ranks: int

    @property
    def drop_last(self) -> bool:
        return self.recipe.get("train.dataloader.drop_last", True)

    def steps_in_pass(self, stage: Stage) -> int:
        """Optimizer steps in one pass over the data, the last of which may hold fewer batches.

        Raises:
            DataError: the data is smaller than one batch.
        """
        world = stage.batch_size * self.ranks
        batches = batches_of(self.size, world, self.ranks, self.drop_last)
        if not batches:
            raise DataError(
                f"{self.recipe.where}: {self.size} pairs are fewer than one batch of {world} ({stage.batch_size} × "
                f"{self.ranks} ranks) in {stage.name}: lower batch_size_per_gpu, or set "
                "train.dataloader.drop_last to false"
            )
        return math.ceil(batches / stage.cumulative_iters)

    def steps_in(self, stage: Stage) -> int:
        """Optimizer steps in a stage, if it isn't ended early."""
        in_pass = self.steps_in_pass(stage)
        lengths = [stage.max_steps, None if stage.max_epochs is None else math.ceil(stage.max_epochs * in_pass)]
        return min(length for length in lengths if length is not None)

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(self.steps_in(stage) for stage in self.recipe.stages)

    @property
    def passes(self) -> int:
        """Of all stages; a pass that its stage ends early counts."""
        return sum(math.ceil(self.steps_in(stage) / self.steps_in_pass(stage)) for stage in self.recipe.stages)

    def schedule(self, number: int) -> tuple[Stage, int]:
        """The learning-rate schedule that a stage is a part of: its shape and warm-up, and its length in steps.

        Stages with ``restart_schedule: false`` go on along the schedule of the stage before them, under their own
        peak.
        """
        stages, first = self.recipe.stages, number
        while first and not stages[first].restart_schedule:
            first -= 1
        last = number + 1
        while last < len(stages) and not stages[last].restart_schedule:
            last += 1
        total = sum(self.steps_in(stage) for stage in stages[first:last])
        return replace(stages[first], lr=stages[number].lr), total
