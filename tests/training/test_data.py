"""Loading, splitting, tokens and batches."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.errors import InputError
from airtune.streams import stream
from airtune.training.data import (
    IGNORED_LABEL,
    DataConfig,
    TokenizedData,
    client_batches,
    length_sorted_batches,
    load,
    load_tokenizer,
    padded_tokens,
    tokenize,
)
from airtune.training.sources import read_labelled_file


class WordTokenizer:
    """A tokenizer that can be checked by hand: one number a word, 1 in front; 2 is the end, 0 the padding."""

    pad_token_id, eos_token_id = 0, 2

    def __call__(self, texts, truncation, max_length=None, verbose=True):
        ids = [[1, *(10 + len(word) for word in text.split())] for text in texts]
        return {"input_ids": [row[:max_length] if truncation else row for row in ids]}


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write rows as CSV, JSONL or Parquet, by the ending of the path."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        (csv.write_csv if path.suffix == ".csv" else parquet.write_table)(pa.Table.from_pylist(rows), path)
    return str(path)


def rows_of(number: int, **columns) -> list[dict]:
    return [{"text": f'row {i}, "quoted"\nand more', "label": i % 3} | columns for i in range(number)]


def random_tokens(lengths: list[int], seed: int = 0, task: str = "sequence-classification") -> TokenizedData:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = rng.integers(5, 100, offsets[-1]).astype(np.int32)
    labels = rng.integers(0, 3, len(lengths))
    return TokenizedData(ids, offsets, labels, 3, ("a", "b", "c"), 0, 50, task)


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_local_files_load_alike(tmp_path: Path, ending: str) -> None:
    rows = [{"review": row["text"], "stars": ["bad", "fine", "good"][row["label"]], "id": 1} for row in rows_of(80)]
    file = write_rows(tmp_path / f"data{ending}", rows)
    config = DataConfig(name=file, text_column="review", label_column="stars", test_fraction=0.25)
    data = load(config)
    assert data.label_names == ("bad", "fine", "good")
    assert (len(data.train), len(data.test), data.validation) == (60, 20, None)
    assert data.train.column_names == ["text", "label"]
    pairs = {(row["text"], row["label"]) for split in (data.train, data.test) for row in split}
    assert pairs == {(row["text"], row["label"]) for row in rows_of(80)}
    test_file = write_rows(tmp_path / f"test{ending}", rows[:7])
    split = load(DataConfig(name=file, text_column="review", label_column="stars", test_file=test_file))
    assert (len(split.train), len(split.test)) == (80, 7)


def test_splits_are_disjoint_nested_and_fixed_by_the_split_seed(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "data.jsonl", rows_of(200))

    def texts(**fields) -> dict[str, set[str]]:
        data = load(DataConfig(name=file, **fields))
        splits = {"train": data.train, "test": data.test, "validation": data.validation}
        return {name: set(split["text"]) for name, split in splits.items() if split is not None}

    full, small = texts(), texts(train_rows=50, test_rows=10, validation_rows=30)
    assert (len(full["train"]), len(full["test"])) == (175, 25)
    assert (len(small["train"]), len(small["test"]), len(small["validation"])) == (50, 10, 30)
    assert small["train"] < full["train"] and small["test"] < full["test"]
    assert small["validation"] < full["train"] and not small["validation"] & small["train"]
    assert not full["train"] & full["test"]
    assert texts(train_rows=20)["train"] < texts(train_rows=50)["train"]
    assert texts() == full
    assert texts(split_seed=1)["test"] != full["test"]
    assert texts(train_rows=145, validation_rows=30)["train"] == full["train"] - small["validation"]


def test_causal_language_modelling_needs_no_labels(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "data.jsonl", [{"text": f"text {i}"} for i in range(16)])
    data = load(DataConfig(name=file), task="causal-lm")
    assert data.label_names == () and data.train.column_names == ["text"]
    with pytest.raises(InputError, match=r"data\.label_column: .* has no column 'label'; its columns: text"):
        load(DataConfig(name=file))


def test_integer_and_declared_class_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "data.parquet", [{"text": "x", "label": label} for label in (0.0, 4.0, 2.0)])
    assert load(DataConfig(name=file, test_fraction=0.4)).label_names == ("0", "1", "2", "3", "4")
    import datasets

    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])})
    table = datasets.Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    asked: list[tuple] = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return datasets.DatasetDict({"train": table, "validation": table.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = DataConfig(name="owner/set", subset="sst2", text_column="sentence", test_split="validation")
    data = load(config)
    assert asked == [("owner/set", "sst2")]
    assert data.label_names == ("n", "p")
    assert (data.train["label"][:], data.test["label"][:]) == ([1, 0, 1], [1])
    with pytest.raises(InputError, match=r"data\.train_split: .*valid: train, validation"):
        load(DataConfig(name="owner/set", train_split="training", text_column="sentence"))


def test_bad_data_is_one_line_with_field_file_and_valid_values(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "good.jsonl", rows_of(20))

    def refused(match: str, **fields) -> None:
        with pytest.raises(InputError, match=match) as error:
            load(DataConfig(**({"name": good} | fields)))
        assert "\n" not in str(error.value)

    refused(r"data\.text_column: .*good.jsonl' has no column 'txt'; its columns: text, label", text_column="txt")
    refused(r"data\.label_column: .* has no column 'y'", label_column="y")
    refused(r"data\.label_column: .* 'row 0.*valid: text, or whole", label_column="mixed", name=mixed_labels(tmp_path))
    refused(r"data\.train_rows: 19 rows .* has 18", train_rows=19)
    refused(r"data\.train_rows: .* has 18 training rows", validation_rows=18)
    refused(r"data\.test_rows: 3 rows asked for, .* has 2", test_rows=3)
    refused(r"data\.name: there is no file", name=str(tmp_path / "absent.csv"))
    refused(r"data\.name: .* known type; valid endings: .csv, .jsonl", name=write_text(tmp_path / "data.txt", "x"))
    refused(r"data\.name: '\./folder' is no file", name="./folder")
    refused(r"data\.name: .*did you mean 'imdb'.*rotten-tomatoes", name="imbd")
    refused(r"data\.name: cannot get 'owner/absent' from the Hugging Face hub .*rotten-tomatoes", name="owner/absent")
    refused(r"data\.name: cannot read .*broken", name=write_text(tmp_path / "broken.jsonl", '{"text": "a"\n{'))
    refused(r"data\.name: .* has no rows", name=write_text(tmp_path / "empty.csv", "text,label\n"))
    refused(
        r"data\.text_column: row 2 of .* has no text",
        name=write_rows(tmp_path / "gap.jsonl", [{"text": t, "label": 0} for t in ("a", " ")]),
    )
    refused(
        r"data\.label_column: .* has the label -1",
        name=write_rows(tmp_path / "negative.jsonl", [{"text": "a", "label": -1}]),
    )
    refused(r"data\.test_file: only for local files", name="owner/set", test_file=good)


def mixed_labels(folder: Path) -> str:
    return write_rows(folder / "mixed.parquet", [{"text": "a", "mixed": "row 0"}, {"text": "b", "mixed": None}])


def write_text(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_fraction": 1.0}, "data.test_fraction: 1.0"),
        ({"train_rows": 0}, "data.train_rows: 0"),
        ({"test_rows": -1}, "data.test_rows: -1"),
        ({"validation_rows": -1}, "data.validation_rows: -1"),
        ({"max_length": 1}, "data.max_length: 1"),
    ],
)
def test_impossible_configurations_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig(**fields)


def test_further_test_rows_use_the_labels_of_the_model(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "more.jsonl", [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}])

    def read(label_names):
        return read_labelled_file(file, column="text", label_column="label", label_names=label_names)

    assert read(("bad", "fine", "good"))["label"][:] == [2, 0]
    with pytest.raises(InputError, match=r"row 2 .* has the label 'bad' .*valid: fine, good"):
        read(("fine", "good"))
    assert read(())["text"][:] == ["a", "b"]


def test_tokens_by_hand() -> None:
    rows = FakeRows(text=["aa b", "ccc", "a b c d e"], label=[1, 0, 1])
    data = tokenize(rows, WordTokenizer(), max_length=4, label_names=("n", "p"))
    assert data.ids.tolist() == [1, 12, 11, 1, 13, 1, 11, 11, 11]
    assert data.offsets.tolist() == [0, 3, 5, 9] and len(data) == 3
    batch = data.batch([1, 0])
    assert batch["input_ids"].tolist() == [[1, 13, 0], [1, 12, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    causal = tokenize(rows, WordTokenizer(), max_length=4, task="causal-lm", label_names=("n", "p"))
    blocks = [causal.ids[a:b].tolist() for a, b in zip(causal.offsets, causal.offsets[1:], strict=False)]
    assert blocks == [[1, 12, 11, 2], [1, 13, 2], [1, 11, 11, 11], [11, 11, 2]]
    assert causal.labels.tolist() == [1, 0, 1, 1]
    batch = causal.batch([0, 1])
    assert batch["labels"].tolist() == [[1, 12, 11, 2], [1, 13, 2, IGNORED_LABEL]]


class FakeRows(dict):
    """Columns that look like a `datasets.Dataset` to `tokenize`."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


