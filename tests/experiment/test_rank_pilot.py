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


def test_without_pilot_rounds_or_with_another_method_there_is_nothing_to_choose(tmp_path):
    file, session = read_file(write_experiment(tmp_path / "tiny"), {}), Session(Workshop())
    with pytest.raises(InputError, match=r"pilot_rounds.*valid"):
        run_rank_pilot(file.experiment("tsfa", method__pilot_rounds=0), tmp_path / "one", session)
    with pytest.raises(InputError, match="chooses no rank; valid: tsfa"):
        run_rank_pilot(file.experiment("fedit"), tmp_path / "two", session)
