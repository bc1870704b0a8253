"""What a plan assumes of data that it does not load: rows, classes and length of the examples.

A run draws the partition with flwr-datasets and tokenises every row, which takes seconds and needs transformers. A plan
counts the rows of the file, shares them equally, and tokenises a sample with the model's tokenizer file.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from airtune.experiment.config import Experiment
from airtune.training.catalogue import find, is_fetched, locate, names, read_config, resolve_model
from airtune.training.data import DataConfig
from airtune.training.images import ImageShape

SAMPLE_ROWS = 512
UNKNOWN_ROWS = 100  # examples a client where the data is not here
UNKNOWN_CLASSES = 2
EQUAL_SHARES = "examples are shared equally (a run draws the partition)"


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes the data to be.

    examples : training examples of each client. classes : of the task, None for causal language modelling.
    tokens : of an average example; an image has its patches and the class token. notes : one sentence for each
        assumption.
    """

    examples: int
    classes: int | None
    tokens: float
    notes: tuple[str, ...]


def assume(experiment: Experiment) -> Assumptions:
    """Return the assumptions for an experiment."""
    rows, row_note = _rows(experiment.data, experiment.fleet.clients)
    classes, class_note = _classes(experiment)
    tokens, token_note = _tokens(experiment)
    notes = tuple(note for note in (row_note, class_note, token_note) if note)
    return Assumptions(max(rows, 1), classes, tokens, notes)


def data_file(data: DataConfig) -> Path | None:
    """Return the local file of the training rows, None if it is not here."""
    if data.name in names("data"):
        if not is_fetched(find(data.name, kind="data")):
            return None
        return locate(data.name, kind="data") / "train.jsonl"
    path = Path(data.name).expanduser()
    return path if path.is_file() and path.suffix in (".csv", ".jsonl") else None


def _rows(data: DataConfig, clients: int) -> tuple[int, str]:
    if data.train_rows is not None:
        return data.train_rows // clients, EQUAL_SHARES
    path = data_file(data)
    if path is None:
        return UNKNOWN_ROWS, f"the data is not here: {UNKNOWN_ROWS} examples a client"
    with path.open("rb") as file:
        rows = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    apart = data.test_file is not None or (data.name in names("data") and (path.parent / "test.jsonl").is_file())
    kept = rows if apart else round(rows * (1.0 - data.test_fraction))
    return max(kept - data.validation_rows, 0) // clients, EQUAL_SHARES


def _classes(experiment: Experiment) -> tuple[int | None, str]:
    if experiment.model.task == "causal-lm":
        return None, ""
    data = experiment.data
    if data.name in names("data"):
        entry = find(data.name, kind="data")
        if entry.label_names:
            return len(entry.label_names), ""
        stored = locate(data.name, kind="data") / "label_names.json" if is_fetched(entry) else None
        if stored is not None and stored.is_file():
            return len(json.loads(stored.read_text(encoding="utf-8"))), ""
    return UNKNOWN_CLASSES, f"the number of classes is taken to be {UNKNOWN_CLASSES}"


def _tokens(experiment: Experiment) -> tuple[float, str]:
    """Return the mean length of a sample of examples, or the longest that is allowed; images are of one length."""
    if experiment.model.task == "image-classification":
        return float(ImageShape.of(read_config(experiment.model.name)).places), ""
    longest = experiment.data.max_length
    path, where = data_file(experiment.data), resolve_model(experiment.model.name)
    if path is None or path.suffix != ".jsonl" or not isinstance(where, Path):
        return float(longest), f"every example is taken to have {longest} tokens"
    tokenizer_file = where / "tokenizer.json"
    if not tokenizer_file.is_file():
        return float(longest), f"every example is taken to have {longest} tokens (no tokenizer.json)"
    from tokenizers import Tokenizer

    with path.open(encoding="utf-8") as file:
        texts = [str(json.loads(line)[experiment.data.text_column]) for line in itertools.islice(file, SAMPLE_ROWS)]
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = [min(len(encoded.ids), longest) for encoded in tokenizer.encode_batch(texts)]
    mean = float(np.mean(lengths))
    return mean, f"an example has {mean:.1f} tokens on average (sample of {len(texts)} rows)"
