"""What depth really saves: executed backward FLOPs and kept activations, counted by torch, not by a formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from airtune.aggregation.one_factor import SharedCore
from airtune.devices.latency import TransformerShape, backward_flops, forward_flops, rank_table
from airtune.lora import NEITHER, ONLY_A, ONLY_B, AdapterSlice
from airtune.training.model import FederatedModel
from airtune.training.shapes import ModelConfig
from airtune.types import ServerModel
from tiny_networks import CLASSES, network, random_adapter

DEPTHS = 6


@pytest.fixture(scope="module")
def model() -> Any:
    """Return six layers of width 64 with eager attention, whose products the counter can see."""
    bert = network(num_hidden_layers=DEPTHS, hidden_size=64, intermediate_size=256)
    made = FederatedModel(bert, ModelConfig(name="random", rank=4, alpha=8.0), num_labels=CLASSES, precision="fp32")
    made.network.set_attn_implementation("eager")
    return made


def batch(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 61, (8, 24), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def step(
    model: Any, train: AdapterSlice, receive: AdapterSlice | None = None, server: ServerModel | None = None
) -> dict[str, float]:
    """Run one forward and one backward pass and return FLOPs and the bytes kept in between."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.activate(server or ServerModel(random_adapter(model)), train, receive)
    parameters = {p.untyped_storage().data_ptr() for p in model.network.parameters()}
    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model.logits(*batch(model)).square().mean()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    activations = sum(size for pointer, size in kept.items() if pointer not in parameters)
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops(), "kept": activations}


def by_depth(model: Any, outside: str) -> dict[str, np.ndarray]:
    shape = model.shape
    measured = []
    for depth in range(1, DEPTHS + 1):
        train = AdapterSlice.top_layers(shape, depth, outside)  # type: ignore[arg-type]
        measured.append(step(model, train, AdapterSlice.everything(shape) if outside == "frozen" else train))
    return {key: np.array([row[key] for row in measured], dtype=float) for key in measured[0]}


def allocated_peak(model: Any, train: AdapterSlice, receive: AdapterSlice) -> int:
    """Return the most bytes that torch's allocator held during one step beyond those before it."""
    model.activate(ServerModel(random_adapter(model)), train, receive)
    inputs = batch(model)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model.logits(*inputs).square().mean().backward()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    return int(held.max())


@pytest.mark.parametrize("outside", ["frozen", "absent"])
def test_the_peak_of_allocated_memory_rises_by_the_same_with_every_layer(model: Any, outside: str) -> None:
    """Every allocation and release that the profiler saw, summed in time: frozen lower layers keep nothing."""
    everything, peaks, kept = AdapterSlice.everything(model.shape), [], []
    for depth in range(1, DEPTHS + 1):
        train = AdapterSlice.top_layers(model.shape, depth, outside)  # type: ignore[arg-type]
        receive = everything if outside == "frozen" else train
        peaks.append(allocated_peak(model, train, receive))
        kept.append(step(model, train, receive)["kept"])
    steps = np.diff(peaks)
    assert steps.min() > 0
    assert np.ptp(steps) <= 0.02 * steps.mean()
    assert steps.mean() == pytest.approx(np.diff(kept).mean(), rel=0.1)  # a layer's peak is what autograd keeps of it
    assert peaks[0] < 0.3 * peaks[-1]


@pytest.mark.parametrize("outside", ["frozen", "absent"])
def test_executed_backward_flops_and_kept_activations_are_linear_in_depth(model: Any, outside: str) -> None:
    """LEGEND's T1: every layer less saves the same; R^2 above 0.98."""
    found = by_depth(model, outside)
    depth = np.arange(1, DEPTHS + 1)
    for key in ("backward", "kept"):
        steps = np.diff(found[key])
        assert steps.min() > 0
        assert np.ptp(steps) <= 0.02 * steps.mean()
        assert np.corrcoef(depth, found[key])[0, 1] ** 2 > 0.999
    per_layer = np.diff(found["backward"]).mean()
    assert found["backward"][0] < 1.3 * per_layer  # nothing is computed below the lowest trained layer


def test_the_forward_pass_crosses_all_layers_at_every_depth(model: Any) -> None:
    frozen = by_depth(model, "frozen")["forward"]
    assert np.ptp(frozen) == 0
    absent = by_depth(model, "absent")["forward"]
    assert np.all(np.diff(absent) > 0)  # D2 leaves the products of the lower layers' factors out
    assert absent[0] > 0.9 * frozen[0]


