"""PEFT's own merge of several adapters, combination "cat", as an independent implementation of stacking."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from aggregation_examples import effective, fleet, outcome, random_factors, relative, task, update
from airtune.aggregation.stacking import Stacking
from airtune.lora import Adapter, AdapterSlice, LoraFactors, stack
from airtune.types import ServerModel

RANKS, EXAMPLES = (2, 4, 8), (5, 20, 75)
NAMES = ("first", "second", "third")


class _OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def _clients(rank_stabilized: bool) -> list[LoraFactors]:
    """alpha is 16 for everyone, so the scalings differ with the ranks."""
    return [
        random_factors(r, (24, 40), seed=r, scaling=16 / (r**0.5 if rank_stabilized else r), dtype=torch.float32)
        for r in RANKS
    ]


def _peft_sum(base: nn.Module, clients: list[LoraFactors], weights: list[float], rank_stabilized: bool) -> torch.Tensor:
    model = None
    for name, factors in zip(NAMES, clients, strict=True):
        config = LoraConfig(
            r=factors.rank,
            lora_alpha=16,
            target_modules=["linear"],
            use_rslora=rank_stabilized,
            fan_in_fan_out=isinstance(base, Conv1D),
        )
        if model is None:
            model = get_peft_model(_OneLayer(base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        layer = model.base_model.model.linear
        layer.lora_A[name].weight.data.copy_(factors.A)
        layer.lora_B[name].weight.data.copy_(factors.B)
    if rank_stabilized:  # PEFT over-scales the result of rsLoRA adapters (pull requests 3449, 3473): give it plain ones
        for name, factors in zip(NAMES, clients, strict=True):
            model.peft_config[name].use_rslora = False
            layer.scaling[name] = factors.scaling
    model.add_weighted_adapter(list(NAMES), weights, "sum", combination_type="cat")
    delta = model.base_model.model.linear.get_delta_weight("sum").detach()
    return delta.T if isinstance(base, Conv1D) else delta


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_stack_equals_peft_cat(kind: str, rank_stabilized: bool) -> None:
    base = nn.Linear(24, 40, bias=False) if kind == "linear" else Conv1D(40, 24)
    clients = _clients(rank_stabilized)
    weights = [n / sum(EXAMPLES) for n in EXAMPLES]
    wanted = _peft_sum(base, clients, weights, rank_stabilized)
    assert relative(stack(clients, weights).product() - wanted, wanted) < 1e-6


def test_flora_equals_peft_cat() -> None:
    clients = _clients(False)
    start = random_factors(8, (24, 40), dtype=torch.float32)
    model = ServerModel(Adapter({"linear": start}, {"linear": ("linear",)}, {"linear": 0}, 1))
    updates = []
    for client, factors in enumerate(clients):
        part = AdapterSlice.truncation(model.adapter.shape, factors.rank)
        updates.append(update(task(client, part), part.take(model.adapter).with_factors({"linear": factors})))
    after = Stacking()(model, outcome(updates, EXAMPLES))
    wanted = _peft_sum(nn.Linear(24, 40, bias=False), clients, [n / sum(EXAMPLES) for n in EXAMPLES], False)
    assert fleet(EXAMPLES).size == 3
    assert relative(effective(after, "linear") - wanted, wanted) < 1e-6
