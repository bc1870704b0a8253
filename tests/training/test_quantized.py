"""A base in 8 or 4 bits: what the codes restore, that gradients pass, and that merges lie exactly beside it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import tiny_networks as tiny
from airtune.aggregation.contributions import Contributions
from airtune.aggregation.merging import Redraw, merged, restarted
from airtune.cli import main
from airtune.devices.latency import KINDS, TransformerShape
from airtune.devices.memory import training_bytes
from airtune.errors import InputError
from airtune.lora import LoraFactors
from airtune.training.cohort.trainer import CohortTrainer
from airtune.training.local import LocalTrainer
from airtune.training.quantized import BLOCK, NF4, CodedLinear, Int8Linear, NF4Linear, quantize, stored_bytes
from airtune.training.shapes import LINEAR_BYTES, ModelConfig
from airtune.types import ServerModel
from cohort_jobs import CLIENTS, job
from tiny_experiment import write_experiment

CODED = ("int8", "nf4")


def matrix(rows: int = 24, columns: int = 40) -> torch.Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    drawn[3] = 0.0
    return drawn


def test_int8_is_off_by_at_most_half_a_step_of_its_row() -> None:
    weight = matrix()
    layer = Int8Linear(weight, None, transposed=False)
    steps = weight.abs().amax(dim=1, keepdim=True) / 127
    assert layer.codes.dtype == torch.int8
    assert ((layer.weight - weight).abs() <= steps / 2 + 1e-7).all()
    assert not layer.weight[3].any()


@pytest.mark.parametrize("size", [(24, 40), (7, 9)])  # whole blocks, and one that is filled up
def test_nf4_takes_the_nearest_of_sixteen_levels_in_each_block(size: tuple[int, int]) -> None:
    weight = matrix(*size)
    layer = NF4Linear(weight, None, transposed=False)
    flat, restored = weight.reshape(-1), layer.weight.reshape(-1)
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        largest = block.abs().max()
        levels = torch.tensor(NF4) * largest
        nearest = (block[:, None] - levels).abs().min(dim=1).values
        torch.testing.assert_close((restored[start : start + BLOCK] - block).abs(), nearest)


def test_the_levels_of_nf4_are_the_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, appendix E: 8 negative and 9 positive quantiles with an exact zero in common, scaled to [-1, 1]."""
    from scipy.stats import norm

    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([negative, [0.0], positive]))
    assert np.allclose(levels / levels.max(), NF4, atol=1e-5)


