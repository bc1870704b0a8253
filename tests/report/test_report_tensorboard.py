"""Event files hold what rounds.jsonl holds."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest

from airtune.errors import InputError
from airtune.report import load_run, write_event_files
from report.synthetic_runs import write_run


def test_event_files_hold_the_rounds(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    run = load_run(write_run(tmp_path / "run", rounds=6, diagnostics=True))
    folder = write_event_files(run.path)
    assert folder == run.path / "tensorboard"
    write_event_files(run.path)  # replaces, does not double
    (file,) = folder.iterdir()
    found: dict[str, list[tuple[int, float, float]]] = {}
    for event in loader.EventFileLoader(str(file)).Load():
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, event.wall_time, value.tensor.float_val[0]))
    stored = [(line.number, line.time_s, line.accuracy) for line in run.rounds if line.accuracy is not None]
    assert [step for step, _, _ in found["test/accuracy"]] == [number for number, _, _ in stored]
    assert [time for _, time, _ in found["test/accuracy"]] == pytest.approx([time for _, time, _ in stored])
    assert [value for *_, value in found["test/accuracy"]] == pytest.approx([value for *_, value in stored])
    total = sum(line.uplink_bits for line in run.rounds)
    assert found["paid/uplink_bits"][-1][2] == pytest.approx(total)
    assert len(found["diagnostics/covariance_norm"]) == 6
    assert [step for step, _, _ in found["train/loss"]] == list(range(1, 7))


def test_missing_tensorboard_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("tensorboard"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'airtune\[plots\]'"):
        write_event_files(write_run(tmp_path / "run", rounds=1))


def test_what_is_not_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        write_event_files(tmp_path)
