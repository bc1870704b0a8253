"""The pages: self-contained, escaped, and saying the right result. How they look is tested in a browser."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.report import (
    compare_summary,
    html,
    load_run,
    load_runs,
    write_compare_files,
    write_compare_report,
    write_plan_page,
    write_report,
    write_run_report,
)
from airtune.report.figures import learning_figure, log_axis, mean_curve
from airtune.report.page import compare_headline, run_headline
from airtune.report.plan_view import read_plan
from airtune.report.round_view import CLIENTS_IN_VIEW, round_view, spaced
from airtune.report.run_figures import achieved_rates, cell_figure, run_figures
from report.synthetic_plans import make_plan
from report.synthetic_runs import write_compare, write_run


class Links(HTMLParser):
    """Collects every attribute that makes a browser fetch something, and the texts of headings."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "srcset", "data", "action", "poster"}:
                self.fetched.append(value or "")


def parse(page: Path) -> tuple[Links, dict]:
    """Return the page's links and its embedded data; plotly.js itself is cut out, it is a third party's text."""
    text = page.read_text(encoding="utf-8").replace(html.plotly_script(), "")
    links = Links()
    links.feed(text)
    found = re.search(r'<script type="application/json" id="airtune-data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return links, json.loads(found.group(1))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_compare(tmp_path_factory.mktemp("compare"), ("legend", "fedit"), seeds=2)
    runs = load_runs([folder])[::-1]
    summary = compare_summary(runs, out_dir=folder)
    write_compare_files(folder, summary)
    write_compare_report(folder, runs, summary)
    return folder


def test_pages_fetch_nothing(tmp_path: Path, compared: Path) -> None:
    pages = [
        write_run_report(write_run(tmp_path / "run", diagnostics=True)),
        compared / "report.html",
        write_plan_page(tmp_path, [make_plan("legend")]),
    ]
    for page in pages:
        links, _ = parse(page)
        assert all(link.startswith(("#", "data:")) for link in links.fetched), links.fetched
        own = page.read_text(encoding="utf-8").replace(html.plotly_script(), "")
        assert not re.search(r"(https?:)?//[a-z]+\.[a-z]", own)
        assert "url(" not in own
        assert "default-src 'none'" in own
        assert {"iframe", "object", "embed", "img"}.isdisjoint(links.tags)


def test_texts_of_files_cannot_leave_their_place(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    head = json.loads((folder / "run.json").read_text())
    evil = "</script><script>alert(1)</script><img src=//x.example>"
    head["method"] = evil
    head["config"]["data"]["name"] = evil
    for item in head["fleet"]:
        item["device"] = evil
    (folder / "run.json").write_text(json.dumps(head))
    page = write_run_report(folder)
    links, data = parse(page)
    assert "<script>alert" not in page.read_text()
    assert "img" not in links.tags
    assert data["entries"][0]["view"]["rounds"][0]["device"][0] == evil


def test_the_headline_states_the_result(tmp_path: Path, compared: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    final, seconds = run.final["accuracy"], run.rounds[-1].time_s
    assert run_headline(run) == f"legend reached {100 * final:.1f} % accuracy in {seconds:.0f} s of fleet time"
    text = write_run_report(run.path).read_text().replace("\u00a0", " ")
    start = run.rounds[0].accuracy or 0.0
    assert f"{100 * (final - start):+.1f} points of accuracy against the {100 * start:.1f} % before training" in text
    runs = load_runs([compared])
    summary = compare_summary(runs)
    assert re.fullmatch(
        rf"legend reached {100 * summary['target']:.1f} % in [\d.]+ s, fedit in [\d.]+ s", compare_headline(summary)
    )
    assert compare_headline(compare_summary(runs, 0.999)) == "No method reached 99.9 %"
    best = {run.method: max(v for _, v in run.evaluations()) for run in runs}
    between = (best["legend"] + max(v for run in runs if run.method == "fedit" for _, v in run.evaluations())) / 2
    assert compare_headline(compare_summary(runs, max(between, best["legend"]))).endswith("; fedit missed it")


def test_a_causal_model_is_reported_by_its_loss(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", metric="loss"))
    assert run_headline(run).startswith("legend brought the loss to 0.")
    _, data = parse(write_run_report(run.path))
    assert set(data["figures"]) == {"loss_time", "loss_bits"}


def test_plotted_numbers_are_the_stored_ones(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    _, data = parse(write_run_report(run.path))
    trace = data["figures"]["accuracy_time"]["data"][0]
    stored = [(line.time_s, line.accuracy) for line in run.rounds if line.accuracy is not None]
    assert trace["x"] == pytest.approx([time for time, _ in stored], rel=1e-5)
    assert trace["y"] == pytest.approx([100 * value for _, value in stored], rel=1e-5)
    bits = data["figures"]["accuracy_bits"]
    total = sum(line.uplink_bits + line.downlink_bits for line in run.rounds)
    assert bits["layout"]["xaxis"]["title"]["text"] == "Sent up and down, Mbit"
    assert bits["data"][0]["x"][-1] == pytest.approx(total / 1e6, rel=1e-5)
    view = data["entries"][0]["view"]
    assert [item["round"] for item in view["rounds"]] == list(range(1, 25))
    shown = view["rounds"][4]
    line = run.rounds[5]
    stored_seconds = {row.client: row.upload_s for row in line.clients}
    assert dict(zip(shown["client"], shown["upload_s"], strict=True)) == pytest.approx(stored_seconds, rel=1e-5)


def test_the_compared_curve_is_the_mean_within_its_band(compared: Path) -> None:
    runs = load_runs([compared])
    figure = learning_figure(runs, "accuracy", "time", 0.7)
    assert figure is not None
    names = [trace.get("name") for trace in figure.traces]
    assert names == [None, "legend", "legend", "legend", None, "fedit", "fedit", "fedit"]
    x, mean, low, high = mean_curve(
        [(np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([2.0, 6.0, 12.0]), np.array([4.0, 4.0, 4.0]))]
    )
    assert x.tolist() == [2, 6, 10]
    assert mean.tolist() == [3, 5, 7]
    assert low.tolist() == [2, 4, 4]
    assert high.tolist() == [4, 6, 10]
    apart = mean_curve([(np.array([0.0, 1.0]), np.zeros(2)), (np.array([2.0, 3.0]), np.zeros(2))])
    assert all(len(part) == 0 for part in apart)


def test_a_stored_target_is_kept_and_a_default_one_is_recomputed(compared: Path, tmp_path: Path) -> None:
    page = write_report([compared], tmp_path)
    assert page == tmp_path / "report.html"
    assert "the worst run" in page.read_text()
    runs = load_runs([compared])
    folder = write_compare(tmp_path / "given", ("legend",), seeds=1)
    write_compare_files(folder, compare_summary(load_runs([folder]), 0.6, out_dir=folder))
    assert "at least 60.0 % (as given)" in write_report([folder]).read_text()
    with pytest.raises(InputError, match="--out"):
        write_report([runs[0].path, runs[1].path])
    both = write_report([runs[0].path, runs[1].path], tmp_path / "both")
    assert parse(both)[1]["entries"][1]["view"]["of_rounds"] == 24


def test_an_interrupted_run_and_a_run_without_rounds_have_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", status="interrupted", rounds=4)
    (folder / "rounds.jsonl").write_text((folder / "rounds.jsonl").read_text()[:-30])
    text = write_run_report(folder).read_text()
    assert "interrupted" in text
    assert "cut off and was left out" in text
    (folder / "rounds.jsonl").write_text("")
    assert "legend has no evaluation yet" in write_run_report(folder).read_text()


def test_a_target_met_before_training_is_flagged(compared: Path, tmp_path: Path) -> None:
    assert "met the target before training" not in write_report([compared], tmp_path).read_text()
    text = write_report([compared], tmp_path, target=0.1).read_text()
    assert "4 of 4 runs met the target before training (round 0)" in text


def test_constant_notes_are_told_and_changing_ones_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=4)
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line in lines[1:]:
        line["notes"] |= {"passes": 1, "queue_s": line["round"], "branch": "text", "ok": True}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figure = run_figures(load_run(folder))["notes"]
    assert [trace["name"] for trace in figure.traces] == ["queue_s"]
    assert figure.traces[0]["y"] == [1, 2, 3, 4]
    assert figure.caption.endswith("The same in every round: passes 1.")


def test_commands_errors_and_tuned_values_are_shown(tmp_path: Path) -> None:
    folder = write_compare(tmp_path, ("legend", "fedit"), seeds=1)
    runs = load_runs([folder])
    composed = "airtune compare EXPERIMENT.toml --methods fedit,legend --seeds 0"
    assert composed in write_report([folder]).read_text()
    for run in runs:
        head = json.loads((run.path / "run.json").read_text())
        head |= {"command": "airtune compare quick.toml --seeds 0", "git": "abc123-dirty"}
        (run.path / "run.json").write_text(json.dumps(head))
    head |= {"status": "failed", "error": "diverged in round 3"}
    (run.path / "run.json").write_text(json.dumps(head))
    summary = compare_summary(load_runs([folder]), out_dir=folder)
    summary["tuned"] = {"legend": {"training.learning_rate": "0.001"}}
    write_compare_files(folder, summary)
    text = write_report([folder]).read_text()
    assert composed not in text
    assert "airtune compare quick.toml --seeds 0" in text
    assert "abc123-dirty" in text
    assert "&#39;failed&#39; (diverged in round 3)" in text
    assert "legend training.learning_rate" in text


def test_a_run_without_optional_data_has_no_empty_figures(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", with_fleet=False))
    figures = run_figures(run)
    assert set(figures) == {"duration", "participation", "energy_rounds", "energy_devices", "rates"}
    full = load_run(write_run(tmp_path / "full", diagnostics=True))
    assert set(run_figures(full)) == set(figures) | {"cell", "diagnostics"}
    assert cell_figure(run.fleet) is None


def test_lost_updates_are_all_counted(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    lost = [(line.number, item.client) for line in run.rounds for item in line.dropped]
    assert lost
    text = write_run_report(run.path).read_text()
    assert f"Dropped or late: {len(lost)} in all (missed the deadline: {len(lost)})" in text
    figure = run_figures(run)["participation"]
    assert sum(v for v in figure.traces[1]["y"]) == len(lost)  # type: ignore[union-attr, attr-defined]


def test_big_rounds_show_the_slowest_and_say_so(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", rounds=30, cohort=70, clients=100))
    view = round_view(run, share=50)
    assert view["of_rounds"] == 30
    rounds = view["rounds"]
    assert isinstance(rounds, list)
    assert [rounds[0]["round"], rounds[-1]["round"], len(rounds)] == [1, 30, 10]
    assert rounds[0]["of_clients"] == 70
    line = run.rounds[1]
    busy = sorted(row.download_s + row.compute_s + row.upload_s for row in line.clients)
    shown = [
        sum(parts) for parts in zip(*(rounds[0][f"{n}_s"] for n in ("download", "compute", "upload")), strict=True)
    ]
    assert shown == pytest.approx(busy[-CLIENTS_IN_VIEW:], rel=1e-4)
    assert spaced(range(5), 9) == [0, 1, 2, 3, 4]
    assert spaced(range(101), 3) == [0, 50, 100]


def test_rates_are_bits_over_seconds(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", rounds=3))
    rates = achieved_rates(run.rounds)
    rows = [row for line in run.rounds for row in line.clients]
    assert rates["uplink"] == [(row.bits_up or 0) / row.upload_s for row in rows]
    assert rates["downlink"] == pytest.approx([6e6] * len(rows))


def test_log_axes_have_ticks_inside_their_range() -> None:
    layout = log_axis("x", [0.3, 0.9, 1.0])
    low, high = (10**end for end in layout["range"])  # type: ignore[union-attr, attr-defined]
    assert low < 0.3 < 1.0 < high
    assert layout["tickvals"] == pytest.approx([0.3, 0.4, 0.5, 0.7, 1.0])
    assert log_axis("x", [])["tickvals"] == [1.0]


def test_missing_plotly_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Path:
        if name == "plotly":
            raise ModuleNotFoundError(name)
        return Path(__file__).parent

    monkeypatch.setattr(html.resources, "files", missing)
    with pytest.raises(InputError, match=r"pip install 'airtune\[plots\]'"):
        html.plotly_script()


def test_json_cannot_close_its_script() -> None:
    text = html.script_json({"a": "</script><!--", "b": [1.5, None]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!--", "b": [1.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        html.script_json(float("nan"))


def test_a_plan_page_names_the_straggler_and_sorts_plans(tmp_path: Path) -> None:
    plan = make_plan("legend")
    slowest = max(plan["clients"], key=lambda c: c["download_s"] + c["compute_s"] + c["upload_s"])
    text = write_plan_page(tmp_path, [plan]).read_text().replace("\u00a0", " ")
    assert f"The straggler is client {slowest['client']} ({slowest['device']})" in text
    both = write_plan_page(tmp_path / "two", [make_plan("fedit"), plan]).read_text().replace("\u00a0", " ")
    assert re.search(r"<h1>legend needs [\d.]+ s a round, [\d.,]+ s in all; fedit needs", both)
    with pytest.raises(InputError, match="nothing to show"):
        write_plan_page(tmp_path, [])


def test_a_sweep_has_a_point_for_each_value(tmp_path: Path) -> None:
    plans = [make_plan(m, speed=s, sweep=v) for v, s in (("5MHz", 1), ("10MHz", 2)) for m in ("legend", "fedit")]
    _, data = parse(write_plan_page(tmp_path, plans))
    traces = data["figures"]["sweep"]["data"]
    assert [trace["x"] for trace in traces] == [["5MHz", "10MHz"]] * 8
    assert traces[0]["y"] == pytest.approx(
        [plans[0]["predicted"]["round_s"], plans[2]["predicted"]["round_s"]], rel=1e-5
    )


def test_a_plan_of_the_bare_contract_is_enough(tmp_path: Path) -> None:
    bare = {
        "schema": 1,
        "method": "fedit",
        "predicted": {"rounds": 10, "round_s": 4.0, "total_s": 40.0, "uplink_bits": 1e6, "energy_j": 3.0},
        "clients": [
            {
                "client": 0,
                "probability": 0.5,
                "rank": 8,
                "depth": 6,
                "keep_ratio": 0.25,
                "bandwidth_hz": 1e6,
                "compute_s": 3.0,
                "upload_s": 1.0,
            }
        ],
        "solver": {"status": "infeasible", "objective": None, "iterations": 3, "branch": None, "gap": None},
        "notes": ["the limit cannot be met"],
    }
    page = write_plan_page(tmp_path, [bare])
    assert "status is &#39;infeasible&#39;" in page.read_text()
    view = parse(page)[1]["entries"][0]["view"]["rounds"][0]
    assert (view["components"], view["titles"], view["probability"], view["keep_ratio"]) == (
        [8],
        {"components": "Rank"},
        [0.5],
        [0.25],
    )
    with pytest.raises(InputError, match=r"plan 1: clients\[0\]: client: missing"):
        write_plan_page(tmp_path, [bare | {"clients": [{}]}])
    with pytest.raises(InputError, match="here: method: missing"):
        read_plan({}, "here")


def test_a_plan_of_ten_thousand_clients_stays_small(tmp_path: Path) -> None:
    page = write_plan_page(tmp_path, [make_plan("legend", clients=10_000)])
    assert page.stat().st_size - len(html.plotly_script()) < 1_000_000
    _, data = parse(page)
    assert len(data["entries"][0]["view"]["rounds"][0]["client"]) == CLIENTS_IN_VIEW
    assert "10,000" in data["entries"][0]["figures"]["profile"]["caption"]
