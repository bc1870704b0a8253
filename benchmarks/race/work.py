"""What is raced: model, rows, clients, batches and the adapter before round 1, in a folder that every side reads.

The batches are those that airtune's own trainers draw, so that every side takes the same steps in the same order and
the adapters at the end can be compared number by number.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA = 8, 16
TRAIN_ROWS = 7464  # of Rotten Tomatoes, an eighth of it being the test set


@dataclass(frozen=True)
class Size:
    """How much is raced. rounds: measured ones; one more before them warms up."""

    name: str
    clients: int
    rounds: int
    steps: int
    batch_size: int
    tokens: int
    learning_rate: float = 1e-3
    seed: int = 0


# name: the sizes of the two races; the first is the quick form of the demo, --clients 100 the whole of it
SIZES = {
    "minilm": Size("minilm", clients=10, rounds=5, steps=10, batch_size=8, tokens=32),
    "tiny": Size("tiny", clients=100, rounds=5, steps=5, batch_size=4, tokens=16),
}


def experiment_of(size: Size, folder: Path, engine: dict[str, Any]) -> dict[str, Any]:
    """Return airtune's configuration of the work: everyone takes part in every round.

    engine : fields of [training] that say how this machine computes (precision, engine, threads ...).
    """
    tiny = size.name == "tiny"
    train = size.clients * _rows_each(size)
    made = {"name": str(folder / "rows.csv"), "test_fraction": 450 / (train + 500)}
    data = made if tiny else {"name": "rotten-tomatoes"}
    rows = {"train_rows": train, "test_rows": 400, "max_length": size.tokens}
    return {
        "seed": size.seed,
        "model": {"name": str(folder / "model") if tiny else "minilm", "rank": RANK, "alpha": ALPHA},
        "data": {**data, **rows, "partition": {"type": "iid"}},
        "fleet": {"devices": {"jetson-agx-xavier": size.clients}},
        "wireless": {"uplink_bandwidth": "100 MHz"},
        "training": {
            "local_steps": size.steps,
            "batch_size": size.batch_size,
            "learning_rate": size.learning_rate,
            **engine,
        },
        "method": {"name": "fedit"},
        "stop": {"rounds": size.rounds + 1},
        "evaluation": {"every": size.rounds + 1},
    }


def prepare(size: Size, folder: Path) -> dict[str, Any]:
    """Write the work into an empty folder and return what work.json holds."""
    import torch

    from airtune.experiment.build import Workshop, build
    from airtune.experiment.config import read_experiment
    from airtune.training.catalogue import resolve_model
    from airtune.training.export import export_adapter

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    if size.name == "tiny":
        _write_tiny(size, folder)
    plain = experiment_of(size, folder, {"threads": 1})
    bench = build(read_experiment(plain), Workshop())
    export_adapter(bench.federated, bench.start, folder / "start")
    for name, tokens in (("train", bench.tokens.train), ("test", bench.tokens.test)):
        np.savez(folder / f"{name}.npz", ids=tokens.ids, offsets=tokens.offsets, labels=tokens.labels)
    batches = _batches(size, bench)
    np.save(folder / "batches.npy", batches)
    settings = {
        **asdict(size),
        "model": str(resolve_model(bench.experiment.model.name)),
        "labels": bench.tokens.train.num_labels,
        "pad": bench.federated.pad_token_id,
        "all_rounds": size.rounds + 1,
        "examples": [len(rows) for rows in bench.clients],
        "steps_a_round": size.clients * size.steps,
        "mean_tokens_a_step": _mean_tokens(bench.tokens.train.lengths, batches),
    }
    (folder / "work.json").write_text(json.dumps(settings, indent=2))
    return settings


def _rows_each(size: Size) -> int:
    """Return the rows of a client: enough for one pass, or an equal part of what there is."""
    return min(size.steps * size.batch_size, TRAIN_ROWS // size.clients)


def _batches(size: Size, bench: Any) -> np.ndarray:
    """Return [rounds, clients, steps, batch]: indices of examples, -1 where a batch is smaller."""
    from airtune.streams import stream
    from airtune.training.data import client_batches

    found = np.full((size.rounds + 1, size.clients, size.steps, size.batch_size), -1, dtype=np.int64)
    for round_index in range(1, size.rounds + 2):
        for client, rows in enumerate(bench.clients):
            rng = stream(size.seed, "batches", round_index, client, 0)
            drawn = client_batches(bench.tokens.train, rows, size.batch_size, rng=rng, steps=size.steps)
            for step, indices in enumerate(drawn):
                found[round_index - 1, client, step, : len(indices)] = indices
    return found


def _mean_tokens(lengths: np.ndarray, batches: np.ndarray) -> float:
    """Return the mean number of token places of a step, padding included."""
    flat = batches.reshape(-1, batches.shape[-1])
    longest = np.where(flat >= 0, lengths[np.maximum(flat, 0)], 0).max(axis=1)
    return float((longest * (flat >= 0).sum(axis=1)).mean())


def _write_tiny(size: Size, folder: Path) -> None:
    """Write a random BERT of 2 layers x 128 and sentences of exactly `tokens` words that tell their class."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    words = ["[PAD]", "[UNK]", *(f"w{index}" for index in range(998))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    wrapped.save_pretrained(folder / "model")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    disable_progress_bar()
    torch.manual_seed(size.seed)
    BertModel(config).save_pretrained(folder / "model")
    rng = np.random.default_rng(size.seed)
    rows = ["text,label"]
    for index in range(size.clients * _rows_each(size) + 500):
        low = 2 + 490 * (index % 2)
        drawn = np.where(rng.random(size.tokens) < 0.4, rng.integers(low, low + 490, size.tokens), 0)
        drawn = np.where(drawn == 0, rng.integers(2, 998, size.tokens), drawn)
        rows.append(f"{' '.join(f'w{word}' for word in drawn)},{'odd' if index % 2 else 'even'}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n")
