"""Whole runs with ``engine = "cohort"``: the twin's rounds, resumed to the bit, choices written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airtune.errors import InputError
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import Experiment, read_file
from airtune.experiment.run import Session, resume, start
from tiny_experiment import head_of, lines_of, write_experiment


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(Workshop())


def experiment(file: Path, label: str = "fedit", engine: str = "cohort", **changes: Any) -> Experiment:
    return read_file(file).experiment(label, training__engine=engine, **changes)


def rounds(folder: Path) -> list[dict[str, Any]]:
    lines = lines_of(folder)
    return [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in lines]


BEAM = {"model__adapter": "beam-lora", "training__local_steps": 4, "training__beam": {"every": 2, "first_share": 0.5}}


@pytest.mark.parametrize(
    ("label", "changes"),
    [*((label, {}) for label in ("fedit", "legend", "hetlora", "flora", "fed-sb", "hierfedlora")), ("flora", BEAM)],
)
def test_a_run_gives_the_twins_rounds(
    file: Path, session: Session, tmp_path: Path, label: str, changes: dict[str, Any]
) -> None:
    for engine in ("twin", "cohort"):
        start(experiment(file, label, engine, training__optimizer="sgd", **changes), tmp_path / engine, session)
    for mine, wanted in zip(rounds(tmp_path / "cohort"), rounds(tmp_path / "twin"), strict=True):
        assert mine == pytest.approx(wanted, rel=1e-5)
    assert rounds(tmp_path / "cohort")[-1]["train_loss"] > 0


def test_choices_are_made_once_and_a_resumed_run_keeps_them(
    file: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(experiment(file, stop__rounds=4), whole, session)
    start(experiment(file, stop__rounds=2), parts, session)
    chosen = head_of(parts)["config"]["training"]
    assert chosen["engine"] == "cohort" and chosen["memory_budget"] > 0 and chosen["micro_batch_tokens"] > 0
    monkeypatch.setattr("airtune.training.cohort.trainer.automatic_budget", lambda _: 1 / 0)
    resume(parts, {"rounds": "4"}, session)
    kept = head_of(parts)["config"]["training"]
    assert all(kept[name] == chosen[name] for name in ("engine", "memory_budget", "micro_batch_tokens", "threads"))
    for name in ("rounds.jsonl", "adapter/adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()


def test_what_the_engine_cannot_serve_is_refused_before_the_run(file: Path) -> None:
    with pytest.raises(InputError, match=r"training\.base_dropout.*twin"):
        build(experiment(file, training__base_dropout="true"), Workshop())
    with pytest.raises(InputError, match=r"model\.adapter: the cohort engine has no dora"):
        build(experiment(file, model__adapter="dora"), Workshop())
    with pytest.raises(InputError, match=r"training\.memory_budget: 0 B is no size"):
        experiment(file, training__memory_budget="0 B")
    with pytest.raises(InputError, match=r"training\.memory_budget: 2000 bytes do not hold one example"):
        build(experiment(file, training__memory_budget="2 kB"), Workshop())