@given(lengths=LENGTHS, data=st.data(), task=st.sampled_from(["sequence-classification", "causal-lm"]))
def test_a_batch_holds_its_examples_and_no_more_padding_than_needed(lengths, data, task) -> None:
    tokens = random_tokens(lengths, task=task)
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=20))
    batch = tokens.batch(indices)
    assert batch["input_ids"].shape == (len(indices), max(lengths[i] for i in indices))
    for row, i in enumerate(indices):
        example = tokens.ids[tokens.offsets[i] : tokens.offsets[i + 1]]
        assert np.array_equal(batch["input_ids"][row, : lengths[i]], example)
        assert batch["attention_mask"][row].sum() == lengths[i] == batch["attention_mask"][row, : lengths[i]].sum()
        assert (batch["input_ids"][row, lengths[i] :] == tokens.pad_id).all()
        if task == "causal-lm":
            assert np.array_equal(batch["labels"][row, : lengths[i]], example)
            assert (batch["labels"][row, lengths[i] :] == IGNORED_LABEL).all()
        else:
            assert batch["labels"][row] == tokens.labels[i]
    chosen = tokens.select(indices)
    again = chosen.batch(np.arange(len(indices)))
    assert all(np.array_equal(batch[key], again[key]) for key in batch)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), epochs=st.integers(0, 3), window=st.integers(1, 3))
