"""Whole runs with stored prefix activations: the same clock, the same learning, and resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from airtune.errors import InputError
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import Experiment, read_file
from airtune.experiment.run import Session, resume, start
from tiny_experiment import lines_of, write_experiment


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("tiny"))


def run(file: Path, folder: Path, rounds: int = 4, workshop: Workshop | None = None, **training: Any) -> list[Any]:
    start(experiment(file, rounds, **training), folder, Session(workshop or Workshop()))
    return lines_of(folder)


def experiment(file: Path, rounds: int, **training: Any) -> Experiment:
    changes = {f"training.{key}": value for key, value in training.items()}
    return read_file(file, {"model.top_layers": "1", "stop.rounds": str(rounds), **changes}).experiment("fedit")


def test_clock_and_learning_are_those_of_a_run_without_it(file: Path, tmp_path: Path) -> None:
    plain = run(file, tmp_path / "plain")
    workshop = Workshop()
    found = run(file, tmp_path / "cached", workshop=workshop, prefix_cache="10 MB")
    prefix = next(iter(workshop.models.values())).prefix
    assert prefix is not None and prefix.hits > prefix.computed > 0
    for one, other in zip(plain, found, strict=True):
        assert {key: one[key] for key in ("time_s", "uplink_bits", "energy_j", "cohort")} == {
            key: other[key] for key in ("time_s", "uplink_bits", "energy_j", "cohort")
        }
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_legend_d2_with_stored_prefixes_is_the_run_without(tmp_path: Path) -> None:
    """Depths and ranks of LEGEND, nothing below the depth: the same decisions, clock and learning."""
    tiny = write_experiment(tmp_path / "tiny")
    d2 = '[variant.d2]\nmethod = "legend"\noutside = "absent"\n'
    tiny.write_text(tiny.read_text().replace("[stop]", f"{d2}\n[stop]"))
    workshop, found = Workshop(), []
    for name, changes in (("plain", {}), ("cached", {"training.prefix_cache": "10 MB"})):
        made = read_file(tiny, {"stop.rounds": "4", **changes}).experiment("d2")
        start(made, tmp_path / name, Session(workshop))
        found.append(lines_of(tmp_path / name))
    prefix = next(iter(workshop.models.values())).prefix
    assert prefix is not None and prefix.hits > 0
    same = ("time_s", "uplink_bits", "downlink_bits", "energy_j", "cohort")
    for one, other in zip(*found, strict=True):
        assert {key: one[key] for key in same} == {key: other[key] for key in same}
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert found[0][-1]["loss"] != found[0][0]["loss"]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(file: Path, tmp_path: Path) -> None:
    whole = run(file, tmp_path / "whole", prefix_cache="20 kB")
    run(file, tmp_path / "parts", 2, prefix_cache="20 kB")
    resume(tmp_path / "parts", {"rounds": 4}, Session(Workshop()))
    assert (tmp_path / "parts" / "rounds.jsonl").read_bytes() == (tmp_path / "whole" / "rounds.jsonl").read_bytes()
    assert len(whole) == 5


@pytest.mark.parametrize(("key", "value"), [("prefix_cache", "0 MB"), ("prefix_cache", "inf")])
def test_sizes_without_meaning_are_refused(file: Path, key: str, value: str) -> None:
    with pytest.raises(InputError, match=f"training.{key}"):
        experiment(file, 1, **{key: value})


def test_more_top_layers_than_there_are_is_refused(file: Path) -> None:
    made = read_file(file, {"model.top_layers": "3"}).experiment("fedit")
    with pytest.raises(InputError, match=r"model\.top_layers: 3 .*valid: 1 to 2"):
        build(made, Workshop())
