"""What a stored frozen prefix saves by depth: seconds of training and of evaluation; and the activations kept.

    OMP_NUM_THREADS=1 python benchmarks/prefix_cache.py [--model minilm] [--tokens 24] [--rounds 4] [--json FILE]

A client trains the last k layers on 80 rows in each of several rounds; the rows are then evaluated. With the stored
prefix and without it, in turns. Updates and losses must agree. The first round fills the cache, the others profit.
Kept activations are counted by torch's hooks on saved tensors, for one step at each depth.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from airtune.compression.dense import Dense
from airtune.lora import Adapter, AdapterSlice
from airtune.training.data import TokenizedData
from airtune.training.evaluation import score
from airtune.training.loading import load_model
from airtune.training.local import LocalTrainer
from airtune.training.model import FederatedModel
from airtune.training.shapes import ModelConfig
from airtune.types import ClientTask, LocalTraining, ServerModel, TrainingJob

ROWS, BATCH = 80, 8


def random_rows(length: int, vocabulary: int) -> TokenizedData:
    """Return random rows of half to all of `length` tokens."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(length // 2, length + 1, ROWS)
    ids = rng.integers(1000, vocabulary, int(lengths.sum())).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedData(ids, offsets, rng.integers(0, 4, ROWS), 4, tuple("abcd"), 0, length)


def one_round(model: FederatedModel, server: ServerModel, rows: TokenizedData, train: AdapterSlice, number: int) -> Any:
    """Return (seconds of an epoch of training, seconds of evaluation, the values trained, the mean loss)."""
    training = LocalTraining(local_steps=ROWS // BATCH, batch_size=BATCH, learning_rate=1e-3)
    job = TrainingJob(ClientTask(0, train, train, train, training, Dense(), 1e5, 0.1), server, number, 0)
    began = time.process_time()
    trained = LocalTrainer(model, rows, [np.arange(ROWS)], seed=0).train([job])[0]
    middle = time.process_time()
    loss = score(model, server, rows).metrics()["loss"]
    return middle - began, time.process_time() - middle, trained.values, loss


def difference(first: Adapter, second: Adapter) -> float:
    """Return the largest difference between two trained adapters."""
    pairs = zip(first.tensors(), second.tensors(), strict=True)
    return max(float((a - b).abs().max()) for (_, _, a), (_, _, b) in pairs)


def by_depth(model: FederatedModel, rows: TokenizedData, depth: int, rounds: int) -> dict[str, Any]:
    """Measure one depth; the seconds are the least over the rounds, but for the one that fills the cache."""
    train = AdapterSlice.top_layers(model.shape, depth, "absent")
    server = ServerModel(model.initial_adapter(0))
    first = LocalTrainer(model, rows, [np.arange(ROWS)], seed=1)
    task = ClientTask(0, train, train, train, LocalTraining(local_steps=2, batch_size=BATCH), Dense(), 1e5, 0.1)
    server = ServerModel(train.put(server.adapter, first.train([TrainingJob(task, server, 1, 0)])[0].values))
    plain: list[Any] = []
    stored: list[Any] = []
    for number in range(1, rounds + 1):
        kept, model.prefix = model.prefix, None
        plain.append(one_round(model, server, rows, train, number))
        if number == 1:
            model.cache_prefix(2e9)
        else:
            model.prefix = kept
        stored.append(one_round(model, server, rows, train, number))
    assert model.prefix is not None
    found = {
        "depth": depth,
        "train_s": min(r[0] for r in plain),
        "train_stored_s": min(r[0] for r in stored[1:]),
        "train_filling_s": stored[0][0],
        "evaluate_s": min(r[1] for r in plain),
        "evaluate_stored_s": min(r[1] for r in stored),
        "largest_difference": max(difference(a[2], b[2]) for a, b in zip(plain, stored, strict=True)),
        "loss_difference": max(abs(a[3] - b[3]) for a, b in zip(plain, stored, strict=True)),
        "stored_bytes": model.prefix.bytes,
    }
    model.cache_prefix(None)
    return found


def kept_bytes(model: FederatedModel, depth: int, outside: str, length: int) -> int:
    """Return the bytes that autograd keeps between the forward and the backward pass of one step."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    train = AdapterSlice.top_layers(model.shape, depth, outside)  # type: ignore[arg-type]
    model.activate(ServerModel(model.initial_adapter(0)), train)
    weights = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    ids = torch.full((BATCH, length), 2000)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model.logits(ids, torch.ones_like(ids)).square().mean()
    loss.backward()
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def main() -> None:
    """Print both tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(ModelConfig(name=given.model), num_labels=4, precision=given.precision)
    rows = random_rows(given.tokens, model.config_json["vocab_size"])
    layers = model.shape.num_layers
    speed = [by_depth(model, rows, depth, given.rounds) for depth in range(1, layers)]
    memory = [
        {
            "depth": depth,
            **{outside: kept_bytes(model, depth, outside, given.tokens) for outside in ("frozen", "absent")},
        }
        for depth in range(1, layers + 1)
    ]
    for row in speed:
        print(
            f"depth {row['depth']}: train {row['train_s']:.2f} -> {row['train_stored_s']:.2f} s "
            f"({row['train_s'] / row['train_stored_s']:.2f}x; filling {row['train_filling_s']:.2f}), "
            f"evaluate {row['evaluate_s']:.2f} -> {row['evaluate_stored_s']:.2f} s, "
            f"difference {row['largest_difference']:.1e}, {row['stored_bytes'] / 1e6:.1f} MB"
        )
    for row in memory:
        print(f"depth {row['depth']}: kept {row['frozen'] / 1e6:.2f} MB (D1), {row['absent'] / 1e6:.2f} MB (D2)")
    if given.json:
        settings = {name: str(value) for name, value in vars(given).items() if name != "json"}
        given.json.write_text(json.dumps({"settings": settings, "speed": speed, "kept": memory}, indent=2) + "\n")


if __name__ == "__main__":
    main()
