"""Labelled texts and images: loading and splitting; tokenising texts once; and the batches a client trains on.

Nothing heavy is imported before a function needs it. After `tokenize` the text is gone: the token numbers of all
examples stand in one array, which every client shares, so a thousand clients cost a thousand index arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError
from airtune.streams import stream
from airtune.training import sources
from airtune.training.catalogue import resolve_model
from airtune.training.examples import Examples
from airtune.training.shapes import Task

if TYPE_CHECKING:
    from datasets import Dataset

Indices = NDArray[np.int64]
IGNORED_LABEL = -100  # the label that torch's cross entropy leaves out


@dataclass(frozen=True)
class DataConfig:
    """Which data, and how much of it.

    Attributes
    ----------
    name : a data set of the catalogue, a local ``.csv``, ``.jsonl`` or ``.parquet`` file, or the id ``owner/name``
        of a data set on the Hugging Face hub.
    test_file : a local file with the test rows; only for local files.
    subset : the configuration of a hub data set that has several; empty otherwise.
    train_split, test_split : split names of a hub data set.
    text_column, image_column, label_column : column names; a row has a text or an image. Causal language modelling
        needs no label column; where there is one, partitions can use it.
    test_fraction : share of the rows, in (0, 1), that becomes the test set where the data has none.
    train_rows, test_rows : keep only so many rows; None keeps all. Smaller sets are parts of larger ones.
    validation_rows : rows taken out of the training rows for the choice of settings; never from the test set.
    split_seed : seed of all these choices. It is apart from the experiment's seed, so that runs with different
        seeds are measured on the same test set.
    topics : for causal language modelling without labels: number of clusters of the training rows that stand in for
        classes in partitions and in methods that look at label counts (`airtune.training.topics`); None: no classes.
    max_length : longest example in tokens; longer texts are cut off (classification) or cut into several examples
        (causal language modelling).
    """

    name: str = "rotten-tomatoes"
    test_file: str | None = None
    subset: str = ""
    train_split: str = "train"
    test_split: str = "test"
    text_column: str = "text"
    image_column: str = "pixels"
    label_column: str = "label"
    test_fraction: float = 0.125
    train_rows: int | None = None
    test_rows: int | None = None
    validation_rows: int = 0
    split_seed: int = 0
    topics: int | None = None
    max_length: int = 64

    def __post_init__(self) -> None:
        """Refuse values that can never be right."""
        if not 0 < self.test_fraction < 1:
            raise InputError(f"data.test_fraction: {self.test_fraction} is not in (0, 1)")
        for name in ("train_rows", "test_rows"):
            rows: int | None = getattr(self, name)
            if rows is not None and rows < 1:
                raise InputError(f"data.{name}: {rows} is not a positive number of rows")
        if self.topics is not None and self.topics < 2:
            raise InputError(f"data.topics: {self.topics} is below 2; valid: none, or at least 2")
        if self.validation_rows < 0:
            raise InputError(f"data.validation_rows: {self.validation_rows} is negative")
        if self.max_length < 2:
            raise InputError(f"data.max_length: {self.max_length} is below 2 tokens")


@dataclass(frozen=True)
class LabelledData:
    """Texts or images in splits that share no row.

    Attributes
    ----------
    name : where it comes from.
    train, test : `datasets.Dataset` with the columns ``text`` or ``pixels`` and, if the data has labels, ``label``
        (an integer).
    validation : likewise, or None if none was asked for.
    label_names : class names in label order; empty where there are no labels.
    """

    name: str
    train: Dataset
    test: Dataset
    validation: Dataset | None
    label_names: tuple[str, ...]


@dataclass(frozen=True)
class TokenizedData:
    """Examples as token numbers, all in one array.

    Attributes
    ----------
    ids : [tokens], int32; the examples one after the other.
    offsets : [examples + 1], int64; example i is ``ids[offsets[i]:offsets[i + 1]]``.
    labels : [examples], int64; the class of each example (0 where the data has no labels).
    num_labels : number of classes, at least 1.
    label_names : their names; empty where the data has no labels.
    pad_id : token number that fills up a batch.
    max_length : no example is longer.
    task : what `batch` gives as labels: the classes, or the tokens themselves.
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    num_labels: int
    label_names: tuple[str, ...]
    pad_id: int
    max_length: int
    task: Task = "sequence-classification"

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each example, [examples]."""
        return np.diff(self.offsets)

    @property
    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Return token numbers, offsets and labels."""
        return {"ids": self.ids, "offsets": self.offsets, "labels": self.labels}

    @property
    def fields(self) -> Mapping[str, Any]:
        """Return all that is no array."""
        names = ("num_labels", "label_names", "pad_id", "max_length", "task")
        return {name: getattr(self, name) for name in names}

    def batch(self, indices: NDArray[np.integer[Any]] | Sequence[int]) -> dict[str, NDArray[np.int64]]:
        """Return examples as padded arrays, padded on the right to the longest of them.

        Returns
        -------
        input_ids, attention_mask : [batch, longest], int64.
        labels : [batch] classes; or, for causal language modelling, [batch, longest] tokens with -100 on the
            padding. The model shifts them by one itself.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        columns = np.arange(int(lengths.max(initial=0)))
        mask = columns[None, :] < lengths[:, None]
        places = np.where(mask, self.offsets[chosen][:, None] + columns[None, :], 0)
        ids = np.where(mask, self.ids[places], self.pad_id).astype(np.int64)
        labels = self.labels[chosen] if self.task == "sequence-classification" else np.where(mask, ids, IGNORED_LABEL)
        return {"input_ids": ids, "attention_mask": mask.astype(np.int64), "labels": labels}

    def select(self, indices: NDArray[np.integer[Any]] | Sequence[int]) -> TokenizedData:
        """Return the given examples as data of their own (a copy), in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        parts = [self.ids[self.offsets[i] : self.offsets[i + 1]] for i in chosen]
        return replace(
            self,
            ids=np.concatenate([np.empty(0, np.int32), *parts]),
            offsets=_offsets(self.lengths[chosen]),
            labels=self.labels[chosen],
        )


