"""`airtune plan --pilot`: a plan that stands on real runs, taken up again by `run`, or a refusal with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from airtune import cli
from airtune.experiment import pilots
from airtune.solvers.round_bound import RoundModel
from tiny_experiment import head_of, write_experiment

SGD = ("--training.optimizer", "sgd", "--training.learning-rate", "0.3", "--data.validation-rows", "60")


def model_of(losses: object) -> tuple[float, np.ndarray]:
    """Return rounds as a known model would need them at the settings of six clients."""
    truth, weight = RoundModel(7.0, 3.0, "V"), np.full(6, 1.0 / 6.0)
    settings = pilots.default_settings(6)
    rounds = [truth.rounds(weight, 1.0, np.full(6, s.probability), np.full(6, max(s.ratio, 0.25))) for s in settings]
    return 0.5, np.array(rounds)


def test_a_plan_on_pilots_is_stored_and_taken_up_by_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file, out = write_experiment(tmp_path / "task"), tmp_path / "pilot"
    monkeypatch.setattr(pilots, "rounds_to_common_loss", model_of)
    argv = ["plan", str(file), "--method", "adaptive-sampling", *SGD]
    assert cli.main([*argv, "--pilot", "--pilot-rounds", "2", "--out", str(out), "--json"]) == 0
    captured = capfd.readouterr()
    plan = json.loads(captured.out)
    assert f"--method.constants {out / 'pilot.json'}" in captured.err
    stored = json.loads((out / "pilot.json").read_text())
    assert plan == json.loads((out / "plan.json").read_text())
    assert plan["pilot"] == stored
    assert plan["notes"]["round_model"]["from_pilot"] is True
    assert plan["notes"]["round_model"]["alpha"] == stored["constants"]["alpha"]
    assert not any("shared equally" in note for note in plan["notes"]["assumed"])
    assert len(plan["notes"]["sampling"]["probability"]) == 6
    constants = ("--method.constants", str(out / "pilot.json"))
    assert cli.main(["run", *argv[1:], *constants, "--stop.rounds", "1", "--out", str(tmp_path / "run")]) == 0
    assert head_of(tmp_path / "run")["config"]["method"]["constants"] == stored["constants"]
    capfd.readouterr()
    assert cli.main([*argv, *constants]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    assert "uniform sampling takes" in shown
    assert "Components" in shown


def test_a_poor_fit_is_no_result_and_its_file_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file, out = write_experiment(tmp_path / "task"), tmp_path / "pilot"
    jumpy = np.array([10.0, 30.0, 30.0, 60.0])
    monkeypatch.setattr(pilots, "rounds_to_common_loss", lambda _: (0.5, jumpy))
    monkeypatch.setattr(pilots, "default_settings", lambda _: (*SPREAD,))
    argv = ["plan", str(file), "--method", "adaptive-sampling", *SGD]
    assert cli.main([*argv, "--pilot", "--pilot-rounds", "2", "--out", str(out)]) == 3
    assert "more than 25%" in capfd.readouterr().err
    assert json.loads((out / "pilot.json").read_text())["usable"] is False
    assert not (out / "plan.json").exists()
    assert cli.main([*argv, "--method.constants", str(out / "pilot.json")]) == 2
    assert "off; valid: a pilot.json with usable = true" in capfd.readouterr().err


SPREAD = [pilots.PilotSetting(q, ratio) for q, ratio in ((1.0, 1.0), (0.2, 1.0), (1.0, 0.25), (0.6, 0.5))]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--method", "fedit", "--pilot"), "has no pilots; valid: adaptive-sampling"),
        (("--methods", "fedit,adaptive-sampling", "--pilot"), "--pilot: takes one method"),
        (("--method", "adaptive-sampling", "--pilot", "--pilot-rounds", "1"), "--pilot-rounds: 1 are too few"),
        (("--method", "adaptive-sampling", "--pilot-rounds", "5"), "beside --pilot"),
        (("--method", "adaptive-sampling", "--method.constants", "nowhere/pilot.json"), "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_bad_input(
    argv: tuple[str, ...], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write_experiment(tmp_path / "task")
    assert cli.main(["plan", str(file), *argv, "--out", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err.splitlines()
    assert words in err[-1]
    assert not (tmp_path / "out" / "pilot-0").exists()
