"""The cost model: what is trained, sent and kept decides what a task costs; depth, rank and freezing pay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.lora import AdapterSlice
from airtune.streams import stream
from airtune.training.data import TokenizedData, client_batches
from airtune.types import ClientTask
from small_world import LAYERS, RANK, make_adapter, make_cell, make_task

ADAPTER = make_adapter()
COSTS = make_cell().costs
WHOLE = AdapterSlice.everything(ADAPTER.shape)


def flops(train: AdapterSlice, receive: AdapterSlice = WHOLE) -> tuple[float, float]:
    return COSTS.compute_flops(make_task(1, ADAPTER, train=train, receive=receive))


def test_depth_saves_backward_work_only() -> None:
    depths = [AdapterSlice.top_layers(ADAPTER.shape, k) for k in range(LAYERS + 1)]
    forward, backward = np.array([flops(part) for part in depths]).T
    assert np.ptp(forward) == 0  # the global adapter below stays in the forward pass (D1)
    assert np.all(np.diff(backward) > 0)
    np.testing.assert_allclose(np.diff(backward)[1:], np.diff(backward)[1], rtol=1e-9)  # linear


def test_absent_layers_leave_the_forward_pass_too() -> None:
    frozen = AdapterSlice.top_layers(ADAPTER.shape, 1)
    absent = AdapterSlice.top_layers(ADAPTER.shape, 1, outside="absent")
    assert flops(absent)[0] < flops(frozen)[0]
    assert flops(absent)[1] == flops(frozen)[1]


@given(st.integers(1, RANK), st.integers(0, 50))
def test_a_sketch_costs_as_much_as_a_truncation_of_its_size(kept: int, seed: int) -> None:
    sketch = AdapterSlice.sketch(ADAPTER.shape, kept, stream(seed, "test"))
    truncated = AdapterSlice.truncation(ADAPTER.shape, kept)
    assert flops(sketch, sketch) == flops(truncated, truncated)
    tasks = [make_task(1, ADAPTER, receive=p, train=p, send=p) for p in (sketch, truncated)]
    assert COSTS.uplink_bits(tasks[0]) == COSTS.uplink_bits(tasks[1])
    assert COSTS.memory_bytes(tasks[0]) == COSTS.memory_bytes(tasks[1])


def test_bits_are_those_of_the_values_sent() -> None:
    for part in (WHOLE, AdapterSlice.top_layers(ADAPTER.shape, 2), replace(WHOLE, tensors=frozenset({"B"}))):
        values = sum(tensor.numel() for _, _, tensor in part.payload(part.take(ADAPTER)))
        task = make_task(0, ADAPTER, send=part, receive=part)
        assert COSTS.uplink_bits(task) == COSTS.downlink_bits(task) == 32 * values


def test_a_broadcast_holds_each_component_once() -> None:
    one, other = (AdapterSlice.sketch(ADAPTER.shape, 2, stream(s, "test")) for s in (1, 2))
    tasks = [make_task(c, ADAPTER, receive=part) for c, part in enumerate((one, other, one))]
    both = sum(len(np.union1d(one.components[s], other.components[s])) for s in ADAPTER.shape.slots)
    size = sum(f.in_features + f.out_features for f in ADAPTER.factors.values()) // len(ADAPTER.factors)
    assert COSTS.broadcast_bits(tasks) == 32 * (both * size + ADAPTER.shape.extra_values)
    assert COSTS.broadcast_bits(tasks[:1]) == COSTS.downlink_bits(tasks[0])


def test_seconds_and_joules_follow_the_device() -> None:
    slow, fast = (make_task(c, ADAPTER) for c in (0, 2))
    assert COSTS.compute_flops(slow) == COSTS.compute_flops(fast)
    assert COSTS.compute_seconds(slow) > COSTS.compute_seconds(fast)
    assert COSTS.compute_joules(slow) == pytest.approx(sum(COSTS.compute_flops(slow)) * COSTS.fleet.energy_per_flop[0])


def test_epochs_follow_the_data() -> None:
    epochs = replace(make_task(0, ADAPTER).training, local_steps=None, epochs=2.0)
    for client, examples in enumerate(COSTS.fleet.num_examples):
        steps = int(2 * np.ceil(examples / epochs.batch_size))
        one = COSTS.compute_flops(make_task(client, ADAPTER, training=replace(epochs, local_steps=1)))
        assert COSTS.compute_flops(make_task(client, ADAPTER, training=epochs)) == pytest.approx(
            tuple(steps * f for f in one)
        )


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 3))
def test_the_rows_that_are_charged_are_those_that_are_trained(examples: int, batch: int, epochs: int) -> None:
    costs = make_cell(num_examples=[examples] * 4).costs
    one = sum(make_cell(num_examples=[1] * 4).costs.compute_flops(_with(local_steps=1, batch_size=1)))
    charged = sum(costs.compute_flops(_with(local_steps=None, epochs=float(epochs), batch_size=batch))) / one
    tokens = TokenizedData(
        ids=np.zeros(examples, np.int32),
        offsets=np.arange(examples + 1),
        labels=np.zeros(examples, np.int64),
        num_labels=2,
        label_names=("a", "b"),
        pad_id=0,
        max_length=4,
    )
    batches = client_batches(tokens, np.arange(examples), batch, rng=stream(0, "test"), epochs=epochs)
    assert charged == pytest.approx(sum(len(rows) for rows in batches))


def _with(**changes: object) -> ClientTask:
    task = make_task(0, ADAPTER)
    return replace(task, training=replace(task.training, **changes))  # type: ignore[arg-type]


def test_memory_grows_with_depth_and_batch() -> None:
    needed = [
        COSTS.memory_bytes(make_task(1, ADAPTER, train=AdapterSlice.top_layers(ADAPTER.shape, k))) for k in range(1, 4)
    ]
    assert needed == sorted(needed) and needed[0] < needed[-1]
