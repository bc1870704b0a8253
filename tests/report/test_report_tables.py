"""Targets, costs, spreads and ratios against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from airtune.errors import InputError, NoResultError
from airtune.report import CompareSummary, Run, compare_summary, render_table, write_compare_files
from airtune.report.cells import cost_text, cost_units, early_notes, spread_text, target_sentence
from airtune.report.quantities import Unit, bit_unit, counted, digits, energy_unit, metric_text, time_unit
from airtune.report.records import Round
from airtune.report.tables import (
    COSTS,
    default_target,
    method_rows,
    paid,
    paired_ratios,
    reached,
    spread,
)


def make_round(number: int, time_s: float, value: float | None, metric: str = "accuracy") -> Round:
    return Round(
        number=number,
        time_s=time_s,
        duration_s=10.0,
        cohort=(0,),
        arrived=(0,),
        dropped=(),
        uplink_bits=100.0 if number else 0.0,
        downlink_bits=1000.0 if number else 0.0,
        energy_j=5.0 if number else 0.0,
        train_loss=None,
        accuracy=value if metric == "accuracy" else None,
        loss=value if metric == "loss" else None,
        clients=(),
        diagnostics={},
        notes={},
    )


def make_run(
    method: str,
    seed: int,
    values: list[float | None],
    *,
    step: float = 10.0,
    metric: str = "accuracy",
    status: str = "done",
) -> Run:
    """Return a run whose round i ends at i * step and has evaluated values[i] (None: not evaluated)."""
    return Run(
        path=Path(f"runs/{method}-{seed}"),
        method=method,
        seed=seed,
        status=status,
        metric=metric,
        direction="max" if metric == "accuracy" else "min",
        airtune="0",
        config={},
        versions={},
        final={},
        export=None,
        command=None,
        git=None,
        error=None,
        fleet=(),
        curves=(),
        rounds=tuple(make_round(i, i * step, value, metric) for i, value in enumerate(values)),
        host_seconds={},
        warnings=(),
    )


def two_methods() -> list[Run]:
    return [
        make_run("slow", 0, [0.5, 0.6, 0.7, 0.8], step=10),
        make_run("slow", 1, [0.5, 0.65, 0.75, 0.74], step=12),
        make_run("fast", 0, [0.5, None, 0.76, 0.9], step=5),
        make_run("fast", 1, [0.5, None, 0.7, 0.8], step=4),
    ]


def test_the_default_target_is_the_worst_best_value() -> None:
    assert default_target(two_methods()) == 0.75  # the best of slow, seed 1, although it ended lower
    losses = [make_run("a", 0, [3.0, 2.0, 2.5], metric="loss"), make_run("b", 0, [3.0, 1.5], metric="loss")]
    assert default_target(losses) == 2.0


def test_a_failed_run_does_not_set_the_target_but_is_measured() -> None:
    runs = [*two_methods(), make_run("broken", 0, [0.5, 0.55], status="failed")]
    summary = compare_summary(runs)
    assert summary["target"] == 0.75
    assert summary["runs"][-1]["time_to_target_s"] is None
    assert summary["runs"][-1]["status"] == "failed"
    assert summary["runs"][-1]["final_metric"] == 0.55


def test_reached_is_the_first_evaluation_at_or_beyond_without_interpolation() -> None:
    run = make_run("m", 0, [0.5, None, 0.7, 0.9, 0.6, 0.95])
    at = reached(run, 0.7)  # equality counts
    assert at is not None
    assert (at.round, at.time_s, at.uplink_bits, at.downlink_bits, at.energy_j) == (2, 20.0, 200.0, 2000.0, 10.0)
    beyond = reached(run, 0.71)  # not 20 s + a fraction: the end of round 3
    assert beyond is not None
    assert beyond.time_s == 30.0
    assert reached(run, 0.96) is None
    start = reached(run, 0.4)
    assert start is not None
    assert (start.round, start.time_s, start.uplink_bits) == (0, 0.0, 0.0)


def test_summary_has_exactly_the_keys_of_the_contract() -> None:
    summary = compare_summary(two_methods())
    assert list(summary) == ["schema", "metric", "direction", "target", "target_source", "runs"]
    assert summary["target_source"] == "default"
    assert list(summary["runs"][0]) == [
        "method",
        "seed",
        "status",
        "run_dir",
        "time_to_target_s",
        "uplink_bits_to_target",
        "downlink_bits_to_target",
        "energy_j_to_target",
        "final_metric",
        "rounds",
    ]
    times = [line["time_to_target_s"] for line in summary["runs"]]
    assert times == [30.0, 24.0, 10.0, 12.0]
    assert [line["uplink_bits_to_target"] for line in summary["runs"]] == [300.0, 200.0, 200.0, 300.0]
    assert [line["final_metric"] for line in summary["runs"]] == [0.8, 0.74, 0.9, 0.8]
    assert [line["rounds"] for line in summary["runs"]] == [3, 3, 3, 3]


def test_a_given_target_that_is_missed_is_null_and_shown() -> None:
    summary = compare_summary(two_methods(), 0.85)
    assert summary["target_source"] == "given"
    assert [line["time_to_target_s"] for line in summary["runs"]] == [None, None, 15.0, None]
    slow, fast = method_rows(summary)
    units = cost_units(summary)
    assert slow.costs["time_to_target_s"] is None
    assert cost_text(slow, "time_to_target_s", units["time_to_target_s"]) == "missed"
    assert cost_text(fast, "time_to_target_s", units["time_to_target_s"]) == "15.0 s (1 of 2)"
    ratio = next(item for item in paired_ratios(summary) if item.cost == "time_to_target_s")
    assert (ratio.ratio, ratio.pairs, ratio.seeds) == (None, 0, 2)


def test_rows_hold_mean_and_sample_deviation() -> None:
    slow, fast = method_rows(compare_summary(two_methods()))
    time = slow.costs["time_to_target_s"]
    assert time is not None
    assert time.mean == 27.0
    assert time.deviation == pytest.approx(math.sqrt(18))  # (3^2 + 3^2) / (2 - 1)
    assert (time.low, time.high, time.count) == (24.0, 30.0, 2)
    assert fast.final is not None
    assert fast.final.mean == pytest.approx(0.85)
    assert (fast.seeds, fast.reached, fast.failed) == (2, 2, 0)
    assert spread([]) is None
    one = spread([3.0])
    assert one is not None
    assert one.deviation is None


def test_ratios_are_paired_by_seed_and_geometric() -> None:
    ratios = {item.cost: item for item in paired_ratios(compare_summary(two_methods()))}
    time = ratios["time_to_target_s"]
    assert (time.method, time.reference, time.pairs) == ("fast", "slow", 2)
    assert time.ratio == pytest.approx(math.sqrt((10 / 30) * (12 / 24)))
    # With two pairs the bootstrap means are the two pairs and their mean: the interval is the pairs' range.
    assert time.low == pytest.approx(10 / 30)
    assert time.high == pytest.approx(12 / 24)
    assert ratios["uplink_bits_to_target"].ratio == pytest.approx(math.sqrt((200 / 300) * (300 / 200)))


def test_swapping_the_methods_inverts_the_ratio() -> None:
    summary = compare_summary(two_methods())
    there = {item.cost: item.ratio for item in paired_ratios(summary, "slow")}
    back = {item.cost: item.ratio for item in paired_ratios(summary, "fast")}
    for cost in COSTS:
        assert (there[cost] or 0) * (back[cost] or 0) == pytest.approx(1.0)
    with pytest.raises(InputError, match="valid: slow, fast"):
        paired_ratios(summary, "other")


def test_the_bootstrap_interval_covers_as_often_as_it_says() -> None:
    """Over 200 worlds of 20 seeds the 95 % interval holds the true ratio about 95 % of the time."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        runs = [
            make_run(name, seed, [0.1, 0.9], step=float(np.exp(shift + 0.3 * rng.normal())))
            for name, shift in (("a", 0.0), ("b", math.log(0.5)))
            for seed in range(20)
        ]
        ratio = paired_ratios(compare_summary(runs, 0.9), resamples=400)[0]
        assert ratio.low is not None
        assert ratio.high is not None
        covered += ratio.low <= 0.5 <= ratio.high
    assert 175 <= covered <= 199


