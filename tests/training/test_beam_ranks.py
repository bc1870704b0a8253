"""BeamLoRA composes with the allocation of ranks: devices of unequal memory train unequal ranks, and both are right."""

from pathlib import Path

import pytest

from airtune.experiment.build import Workshop
from airtune.experiment.config import read_file
from airtune.experiment.run import Session, start
from tiny_experiment import lines_of, write_experiment

DEVICES = '["jetson-tx2", "jetson-agx-xavier", "raspberry-pi-5"]'


FIELDS = {
    "fleet.devices": DEVICES,
    "method.cohort_size": "3",
    "method.lowest_rank": "2",
    "method.highest_rank": "4",
    "training.optimizer": "sgd",
    "training.learning_rate": "1.0",
    "training.local_steps": "4",
    "training.beam.every": "2",
    "training.beam.first_share": "0.7",
    "model.adapter": "beam-lora",
}


@pytest.mark.parametrize("method", ["flora", "flexlora"])
def test_components_are_replaced_under_unequal_ranks_and_both_engines_agree(tmp_path: Path, method: str) -> None:
    file, workshop = write_experiment(tmp_path / "world"), Workshop()
    runs = {
        "twin": {},
        "cohort": {"training.engine": "cohort"},
        "never": {"training.beam.every": "1000"},
    }
    losses = {}
    for name, changes in runs.items():
        start(read_file(file, {**FIELDS, **changes}).experiment(method), tmp_path / name, Session(workshop))
        lines = lines_of(tmp_path / name)
        losses[name] = [line["loss"] for line in lines]
        assert len(lines) == 3
        for line in lines[1:]:
            assert line["arrived"] and len({entry["bits_up"] for entry in line["clients"]}) > 1  # ranks do differ
    assert losses["cohort"] == pytest.approx(losses["twin"], abs=1e-5)
    assert losses["never"][-1] != pytest.approx(losses["twin"][-1], abs=1e-7)
