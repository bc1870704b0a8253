"""Predicted beside measured seconds: a known overhead is found again, errors shrink, a run's notes are read back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from airtune import cli
from airtune.deploy.prediction import (
    ClientSeconds,
    MeasuredRound,
    Observed,
    Predicting,
    Simulated,
    TimeModel,
    fit,
    read_rounds,
    relative_errors,
)
from airtune.errors import InputError
from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.config import read_file
from airtune.experiment.run import Actors, Session, start
from airtune.federation import begin
from tiny_experiment import lines_of, write_experiment

TRUE = TimeModel(fixed_s=4.0, overhead_flops=3e10, compute=1.3, download=1.05, upload=1.1)


def rounds_of(model: TimeModel, count: int, seed: int, noise: float = 0.0) -> list[MeasuredRound]:
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        clients = [
            ClientSeconds(c, *rng.uniform(0.1, 8.0, 3), float(rng.uniform(5e9, 3e10)), 1e6, 1e7) for c in range(4)
        ]
        pairs = tuple((each, model.seconds(each) * float(rng.lognormal(0, noise))) for each in clients)
        plan = max(each.download_s + each.compute_s + each.upload_s for each in clients)
        found.append(MeasuredRound(index + 1, plan, max(seconds for _, seconds in pairs), pairs))
    return found


def test_a_known_overhead_is_found_again() -> None:
    """The factors are held at 1 with a weight of half an observation, so the fit comes nearer with more rounds."""
    few, many = (fit(rounds_of(TRUE, count, seed=0)) for count in (10, 200))
    for name, value in asdict(TRUE).items():
        assert getattr(many, name) == pytest.approx(value, rel=0.02), name
        assert getattr(few, name) == pytest.approx(value, rel=0.2), name


def test_the_fit_serves_rounds_that_it_has_not_seen() -> None:
    found = fit(rounds_of(TRUE, 10, seed=1, noise=0.05))
    others = rounds_of(TRUE, 50, seed=2, noise=0.05)
    before, after = (np.median(np.abs(relative_errors(others, model))) for model in (None, found))
    assert after < 0.1 < before


def test_an_exact_plan_needs_no_fit() -> None:
    found = fit(rounds_of(TimeModel(), 10, seed=3))
    assert found.fixed_s == pytest.approx(0.0, abs=1e-6) and found.compute == pytest.approx(1.0, rel=1e-6)
    assert max(map(abs, relative_errors(rounds_of(TimeModel(), 3, seed=4)))) < 1e-12


def test_a_part_that_never_mattered_keeps_its_factor() -> None:
    rounds = [
        replace(each, clients=tuple((replace(c, download_s=0.0), s) for c, s in each.clients))
        for each in rounds_of(TRUE, 10, seed=5)
    ]
    assert fit(rounds).download == pytest.approx(1.0)


def test_too_few_observations_are_refused() -> None:
    with pytest.raises(InputError, match="4 clients' rounds"):
        fit(rounds_of(TRUE, 1, seed=6))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated run whose runner also predicts: prediction and measurement must then be equal."""
    folder = tmp_path_factory.mktemp("prediction")
    told: list[int] = []

    def actors(bench: Bench) -> Actors:
        runner = Predicting(bench.runner, Simulated(bench), lambda clients: told.append(len(clients)))
        return Actors(bench.cell, runner, bench.evaluate)

    path = write_experiment(folder)
    experiment = read_file(path, {"stop.rounds": "4"}).experiment()
    start(experiment, folder / "run", Session(Workshop(), actors=actors))
    start(experiment, folder / "plain", Session(Workshop()))
    assert told == [3, 3, 3, 3]
    return folder / "run"


def test_predicting_changes_nothing_and_predicts_the_simulator(run: Path) -> None:
    ours, theirs = lines_of(run), lines_of(run.parent / "plain")
    for line in [*ours, *theirs]:
        notes = {key: value for key, value in line.get("notes", {}).items() if not key.startswith("predicted")}
        line["notes"] = notes
    assert ours == theirs
    rounds = read_rounds(run)
    assert [each.round for each in rounds] == [1, 2, 3, 4]
    assert max(map(abs, relative_errors(rounds))) < 1e-9
    for each in rounds:
        assert all(client.upload_s > 0 and client.up_bit_s > 0 for client, _ in each.clients)


def test_calibrate_flower_reports_the_fit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "overhead.json"
    assert cli.main(["calibrate", "--flower", str(run), "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rounds"] == 4 and found["median_error_before"] < 1e-9
    assert found["model"]["compute"] == pytest.approx(1.0, abs=0.01)
    assert json.loads(out.read_text()) == found
    assert cli.main(["calibrate", "--flower", str(run)]) == 0
    assert "upload" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flower", "{plain}"], "0 clients' rounds"),
        (["--flower", "{nothing}"], "is not a run folder"),
        (["experiment.toml", "--flower", "{run}"], "takes no experiment"),
        ([], "EXPERIMENT.toml"),
    ],
)
def test_bad_options_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    places = {"plain": run.parent / "plain", "nothing": run.parent / "nothing", "run": run}
    assert cli.main(["calibrate", *(option.format(**places) for option in options)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def _line_without_a_client(run: Path) -> str:
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    lines[1]["dropped"] = [{"client": 0, "reason": "late"}]
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_round_that_lost_a_client_is_left_out(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    (tmp_path / "rounds.jsonl").write_text(_line_without_a_client(run))
    assert [each.round for each in read_rounds(tmp_path)] == [2, 3, 4]


@pytest.mark.parametrize("kind", ["unicast", "broadcast"])
def test_what_planners_know_predicts_the_same_where_they_know_the_truth(tmp_path: Path, kind: str) -> None:
    """Without fading in a round the observed prediction is the simulator's, but for the shares of the downlink."""
    path = write_experiment(tmp_path)
    changes = {"wireless.fading": "none", "wireless.downlink": kind}
    bench = build(read_file(path, changes).experiment(), Workshop())
    progress = begin(bench.experiment.method, bench.start, bench.cell)
    seen = bench.cell.observe(1, 0.0, progress.pending, progress.model)
    plan = bench.experiment.method.plan(progress.state, seen, np.random.default_rng(0))
    (known, seconds), (true, _) = (
        prediction(plan, progress.model, progress.pending, 1, 0.0)
        for prediction in (Observed(bench.cell), Simulated(bench))
    )
    by_client = {each.client: each for each in true}
    assert {each.client for each in known} == set(by_client) and len(known) == 3
    for one in known:
        other = by_client[one.client]
        assert one.upload_s == pytest.approx(other.upload_s, rel=1e-9)
        assert one.compute_s == pytest.approx(other.compute_s, rel=1e-9)
        assert 0.0 < one.download_s
    assert seconds == pytest.approx(max(c.download_s + c.compute_s + c.upload_s for c in known))
