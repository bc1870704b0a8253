"""Stored runs are read exactly, and what is wrong with them is said with file and field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from airtune.errors import InputError
from airtune.report import compare_summary, load_run, load_runs, load_summary, write_compare_files
from report.synthetic_runs import write_compare, write_run


def change_head(folder: Path, **changes: object) -> None:
    head = json.loads((folder / "run.json").read_text())
    for key, value in changes.items():
        head.pop(key) if value is ... else head.update({key: value})
    (folder / "run.json").write_text(json.dumps(head))


def change_line(folder: Path, index: int, **changes: object) -> None:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for key, value in changes.items():
        lines[index].pop(key) if value is ... else lines[index].update({key: value})
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", seed=4, rounds=6, diagnostics=True)
    run = load_run(folder)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert (run.method, run.seed, run.status, run.metric, run.direction) == ("legend", 4, "done", "accuracy", "max")
    assert run.warnings == ()
    assert [line.number for line in run.rounds] == list(range(7))
    for read, written in zip(run.rounds, lines, strict=True):
        assert (read.time_s, read.uplink_bits, read.energy_j) == tuple(
            written[key] for key in ("time_s", "uplink_bits", "energy_j")
        )
        assert read.accuracy == written.get("accuracy")
        assert [row.client for row in read.clients] == [row["client"] for row in written["clients"]]
        assert [row.upload_s for row in read.clients] == [row["upload_s"] for row in written["clients"]]
        assert [(d.client, d.reason) for d in read.dropped] == [(d["client"], d["reason"]) for d in written["dropped"]]
        assert read.diagnostics == written.get("diagnostics", {})
    assert len(run.fleet) == 24
    assert run.host_seconds == {"train_s": 9.0, "evaluate_s": 3.0}


def test_work_of_this_round_starts_at_zero_and_work_in_flight_before(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=3)
    assert all(row.start_s == 0 for line in load_run(folder).rounds for row in line.clients)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    early = lines[2]["clients"][0] | {"download_s": 1.0, "compute_s": 40.0, "upload_s": 2.0, "wait_s": 0.5}
    arrived = sorted({*lines[2]["arrived"], early["client"]})
    change_line(folder, 2, clients=[early], arrived=arrived)
    start = load_run(folder).rounds[2].clients[0].start_s
    assert start == pytest.approx(lines[2]["duration_s"] - 43.5)


def test_a_cut_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=5)
    text = (folder / "rounds.jsonl").read_text()
    (folder / "rounds.jsonl").write_text(text[:-40])
    run = load_run(folder)
    assert [line.number for line in run.rounds] == list(range(5))
    assert len(run.warnings) == 1
    assert "rounds.jsonl" in run.warnings[0]
    assert "(6)" in run.warnings[0]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=5)
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    lines[2] = lines[2][:30]
    (folder / "rounds.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"rounds\.jsonl: line 3: not valid JSON"):
        load_run(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": ...}, r"run\.json: method: missing"),
        ({"seed": "one"}, r"run\.json: seed: 'one' is not a number"),
        ({"seed": 1.5}, r"run\.json: seed: 1\.5 is not a whole number"),
        ({"metric": "f1"}, r"run\.json: metric: 'f1'; valid: accuracy, loss"),
        ({"direction": "up"}, r"run\.json: direction: 'up'; valid: max, min"),
        ({"config": []}, r"run\.json: config: expected a JSON object"),
        ({"fleet": [{"device": "x"}]}, r"run\.json: fleet\[0\]: client: missing"),
        ({"curves": [{"title": "t", "x_label": "x", "y_label": "y", "x": [1, 2], "y": [1]}]}, r"x and y differ"),
    ],
)
def test_a_bad_head_names_file_and_field(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = write_run(tmp_path / "run", rounds=1)
    change_head(folder, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_s": ...}, r"line 2: time_s: missing"),
        ({"energy_j": True}, r"line 2: energy_j: True is not a number"),
        ({"cohort": 3}, r"line 2: cohort: missing or not a list"),
        ({"dropped": [{"client": 1}]}, r"line 2: dropped\[0\]: reason: missing"),
        ({"clients": [{"client": 1}]}, r"line 2: clients\[0\]: download_s: missing"),
        ({"round": 0}, r"round: numbers do not rise"),
    ],
)
def test_a_bad_line_names_file_line_and_field(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    change_line(folder, 1, **changes)
    with pytest.raises(InputError, match=message):
        load_run(folder)


def test_null_and_nan_losses_are_absent_values(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    change_line(folder, 2, train_loss=float("nan"), accuracy=None)
    last = load_run(folder).rounds[2]
    assert last.train_loss is None
    assert last.accuracy is None


def test_what_is_not_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run folder \(no run\.json\)"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="holds no run"):
        load_runs([tmp_path])
    with pytest.raises(InputError, match="no run given"):
        load_runs([])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: not valid JSON"):
        load_run(tmp_path)
    folder = write_run(tmp_path / "run", rounds=1)
    (folder / "rounds.jsonl").unlink()
    with pytest.raises(InputError, match=r"rounds\.jsonl: missing"):
        load_run(folder)


def test_a_compare_folder_keeps_the_order_of_compare_json(tmp_path: Path) -> None:
    folder = write_compare(tmp_path, ("legend", "fedit"), seeds=2)
    by_name = load_runs([folder])
    assert [run.method for run in by_name] == ["fedit", "fedit", "legend", "legend"]
    summary = compare_summary(by_name[::-1], out_dir=folder)
    write_compare_files(folder, summary)
    assert [(run.method, run.seed) for run in load_runs([folder])] == [
        ("legend", 1),
        ("legend", 0),
        ("fedit", 1),
        ("fedit", 0),
    ]
    assert load_summary(folder) == summary
    assert load_summary(tmp_path / "runs") is None


def test_the_report_imports_no_training_code() -> None:
    code = (
        "import sys, airtune.report\n"
        "bad = {'torch', 'transformers', 'peft', 'datasets', 'plotly', 'pandas', 'rich', 'tensorboard'}\n"
        "print(sorted(bad & {name.split('.')[0] for name in sys.modules}))\n"
        "print(sorted(n for n in sys.modules if n.startswith(('airtune.training', 'airtune.simulation'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
