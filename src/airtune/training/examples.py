"""What trainers, evaluation and costs need of the rows of a task, whether a row is a text or an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from airtune.training.shapes import Task


class Examples(Protocol):
    """Rows as numbers, ready for the network; `TokenizedData` and `ImageData` are the two kinds."""

    @property
    def task(self) -> Task:
        """What the labels of `batch` are."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """The class of each row, [rows]; 0 where the data has no labels."""
        ...

    @property
    def num_labels(self) -> int:
        """Number of classes, at least 1."""
        ...

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes; empty where the data has no labels."""
        ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Token places that each row fills in the network, [rows]: tokens, or patches and the class token."""
        ...

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All numbers of the rows, by name: what a store writes and what tells two sets of rows apart."""
        ...

    @property
    def fields(self) -> Mapping[str, Any]:
        """All other attributes, by name, as JSON has them; with the arrays they make an equal object."""
        ...

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def batch(self, indices: NDArray[np.integer[Any]] | Sequence[int]) -> Mapping[str, NDArray[Any]]:
        """Return rows as the network takes them, by the names of its arguments, and their ``labels``."""
        ...

    def select(self, indices: NDArray[np.integer[Any]] | Sequence[int]) -> Self:
        """Return the given rows as data of their own (a copy), in this order."""
        ...
