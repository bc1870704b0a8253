"""From rows of a data set to what a model takes: texts through its tokenizer, images through its image processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from airtune.training.data import DataConfig, TokenizedData, load_tokenizer, tokenize
from airtune.training.examples import Examples
from airtune.training.images import ImageReader
from airtune.training.shapes import Task

if TYPE_CHECKING:
    from datasets import Dataset


class Reader(Protocol):
    """Reads the rows of one task for one model; loads what it needs of the model when it first reads."""

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that the numbers depend on, by name."""
        ...

    def read(self, rows: Dataset, label_names: Sequence[str] = ()) -> Examples:
        """Return rows as numbers.

        Parameters
        ----------
        rows : with the columns ``text`` or ``pixels`` and, unless the task needs none, ``label``.
        label_names : of the classes, in label order.

        Raises
        ------
        InputError : the model is not there or cannot read such rows.
        """
        ...

    def stored(self, arrays: Mapping[str, NDArray[Any]], fields: Mapping[str, Any]) -> Examples:
        """Return the examples of these `Examples.arrays` and `Examples.fields`; KeyError if one is missing."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model's tokenizer or image processor into a folder, for transformers' ``from_pretrained``."""
        ...


@dataclass(frozen=True)
class TextReader:
    """Turns rows with the column ``text`` into `TokenizedData`.

    Attributes
    ----------
    model : whose tokenizer it is (see `resolve_model`). max_length, task : as in `tokenize`.
    """

    model: str
    max_length: int
    task: Task

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    @property
    def versions(self) -> Mapping[str, str]:
        """Return that of the tokenizers."""
        return {"tokenizers": version("tokenizers")}

    def read(self, rows: Dataset, label_names: Sequence[str] = ()) -> TokenizedData:
        """Return rows as token numbers."""
        return tokenize(rows, self._tokenizer, max_length=self.max_length, task=self.task, label_names=label_names)

    def stored(self, arrays: Mapping[str, NDArray[Any]], fields: Mapping[str, Any]) -> TokenizedData:
        """Return the token numbers of these arrays and fields."""
        return TokenizedData(
            ids=arrays["ids"],
            offsets=arrays["offsets"],
            labels=arrays["labels"],
            num_labels=fields["num_labels"],
            label_names=tuple(fields["label_names"]),
            pad_id=fields["pad_id"],
            max_length=fields["max_length"],
            task=fields["task"],
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer."""
        self._tokenizer.save_pretrained(folder)


def reader_of(data: DataConfig, model: str, task: Task) -> Reader:
    """Return what reads the rows of a task for a model."""
    return ImageReader(model) if task == "image-classification" else TextReader(model, data.max_length, task)
