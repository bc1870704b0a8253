"""Pseudo labels of texts without labels: planted topics are found, counted per client and grouped."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from airtune.errors import InputError
from airtune.experiment.build import Workshop
from airtune.scheduling.grouping import GroupingProblem, divergence, near_iid_groups
from airtune.training.data import DataConfig, TokenizedData
from airtune.training.partition import Dirichlet, label_counts
from airtune.training.shapes import ModelConfig
from airtune.training.topics import topics_of, with_topics
from tiny_networks import tokens

TOPICS, ROWS = 4, 400


def planted(seed: int = 0) -> tuple[TokenizedData, np.ndarray]:
    """Return texts of 30 to 60 tokens, half of them common words, half from one of four vocabularies."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, TOPICS, ROWS)
    lengths = rng.integers(30, 61, ROWS)
    own = [1000 + 500 * t + rng.integers(0, 200, n) for t, n in zip(topic, lengths, strict=True)]
    common = [rng.integers(2, 300, n) for n in lengths]
    ids = [np.where(rng.random(n) < 0.5, a, b) for a, b, n in zip(own, common, lengths, strict=True)]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = np.zeros(ROWS, dtype=np.int64)
    return TokenizedData(np.concatenate(ids).astype(np.int32), offsets, labels, 1, (), 0, 64, "causal-lm"), topic


def purity(found: np.ndarray, topic: np.ndarray) -> float:
    """Return the share of rows that have the commonest planted topic of their cluster."""
    return sum(np.bincount(topic[found == c]).max() for c in np.unique(found)) / len(topic)


@pytest.mark.parametrize("seed", range(3))
def test_planted_topics_are_recovered(seed: int) -> None:
    rows, topic = planted(seed)
    found = topics_of(rows, TOPICS, seed)
    assert len(np.unique(found)) == TOPICS
    assert purity(found, topic) > 0.97


def test_topics_are_a_function_of_rows_and_seed() -> None:
    rows, _ = planted()
    assert np.array_equal(topics_of(rows, TOPICS, 1), topics_of(rows, TOPICS, 1))
    part = rows.select(np.arange(100))
    assert set(topics_of(part, 3, 0)) <= {0, 1, 2}


def test_texts_without_labels_are_dealt_out_and_grouped_by_topic() -> None:
    """The chain of a run: pseudo labels, a skewed partition, counts per client, near-IID groups."""
    rows, topic = planted()
    made = with_topics(rows, TOPICS, 0)
    assert made.label_names == ("topic 0", "topic 1", "topic 2", "topic 3") and made.task == "causal-lm"
    assert np.array_equal(made.batch([0, 5])["labels"], rows.batch([0, 5])["labels"])  # what is learnt stays the same
    clients = Dirichlet(0.1)(made.labels, 16, seed=0)
    counts = label_counts(made.labels, clients, TOPICS).astype(float)
    truth = label_counts(topic, clients, TOPICS).astype(float)
    ours = near_iid_groups(GroupingProblem(counts, np.ones(16), 4, 1.0))
    random = np.random.default_rng(0).permutation(16) % 4

    def apart(group: np.ndarray) -> float:
        return float(np.mean([divergence(truth[group == g].sum(axis=0), truth.sum(axis=0)) for g in range(4)]))

    assert apart(ours) < 0.3 * apart(random)


def test_a_file_without_labels_gets_topics_when_its_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From `[data] topics` to the rows that are dealt out: two vocabularies, two topics."""
    monkeypatch.setenv("AIRTUNE_CACHE", str(tmp_path / "cache"))
    words = [f"{kind}{index}" for kind in "ab" for index in range(40)]
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    model = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]").save_pretrained(model)
    (model / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words[40 * (row % 2) :][:40], 12)) for row in range(160)]
    (tmp_path / "rows.csv").write_text("\n".join(["text", *texts]) + "\n", encoding="utf-8")
    data, config = DataConfig(name=str(tmp_path / "rows.csv"), topics=2), ModelConfig(name=str(model), task="causal-lm")
    workshop = Workshop()
    found = workshop.tokens(data, config)
    assert found.train.label_names == ("topic 0", "topic 1") and found.test.label_names == ()
    second = np.array([int(found.train.batch([row])["input_ids"].flat[0]) >= 43 for row in range(len(found.train))])
    assert purity(found.train.labels, second.astype(int)) > 0.97
    assert workshop.tokens(replace(data, topics=None), config).train.label_names == ()
    with pytest.raises(InputError, match=r"data\.topics: 1 is below 2"):
        replace(data, topics=1)


def test_where_topics_have_no_meaning_they_are_refused() -> None:
    rows, _ = planted()
    assert with_topics(rows, None, 0) is rows
    with pytest.raises(InputError, match=r"data\.topics: the task is sequence-classification"):
        with_topics(tokens(), 3, 0)
    with pytest.raises(InputError, match=r"data\.topics: 401 is more than the 400 rows"):
        with_topics(rows, 401, 0)
    with pytest.raises(InputError, match="labels of their own"):
        with_topics(with_topics(rows, 2, 0), 2, 0)
