"""Plans without training: the numbers are those of the simulator's clock where the world has no chance in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from airtune.errors import InputError, NoResultError
from airtune.experiment.build import Workshop
from airtune.experiment.config import Experiment, read_file
from airtune.experiment.planning import plan_round
from airtune.experiment.run import Session, start
from airtune.methods import method_class, method_names
from tiny_experiment import lines_of, write_experiment

STILL = {"wireless.fading": "none", "data.partition": "iid", "stop.rounds": "1"}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an experiment whose sentences all have seven words: a plan then knows the tokens exactly."""
    return write_experiment(tmp_path_factory.mktemp("tiny"), words=7)


def experiment(file: Path, label: str = "fedit", **overrides: str) -> Experiment:
    return read_file(file, {**STILL, "data.max_length": "7", **overrides}).experiment(label)


@pytest.mark.parametrize("label", ["fedit", "hetlora", "legend"])
@pytest.mark.parametrize("downlink", ["broadcast", "unicast"])
def test_a_plan_predicts_what_the_clock_then_shows(file: Path, tmp_path: Path, label: str, downlink: str) -> None:
    made = experiment(file, label, **{"wireless.downlink": downlink})
    plan = plan_round(made)
    start(made, tmp_path / "run", Session(Workshop()))
    line = lines_of(tmp_path / "run")[1]
    predicted = plan["predicted"]
    assert [client["client"] for client in plan["clients"]] == line["cohort"]
    assert predicted["round_s"] == pytest.approx(line["duration_s"], rel=1e-9)
    assert predicted["uplink_bits"] == line["uplink_bits"]
    assert predicted["energy_j"] == pytest.approx(line["energy_j"], rel=1e-9)
    clocked = {client["client"]: client for client in line["clients"]}
    for client in plan["clients"]:
        for name in ("download_s", "compute_s", "upload_s", "bandwidth_hz", "depth"):
            assert client[name] == pytest.approx(clocked[client["client"]][name], rel=1e-9)
    slowest = max(line["clients"], key=lambda client: client["download_s"] + client["compute_s"] + client["upload_s"])
    assert predicted["straggler"]["client"] == slowest["client"]


def test_a_plan_has_the_keys_of_the_contract(file: Path) -> None:
    plan = plan_round(experiment(file, **{"stop.rounds": "4"}))
    assert {"schema", "method", "predicted", "clients", "solver", "notes"} <= set(plan)
    predicted = plan["predicted"]
    assert {"rounds", "round_s", "total_s", "uplink_bits", "energy_j"} <= set(predicted)
    assert predicted["total_s"] == pytest.approx(4 * predicted["round_s"])
    for client in plan["clients"]:
        assert {"client", "probability", "depth", "keep_ratio", "bandwidth_hz", "compute_s", "upload_s"} <= set(client)
        assert ("rank" in client) != ("components" in client)
    assert {"status", "objective", "iterations", "branch", "gap"} <= set(plan["solver"])
    assert json.loads(json.dumps(plan, allow_nan=False)) == plan


def test_rounds_follow_from_fleet_seconds(file: Path) -> None:
    one = plan_round(experiment(file))["predicted"]["round_s"]
    limits = {"stop.rounds": "none", "stop.fleet_seconds": str(2.5 * one)}
    assert plan_round(experiment(file, **limits))["predicted"]["rounds"] == 3


def test_more_bandwidth_is_never_slower(file: Path) -> None:
    rounds = [
        plan_round(experiment(file, **{"wireless.uplink_bandwidth": f"{width}MHz"}))["predicted"]["round_s"]
        for width in (1, 2, 5, 10, 50)
    ]
    assert rounds == sorted(rounds, reverse=True)
    assert rounds[0] > rounds[-1]


@pytest.mark.parametrize("label", method_names())
def test_every_method_that_needs_no_settings_can_be_planned(file: Path, label: str) -> None:
    try:
        needed = {"fedbuff": {"method.concurrency": "4"}, "mole": {"method.clusters": "index"}}.get(label, {})
        adapter = getattr(method_class(label), "only_adapter", "lora")
        made = experiment(file, label, **{"model.adapter": adapter}, **needed)
    except InputError as error:
        assert "is missing" in str(error)  # wrappers need a method
        return
    plan = plan_round(made)
    assert plan["clients"]
    assert plan["predicted"]["round_s"] > 0


def test_no_link_is_no_result(file: Path) -> None:
    silent = {"wireless.path_loss.reference_loss_db": "4000", "wireless.path_loss.shadowing_db": "0"}
    with pytest.raises((NoResultError, InputError)) as caught:
        plan_round(experiment(file, **silent, **{"method.bandwidth": "equal"}))
    assert "\n" not in str(caught.value)


def test_planning_imports_neither_torch_nor_transformers_and_takes_no_memory_for_the_adapter(file: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from airtune.experiment.config import read_file;"
        "from airtune.experiment.planning import plan_round;"
        f"plan_round(read_file(Path({str(file)!r})).experiment('legend'));"
        "print([name for name in ('torch', 'transformers', 'datasets', 'flwr_datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_assumptions_are_said(file: Path) -> None:
    notes: Any = plan_round(experiment(file))["notes"]["assumed"]
    assert any("shared equally" in note for note in notes)
    assert any("7 tokens" in note for note in notes)
    assert np.isfinite(plan_round(experiment(file))["predicted"]["energy_j"])
