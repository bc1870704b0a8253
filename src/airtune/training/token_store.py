"""Token numbers on disk: each task is tokenised once, and every process maps the same pages into its memory.

A folder ``tokens/<key>`` of the cache holds plain ``.npy`` arrays and one JSON file. The key is a hash of everything
that the numbers depend on: the fields of [data], the contents of the data's and the tokenizer's files, the task, and
the version of the library that tokenises. What has no files of its own (the Hugging Face hub) is tokenised each time.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from airtune.errors import InputError
from airtune.training.catalogue import cache_root, find, folder_of, is_hub_id, names, resolve_model
from airtune.training.data import DataConfig, LabelledData, TokenizedData, load, load_tokenizer, tokenize
from airtune.training.shapes import Task

FORMAT = 1
META = "meta.json"
ARRAYS = ("ids", "offsets", "labels")
_TOKENIZER_FILES = (".json", ".txt", ".model", ".jinja")
_LOG = logging.getLogger(__name__)


def token_splits(config: DataConfig, model: str, *, task: Task) -> Mapping[str, TokenizedData]:
    """Return the rows of "train", "test" and, if any were asked for, "validation" as token numbers.

    From the cache if they are there; otherwise they are made and put there. A cache that cannot be written costs time,
    not the run: it is logged.

    Raises
    ------
    InputError : as `airtune.training.data.load` and `load_tokenizer`; or the stored files are damaged.
    """
    key = _key(config, model, task)
    if key is None:
        return _tokenized(config, model, task)
    folder = cache_root() / "tokens" / key
    if not folder.is_dir():
        made = _tokenized(config, model, task)
        try:
            _write(folder, made)
        except OSError as error:
            _LOG.warning("token numbers are not kept: cannot write %s (%s)", folder, error.strerror)
            return made
    return _read(folder)


def _tokenized(config: DataConfig, model: str, task: Task) -> dict[str, TokenizedData]:
    rows = load(config, task=task)
    tokenizer = load_tokenizer(model)
    return {
        name: tokenize(part, tokenizer, max_length=config.max_length, task=task, label_names=rows.label_names)
        for name, part in _splits(rows)
    }


def _splits(rows: LabelledData) -> list[tuple[str, Any]]:
    found = [("train", rows.train), ("test", rows.test)]
    return found if rows.validation is None else [*found, ("validation", rows.validation)]


# ----------------------------------------------------------------------------------------------------------- the key


def _key(config: DataConfig, model: str, task: Task) -> str | None:
    data, tokenizer = _data_files(config), _tokenizer_files(model)
    if data is None or tokenizer is None:
        return None
    identity = {
        "format": FORMAT,
        "data": asdict(config),
        "task": task,
        "tokenizers": version("tokenizers"),
        "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in (*data, *tokenizer)],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def _data_files(config: DataConfig) -> list[Path] | None:
    if config.name in names("data"):
        return _files(folder_of(find(config.name, kind="data")).glob("*.json*"))
    given = [Path(name).expanduser() for name in (config.name, config.test_file) if name is not None]
    if not given[0].is_file() and is_hub_id(config.name):
        return None
    return _files(given)


def _tokenizer_files(model: str) -> list[Path] | None:
    where = resolve_model(model)
    if not isinstance(where, Path):
        return None
    return _files(path for path in where.iterdir() if path.suffix in _TOKENIZER_FILES)


def _files(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.is_file())


# --------------------------------------------------------------------------------------------------------- the folder


def _write(folder: Path, splits: Mapping[str, TokenizedData]) -> None:
    """Write all of it beside its place, then move it there; another process may have been faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        meta: dict[str, Any] = {}
        for name, part in splits.items():
            for array in ARRAYS:
                np.save(beside / f"{name}.{array}.npy", getattr(part, array), allow_pickle=False)
            fields = {"num_labels", "label_names", "pad_id", "max_length", "task"}
            meta[name] = {field: getattr(part, field) for field in sorted(fields)}
        (beside / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        beside.chmod(0o755)
        try:
            os.rename(beside, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _read(folder: Path) -> dict[str, TokenizedData]:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        return {name: _split(folder, name, fields) for name, fields in meta.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"data.name: the stored token numbers in {str(folder)!r} are damaged; remove them") from error


def _split(folder: Path, name: str, fields: Mapping[str, Any]) -> TokenizedData:
    ids, offsets, labels = (np.load(folder / f"{name}.{key}.npy", mmap_mode="r", allow_pickle=False) for key in ARRAYS)
    return TokenizedData(
        ids=ids,
        offsets=offsets,
        labels=labels,
        num_labels=fields["num_labels"],
        label_names=tuple(fields["label_names"]),
        pad_id=fields["pad_id"],
        max_length=fields["max_length"],
        task=fields["task"],
    )
