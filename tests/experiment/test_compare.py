"""Comparisons are fair: one world, equal fleet seconds, values chosen on validation rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airtune.errors import InputError, NoResultError
from airtune.experiment import compare as comparing
from airtune.experiment.build import Workshop
from airtune.experiment.compare import Comparison, compare, go_on, read_comparison
from airtune.experiment.config import read_file
from airtune.experiment.run import Session
from airtune.experiment.sweep import combinations, parse_settings
from tiny_experiment import head_of, lines_of, write_experiment


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(Workshop())


def comparison(file: Path, out: Path, **fields: Any) -> Comparison:
    overrides = fields.pop("overrides", {})
    fields = {"methods": ("fedit", "legend"), "seeds": (0,), "tune": {}, **fields}
    return Comparison(file=read_file(file, overrides), out=out, **fields)


def test_all_methods_meet_one_world(file: Path, session: Session, tmp_path: Path) -> None:
    methods = ("fedit", "legend", "slow")
    found = compare(comparison(file, tmp_path / "out", methods=methods, seeds=(0, 1)), session)
    assert [folder.name for folder in found.folders] == [f"{method}-{seed}" for seed in (0, 1) for method in methods]
    assert not found.failed
    for seed in (0, 1):
        runs = [tmp_path / "out" / "runs" / f"{method}-{seed}" for method in methods]
        heads = [head_of(folder) for folder in runs]
        assert all(head["fleet"] == heads[0]["fleet"] for head in heads), "same devices, places, gains and examples"
        for section in ("data", "fleet", "wireless", "evaluation", "seed"):
            assert all(head["config"][section] == heads[0]["config"][section] for head in heads)
        starts = [
            lines_of(folder)[0]["loss"] for folder, method in zip(runs, methods, strict=True) if method != "legend"
        ]
        assert len(set(starts)) == 1, "same rows, same head before training"


@pytest.mark.parametrize("limits", [{"stop.rounds": "3"}, {"stop.rounds": "500", "stop.fleet_seconds": "50 ms"}])
def test_all_methods_get_the_same_fleet_seconds(
    file: Path, session: Session, tmp_path: Path, limits: dict[str, str]
) -> None:
    made = comparison(file, tmp_path / "out", methods=("fedit", "legend", "hetlora"), overrides=limits)
    compare(made, session)
    first, *others = [tmp_path / "out" / "runs" / f"{method}-0" for method in made.methods]
    budget = 0.05 if "stop.fleet_seconds" in limits else lines_of(first)[-1]["time_s"]
    for folder in (first, *others):
        times = [line["time_s"] for line in lines_of(folder)]
        assert times[-1] >= budget > times[-2], "a run ends with the first round at or beyond the budget"
    for folder in others:
        assert head_of(folder)["config"]["stop"] == {"rounds": None, "fleet_seconds": budget, "target": None}


def test_a_target_in_the_file_ends_no_run_of_a_comparison(file: Path, session: Session, tmp_path: Path) -> None:
    compare(comparison(file, tmp_path / "out", overrides={"stop.target": "0.0", "stop.rounds": "3"}), session)
    assert len(lines_of(tmp_path / "out" / "runs" / "fedit-0")) == 4


def test_a_run_that_fails_does_not_stop_the_others(
    file: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = comparing.start

    def start(experiment: Any, folder: Path, given: Session) -> Any:
        head = honest(experiment, folder, given)
        if folder.name == "fedit-0":
            raise NoResultError("the model diverged")
        return head

    monkeypatch.setattr(comparing, "start", start)
    found = compare(comparison(file, tmp_path / "out", seeds=(0, 1)), session)
    assert {folder.name: reason for folder, reason in found.failed.items()} == {"fedit-0": "the model diverged"}
    assert len(found.folders) == 4
    after = head_of(tmp_path / "out" / "runs" / "legend-0")["config"]["stop"]
    assert after["rounds"] == 2, "the next method takes the place of the first"


def test_bad_input_is_found_before_the_first_run(file: Path, session: Session, tmp_path: Path) -> None:
    for fields, words in (
        ({"methods": ("fedit", "legned")}, "'legend'"),
        ({"methods": ()}, "--methods"),
        ({"methods": ("fedit", "fedit")}, "--methods"),
        ({"methods": ("fed-sb", "fed_sb")}, "--methods"),
        ({"overrides": {"variant.slow.cohort_size": "1"}}, "variant.slow"),
        ({"seeds": ()}, "--seeds"),
        ({"seeds": (0, -1)}, "seed: -1"),
        ({"overrides": {"stop.rounds": "0"}}, "stop.rounds: 0"),
        ({"tune": {"training.learning_rat": ("1", "2")}}, "learning_rate"),
        ({"tune": {"training.learning_rate": ("1", "-2")}}, "-2"),
    ):
        with pytest.raises(InputError, match=words):
            compare(comparison(file, tmp_path / "out", **fields), session)
        assert not (tmp_path / "out").exists()


def test_if_every_run_fails_for_bad_input_it_is_bad_input(file: Path, session: Session, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cohort_size"):
        made = comparison(file, tmp_path / "out", methods=("fedit",), overrides={"method.cohort_size": "99"})
        compare(made, session)
    assert not (tmp_path / "out").exists()


def test_tuning_chooses_each_methods_best_value_on_validation_rows(
    file: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {("fedit", 1e-3): 0.6, ("fedit", 1e-2): 0.7, ("legend", 1e-3): 0.8, ("legend", 1e-2): 0.5}
    seen: list[tuple[str, str, str]] = []
    honest = comparing.start

    def start(experiment: Any, folder: Path, given: Session) -> Any:
        head = honest(experiment, folder, given)
        seen.append((experiment.label, experiment.evaluation.split, folder.parent.name))
        value = scores[experiment.label, experiment.training.learning_rate]
        return {**head, "final": {**head["final"], "accuracy": value}}

    monkeypatch.setattr(comparing, "start", start)
    tune = {"training.learning_rate": ("1e-3", "1e-2")}
    found = compare(comparison(file, tmp_path / "out", seeds=(0, 1), tune=tune), session)
    assert found.tuned == {"fedit": {"training.learning_rate": "1e-2"}, "legend": {"training.learning_rate": "1e-3"}}
    assert {split for _, split, place in seen if place == "tune"} == {"validation"}
    assert {split for _, split, place in seen if place == "runs"} == {"test"}
    for method, rate in (("fedit", 1e-2), ("legend", 1e-3)):
        for seed in (0, 1):
            head = head_of(tmp_path / "out" / "runs" / f"{method}-{seed}")
            assert head["config"]["training"]["learning_rate"] == rate
            assert head["config"]["data"]["validation_rows"] == 18, "a tenth of 180 training rows"
            assert sum(client["examples"] for client in head["fleet"]) == 162


def test_validation_rows_are_no_test_rows_and_no_training_rows(file: Path, session: Session) -> None:
    experiment = read_file(file).experiment(data__validation_rows=30)
    plain = read_file(file).experiment()
    ours = session.workshop.tokens(experiment.data, experiment.model)
    before = session.workshop.tokens(plain.data, plain.model)
    assert ours.validation is not None
    assert (len(ours.train), len(ours.validation), len(ours.test)) == (150, 30, 60)
    assert ours.test.ids.tolist() == before.test.ids.tolist()


def test_a_diverging_value_is_not_chosen(
    file: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = comparing.start

    def start(experiment: Any, folder: Path, given: Session) -> Any:
        head = honest(experiment, folder, given)
        if experiment.training.learning_rate == 1.0:
            raise NoResultError("diverged")
        return head

    monkeypatch.setattr(comparing, "start", start)
    made = comparison(file, tmp_path / "out", methods=("fedit",), tune={"training.learning_rate": ("1.0", "1e-3")})
    assert compare(made, session).tuned == {"fedit": {"training.learning_rate": "1e-3"}}
    made = replace(made, out=tmp_path / "again", tune={"training.learning_rate": ("1.0",)})
    with pytest.raises(NoResultError, match="--tune: fedit"):
        compare(made, session)


@pytest.mark.parametrize("moment", ["before the checkpoint", "before the end"])
def test_a_comparison_goes_on_after_a_crash_at_any_moment(
    file: Path, session: Session, tmp_path: Path, moment: str
) -> None:
    made = comparison(file, tmp_path / "out", tune={"training.learning_rate": ("1e-3", "5e-3")})
    first = compare(made, session)
    folder = tmp_path / "out" / "runs" / "legend-0"
    before = {name: (folder / name).read_bytes() for name in ("rounds.jsonl", "run.json")}
    head = {**head_of(folder), "status": "running", "final": {}, "export": None}
    (folder / "run.json").write_text(json.dumps(head))
    if moment == "before the checkpoint":
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.name != "run.json":
                path.rmdir() if path.is_dir() else path.unlink()
    again = read_comparison(tmp_path / "out")
    assert again == made
    second = go_on(again, session)
    assert (second.folders, second.failed, second.tuned) == (first.folders, {}, first.tuned)
    assert (folder / "rounds.jsonl").read_bytes() == before["rounds.jsonl"]
    assert head_of(folder)["final"] == json.loads(before["run.json"])["final"]
    assert (folder / "adapter" / "adapter_config.json").is_file()


def test_settings_of_sweeps() -> None:
    found = parse_settings(["training.learning-rate=1e-4, 1e-3", "stop.rounds=2"], "--tune")
    assert found == {"training.learning_rate": ("1e-4", "1e-3"), "stop.rounds": ("2",)}
    assert len(list(combinations(found))) == 2
    assert list(combinations({})) == [{}]
    for text in ("learning_rate=1", "training.learning_rate", "training.learning_rate=", ""):
        with pytest.raises(InputError, match="--sweep: cannot read"):
            parse_settings([text], "--sweep")