def test_every_epoch_uses_every_example_once(lengths, batch_size, epochs, window) -> None:
    tokens = random_tokens(lengths)
    indices = np.arange(0, len(lengths), 2)
    batches = client_batches(tokens, indices, batch_size, epochs=epochs, rng=stream(0, "batches", 1, 2), window=window)
    per_epoch = -(-len(indices) // batch_size)
    assert len(batches) == epochs * per_epoch and all(0 < len(batch) <= batch_size for batch in batches)
    for epoch in range(epochs):
        used = np.concatenate(batches[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert np.array_equal(np.sort(used), indices)


@given(lengths=LENGTHS, batch_size=st.integers(1, 9), steps=st.integers(0, 20))
def test_steps_give_exactly_so_many_batches_and_depend_on_the_stream_alone(lengths, batch_size, steps) -> None:
    tokens, indices = random_tokens(lengths), np.arange(len(lengths))

    def batches(*where: int) -> list[list[int]]:
        drawn = client_batches(tokens, indices, batch_size, steps=steps, rng=stream(7, "batches", *where))
        return [batch.tolist() for batch in drawn]

    assert len(batches(1, 2)) == steps
    assert batches(1, 2) == batches(1, 2)
    if len(lengths) > 10 and steps > 3:
        assert batches(1, 2) != batches(2, 2)


def test_a_client_without_examples_has_no_batches() -> None:
    tokens = random_tokens([3, 4])
    assert client_batches(tokens, np.array([], dtype=int), 4, steps=5, rng=np.random.default_rng(0)) == []
    with pytest.raises(ValueError, match="either steps or epochs"):
        client_batches(tokens, np.arange(2), 4, rng=np.random.default_rng(0))


def test_sorting_by_length_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(3, 50, 400).tolist()
    tokens, indices = random_tokens(lengths), np.arange(400)
    bucketed = client_batches(tokens, indices, 16, epochs=1, rng=np.random.default_rng(0))
    shuffled = client_batches(tokens, indices, 16, epochs=1, rng=np.random.default_rng(0), window=1)
    assert padded_tokens(tokens, bucketed) < 1.05 * sum(lengths)
    assert padded_tokens(tokens, shuffled) > 1.5 * sum(lengths)
    evaluation = length_sorted_batches(tokens, 16)
    assert np.array_equal(np.sort(np.concatenate(evaluation)), indices)
    assert padded_tokens(tokens, evaluation) < 1.05 * sum(lengths)
    by_hand = sum(tokens.batch(batch)["input_ids"].size for batch in evaluation)
    assert padded_tokens(tokens, evaluation) == by_hand


def test_a_thousand_clients_share_one_array() -> None:
    tokens = random_tokens([20] * 5000)
    parts = np.array_split(np.arange(5000), 1000)
    batches = [
        client_batches(tokens, part, 16, steps=1, rng=stream(0, "batches", 0, client))
        for client, part in enumerate(parts)
    ]
    assert sum(batch.nbytes for client in batches for batch in client) < 8 * 16 * 1000


def test_rotten_tomatoes_in_the_cache(fetched) -> None:
    fetched("rotten-tomatoes")
    fetched("minilm")
    data = load(DataConfig(name="rotten-tomatoes", train_rows=400, test_rows=100, validation_rows=50))
    assert data.label_names == ("negative", "positive")
    assert 0.4 < np.mean(data.train["label"][:]) < 0.6
    tokens = tokenize(data.train, load_tokenizer("minilm"), max_length=32, label_names=data.label_names)
    assert (len(tokens), tokens.num_labels, tokens.pad_id) == (400, 2, 0)
    assert tokens.lengths.max() == 32 and 20 < tokens.lengths.mean() < 32
    assert (tokens.ids[tokens.offsets[:-1]] == 101).all()  # BERT's class token starts every example
    full = load(DataConfig(name="rotten-tomatoes"))
    assert len(full.train) + len(full.test) == 8530
    assert not set(full.train["text"][:]) & set(full.test["text"][:])


def test_a_model_without_a_tokenizer_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError, match=r"model\.name: no tokenizer for"):
        load_tokenizer(str(tmp_path))
