"""`airtune plan` and `run` with adaptive sampling: what the terminal and the JSON say, and that they agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airtune import cli
from tiny_experiment import lines_of, write_experiment

SGD = ("--training.optimizer", "sgd", "--training.learning-rate", "0.3")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("tiny"))


def planned(file: Path, capfd: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main(["plan", str(file), "--method", "adaptive-sampling", *argv, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def shown(file: Path, capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    """Return what a plan writes to stdout, on one line, and to stderr."""
    assert cli.main(["plan", str(file), "--method", "adaptive-sampling", *argv]) == 0
    captured = capfd.readouterr()
    return " ".join(captured.out.split()), captured.err


def test_the_prediction_is_the_mean_over_cohorts_and_the_drawn_round_is_labelled(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn_seconds = set()
    for seed in ("0", "1", "2"):
        plan = planned(file, capfd, *SGD, "--seed", seed, "--stop.rounds", "7")
        predicted, notes = plan["predicted"], plan["notes"]
        assert predicted["round_s"] == notes["expected_round_s"]
        assert predicted["uplink_bits"] == notes["expected_uplink_bits"]
        assert predicted["rounds"] == 7
        assert predicted["total_s"] == pytest.approx(7 * notes["expected_round_s"])
        assert predicted["means_over_cohorts"] == ["round_s", "total_s", "uplink_bits"]
        assert predicted["to_target"] == {
            "rounds": notes["expected_rounds"],
            "total_s": pytest.approx(notes["expected_rounds"] * notes["expected_round_s"]),
            "gain_over_uniform": notes["gain_over_uniform"],
            "time_measure": "mean over every cohort",
        }
        drawn = predicted["drawn"]
        assert drawn["clients"] == len(plan["clients"])
        assert drawn["uplink_bits"] == sum(client["uplink_bits"] for client in plan["clients"])
        ends = [client["download_s"] + client["compute_s"] + client["upload_s"] for client in plan["clients"]]
        assert drawn["round_s"] == pytest.approx(max(ends))
        drawn_seconds.add(drawn["round_s"])
    assert len(drawn_seconds) == 3


def test_other_methods_predict_the_round_that_they_plan(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(file), "--method", "fedit", "--json"]) == 0
    assert not {"drawn", "to_target", "means_over_cohorts"} & set(json.loads(capfd.readouterr().out)["predicted"])


def test_the_terminal_shows_rounds_seconds_gain_probabilities_and_sizes(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = (*SGD, "--fleet.devices", "{ jetson-tx2 = 3, raspberry-pi-5 = 2 }")
    plan = planned(file, capfd, *argv)
    notes, drawn = plan["notes"], plan["predicted"]["drawn"]
    text, _ = shown(file, capfd, *argv)
    rounds, seconds, total = (notes[f"expected_{name}"] for name in ("rounds", "round_s", "total_s"))
    assert f"expected {rounds:.1f} rounds of {seconds:.2f} s = {total:.1f} s to the target" in text
    assert f"uniform sampling takes {notes['gain_over_uniform']:.2f} times as long" in text
    assert "seconds of a round: mean over every cohort" in text
    assert f"Drawn for round 1: {drawn['clients']} clients, {drawn['round_s']:.2f} s" in text
    assert f"adaptive-sampling: {notes['expected_cohort']:.1f} of 5 clients expected in a round" in text
    q, kept = notes["sampling"]["probability"], notes["sampling"]["kept"]
    for kind, ours in (("jetson-tx2", slice(0, 3)), ("raspberry-pi-5", slice(3, 5))):
        row = text[text.rindex(kind) :].split("│")
        assert [part.strip() for part in row[2:5]] == [
            f"{value:.3f}" for value in (sum(q[ours]) / len(q[ours]), min(q[ours]), max(q[ours]))
        ]
        sizes = [f"{size}: {kept[ours].count(size)}" for size in sorted(set(kept[ours]))]
        assert ", ".join(sizes) in row[5]


def test_baselines_say_what_they_gain_too(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, _ = shown(file, capfd, *SGD, "--method.sampling", "weighted", "--method.sizes", "largest")
    assert "uniform sampling takes" in text


def test_heuristic_scaling_and_departures_are_one_line_of_a_plan(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, err = shown(file, capfd, *SGD)
    assert "heuristic scaling" not in err
    assert "departure" not in err
    _, err = shown(file, capfd, "--training.optimizer", "adamw", "--method.weight-cap", "1.5")
    assert sum("heuristic scaling" in line for line in err.splitlines()) == 1
    assert sum("departure: weights are clipped at 1.5 a_n" in line for line in err.splitlines()) == 1


def test_a_run_says_them_once(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = ["run", str(file), "--method", "adaptive-sampling", "--method.weight-cap", "1.5", "--stop.rounds", "3"]
    assert cli.main([*argv, "--out", str(tmp_path / "run")]) == 0
    err = capfd.readouterr().err.splitlines()
    for words in ("heuristic scaling: the factors a_n / q_n", "departure: weights are clipped at 1.5 a_n"):
        assert sum(words in line for line in err) == 1
    assert all("heuristic_scaling" in line["notes"] for line in lines_of(tmp_path / "run")[1:])


def test_gradients_of_a_pilot_that_no_weight_uses_are_named(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    constants = {"alpha": 30.0, "beta": 12.0, "form": "V", "gradient_norms": [*[1.0] * 5, 5.0]}
    stored = {"schema": 1, "seed": 0, "usable": True, "constants": {**constants, "gradient_noise": [0.5] * 6}}
    path = tmp_path / "pilot.json"
    path.write_text(json.dumps(stored))
    argv = (*SGD, "--method.constants", str(path))
    _, err = shown(file, capfd, *argv)
    assert "not used" in err
    assert "--method.noise gradients" in err
    equal = planned(file, capfd, *argv)["notes"]["sampling"]["probability"]
    used = planned(file, capfd, *argv, "--method.noise", "gradients")
    assert "unused" not in used["notes"]
    found = used["notes"]["sampling"]["probability"]
    assert found[5] / sum(found) > 1.5 * equal[5] / sum(equal)