def test_the_same_runs_give_the_same_interval() -> None:
    summary = compare_summary(two_methods())
    assert paired_ratios(summary) == paired_ratios(summary)
    assert paired_ratios(summary, confidence=0.5) != paired_ratios(summary, confidence=0.95)


def test_a_target_met_before_training_has_no_ratio() -> None:
    """Zero seconds have no ratio: the pair is left out and counted."""
    ratio = paired_ratios(compare_summary(two_methods(), 0.3))[0]
    assert (ratio.ratio, ratio.pairs, ratio.seeds) == (None, 0, 2)


def test_runs_of_different_metrics_are_refused() -> None:
    runs = [make_run("a", 0, [0.5]), make_run("b", 0, [3.0], metric="loss")]
    with pytest.raises(InputError, match="do not share one metric"):
        compare_summary(runs)
    with pytest.raises(InputError, match="nothing to compare"):
        compare_summary([])
    with pytest.raises(InputError, match="no run holds an evaluation"):
        compare_summary([make_run("a", 0, [None])])


def test_paths_inside_the_folder_are_relative() -> None:
    runs = [make_run("a", 0, [0.5])]
    assert compare_summary(runs, out_dir=".")["runs"][0]["run_dir"] == "runs/a-0"
    assert compare_summary(runs, out_dir="elsewhere")["runs"][0]["run_dir"] == str(Path("runs/a-0"))


