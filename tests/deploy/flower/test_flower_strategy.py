"""A method as Flower's `Strategy`: the adapter of the simulation through ``start``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Strategy

from airtune.deploy.flower.strategy import AirtuneStrategy, adapter_of, arrays_of
from airtune.errors import InputError
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import read_file
from airtune.federation import begin, run
from flower_loopback import Delivery, LoopbackGrid, fleet_of_nodes, options_for
from small_world import make_adapter
from tiny_experiment import write_experiment


class Loop(LoopbackGrid):
    """With the blocking call of Flower's grid, whose message ids are its own."""

    def send_and_receive(self, messages: Any, *, timeout: float) -> list[Message]:
        return list(self.pull_messages(self.push_messages(list(messages))))


def lossy(delivery: Delivery) -> Any:
    if delivery.round == 2 and delivery.node == min(delivery.grid.nodes):
        return delivery.error("gone")
    return delivery.answer()


@pytest.mark.parametrize("method", ["fedit", "flora"])
def test_start_gives_the_adapter_of_the_simulation(tmp_path: Path, method: str) -> None:
    path = write_experiment(tmp_path / "task")
    bench = build(read_file(path).experiment(method), Workshop())
    progress = begin(bench.experiment.method, bench.start, bench.cell)
    rounds = run(
        bench.experiment.method, progress, bench.cell, bench.runner, stop=bench.stop, seed=0, evaluate=no_metrics
    )
    *_, (last, _) = rounds

    options = options_for(path, tmp_path / "out", method=method)
    strategy = AirtuneStrategy(options)
    assert isinstance(strategy, Strategy)
    grid: Any = Loop(options, fleet_of_nodes(6))
    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=2, timeout=60, evaluate_fn=strategy.evaluate)
    found = adapter_of(result.arrays, last.model.adapter)
    for (_, _, ours), (_, _, theirs) in zip(found.tensors(), last.model.adapter.tensors(), strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-6
    expected = bench.evaluate(last.model)["accuracy"]
    assert result.evaluate_metrics_serverapp[2]["accuracy"] == pytest.approx(expected, abs=1e-9)


def no_metrics(model: object) -> dict[str, float]:
    return {}


def test_a_lost_client_does_not_end_the_loop(tmp_path: Path) -> None:
    path = write_experiment(tmp_path / "task")
    options = options_for(path, tmp_path / "out", overrides="method.cohort_size=6")
    strategy = AirtuneStrategy(options)
    grid: Any = Loop(options, fleet_of_nodes(6), lossy)
    result = strategy.start(grid, strategy.initial_arrays(), num_rounds=2, timeout=60)
    assert [result.train_metrics_clientapp[index]["updates"] for index in (1, 2)] == [6, 5]


def test_arrays_come_back_and_strange_ones_are_refused() -> None:
    adapter = make_adapter()
    back = adapter_of(arrays_of(adapter), make_adapter(seed=4))
    assert all(bool((a == b).all()) for (_, _, a), (_, _, b) in zip(back.tensors(), adapter.tensors(), strict=True))
    with pytest.raises(InputError, match="missing or of another size"):
        adapter_of(ArrayRecord(), adapter)
