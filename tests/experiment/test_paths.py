"""Relative paths mean the experiment file's folder, wherever the shell stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from airtune.experiment.config import read_file
from airtune.experiment.paths import absolute_path, absolute_paths
from tiny_experiment import write_experiment


def test_paths_of_the_file_and_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_experiment(tmp_path / "here")
    path.write_text(path.read_text().replace(f"{path.parent}/", ""))
    assert str(tmp_path) not in path.read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    experiment = read_file(Path("../here/tiny.toml"), {"data.test_file": "more.csv"}).experiment()
    assert experiment.model.name == str(tmp_path / "here" / "model")
    assert experiment.data.name == str(tmp_path / "here" / "rows.csv")
    assert experiment.data.test_file == str(elsewhere / "more.csv")


def test_what_is_no_path_stays(tmp_path: Path) -> None:
    (tmp_path / "minilm").mkdir()
    for name in ("minilm", "rotten-tomatoes", "owner/name", "bert-nope", "example"):
        assert absolute_path(name, tmp_path) == name
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert absolute_path("owner/name", tmp_path) == str(tmp_path / "owner" / "name"), "a folder goes before the hub"
    assert absolute_path("./x", tmp_path) == str(tmp_path / "x")
    assert absolute_path(str(tmp_path / "x.csv"), Path("/elsewhere")) == str(tmp_path / "x.csv")
    devices = {"devices": {"mine.toml": 2, "jetson-tx2": 1}}
    found = absolute_paths({"fleet": devices, "variant": {"v": {"model": {"name": "./m"}}}}, tmp_path)
    assert found["fleet"]["devices"] == {str(tmp_path / "mine.toml"): 2, "jetson-tx2": 1}
    assert found["variant"]["v"]["model"]["name"] == str(tmp_path / "m")
    assert devices == {"devices": {"mine.toml": 2, "jetson-tx2": 1}}