def layer_costs(width: int, tokens: int, rank: int) -> tuple[int, int, int]:
    """Return the FLOPs per token of a layer forward, backward, and backward where it is the lowest trained one.

    Derived for an MLP of four widths and rank r on query and value. Forward: 12 d^2 multiply-adds in linear layers, two
    attention products over s tokens, and the factors. Backward: each linear layer passes one activation gradient on
    (frozen: no weight gradient), each attention product and each factor has two products. In the lowest trained layer
    the inputs of query, key and value need no gradient, and neither does what key put out.
    """
    d, s, r = width, tokens, rank
    forward = 24 * d * d + 4 * s * d + 8 * r * d
    backward = 24 * d * d + 8 * s * d + 16 * r * d
    lowest = 18 * d * d + 6 * s * d + 12 * r * d
    return forward, backward, lowest


def largest_gain(layers: int, depth: int, forward: float, backward: float, lowest: float) -> float:
    """Return the bound on what `depth` instead of all layers gains; with equal costs 2L / (L + k)."""
    whole = layers * forward + (layers - 1) * backward + lowest
    return whole / (layers * forward + (depth - 1) * backward + lowest)


def test_a_frozen_linear_layer_costs_as_much_backward_as_forward(model: Any) -> None:
    """Where 2L / (L + 1) comes from: without attention and factors, a whole layer's passes are equal, to the FLOP."""
    found = by_depth(model, "frozen")
    tokens, width, rank = 8 * 24, 64, 4
    attention_and_factors = tokens * (8 * 24 * width + 16 * rank * width)
    backward = np.diff(found["backward"]) - attention_and_factors
    assert set(backward) == {tokens * 24 * width**2}
    head = 8 * 2 * (width**2 + width * CLASSES)  # pooler and classifier
    forward = found["forward"][0] - head - DEPTHS * tokens * (4 * 24 * width + 8 * rank * width)
    assert forward == DEPTHS * backward[0]
    assert (forward + DEPTHS * backward[0]) / (forward + backward[0]) == 2 * DEPTHS / (DEPTHS + 1)


def test_no_depth_gains_more_than_the_bound_with_attention_and_factors(model: Any) -> None:
    """The bound is met up to the head, which costs the same at every depth."""
    found = by_depth(model, "frozen")
    total, costs = found["forward"] + found["backward"], layer_costs(width=64, tokens=24, rank=4)
    for depth in range(1, DEPTHS + 1):
        gain, bound = total[-1] / total[depth - 1], largest_gain(DEPTHS, depth, *costs)
        assert 0.98 * bound < gain <= bound
    assert largest_gain(DEPTHS, 1, 1, 1, 1) == 2 * DEPTHS / (DEPTHS + 1)


def test_the_cost_model_counts_what_torch_executes(model: Any) -> None:
    """The planner's FLOPs of each depth against the executed ones."""
    found, shape = by_depth(model, "frozen"), TransformerShape.from_config(model.config_json)
    for depth in range(1, DEPTHS + 1):
        ranks = [{n: 4 * (s.layer >= DEPTHS - depth) for n, s in model.shape.slots.items()}]
        ranks.append({n: 4 * (s.layer < DEPTHS - depth) for n, s in model.shape.slots.items()})
        trained, frozen = (rank_table(shape, part) for part in ranks)
        forward = forward_flops(shape, trained + frozen, 24, 8, "classification", CLASSES)
        backward = backward_flops(shape, trained, 24, 8, "classification", CLASSES, frozen_ranks=frozen)
        assert float(forward) == pytest.approx(found["forward"][depth - 1], rel=0.05)
        assert float(backward) == pytest.approx(found["backward"][depth - 1], rel=0.05)


@pytest.mark.parametrize("factors", [ONLY_A, ONLY_B, NEITHER])
def test_a_frozen_factor_costs_no_gradient_of_its_own(model: Any, factors: frozenset[Any]) -> None:
    """FFA-LoRA, RoLoRA and Fed-SB: the counted FLOPs against the executed ones, and below those of plain LoRA."""
    server = ServerModel(random_adapter(model))
    trained = set(factors)
    if not factors:
        server, trained = SharedCore().prepare(server), {"core"}
    found = step(model, AdapterSlice.everything(model.shape, factors), server=server)
    shape = TransformerShape.from_config(model.config_json)
    ranks = rank_table(shape, dict.fromkeys(model.shape.slots, 4))
    forward = forward_flops(shape, ranks, 24, 8, "classification", CLASSES, core="core" in trained)
    backward = backward_flops(shape, ranks, 24, 8, "classification", CLASSES, factors=trained)
    plain = step(model, AdapterSlice.everything(model.shape))
    assert float(forward) == pytest.approx(found["forward"], rel=0.005)
    assert float(backward) == pytest.approx(found["backward"], rel=0.005)
    assert found["backward"] < plain["backward"]
