"""Cohorts in groups of like size: what one call of a trainer sees, here or on a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from airtune.types import Trained, Trainer, TrainingJob

Item = TypeVar("Item")


def groups_of(items: Sequence[Item], size: int | None) -> list[Sequence[Item]]:
    """Return runs of consecutive items, as few as `size` allows and as equal as they can be; None: one run.

    The runs depend on the items and on `size` alone, never on who works on them: an engine that trains a run together
    sums in the same order wherever it runs.
    """
    if not items:
        return []
    count = 1 if size is None else -(-len(items) // size)
    ends = [round(len(items) * (index + 1) / count) for index in range(count)]
    return [items[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class GroupedTrainer:
    """Trains a cohort group after group in this process.

    Attributes
    ----------
    trainer : trains one group. size : most clients of a group; None: the whole cohort.
    """

    trainer: Trainer
    size: int | None = None

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[Trained]:
        """Return one result per job, in order."""
        return [trained for group in groups_of(jobs, self.size) for trained in self.trainer.train(group)]
