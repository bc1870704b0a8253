"""What TSFA's offline stage decided by ends up in run.json, where the report finds it."""

from airtune.experiment.build import Workshop
from airtune.experiment.config import read_file
from airtune.experiment.run import Session, start
from airtune.report import load_run
from airtune.report.run_figures import run_figures
from tiny_experiment import head_of, lines_of, write_experiment


def test_run_json_holds_the_curves_over_ranks_and_the_page_draws_them(tmp_path):
    file = read_file(write_experiment(tmp_path / "tiny"), {})
    folder = tmp_path / "run"
    start(file.experiment("tsfa", stop__rounds=3), folder, Session(Workshop()))
    curves = {curve["title"]: curve for curve in head_of(folder)["curves"]}
    assert set(curves) == {"Components within the limit", "Bound over ranks"}
    bound = curves["Bound over ranks"]
    assert bound["chosen"] == lines_of(folder)[2]["notes"]["structural_rank"]
    assert bound["chosen"] == bound["x"][bound["y"].index(min(bound["y"]))]
    figures = run_figures(load_run(folder))
    assert {"curve_0", "curve_1", "latency_limit"} <= set(figures)


def test_a_method_without_such_a_decision_leaves_no_curves(tmp_path):
    file = read_file(write_experiment(tmp_path / "tiny"), {})
    start(file.experiment("fedit", stop__rounds=1), tmp_path / "run", Session(Workshop()))
    assert "curves" not in head_of(tmp_path / "run")
