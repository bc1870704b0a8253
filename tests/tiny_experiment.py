"""A whole experiment that trains in a second: a random two-layer BERT, two hundred made-up sentences, six devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

GOOD, BAD, OTHER = (
    ("good", "fine", "great", "nice"),
    ("bad", "poor", "awful", "dull"),
    ("a", "film", "the", "plot", "is"),
)
WORDS = ("[PAD]", "[UNK]", *GOOD, *BAD, *OTHER)

TOML = """\
seed = {seed}

[model]
name = "{folder}/model"
rank = 4
alpha = 8

[data]
name = "{folder}/rows.csv"
test_fraction = 0.25
max_length = 12

[data.partition]
type = "dirichlet"
alpha = 1.0

[fleet]
devices = {{ jetson-tx2 = 2, raspberry-pi-5 = 2, jetson-orin-nano = 2 }}

[wireless]
uplink_bandwidth = "5 MHz"

[training]
local_steps = 2
batch_size = 8
learning_rate = 5e-3
threads = 1

[method]
name = "fedit"
cohort_size = 3

[variant.slow]
method = "fedit"
training = {{ learning_rate = 1e-4 }}
cohort_size = 2

[stop]
rounds = 2
"""


def write_experiment(folder: Path, *, seed: int = 0, rows: int = 240, words: int | None = None) -> Path:
    """Write model, data and experiment file into a folder and return the file.

    words : of each sentence; None: 4 to 9, drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        _write_model(folder / "model")
    rng = np.random.default_rng(0)
    lines = ["text,label"]
    for index in range(rows):
        label = index % 2
        count = words or int(rng.integers(4, 10))
        text = [str(rng.choice(OTHER)) for _ in range(count)]
        text[int(rng.integers(count))] = str(rng.choice(GOOD if label else BAD))
        lines.append(f"{' '.join(text)},{'positive' if label else 'negative'}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    path = folder / "tiny.toml"
    path.write_text(TOML.format(folder=folder, seed=seed))
    return path


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)  # without a head: it is drawn with the experiment's seed


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's rounds.jsonl."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def head_of(folder: Path) -> dict[str, Any]:
    """Return a run's run.json."""
    return json.loads((folder / "run.json").read_text())
