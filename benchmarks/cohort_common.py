"""What the benchmarks of the cohort engine share: models, data, jobs, paired timing, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from airtune.compression.dense import Dense
from airtune.lora import AdapterSlice
from airtune.training.data import DataConfig, TokenizedData, load, load_tokenizer, tokenize
from airtune.training.loading import load_model
from airtune.training.model import FederatedModel
from airtune.training.shapes import ModelConfig
from airtune.types import ClientTask, LocalTraining, ServerModel, TrainingJob

VOCABULARY = 1000


class Setting:
    """A base model, its data dealt to clients, and their jobs.

    model : in the wanted precision. tokens : all examples. clients : client -> its examples.
    """

    def __init__(self, model: FederatedModel, tokens: TokenizedData, clients: int) -> None:
        self.model = model
        self.tokens = tokens
        order = np.random.default_rng(0).permutation(len(tokens))
        self.clients = [np.sort(part) for part in np.array_split(order, clients)]
        self.server = ServerModel(model.initial_adapter(0))

    def jobs(self, steps: int, batch: int, clients: int | None = None) -> list[TrainingJob]:
        """Return one job per client, all of the same size."""
        whole = AdapterSlice.everything(self.server.adapter.shape)
        training = LocalTraining(local_steps=steps, batch_size=batch)
        count = len(self.clients) if clients is None else clients
        tasks = [ClientTask(c, whole, whole, whole, training, Dense(), 1.0, 1.0) for c in range(count)]
        return [TrainingJob(task, self.server, 1) for task in tasks]

    @property
    def adapter_bytes(self) -> int:
        """Return the bytes of everything that one client trains."""
        return sum(t.numel() * t.element_size() for _, _, t in self.server.adapter.tensors())


def synthetic(
    layers: int, width: int, clients: int, examples: int, length: int, *, precision: Any = "fp32", device: str = "cpu"
) -> Setting:
    """Return a random BERT of that size on random tokens, `examples` of `length` tokens per client."""
    config = transformers.AutoConfig.for_model(
        "bert",
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        num_attention_heads=max(1, width // 64),
        num_labels=2,
    )
    torch.manual_seed(0)
    network = transformers.AutoModelForSequenceClassification.from_config(config)
    chosen = ModelConfig(name="random", rank=min(8, width))
    model = FederatedModel(network, chosen, num_labels=2, precision=precision, device=device)
    count = clients * examples
    ids = np.random.default_rng(0).integers(2, VOCABULARY, count * length).astype(np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * length
    tokens = TokenizedData(ids, offsets, np.arange(count, dtype=np.int64) % 2, 2, ("a", "b"), 0, length)
    return Setting(model, tokens, clients)


def demo(clients: int, *, precision: Any = "fp32", rows: int | None = None, fixed: int | None = None) -> Setting:
    """Return MiniLM on Rotten Tomatoes; `fixed`: random tokens of that length instead of the sentences."""
    model = load_model(ModelConfig(name="minilm"), num_labels=2, precision=precision)
    data = load(DataConfig(name="rotten-tomatoes", train_rows=rows))
    tokens = tokenize(data.train, load_tokenizer("minilm"), max_length=64, label_names=data.label_names)
    if fixed is not None:
        ids = np.random.default_rng(0).integers(1000, 20000, len(tokens) * fixed).astype(np.int32)
        offsets = np.arange(len(tokens) + 1, dtype=np.int64) * fixed
        tokens = TokenizedData(ids, offsets, tokens.labels, 2, tokens.label_names, 0, fixed)
    return Setting(model, tokens, clients)


Timed = tuple[float, float]  # wall and processor seconds


def timed(work: Callable[[], object]) -> Timed:
    """Run once."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def paired(modes: Mapping[str, Callable[[], object]], repeats: int, *, warm: bool = True) -> dict[str, dict[str, Any]]:
    """Return the seconds of each mode; modes take turns, so that other work on the machine hits all of them alike."""
    for work in modes.values() if warm else ():
        work()
    found: dict[str, list[Timed]] = {name: [] for name in modes}
    for _ in range(repeats):
        for name, work in modes.items():
            found[name].append(timed(work))
    return {
        name: {
            "wall_s": [wall for wall, _ in times],
            "processor_s": [processor for _, processor in times],
            "median_wall_s": statistics.median(wall for wall, _ in times),
            "median_processor_s": statistics.median(processor for _, processor in times),
        }
        for name, times in found.items()
    }


def ratio(times: Mapping[str, Mapping[str, Any]], slow: str, fast: str, kind: str = "wall_s") -> float:
    """Return the median over the repeats of slow / fast, pair by pair."""
    return statistics.median(a / b for a, b in zip(times[slow][kind], times[fast][kind], strict=True))


def parser_of(text: str | None, repeats: int = 5) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="of every mode; medians are reported")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores to use")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser


def finish(given: argparse.Namespace, result: Mapping[str, Any]) -> None:
    """Write the result as JSON, with the settings and the machine."""
    whole = {
        "settings": {name: str(value) for name, value in vars(given).items()},
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        **result,
    }
    if given.json is not None:
        given.json.write_text(json.dumps(whole, indent=2) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