def load(config: DataConfig, *, task: Task = "sequence-classification") -> LabelledData:
    """Load texts or images and split them; the same configuration gives the same rows on every machine.

    Where the source has no test rows, a `test_fraction` of its rows is drawn with `split_seed`. Validation rows are
    drawn from the training rows before `train_rows` cuts them, so neither `train_rows` nor `validation_rows` changes
    the test set.

    Raises
    ------
    InputError : unknown name, unreadable file, missing column, unusable labels, or fewer rows than asked for.
    """
    loaded = sources.read(config, labelled=task != "causal-lm", content=sources.CONTENT[task])
    train, test = loaded.train, loaded.test
    if test is None:
        order = stream(config.split_seed, "data.test").permutation(len(train))
        cut = max(1, round(config.test_fraction * len(train)))
        train, test = train.select(np.sort(order[cut:])), train.select(np.sort(order[:cut]))
    order = stream(config.split_seed, "data.train").permutation(len(train))
    kept = len(train) - config.validation_rows
    wanted = kept if config.train_rows is None else config.train_rows
    if wanted > kept or kept < 1:
        raise InputError(
            f"data.train_rows: {config.train_rows or 1} rows and data.validation_rows {config.validation_rows} "
            f"asked for, {config.name!r} has {len(train)} training rows"
        )
    validation = train.select(np.sort(order[kept:])) if config.validation_rows else None
    return LabelledData(
        name=config.name,
        train=train.select(np.sort(order[:wanted])),
        test=_first_rows(test, config),
        validation=validation,
        label_names=loaded.label_names,
    )


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a model (see `resolve_model`); a decoder without a padding token pads with its end token.

    Raises
    ------
    InputError : the model cannot be found, or has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    where = resolve_model(model)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(where)
    except Exception as error:  # transformers raises many kinds here: offline, unknown id, damaged files
        raise InputError(f"model.name: no tokenizer for {model!r}: {' '.join(str(error).split())[:200]}") from error
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one up
        raise InputError(f"model.name: no tokenizer for {model!r}: it has no tokenizer files")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenize(
    rows: Dataset,
    tokenizer: Any,
    *,
    max_length: int,
    task: Task = "sequence-classification",
    label_names: Sequence[str] = (),
) -> TokenizedData:
    """Turn rows into token numbers, once.

    Parameters
    ----------
    rows : with the columns ``text`` and, for sequence classification, ``label``.
    tokenizer : a transformers tokenizer with a padding token.
    max_length : in tokens. Sequence classification cuts longer texts off. Causal language modelling ends each text
        with the end token and cuts it into blocks of `max_length`; a last block of one token has nothing to predict
        and is left out. Blocks keep the label of their text and never mix texts.
    label_names : class names in label order.
    """
    texts = cast("list[str]", rows["text"][:])
    classes = np.asarray(rows["label"][:] if "label" in rows.column_names else [0] * len(texts), dtype=np.int64)
    if task == "sequence-classification":
        encoded = cast("list[list[int]]", tokenizer(texts, truncation=True, max_length=max_length)["input_ids"])
    else:
        whole = cast("list[list[int]]", tokenizer(texts, truncation=False, verbose=False)["input_ids"])
        encoded, source_row = _blocks(whole, tokenizer.eos_token_id, max_length)
        classes = classes[source_row]
    lengths = np.array([len(example) for example in encoded], dtype=np.int64)
    return TokenizedData(
        ids=np.concatenate([np.empty(0, np.int32), *(np.array(example, np.int32) for example in encoded)]),
        offsets=_offsets(lengths),
        labels=classes,
        num_labels=max(len(label_names), 1),
        label_names=tuple(label_names),
        pad_id=int(tokenizer.pad_token_id),
        max_length=max_length,
        task=task,
    )


