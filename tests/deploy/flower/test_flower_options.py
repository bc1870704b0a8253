"""What a run over Flower refuses before a device is asked."""

from pathlib import Path

import pytest

pytest.importorskip("flwr")

from airtune.deploy.flower.options import DeviceOptions, ServerOptions, read_experiment_of
from airtune.errors import InputError
from tiny_experiment import write_experiment


def options(tmp_path: Path, overrides: str = "") -> ServerOptions:
    return ServerOptions(experiment=str(write_experiment(tmp_path)), overrides=overrides)


def test_overrides_are_those_of_the_command_line(tmp_path: Path) -> None:
    experiment, _ = read_experiment_of(options(tmp_path, "stop.rounds=3 seed=5"))
    assert (experiment.stop.rounds, experiment.seed) == (3, 5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("training.precision=fp64", r"training\.precision: fp64 does not travel"),
        ("training.engine=cohort", r"training\.engine: a device trains one client at a time"),
        ("training.workers=2", r"training\.workers: a device trains one client at a time"),
        ("stop.rounds", r"overrides: 'stop\.rounds' is not NAME=VALUE"),
    ],
)
def test_what_a_device_cannot_do_is_refused_on_both_sides(tmp_path: Path, overrides: str, message: str) -> None:
    server = options(tmp_path, overrides)
    for device in (None, DeviceOptions(partition_id=0)):
        with pytest.raises(InputError, match=message):
            read_experiment_of(server, device)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"experiment: there is no file .*gone\.toml"):
        read_experiment_of(ServerOptions(experiment=str(tmp_path / "gone.toml")))
