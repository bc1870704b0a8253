"""Whole runs over a grid without processes: the adapter of the simulation, faults, restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from safetensors.torch import load_file

from airtune.deploy.flower.server_app import serve
from airtune.experiment.build import Workshop
from airtune.experiment.config import read_file
from airtune.experiment.run import Session, start
from flower_loopback import LoopbackGrid, fleet_of_nodes, options_for
from tiny_experiment import lines_of, write_experiment

CLIENTS = 6


def simulate(path: Path, out: Path, method: str | None = None, **overrides: str) -> dict[str, torch.Tensor]:
    """Return the adapter of the simulated run."""
    start(read_file(path, overrides).experiment(method), out, Session(Workshop()))
    return load_file(out / "adapter" / "adapter_model.safetensors")


def over_flower(path: Path, out: Path, **changes: object) -> tuple[dict[str, torch.Tensor], LoopbackGrid]:
    """Return the adapter of the run over the loopback grid, and the grid."""
    options = options_for(path, out, **changes)
    grid = LoopbackGrid(options, fleet_of_nodes(CLIENTS))
    serve(grid, options)
    return load_file(out / "adapter" / "adapter_model.safetensors"), grid


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert set(first) == set(second)
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


@pytest.mark.parametrize("method", ["fedit", "fedsa-lora", "flora"])
def test_the_adapter_is_that_of_the_simulation(tmp_path: Path, method: str) -> None:
    path = write_experiment(tmp_path / "task")
    simulated = simulate(path, tmp_path / "simulated", method)
    real, _ = over_flower(path, tmp_path / "real", method=method)
    assert furthest(simulated, real) <= 1e-6
    ours, theirs = lines_of(tmp_path / "real"), lines_of(tmp_path / "simulated")
    assert [line["cohort"] for line in ours] == [line["cohort"] for line in theirs]
    assert [line["uplink_bits"] for line in ours] == [line["uplink_bits"] for line in theirs]
