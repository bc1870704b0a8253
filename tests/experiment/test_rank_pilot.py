"""TSFA's offline stage in a plan: the curve over ranks from real pilot rounds, and a round at the rank it chooses."""

import json

import pytest

from airtune.cli import main
from airtune.errors import InputError
from airtune.experiment.build import Workshop
from airtune.experiment.config import read_file
from airtune.experiment.rank_pilot import run_rank_pilot
from airtune.experiment.run import Session
from tiny_experiment import head_of, write_experiment


def test_plan_with_a_pilot_shows_the_bound_over_ranks_and_plans_at_the_chosen_one(tmp_path, capsys):
    file = write_experiment(tmp_path / "tiny")
    code = main(["plan", str(file), "--method", "tsfa", "--pilot", "--json", "--out", str(tmp_path / "plan")])
    assert code == 0
    found = json.loads(capsys.readouterr().out)
    rank = found["rank_pilot"]["structural_rank"]
    curves = {curve["title"]: curve for curve in found["curves"]}
    bound = curves["Bound over ranks"]
    assert set(curves) == {"Components within the limit", "Bound over ranks"}
    assert bound["x"] == [1, 2, 4] and bound["chosen"] == rank == bound["x"][bound["y"].index(min(bound["y"]))]
    assert {client["rank"] for client in found["clients"]} == {rank}
    assert found["notes"]["latency_limit_s"] == pytest.approx(found["rank_pilot"]["latency_limit_s"])
    assert head_of(tmp_path / "plan" / "pilot")["final"]["rounds"] == 1
    assert "Bound over ranks" in (tmp_path / "plan" / "plan.html").read_text()


def rows_of(table):
    """Return the cells of a printed table's rows."""
    lines = [line for line in table.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_terminal_shows_what_each_rank_could_send_and_its_bound(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    file = write_experiment(tmp_path / "tiny")
    assert main(["plan", str(file), "--method", "tsfa"]) == 0
    before = capsys.readouterr().out
    title = " ".join(before.split())
    assert "the rank is chosen after the pilot rounds (to run them now: --pilot)" in title
    rows = {row[0]: row[1:] for row in rows_of(before) if row[0] in ("1", "2", "4")}
    assert [bound for _, _, bound, _ in rows.values()] == ["-"] * 3
    assert main(["plan", str(file), "--method", "tsfa", "--pilot", "--out", str(tmp_path / "plan")]) == 0
    after = capsys.readouterr().out
    title = " ".join(after.split())
    found = json.loads((tmp_path / "plan" / "plan.json").read_text())
    pilot = found["rank_pilot"]
    assert f"tsfa: rank {pilot['structural_rank']}, by the bound of the pilot" in title
    assert f"limit {pilot['latency_limit_s']:.4g} s" in title
    rows = {int(row[0]): row[1:] for row in rows_of(after) if row[0] in ("1", "2", "4")}
    for rank, ratio, bound in zip(
        *(pilot["offline"][n] for n in ("ranks", "keep_ratios")), pilot["bounds"], strict=True
    ):
        sent = "none" if ratio is None else f"{ratio * rank:.2f}"
        shown = "-" if bound is None else f"{bound:.4g}"
        assert rows[rank][0::2] == [sent, shown]
        assert (rows[rank][3] == "yes") == (rank == pilot["structural_rank"])


def test_other_methods_print_no_ranks(tmp_path, capsys):
    assert main(["plan", str(write_experiment(tmp_path / "tiny")), "--method", "fedit"]) == 0
    assert "Components within the limit" not in capsys.readouterr().out


def test_without_pilot_rounds_or_with_another_method_there_is_nothing_to_choose(tmp_path):
    file, session = read_file(write_experiment(tmp_path / "tiny"), {}), Session(Workshop())
    with pytest.raises(InputError, match=r"pilot_rounds.*valid"):
        run_rank_pilot(file.experiment("tsfa", method__pilot_rounds=0), tmp_path / "one", session)
    with pytest.raises(InputError, match="chooses no rank; valid: tsfa"):
        run_rank_pilot(file.experiment("fedit"), tmp_path / "two", session)
