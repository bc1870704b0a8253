"""The mean round length against its limit: the right numbers, the queue below, nothing where no plan notes a limit."""

import json

import numpy as np
import pytest

from airtune.report import load_run
from airtune.report.latency_figure import latency_limit_figure
from airtune.report.run_figures import run_figures
from report.synthetic_runs import write_run


def noted(folder, **notes):
    """Return the trained rounds of a synthetic run whose plans note the same things in every round but the first."""
    run = write_run(folder, rounds=6)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    for line in lines[2:]:
        line["notes"] |= {name: value(line["round"]) for name, value in notes.items()}
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_run(run)


def test_mean_limit_and_queue_over_rounds(tmp_path):
    run = noted(tmp_path / "run", latency_limit_s=lambda n: 2.0, queue_s=lambda n: 0.5 * n)
    trained = [line for line in run.rounds if line.number > 0]
    figure = latency_limit_figure(trained)
    assert figure is not None
    mean, limit, queue = figure.traces
    lengths = np.array([line.duration_s for line in trained])
    factor = limit["y"][-1] / 2.0
    assert mean["y"] == pytest.approx(factor * np.cumsum(lengths) / np.arange(1, 7), rel=1e-5)
    assert limit["y"][0] is None and set(limit["y"][1:]) == {2.0 * factor}
    assert queue["y"][1:] == pytest.approx([0.5 * factor * n for n in range(2, 7)])
    assert queue["yaxis"] == "y2" and "yaxis2" in figure.layout
    assert "latency_limit" in run_figures(run)


def test_a_limit_without_a_queue_has_one_panel(tmp_path):
    figure = latency_limit_figure(noted(tmp_path / "run", latency_limit_s=lambda n: 2.0).rounds[1:])
    assert figure is not None
    assert [trace["name"] for trace in figure.traces] == ["mean so far", "limit"]
    assert "yaxis2" not in figure.layout


def test_no_limit_no_figure(tmp_path):
    run = noted(tmp_path / "run", queue_s=lambda n: 1.0)
    assert latency_limit_figure(run.rounds[1:]) is None
    assert "latency_limit" not in run_figures(run)
