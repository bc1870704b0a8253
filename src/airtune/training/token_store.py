"""Rows as numbers on disk: each task is read once, and every process maps the same pages into its memory.

A folder ``tokens/<key>`` of the cache holds plain ``.npy`` arrays and one JSON file. The key is a hash of everything
that the numbers depend on: the fields of [data], the contents of the data's files and of the model's (tokenizer, image
processor), the task, and the versions of the libraries that read. What has no files of its own (the Hugging Face hub)
is read each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from airtune.errors import InputError
from airtune.training.catalogue import cache_root, find, folder_of, is_hub_id, names, resolve_model
from airtune.training.data import DataConfig, LabelledData, load
from airtune.training.examples import Examples
from airtune.training.readers import Reader, reader_of
from airtune.training.shapes import Task

FORMAT = 2
META = "meta.json"
_READER_FILES = (".json", ".txt", ".model", ".jinja")
_LOG = logging.getLogger(__name__)


def token_splits(config: DataConfig, model: str, *, task: Task) -> Mapping[str, Examples]:
    """Return the rows of "train", "test" and, if any were asked for, "validation" as numbers (tokens, or pixels).

    From the cache if they are there; otherwise they are made and put there. A cache that cannot be written costs time,
    not the run: it is logged.

    Raises
    ------
    InputError : as `airtune.training.data.load` and `Reader.read`; or the stored files are damaged.
    """
    reader = reader_of(config, model, task)
    key = _key(config, model, task, reader.versions)
    if key is None:
        return _made(config, task, reader)
    folder = cache_root() / "tokens" / key
    if not folder.is_dir():
        made = _made(config, task, reader)
        try:
            _write(folder, made)
        except OSError as error:
            _LOG.warning("token numbers are not kept: cannot write %s (%s)", folder, error.strerror)
            return made
    return _read(folder, reader)


def _made(config: DataConfig, task: Task, reader: Reader) -> dict[str, Examples]:
    rows = load(config, task=task)
    return {name: reader.read(part, rows.label_names) for name, part in _splits(rows)}


def _splits(rows: LabelledData) -> list[tuple[str, Any]]:
    found = [("train", rows.train), ("test", rows.test)]
    return found if rows.validation is None else [*found, ("validation", rows.validation)]


# ----------------------------------------------------------------------------------------------------------- the key


def _key(config: DataConfig, model: str, task: Task, versions: Mapping[str, str]) -> str | None:
    data, of_model = _data_files(config), _reader_files(model)
    if data is None or of_model is None:
        return None
    fields = {name: value for name, value in asdict(config).items() if name != "topics"}  # made after reading
    identity = {
        "format": FORMAT,
        "data": fields,
        "task": task,
        "versions": dict(versions),
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*data, *of_model)],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _data_files(config: DataConfig) -> list[Path] | None:
    if config.name in names("data"):
        return _files(folder_of(find(config.name, kind="data")).glob("*.json*"))
    given = [Path(name).expanduser() for name in (config.name, config.test_file) if name is not None]
    if not given[0].is_file() and is_hub_id(config.name):
        return None
    return _files(given)


def _reader_files(model: str) -> list[Path] | None:
    where = resolve_model(model)
    if not isinstance(where, Path):
        return None
    return _files(path for path in where.iterdir() if path.suffix in _READER_FILES)


def _files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file())


# --------------------------------------------------------------------------------------------------------- the folder


def _write(folder: Path, splits: Mapping[str, Examples]) -> None:
    """Write all of it beside its place, then move it there; another process may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        meta: dict[str, Any] = {}
        for name, part in splits.items():
            for array, values in part.arrays.items():
                np.save(beside / f"{name}.{array}.npy", values, allow_pickle=False)
            meta[name] = {"arrays": list(part.arrays), "fields": dict(part.fields)}
        (beside / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        beside.chmod(0o755)
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _read(folder: Path, reader: Reader) -> dict[str, Examples]:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        return {name: _split(folder, name, part, reader) for name, part in meta.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"data.name: the stored token numbers in {str(folder)!r} are damaged; remove them") from error


def _split(folder: Path, name: str, part: Mapping[str, Any], reader: Reader) -> Examples:
    load_one = partial(np.load, mmap_mode="r", allow_pickle=False)
    return reader.stored({key: load_one(folder / f"{name}.{key}.npy") for key in part["arrays"]}, part["fields"])
