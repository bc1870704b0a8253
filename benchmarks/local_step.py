"""Processor seconds of a local training step: optimizers and adapter kinds beside AdamW on plain LoRA, on one core.

    OMP_NUM_THREADS=1 python benchmarks/local_step.py [--layers 6] [--width 384] [--rank 8] [--repeats 5] [--json FILE]

A random BERT of that size, batches of 16 x 32 tokens. Choices take turns, so that other work on the machine hits all of
them alike; reported is the least over the repeats of 4 steps each. Beside it: the bytes of trained tensors, their
gradients and what the optimizer keeps, after a step (base and activations come on top for all).
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from airtune.compression.dense import Dense
from airtune.lora import NEITHER, AdapterSlice
from airtune.training.data import TokenizedData
from airtune.training.local import LocalTrainer
from airtune.training.model import FederatedModel
from airtune.training.optimizers import make_optimizer
from airtune.training.shapes import ModelConfig
from airtune.types import BalancePenalty, ClientTask, LocalTraining, ServerModel, TrainingJob

CHOICES = [("lora", "adamw"), ("lora", "sgd"), ("lora", "lora-plus"), ("lora", "lora-rite"), ("lora", "lora-pro")]
CHOICES += [("rslora", "adamw"), ("dora", "adamw"), ("msp-lora", "adamw"), ("beam-lora", "adamw"), ("mole", "adamw")]
STEPS, BATCH, TOKENS, VOCABULARY = 4, 16, 32, 1000


def trainer_of(adapter: str, layers: int, width: int, rank: int) -> LocalTrainer:
    """Return a trainer on random text."""
    config = transformers.AutoConfig.for_model(
        "bert",
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        num_attention_heads=width // 32,
        num_labels=2,
    )
    network = transformers.AutoModelForSequenceClassification.from_config(config)
    model = FederatedModel(network, ModelConfig(name="random", rank=rank, adapter=adapter), num_labels=2)  # type: ignore[arg-type]
    count = BATCH * STEPS
    ids = np.random.default_rng(0).integers(2, VOCABULARY, count * TOKENS).astype(np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * TOKENS
    labels = np.arange(count, dtype=np.int64) % 2
    tokens = TokenizedData(ids, offsets, labels, 2, ("a", "b"), 0, TOKENS)
    return LocalTrainer(model, tokens, [np.arange(count)], seed=0)


def job_of(server: ServerModel, kind: str, optimizer: str) -> TrainingJob:
    """Return a client's job: with mole that of the second phase, in which the gates of two experts are trained."""
    whole = AdapterSlice.everything(server.adapter.shape)
    train = replace(whole, tensors=NEITHER) if kind == "mole" else whole
    penalties = (BalancePenalty(),) if kind == "mole" else ()
    training = LocalTraining(local_steps=STEPS, batch_size=BATCH, optimizer=optimizer, penalties=penalties)
    return TrainingJob(ClientTask(0, whole, train, train, training, Dense(), 1.0, 1.0), server, 1)


def kept_bytes(trainer: LocalTrainer, job: TrainingJob) -> int:
    """Return the bytes of trained tensors, gradients and optimizer state after one step."""
    active = trainer.model.activate(job.model, job.task.train, beam=job.task.training.beam)
    optimizer = make_optimizer(active, job.task.training)
    trained = [tensor for _, _, tensor in active.trained()]
    for tensor in trained:
        tensor.grad = torch.full_like(tensor, 1e-3)
    optimizer.step()
    owned = {id(t) for part in (active.adapter, active.start) for _, _, t in part.tensors()} | {id(t) for t in trained}
    kept = [tensor for tensor in tensors_in(optimizer, set()) if id(tensor) not in owned]
    return sum(2 * t.nbytes for t in trained) + sum(t.nbytes for t in kept)


def tensors_in(thing: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield every tensor that an object holds, once."""
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | type) or inspect.isroutine(thing):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
        return
    inner = [*thing.keys(), *thing.values()] if isinstance(thing, Mapping) else []
    inner += list(thing) if isinstance(thing, list | tuple | set) else []
    for part in [*inner, *vars(thing).values()] if hasattr(thing, "__dict__") else inner:
        yield from tensors_in(part, seen)


def main() -> None:
    """Print a table and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    kinds = dict.fromkeys(kind for kind, _ in CHOICES)
    trainers = {kind: trainer_of(kind, given.layers, given.width, given.rank) for kind in kinds}
    servers = {kind: ServerModel(trainer.model.initial_adapter(0)) for kind, trainer in trainers.items()}
    least = dict.fromkeys(CHOICES, float("inf"))
    for repeat in range(given.repeats + 1):
        for kind, optimizer in CHOICES:
            job = job_of(servers[kind], kind, optimizer)
            begin = time.process_time()
            trainers[kind].train([job])
            if repeat:
                least[kind, optimizer] = min(least[kind, optimizer], (time.process_time() - begin) / STEPS)
    rows = []
    for kind, optimizer in CHOICES:
        seconds, job = least[kind, optimizer], job_of(servers[kind], kind, optimizer)
        values, kept = job.task.send.num_values(servers[kind].adapter.shape), kept_bytes(trainers[kind], job)
        relative = seconds / least["lora", "adamw"]
        rows.append(
            {
                "adapter": kind,
                "optimizer": optimizer,
                "step_s": seconds,
                "relative": relative,
                "values": values,
                "kept_bytes": kept,
            }
        )
        print(
            f"{kind:9} {optimizer:10} {1e3 * seconds:8.1f} ms  {relative:5.2f}  {values:8d} values sent "
            f"{kept / 1e6:6.2f} MB kept"
        )
    if given.json:
        given.json.write_text(
            json.dumps({"settings": {k: str(v) for k, v in vars(given).items()}, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
