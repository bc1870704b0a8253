"""`airtune calibrate` on a tiny model: a speed, a profile that loads and plans, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from airtune import cli
from airtune.devices.profiles import load_profile
from tiny_experiment import write_experiment


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("calibrate"))


def test_the_measured_profile_can_be_planned_with(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "mine.toml"
    options = ["--name", "my-box", "--power", "12 W", "--memory", "4 GB", "--repeats", "2", "--out", str(profile)]
    assert cli.main(["calibrate", str(experiment), *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    loaded = load_profile(profile)
    assert loaded.flops_per_second == pytest.approx(found["flops_per_second"], rel=1e-4) and loaded.name == "my-box"
    assert loaded.energy_per_flop == pytest.approx(12.0 / loaded.flops_per_second)
    devices = json.dumps({str(profile): 3})
    assert cli.main(["plan", str(experiment), "--method", "fedit", "--fleet.devices", devices, "--json"]) == 0
    (planned,) = [json.loads(capsys.readouterr().out)]
    assert "my-box" in json.dumps(planned)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--out", "x.toml"], "--power"),
        (["--out", "x.toml", "--power", "15 Hz"], "--power"),
        (["--repeats", "none"], "--repeats"),
        (["--memory", "plenty"], "--memory"),
        (["--out", "/no/such/folder/x.toml", "--power", "5 W", "--repeats", "1"], "--out"),
        (["--out", "profile.json", "--power", "5 W", "--repeats", "1"], "profile.json"),
    ],
)
def test_bad_options_are_one_line(
    experiment: Path, capsys: pytest.CaptureFixture[str], options: list[str], field: str
) -> None:
    assert cli.main(["calibrate", str(experiment), *options]) == 2
    error = capsys.readouterr().err.strip()
    assert field in error and "\n" not in error
