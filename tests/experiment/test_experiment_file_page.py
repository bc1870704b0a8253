"""The page on experiment files: its example is an experiment, and it names every key of the sections it describes."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from airtune.devices.profiles import profile_names
from airtune.experiment.config import SECTIONS, ExperimentFile
from airtune.experiment.hints import field_names
from airtune.experiment.sections import Engine, Evaluation, FleetConfig, StopLimits
from airtune.training.data import DataConfig
from airtune.training.partition import PARTITIONERS
from airtune.training.shapes import ModelConfig
from airtune.types import LocalTraining

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "experiment-file.md").read_text()
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


def test_the_example_is_an_experiment_and_the_variant_fits_in() -> None:
    whole, variant = (tomllib.loads(text) for text in EXAMPLES)
    assert ExperimentFile("page", whole).experiment().label == "legend"
    flat = ExperimentFile("page", {**whole, **variant}).experiment("flat")
    assert flat.training.learning_rate == 3e-3


@pytest.mark.parametrize("kind", [ModelConfig, DataConfig, FleetConfig, LocalTraining, StopLimits, Evaluation])
def test_every_key_is_named(kind: type) -> None:
    missing = [name for name in field_names(kind) if f"`{name}`" not in PAGE]
    assert not missing


def test_names_of_parts_and_sections_are_complete() -> None:
    names = [*PARTITIONERS, *profile_names()]
    assert not [name for name in names if f"`{name}`" not in PAGE]
    assert not [name for name in SECTIONS if f"[{name}]" not in PAGE]
    assert {name for name in field_names(Engine) if name != "engine"} <= set(re.findall(r"`(\w+)`", PAGE))


def test_the_choices_named_are_choices() -> None:
    world = {"fleet": {"devices": {"jetson-tx2": 1}}}
    for name in ("always", "bernoulli", "diurnal", "markov"):
        ExperimentFile("x", {"fleet": {**world["fleet"], "availability": name}}).experiment()
    wireless = {
        "area": ("disc", "annulus", "hexagon", "uniform-distance"),
        "path_loss": ("log-distance", "free-space", "urban-macro", "urban-micro", "rural-macro", "indoor-office"),
        "fading": ("rayleigh", "rician", "none"),
        "mobility": ("static", "random-waypoint", "gauss-markov"),
        "downlink": ("broadcast", "unicast"),
    }
    for key, names in wireless.items():
        for name in names:
            assert f"`{name}`" in PAGE
            near = {"area": {"type": "disc", "radius": 100.0}} if key != "area" else {}
            ExperimentFile("x", {**world, "wireless": {**near, key: name}}).experiment()


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*/*.toml")), ids=lambda path: path.stem)
def test_every_experiment_that_we_ship_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from airtune.experiment.config import read_file

    monkeypatch.chdir(ROOT)
    file = read_file(path)
    for label in (file.default_method(), *file.variants):
        assert file.experiment(label).label == label


def test_a_measured_network_can_take_the_place_of_the_cell() -> None:
    from airtune.experiment.config import read_experiment

    tables = {"fleet": {"devices": {"jetson-tx2": 2}}, "wireless": {"type": "trace", "uplink_bandwidth": "3 MHz"}}
    experiment = ExperimentFile("x", tables).experiment()
    assert experiment.wireless.channel.uplink_bandwidth == 3e6
    assert read_experiment(experiment.plain(), "fedit") == experiment
