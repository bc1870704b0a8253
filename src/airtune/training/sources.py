"""Where labelled texts and images come from: the catalogue, local files, or the Hugging Face hub.

`read` returns `datasets.Dataset` tables with the columns ``text`` (or ``pixels``) and ``label``; labels are integers
from 0. All
checks of user files stand here, and each message names the file, the field and what the file has instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from airtune.errors import InputError, unknown_name
from airtune.training.catalogue import Entry, find, is_hub_id, locate, looks_like_path, names
from airtune.training.shapes import Task

if TYPE_CHECKING:
    from datasets import Dataset

FILE_TYPES = (".csv", ".jsonl", ".parquet")


class Request(Protocol):
    """What `read` needs of a `DataConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def test_file(self) -> str | None: ...
    @property
    def subset(self) -> str: ...
    @property
    def train_split(self) -> str: ...
    @property
    def test_split(self) -> str: ...
    @property
    def text_column(self) -> str: ...
    @property
    def image_column(self) -> str: ...
    @property
    def label_column(self) -> str: ...


@dataclass(frozen=True)
class Content:
    """What a row holds beside its label.

    column : its name in our tables, and the noun in messages. option : the field of [data] that names it in files.
    is_one : says whether a value is one.
    """

    column: str
    option: str
    is_one: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_image(value: Any) -> bool:
    """Say whether a value is height x width (x channels) finite numbers: nested lists, an array, or a PIL image."""
    try:
        found = np.asarray(value)
    except ValueError:  # rows of unequal length
        return False
    return found.ndim in (2, 3) and found.size > 0 and found.dtype.kind in "uif" and bool(np.isfinite(found).all())


TEXT = Content("text", "text_column", _is_text)
IMAGES = Content("pixels", "image_column", _is_image)
CONTENT: Mapping[Task, Content] = {"sequence-classification": TEXT, "causal-lm": TEXT, "image-classification": IMAGES}


@dataclass(frozen=True)
class Loaded:
    """The rows of a source: `test` is None where the source has none."""

    train: Dataset
    test: Dataset | None
    label_names: tuple[str, ...]


def read(request: Request, *, labelled: bool, content: Content = TEXT) -> Loaded:
    """Read all rows of a source.

    Parameters
    ----------
    labelled : whether labels are needed; otherwise a missing label column is no error.
    content : what a row holds beside it.

    Raises
    ------
    InputError : unknown name, unreadable file, missing column, empty text or unusable labels.
    """
    name = request.name
    if name in names("data"):
        return _read_catalogue(find(name, kind="data"), content)
    suffix = Path(name).suffix.lower()
    if suffix in FILE_TYPES or Path(name).expanduser().is_file():
        files = [name] if request.test_file is None else [name, request.test_file]
        tables = [read_table(file) for file in files]
        return _labelled(tables, files, request, labelled, content)
    if request.test_file is not None:
        raise InputError(f"data.test_file: only for local files, and {name!r} is none")
    if is_hub_id(name):
        return _read_hub(request, labelled, content)
    if looks_like_path(name):
        raise InputError(f"data.name: {name!r} is no file; valid: a file ending in {', '.join(FILE_TYPES)}")
    raise unknown_name("data.name", name, [*names("data"), "FILE.csv", "FILE.jsonl", "FILE.parquet", "OWNER/NAME"])


def read_labelled_file(
    file: str,
    *,
    column: str,
    label_column: str,
    label_names: Sequence[str],
    field: str = "data",
    content: Content = TEXT,
) -> Dataset:
    """Read one local file whose labels must be among known ones: further test rows for a trained model.

    Labels are names out of `label_names`, or integers below their number. With no `label_names` the file needs no
    label column.

    column : of the file, with what `content` says.

    Raises
    ------
    InputError : as `read`; or a label that the model does not know.
    """
    table = read_table(file, field=field)
    values = _values(table, file, column, content)
    if not label_names:
        return _dataset(values, None, content)
    raw = _column(table, file, label_column, "label_column")
    return _dataset(values, _label_numbers(raw, file, label_column, label_names), content)


def read_table(file: str, *, field: str = "data.name") -> Dataset:
    """Read a ``.csv``, ``.jsonl`` or ``.parquet`` file as it stands."""
    from datasets import Dataset
    from pyarrow import ArrowException, csv, json, parquet

    path = Path(file).expanduser()
    readers: dict[str, Any] = {
        ".csv": lambda: csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True)),
        ".jsonl": lambda: json.read_json(path, parse_options=json.ParseOptions(newlines_in_values=False)),
        ".parquet": lambda: parquet.read_table(path),
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"{field}: {file!r} is no file of a known type; valid endings: {', '.join(FILE_TYPES)}")
    try:
        table = readers[path.suffix.lower()]()
    except FileNotFoundError as error:
        raise InputError(f"{field}: there is no file {file!r}") from error
    except (OSError, ArrowException) as error:
        raise InputError(f"{field}: cannot read {file!r}: {' '.join(str(error).split())[:200]}") from error
    if table.num_rows == 0:
        raise InputError(f"{field}: {file!r} has no rows")
    return Dataset(table)


def _read_catalogue(entry: Entry, content: Content) -> Loaded:
    folder = locate(entry.name, kind="data", field="data.name")
    label_names = entry.label_names
    if (stored := folder / "label_names.json").is_file():
        label_names = tuple(json.loads(stored.read_text(encoding="utf-8")))
    splits = {split: read_table(str(folder / f"{split}.jsonl")) for split in ("train", "test") if _has(entry, split)}
    if content.column not in (has := splits["train"].column_names):
        raise InputError(
            f"data.name: {entry.name!r} has {' and '.join(has)}, the model's task needs {content.column}; valid: other "
            "data, or another model.task"
        )
    return Loaded(splits["train"], splits.get("test"), label_names)


def _has(entry: Entry, split: str) -> bool:
    return f"{split}.jsonl" in entry.files


def _read_hub(request: Request, labelled: bool, content: Content) -> Loaded:
    from datasets import load_dataset

    try:
        splits: Any = load_dataset(request.name, request.subset or None)
    except Exception as error:  # the hub client raises many kinds: offline, unknown id, gated, no connection
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"data.name: cannot get {request.name!r} from the Hugging Face hub ({reason}); "
            f"data that needs no hub: {', '.join(names('data'))}"
        ) from error
    if request.train_split not in splits:
        raise InputError(
            f"data.train_split: {request.name!r} has no split {request.train_split!r}; valid: {', '.join(splits)}"
        )
    chosen = [split for split in (request.train_split, request.test_split) if split in splits]
    where = [f"{request.name}, {split}" for split in chosen]
    return _labelled([splits[split] for split in chosen], where, request, labelled, content)


def _labelled(
    tables: Sequence[Dataset], where: Sequence[str], request: Request, labelled: bool, content: Content
) -> Loaded:
    """Reduce tables (train, perhaps test) to the content's column and the label."""
    name = getattr(request, content.option)
    found = [_values(table, file, name, content) for table, file in zip(tables, where, strict=True)]
    label = request.label_column
    if not labelled and any(label not in table.column_names for table in tables):
        plain = [_dataset(column, None, content) for column in found]
        return Loaded(plain[0], plain[1] if len(plain) > 1 else None, ())
    raw = [_column(table, file, label, "label_column") for table, file in zip(tables, where, strict=True)]
    label_names = _label_names(tables[0], raw, where[0], label)
    rows = [
        _dataset(column, _label_numbers(values, file, label, label_names), content)
        for column, values, file in zip(found, raw, where, strict=True)
    ]
    return Loaded(rows[0], rows[1] if len(rows) > 1 else None, label_names)


def _dataset(values: list[Any], labels: list[int] | None, content: Content) -> Dataset:
    from datasets import Dataset

    columns: dict[str, Any] = {content.column: values} if labels is None else {content.column: values, "label": labels}
    return Dataset.from_dict(columns)


def _column(table: Dataset, file: str, column: str, option: str) -> list[Any]:
    if column not in table.column_names:
        raise InputError(
            f"data.{option}: {file!r} has no column {column!r}; its columns: {', '.join(table.column_names)}"
        )
    return cast("list[Any]", table[column][:])


def _values(table: Dataset, file: str, column: str, content: Content) -> list[Any]:
    """Return the checked column of what the rows hold; images as arrays."""
    values = _column(table, file, column, content.option)
    for row, value in enumerate(values):
        if not content.is_one(value):
            raise InputError(
                f"data.{content.option}: row {row + 1} of {file!r} has no {content.column} in column {column!r}: "
                f"{repr(value)[:80]}"
            )
    return [np.asarray(value) for value in values] if content is IMAGES else values


def _label_names(table: Dataset, raw: Sequence[list[Any]], file: str, column: str) -> tuple[str, ...]:
    """Return the class names: those the data declares, the sorted text labels, or the integers from 0."""
    declared = getattr(table.features[column], "names", None)
    if declared:
        return tuple(declared)
    values = [value for values in raw for value in values]
    if all(isinstance(value, str) for value in values):
        return tuple(sorted(set(values)))
    whole = [_whole_number(value) for value in values]
    if any(number is None or number < 0 for number in whole):
        wrong = next(value for value, number in zip(values, whole, strict=True) if number is None or number < 0)
        raise InputError(
            f"data.label_column: {file!r} has the label {wrong!r} in column {column!r}; "
            "valid: text, or whole numbers from 0"
        )
    return tuple(str(number) for number in range(max(cast("list[int]", whole)) + 1))


def _label_numbers(raw: Sequence[Any], file: str, column: str, label_names: Sequence[str]) -> list[int]:
    position = {name: number for number, name in enumerate(label_names)}
    numbers = [position.get(value) if isinstance(value, str) else _whole_number(value) for value in raw]
    for row, number in enumerate(numbers):
        if number is None or not 0 <= number < len(label_names):
            raise InputError(
                f"data.label_column: row {row + 1} of {file!r} has the label {raw[row]!r} in column {column!r}; "
                f"valid: {', '.join(label_names)}"
            )
    return cast("list[int]", numbers)


def _whole_number(value: Any) -> int | None:
    if isinstance(value, int | float) and float(value).is_integer():
        return int(value)
    return None