def client_batches(
    tokens: Examples,
    indices: NDArray[np.integer[Any]],
    batch_size: int,
    *,
    rng: np.random.Generator,
    steps: int | None = None,
    epochs: int | None = None,
    window: int = 32,
) -> list[Indices]:
    """Return the batches of a client's local training; give either `steps` or `epochs`.

    Each epoch shuffles the examples, sorts each run of ``window * batch_size`` of them by length, cuts them into
    batches and shuffles the batches: a batch holds examples of like length, so little padding is trained, and yet
    the batches of one epoch differ from those of the next.

    Parameters
    ----------
    indices : the client's examples.
    batch_size : the last batch of an epoch may be smaller.
    rng : the generator of this round and client; equal generators give equal batches.
    steps : number of batches; the examples are gone through as often as needed.
    epochs : number of times each example is used.
    window : 1 shuffles fully, large values sort fully.

    Returns
    -------
    index arrays; no batch at all for a client without examples.
    """
    if (steps is None) == (epochs is None):
        raise ValueError("give either steps or epochs")
    batches: list[Indices] = []
    if len(indices) == 0:
        return batches
    per_epoch = -(-len(indices) // batch_size)
    wanted = steps if steps is not None else per_epoch * (epochs or 0)
    lengths = tokens.lengths
    while len(batches) < wanted:
        order = rng.permutation(np.asarray(indices, dtype=np.int64))
        for start in range(0, len(order), window * batch_size):
            part = order[start : start + window * batch_size]
            order[start : start + window * batch_size] = part[np.argsort(lengths[part], kind="stable")]
        cut = _cut(order, batch_size)
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches[:wanted]


def length_sorted_batches(
    tokens: Examples, batch_size: int, indices: NDArray[np.integer[Any]] | None = None
) -> list[Indices]:
    """Return every example once, longest last, in batches with little padding: for evaluation."""
    chosen = np.arange(len(tokens)) if indices is None else np.asarray(indices, dtype=np.int64)
    return _cut(chosen[np.argsort(tokens.lengths[chosen], kind="stable")], batch_size)


def padded_tokens(tokens: Examples, batches: Sequence[Indices]) -> int:
    """Return how many token places the batches fill, padding included: what training them costs."""
    lengths = tokens.lengths
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def _first_rows(test: Dataset, config: DataConfig) -> Dataset:
    if config.test_rows is None:
        return test
    if config.test_rows > len(test):
        raise InputError(f"data.test_rows: {config.test_rows} rows asked for, {config.name!r} has {len(test)}")
    order = stream(config.split_seed, "data.test_rows").permutation(len(test))
    return test.select(np.sort(order[: config.test_rows]))


def _blocks(whole: Sequence[Sequence[int]], end: int | None, max_length: int) -> tuple[list[list[int]], list[int]]:
    """Return blocks of at most `max_length` tokens and, for each, the row it comes from."""
    blocks: list[list[int]] = []
    source_row: list[int] = []
    for row, example in enumerate(whole):
        text = [*example] if end is None or (example and example[-1] == end) else [*example, end]
        pieces = [text[start : start + max_length] for start in range(0, len(text), max_length)]
        kept = [piece for piece in pieces if len(piece) > 1]
        blocks += kept
        source_row += [row] * len(kept)
    return blocks, source_row


def _cut(order: NDArray[np.int64], batch_size: int) -> list[Indices]:
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