@pytest.mark.parametrize("kind", CODED)
def test_values_and_gradients_are_those_of_the_restored_weight(kind: str) -> None:
    plain = nn.Sequential(nn.Linear(40, 24), Conv1D(16, 24))
    coded = nn.Sequential(*plain)
    quantize(coded, ["0", "1"], kind)  # type: ignore[arg-type]
    first, second = coded[0], coded[1]
    assert isinstance(first, CodedLinear) and isinstance(second, CodedLinear)
    assert second.weight.shape == plain[1].weight.shape == (24, 16)  # as it was stored
    x = torch.randn(5, 3, 40, generator=torch.Generator().manual_seed(1), requires_grad=True)
    output = coded(x)
    expected = functional.linear(functional.linear(x, first.matrix(), first.bias), second.matrix(), second.bias)
    torch.testing.assert_close(output, expected)
    (found,) = torch.autograd.grad(output.square().sum(), x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(found, wanted)


def batch_of(task: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(rows) for name, rows in tiny.rows(task, 6).batch(np.arange(6)).items()}


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_all_linear_layers_of_the_base_are_coded_and_memory_falls(family: str, kind: str) -> None:
    task = tiny.classification(family)
    full, coded = tiny.federated(family, task), tiny.federated(family, task, base_weights=kind)
    layers = [module for module in coded.network.modules() if isinstance(module, CodedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    saved = stored_bytes(full.network) - stored_bytes(coded.network)
    assert len(layers) >= 8
    left = {"int8": 1.0, "nf4": LINEAR_BYTES["nf4"]}[kind]
    assert saved == pytest.approx((4 - left) * weights, rel=0.06)  # scales of short rows and the table of levels
    rows = batch_of(task)
    distance = (coded.output(rows) - full.output(rows)).norm() / full.output(rows).norm()
    assert 0 < distance < {"int8": 0.1, "nf4": 0.8}[kind]  # random weights are unkind to few bits


def servers(model: Any) -> tuple[ServerModel, ServerModel]:
    """Return the mean of two clients as an adapter of rank 8, and merged into the base beside a new adapter."""
    clients = [tiny.random_adapter(model, seed) for seed in (0, 1)]
    sums = {
        slot: Contributions(tuple(c.factors[slot] for c in clients), (0.25, 0.75)).stacked()
        for slot in clients[0].factors
    }
    start = clients[0]
    before = ServerModel(start)
    adapter = start.with_factors(restarted(start, sums, Redraw(), 1))
    return ServerModel(replace(start, factors=sums)), merged(before, adapter, sums, 0)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(("base", "precision"), [("full", "fp32"), ("full", "bf16"), ("int8", "fp32"), ("nf4", "fp32")])
def test_merged_and_unmerged_models_agree_over_any_base(base: str, precision: str, family: str, dense: bool) -> None:
    """Small merges are not lost in the rounding of the base, because they never enter it."""
    try:
        model = tiny.federated(family, base_weights=base, precision=precision)
    except InputError as error:
        pytest.skip(str(error))
    unmerged, merge = servers(model)
    if dense:
        merge = replace(merge, base_update={m: _dense(update) for m, update in merge.base_update.items()})
    batch = batch_of(model.config.task)
    logits = []
    for server in (unmerged, merge, ServerModel(merge.adapter)):
        model.show(server)
        logits.append(model.output(batch).detach())
    apart = float((logits[0] - logits[1]).norm() / logits[0].norm())
    moved = float((logits[2] - logits[0]).norm() / logits[0].norm())
    assert moved > 0.05  # the merge matters
    assert apart < (0.02 if precision == "bf16" else 1e-5) < moved


def _dense(update: Any) -> Any:
    from airtune.lora import DenseUpdate

    return DenseUpdate(update.product()) if isinstance(update, LoraFactors) else update


@pytest.mark.parametrize("kind", CODED)
def test_both_engines_train_the_same_on_a_coded_base(kind: str) -> None:
    model, data = tiny.federated("bert", base_weights=kind), tiny.tokens(40)
    server = ServerModel(tiny.random_adapter(model))
    jobs = [job(server, client) for client in range(3)]
    alone = LocalTrainer(model, data, CLIENTS, 0).train(jobs)
    together = CohortTrainer(model, data, CLIENTS, 0).train(jobs)
    start = server.adapter
    for one, other in zip(alone, together, strict=True):
        for slot, factors in one.values.factors.items():
            assert not torch.equal(factors.B, start.factors[slot].B)
            torch.testing.assert_close(factors.B, other.values.factors[slot].B, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", CODED)
def test_a_run_of_flora_merges_over_a_coded_base(kind: str, tmp_path: Path) -> None:
    file = write_experiment(tmp_path / "world")
    out = tmp_path / "run"
    command = ["run", str(file), "--method", "flora", "--model.base_weights", kind, "--out", str(out)]
    assert main(command) == 0
    head = json.loads((out / "run.json").read_text())
    assert head["status"] == "done" and head["config"]["model"]["base_weights"] == kind
    assert head["export"]["base_weights"] == kind
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert lines[-1]["round"] == 2 and all(np.isfinite(line["accuracy"]) for line in lines if "accuracy" in line)
    assert lines[-1]["downlink_bits"] > lines[1]["downlink_bits"]  # the first merge is downloaded


def test_devices_need_less_memory_for_a_coded_base() -> None:
    shape = TransformerShape.from_config({**tiny.SETTINGS["bert"], "model_type": "bert"})
    ranks = np.full((tiny.LAYERS, len(KINDS)), 2)
    full, int8, nf4 = (training_bytes(shape, ranks, 8, 4, linear_bytes=LINEAR_BYTES[k]) for k in ("full", *CODED))  # type: ignore[index]
    matrices = shape.inputs * shape.outputs
    assert full - int8 == pytest.approx(3.0 * tiny.LAYERS * matrices.sum() - 4.0 * matrices.max())
    assert int8 - nf4 == pytest.approx(0.4375 * tiny.LAYERS * matrices.sum())


def test_unknown_codes_and_dora_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.base_weights.*int8"):
        ModelConfig(base_weights="int3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="dora"):
        ModelConfig(base_weights="nf4", adapter="dora")
