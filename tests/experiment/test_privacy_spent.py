"""Epsilon in run.json: the arguments of the accountant, worst clients, and what is not known is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airtune.aggregation.privacy import epsilon
from airtune.cli import main
from airtune.errors import InputError
from airtune.experiment.config import Experiment, read_experiment
from airtune.experiment.privacy_spent import privacy_spent
from tiny_experiment import write_experiment

RULE = {"type": "client-privacy", "noise_multiplier": 2.0, "inner": "frozen-a"}
INDEPENDENT = {"type": "separate", "sampler": {"type": "independent", "expected_cohort_size": 2}}


def experiment(method: dict[str, Any], **tables: Any) -> Experiment:
    return read_experiment({"method": method, "fleet": {"devices": {"jetson-tx2": 5}}, **tables})


def line(number: int, *arrived: int) -> dict[str, Any]:
    return {"round": number, "arrived": list(arrived)}


class Accountant:
    """Remembers what it was asked, and answers with the number of repetitions."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int, float, float]] = []

    def __call__(self, noise: float, count: int, probability: float, delta: float) -> float:
        self.asked.append((noise, count, probability, delta))
        return float(count)


EXAMPLES = [10, 20, 0, 40, 80]
LINES = [line(0), line(1, 0, 1), line(2), line(3, 1, 4)]


def test_without_noise_nothing_is_said() -> None:
    assert privacy_spent(experiment({"name": "fedit"}), EXAMPLES, LINES) == {}


@pytest.mark.parametrize(
    ("changes", "tables", "probability"),
    [
        ({"planner": INDEPENDENT}, {}, 0.5),  # two of the four that have examples
        ({}, {}, 1.0),
        (
            {"planner": INDEPENDENT},
            {
                "fleet": {
                    "devices": {"jetson-tx2": 5},
                    "availability": {"type": "markov"},
                }
            },
            1.0,
        ),
    ],
)
def test_clients_spend_by_rounds_in_which_anything_arrived(changes: Any, tables: Any, probability: float) -> None:
    asked = Accountant()
    spent = privacy_spent(
        experiment({"name": "composed", "aggregator": RULE, **changes}, **tables), EXAMPLES, LINES, asked
    )
    assert asked.asked == [(2.0, 2, probability, 1e-5)]
    assert spent["privacy"]["clients"]["epsilon"] == 2.0 and spent["privacy"]["clients"]["rounds"] == 2


def test_a_deadline_makes_the_cohort_no_independent_sample() -> None:
    inside = {"type": "composed", "aggregator": RULE, "planner": INDEPENDENT}
    spent = privacy_spent(
        experiment({"name": "deadline", "seconds": 9.0, "method": inside}), EXAMPLES, LINES, Accountant()
    )
    assert spent["privacy"]["clients"]["sampling_probability"] == 1.0


def test_examples_spend_by_steps_and_the_worst_client_counts() -> None:
    training = {"batch_size": 16, "local_steps": 3, "privacy": {"noise_multiplier": 0.8}}
    asked = Accountant()
    spent = privacy_spent(experiment({"name": "ffa-lora"}, training=training), EXAMPLES, LINES, asked)
    assert set(asked.asked) == {(0.8, 3, 1.0, 1e-5), (0.8, 6, 0.8, 1e-5), (0.8, 3, 0.2, 1e-5)}
    assert spent["privacy"]["examples"]["epsilon"] == 6.0 and spent["privacy"]["examples"]["examples"] == 20


def test_what_is_not_known_is_null_with_a_reason() -> None:
    try:
        epsilon(1.0, 1, 1.0, 1e-5)
    except InputError:
        spent = privacy_spent(experiment({"name": "composed", "aggregator": RULE}), EXAMPLES, LINES)
        assert spent["privacy"]["clients"]["epsilon"] is None
        assert "dp-accounting" in spent["privacy"]["clients"]["reason"]
    training = {"privacy": {"noise_multiplier": 0.8}}
    for method in ({"name": "hierfedlora"}, {"name": "staleness", "method": "hierfedlora"}):
        spent = privacy_spent(experiment(method, training=training), EXAMPLES, LINES, Accountant())
        assert spent["privacy"]["examples"]["epsilon"] is None and "cycles" in spent["privacy"]["examples"]["reason"]


def test_a_private_run_writes_and_shows_what_it_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_experiment(tmp_path / "world")
    table = '[variant.private]\nmethod = "composed"\naggregator = { type = "client-privacy", inner = "frozen-a" }\n'
    file.write_text(file.read_text() + "\n" + table)
    assert main(["run", str(file), "--method", "private", "--out", str(tmp_path / "run")]) == 0
    spent = json.loads((tmp_path / "run" / "run.json").read_text())["privacy"]["clients"]
    assert spent["rounds"] == 2 and spent["sampling_probability"] == 1.0 and spent["delta"] == 1e-5
    assert spent["epsilon"] is None or spent["epsilon"] > 0.0
    assert "epsilon of clients" in capsys.readouterr().err
