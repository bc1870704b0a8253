"""Measured networks from an experiment file: the trace must name exactly the clients of the fleet."""

from __future__ import annotations

from pathlib import Path

import pytest

from airtune import cli
from tiny_experiment import write_experiment

HEADER = "time_s,client,uplink_bit_per_s,downlink_bit_per_s\n"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("trace"))


@pytest.mark.parametrize(
    ("clients", "error"), [(4, None), (5, "unknown client '4'; valid: 0 to 3"), (3, "no rows for client 3")]
)
def test_a_trace_is_for_the_whole_fleet_and_nobody_else(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], clients: int, error: str | None
) -> None:
    trace = tmp_path / "links.csv"
    trace.write_text(HEADER + "".join(f"0,{c},1e6,5e6\n" for c in range(clients)), encoding="utf-8")
    text = experiment.read_text(encoding="utf-8")
    kept = [part for part in text.split("\n[") if not part.startswith(("wireless", "fleet"))]
    file = experiment.with_name(f"trace-{clients}.toml")
    file.write_text(
        "\n[".join(kept) + f'\n[fleet]\ndevices = {{ jetson-tx2 = 4 }}\n[wireless]\ntype = "trace"\npath = "{trace}"\n',
        encoding="utf-8",
    )
    code = cli.main(["plan", str(file), "--method", "fedit", "--json"])
    shown = capsys.readouterr()
    if error is None:
        assert code == 0, shown.err
    else:
        assert code == 2 and str(trace) in shown.err and error in shown.err
