"""A run that asks for it records the aggregation error of every round, and nothing else changes."""

from pathlib import Path

import pytest

from airtune.experiment.build import Workshop
from airtune.experiment.config import read_file
from airtune.experiment.run import Session, start
from tiny_experiment import lines_of, write_experiment


@pytest.mark.parametrize(("label", "exact"), [("fedit", False), ("flora", True), ("ffa-lora", True)])
def test_rounds_record_it(tmp_path: Path, label: str, exact: bool) -> None:
    file = read_file(write_experiment(tmp_path))
    session = Session(Workshop())
    start(file.experiment(label, stop__rounds=2), tmp_path / "plain", session)
    start(file.experiment(label, stop__rounds=2, evaluation__aggregation_error=True), tmp_path / "asked", session)
    plain, asked = lines_of(tmp_path / "plain"), lines_of(tmp_path / "asked")
    found = [line.pop("diagnostics")["aggregation_error"] for line in asked[1:]]
    assert all("diagnostics" not in line for line in plain)
    assert asked == plain
    assert all((error < 1e-5) == exact for error in found)
