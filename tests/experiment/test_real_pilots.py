"""Pilots on real weights and real text: `airtune plan --pilot` on an experiment of this repository ends in a fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from airtune import cli
from airtune.solvers.pilot_fit import LARGEST_RESIDUAL

FILE = Path(__file__).parents[2] / "experiments" / "adaptive-sampling" / "20newsgroups.toml"


@pytest.mark.slow
def test_pilots_that_really_train_become_a_usable_fit_and_a_plan(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(FILE), "--pilot", "--json", "--out", str(tmp_path / "pilot")]) == 0
    plan = json.loads(capfd.readouterr().out)
    pilot = plan["pilot"]
    assert pilot["usable"] is True
    assert pilot["largest_residual"] <= LARGEST_RESIDUAL
    assert pilot["constants"]["alpha"] > 0.0 and pilot["constants"]["beta"] > 0.0
    for one in pilot["pilots"]:
        assert one["fitted"] == pytest.approx(one["rounds"], rel=LARGEST_RESIDUAL)
    of = {(one["probability"], one["ratio"]): one["rounds"] for one in pilot["pilots"]}
    assert of[0.4, 0.125] > of[0.4, 1.0]  # an eighth of the components learns more slowly than all of them
    assert len(pilot["constants"]["gradient_norms"]) == 40
    notes = plan["notes"]
    assert notes["round_model"]["from_pilot"] is True
    assert notes["round_model"]["alpha"] == pilot["constants"]["alpha"]
    assert len(set(notes["sampling"]["probability"])) > 1
