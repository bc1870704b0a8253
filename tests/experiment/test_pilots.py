"""Pilots: real short runs, rounds to a common loss, and constants that are stored or refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from airtune.errors import InputError, NoResultError
from airtune.experiment import pilots
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import Experiment, read_file
from airtune.experiment.pilots import PilotSetting, rounds_to_common_loss, run_pilots
from airtune.experiment.run import Session
from airtune.solvers.round_bound import RoundModel
from tiny_experiment import lines_of, write_experiment


def test_rounds_to_the_common_loss_are_interpolated() -> None:
    fast, slow = np.array([1.0, 0.5, 0.25, 0.1]), np.array([1.0, 0.8, 0.6, 0.4])
    level, needed = rounds_to_common_loss([fast, slow], window=1, levels=(1.0,))
    assert level == 0.4
    np.testing.assert_allclose(needed, [1.4, 3.0])


def test_several_levels_find_the_ratio_of_speeds_that_noise_hides_from_one() -> None:
    """Curves of one shape at speeds 1, 2/3 and 1/3 under noise: the error of the ratios, one level against five."""
    time, speeds, rng = np.arange(25.0), np.array([1.0, 2 / 3, 1 / 3]), np.random.default_rng(0)
    errors: dict[int, list[float]] = {1: [], 5: []}
    for _ in range(50):
        curves = [np.exp(-0.1 * speed * time) + rng.normal(0.0, 0.02, len(time)) for speed in speeds]
        for count, levels in ((1, (1.0,)), (5, pilots.LEVELS)):
            needed = rounds_to_common_loss(curves, levels=levels)[1]
            errors[count].append(float(np.abs(np.log(needed[1:] / needed[0] * speeds[1:])).mean()))
    assert np.mean(errors[5]) < 0.7 * np.mean(errors[1])
    exact = rounds_to_common_loss([np.exp(-0.1 * speed * np.linspace(0, 25, 2000)) for speed in speeds], window=1)[1]
    np.testing.assert_allclose(exact[0] / exact, speeds, rtol=1e-3)


def test_a_pilot_that_learns_nothing_is_no_result() -> None:
    with pytest.raises(NoResultError, match="pilot"):
        rounds_to_common_loss([np.array([1.0, 1.2, 1.3]), np.array([1.0, 0.5, 0.2])], window=1)


SETTINGS = (PilotSetting(1.0, 1.0), PilotSetting(0.5, 1.0), PilotSetting(1.0, 0.25))


def tiny(folder: Path) -> Experiment:
    changes = {"training__optimizer": "sgd", "training__learning_rate": 0.3, "data__validation_rows": 60}
    return read_file(write_experiment(folder)).experiment("adaptive-sampling", **changes)


def test_a_task_that_pilots_do_not_explain_is_no_result_and_its_runs_are_kept(tmp_path: Path) -> None:
    """A few rounds of this task are noise: some pilot never gains, or no formula fits; either way nothing is usable."""
    with pytest.raises(NoResultError, match=r"^pilot: "):
        run_pilots(tiny(tmp_path / "task"), tmp_path / "pilots", Session(Workshop()), rounds=4, settings=SETTINGS)
    stored = tmp_path / "pilots" / "pilot.json"
    assert not stored.exists() or json.loads(stored.read_text())["usable"] is False
    assert [len(lines_of(tmp_path / "pilots" / f"pilot-{index}")) for index in range(3)] == [5, 5, 5]


def test_the_rounds_of_real_pilots_become_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs are real; the rounds that they are said to need are those of a known model."""
    experiment = tiny(tmp_path / "task")
    weight = build(experiment, Workshop()).cell.fleet.data_weight
    truth = RoundModel(7.0, 2.0, "V+S")
    share = [(np.full(6, s.probability), np.full(6, s.ratio)) for s in SETTINGS]
    needed = np.array([truth.rounds(weight, 1.0, q, ratio) for q, ratio in share])
    monkeypatch.setattr(pilots, "rounds_to_common_loss", lambda losses: (0.5, needed))
    found = run_pilots(experiment, tmp_path / "pilots", Session(Workshop()), rounds=2, settings=SETTINGS)
    assert found.constants.form == "V+S"
    assert found.constants.alpha == pytest.approx(7.0)
    assert found.constants.beta == pytest.approx(2.0)
    assert len(found.constants.gradient_norms) == len(found.constants.gradient_noise) == 6
    stored = json.loads((tmp_path / "pilots" / "pilot.json").read_text())
    assert stored["usable"] is True
    assert stored["constants"]["alpha"] == found.constants.alpha
    cohorts = [len(line["cohort"]) for line in lines_of(tmp_path / "pilots" / "pilot-0") if line["round"]]
    assert cohorts == [6, 6]
    again = read_file(tmp_path / "task" / "tiny.toml")
    path = str(tmp_path / "pilots" / "pilot.json")
    assert again.experiment("adaptive-sampling", method__constants=path).method.constants == found.constants
    other = again.experiment("adaptive-sampling", seed=1, method__constants=path).method.constants
    assert (other.alpha, other.gradient_norms) == (found.constants.alpha, ()), "other clients have other gradients"


def test_other_methods_have_no_pilots(tmp_path: Path) -> None:
    experiment = read_file(write_experiment(tmp_path / "task")).experiment("fedit")
    with pytest.raises(InputError, match="adaptive-sampling"):
        run_pilots(experiment, tmp_path / "pilots", Session(Workshop()))