def test_files_hold_the_summary(tmp_path: Path) -> None:
    summary = compare_summary(two_methods(), 0.85)
    as_json, as_csv = write_compare_files(tmp_path, summary)
    assert json.loads(as_json.read_text()) == summary
    with open(as_csv, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["time_to_target_s"] for line in lines] == ["", "", "15", ""]
    assert [line["method"] for line in lines] == ["slow", "slow", "fast", "fast"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.csv", "compare.json"]


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoResultError, match="cannot write"):
        write_compare_files(tmp_path / "file" / "out", compare_summary(two_methods()))


def test_the_terminal_table_shows_everything() -> None:
    summary: CompareSummary = compare_summary(two_methods(), 0.85)
    console = Console(width=80, file=io.StringIO())
    console.print(render_table(summary))
    text = console.file.getvalue()
    assert "Target: accuracy at least 85.0 % (as given)" in text
    assert "missed" in text
    assert re.search(r"fast +1 of 2 +15\.0 ", text)
    assert re.search(r"slow +0 of 2 +missed", text)
    assert "Cost over that of slow" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    assert target_sentence(compare_summary(two_methods())).endswith("(the worst run's best)")
    assert "before training" not in text


def test_a_target_that_needs_no_training_is_said_in_the_terminal() -> None:
    console = Console(width=80, file=io.StringIO())
    summary = compare_summary(two_methods(), 0.1)
    console.print(render_table(summary))
    text = " ".join(console.file.getvalue().split())
    assert "4 of 4 runs met the target before training (round 0)" in text
    assert early_notes(summary)[0].endswith("about them.")
    assert early_notes({**summary, "target_source": "default"})[0].endswith("give another one with --target.")
    for line in summary["runs"]:
        assert (line["time_to_target_s"], line["uplink_bits_to_target"]) == (0.0, 0)
        assert isinstance(line["uplink_bits_to_target"], int)
        assert isinstance(line["downlink_bits_to_target"], int)


@given(st.floats(min_value=1e-6, max_value=1e12))
def test_digits_keep_three_significant_digits(value: float) -> None:
    text = digits(value)
    assert "e" not in text
    assert float(text.replace(",", "")) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (digits(0), "0"),
        (digits(0.9996), "1.00"),
        (digits(9.996), "10.0"),
        (digits(1640.2), "1,640"),
        (digits(math.inf), "-"),
        (time_unit([812.0]).show(812.0), "812 s"),
        (time_unit([90000.0]).show(90000.0), "25.0 h"),
        (time_unit([0.0]).show(0.0), "0 s"),
        (bit_unit([1.5e9]).show(3e8), "0.300 Gbit"),
        (bit_unit([0.0]).show(0.0), "0 bit"),
        (energy_unit([0.25]).show(0.25), "250 mJ"),
        (metric_text("accuracy", 0.7804), "78.0 %"),
        (metric_text("loss", 2.31), "2.310"),
        (counted(1, "seed"), "1 seed"),
        (counted(1200, "seed"), "1,200 seeds"),
    ],
)
def test_quantities_read_as_written(text: str, expected: str) -> None:
    assert text == expected


def test_deviations_have_two_digits() -> None:
    found = spread([100.0, 112.0, 130.0])
    assert found is not None
    assert spread_text(found, Unit("s", 1.0)) == "114 ± 15 s"
    same = spread([5.0, 5.0])
    assert same is not None
    assert spread_text(same, Unit("s", 1.0)) == "5.00 ± 0 s"


def test_paid_is_cumulative() -> None:
    run = make_run("m", 0, [0.5, 0.6, 0.7])
    assert [entry.uplink_bits for entry in paid(run)] == [0.0, 100.0, 200.0]
    assert [entry.energy_j for entry in paid(run)] == [0.0, 5.0, 10.0]
