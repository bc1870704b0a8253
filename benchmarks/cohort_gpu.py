"""The cohort engine against the readable twin on a CUDA device. Needs torch, transformers and numpy alone.

    python benchmarks/cohort_gpu.py [--device cuda] [--clients 100] [--repeats 5] [--json FILE]

Finds airtune in the source tree beside it, so nothing has to be installed. Where PEFT is missing, a stand-in with the
forward pass of its plain LoRA layer serves the twin (said in the result). Random BERTs of MiniLM's and of BERT-base's
size and random tokens: nothing is downloaded. On a data-centre GPU it takes a few minutes; ``--device cpu --clients 2
--steps 1 --sizes 2x128`` tries it out without one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))


class PlainLora(nn.Module):
    """The forward pass and the fields of PEFT's plain LoRA layer that airtune uses."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.fan_in_fan_out = not isinstance(base, nn.Linear)
        out_features, in_features = base.weight.shape[:: -1 if self.fan_in_fan_out else 1]
        self.in_features, self.out_features = in_features, out_features
        self.lora_A, self.lora_B, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.scaling, self.r, self.lora_alpha = {}, {}, {}
        self.use_rslora, self.use_dora, self.lora_bias, self.lora_variant = {}, {}, {}, {}
        self.lora_magnitude_vector = nn.ModuleDict()

    def set_adapter(self, names: list[str], inference_mode: bool = False) -> None:
        self.active = names
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        for name in self.active:
            inner = x.to(self.lora_A[name].weight.dtype)
            inner = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](inner)))
            result = result + inner * self.scaling[name]
        return result


def stand_in_for_peft() -> bool:
    """Let airtune import PEFT where it is not installed; return whether that was needed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        pass
    else:
        return False

    def inject(config: Any, network: nn.Module) -> None:
        for name in config.target_modules:
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, PlainLora(network.get_submodule(name)))

    top, tuners, lora = (types.ModuleType(name) for name in ("peft", "peft.tuners", "peft.tuners.lora"))
    top.LoraConfig, top.inject_adapter_in_model = types.SimpleNamespace, inject  # type: ignore[attr-defined]
    lora.Linear = PlainLora  # type: ignore[attr-defined]
    sys.modules.update({"peft": top, "peft.tuners": tuners, "peft.tuners.lora": lora})
    return True


def main() -> None:
    """Print a table and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--sizes", default="2x128,6x384,12x768")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    without_peft = stand_in_for_peft()
    rows: list[dict[str, Any]] = []
    for size in given.sizes.split(","):
        layers, width = (int(number) for number in size.split("x"))
        for precision in given.precisions.split(","):
            rows.append(
                {"layers": layers, "width": width, "precision": precision, **race(layers, width, precision, given)}
            )
            print(_line(rows[-1]), flush=True)
    name = torch.cuda.get_device_name(given.device) if given.device.startswith("cuda") else "cpu"
    settings = {key: str(value) for key, value in vars(given).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    whole = {"settings": settings, "device": name, "peft_stand_in": without_peft, **versions, "rows": rows}
    if given.json is not None:
        given.json.write_text(json.dumps(whole, indent=2) + "\n")


def race(layers: int, width: int, precision: str, given: argparse.Namespace) -> dict[str, Any]:
    """Time both engines on the same jobs, in turns."""
    from airtune.training.cohort.trainer import CohortTrainer
    from airtune.training.local import LocalTrainer

    model, tokens, clients = setting(layers, width, precision, given)
    jobs = jobs_of(model, given)
    parts = model, tokens, clients, 0
    engine = CohortTrainer(*parts)
    modes: dict[str, Callable[[], Any]] = {
        "twin": lambda: LocalTrainer(*parts).train(jobs),
        "cohort": lambda: engine.train(jobs),
    }
    losses = {name: statistics.fmean(t.reports["loss"] for t in work()) for name, work in modes.items()}  # warms up
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(given.repeats):
        for name, work in modes.items():
            begin = time.perf_counter()
            work()  # ends with the results on the CPU, so the device is done
            seconds[name].append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
    gemm = gemm_flops_per_second(given.clients * given.batch * given.tokens, width, precision, given.device)
    arithmetic = 4.0 * 12 * layers * width**2 * given.batch * given.tokens * given.steps * given.clients
    fast = statistics.median(seconds["cohort"])
    return {
        "seconds": seconds,
        "losses": losses,
        "times_the_twin": statistics.median(a / b for a, b in zip(seconds["twin"], seconds["cohort"], strict=True)),
        "client_steps_per_s": given.clients * given.steps / fast,
        "gemm_share": arithmetic / fast / gemm,
        "peak_bytes": peak,
    }


def setting(layers: int, width: int, precision: str, given: argparse.Namespace) -> tuple[Any, Any, list[Any]]:
    """Return a random BERT on the device, random tokens, and each client's examples."""
    from airtune.training.data import TokenizedData
    from airtune.training.model import FederatedModel
    from airtune.training.shapes import ModelConfig

    config = transformers.BertConfig(
        vocab_size=30000,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        num_labels=2,
    )
    torch.manual_seed(0)
    network = transformers.BertForSequenceClassification(config)
    chosen = ModelConfig(name="random")
    model = FederatedModel(network, chosen, num_labels=2, precision=precision, device=given.device)  # type: ignore[arg-type]
    each = 4 * given.batch
    count = given.clients * each
    ids = np.random.default_rng(0).integers(2, 30000, count * given.tokens).astype(np.int32)
    offsets = np.arange(count + 1, dtype=np.int64) * given.tokens
    tokens = TokenizedData(ids, offsets, np.arange(count, dtype=np.int64) % 2, 2, ("a", "b"), 0, given.tokens)
    return model, tokens, [np.arange(k * each, (k + 1) * each) for k in range(given.clients)]


def jobs_of(model: Any, given: argparse.Namespace) -> list[Any]:
    """Return one job per client."""
    from airtune.compression.dense import Dense
    from airtune.lora import AdapterSlice
    from airtune.types import ClientTask, LocalTraining, ServerModel, TrainingJob

    server = ServerModel(model.initial_adapter(0))
    whole = AdapterSlice.everything(server.adapter.shape)
    training = LocalTraining(local_steps=given.steps, batch_size=given.batch)
    tasks = [ClientTask(c, whole, whole, whole, training, Dense(), 1.0, 1.0) for c in range(given.clients)]
    return [TrainingJob(task, server, 1) for task in tasks]


def gemm_flops_per_second(rows: int, width: int, precision: str, device: str) -> float:
    """Return the FLOP/s of [rows, width] x [width, 4 width] there, with a warm cache."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w = (torch.randn(n, width, dtype=dtype, device=device) for n in (rows, 4 * width))
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(20):
            torch.mm(x, w.T)
        wait()
        best = min(best, time.perf_counter() - begin)
    return 20 * 2.0 * rows * width * 4 * width / best


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['layers']:2d}x{row['width']:<4d} {row['precision']}  {row['times_the_twin']:6.2f} x twin  "
        f"{row['client_steps_per_s']:9.1f} client-steps/s  GEMM share {row['gemm_share']:.2f}  losses {row['losses']}"
    )


if __name__ == "__main__":
    main()
