"""What `flwr run` may set (``[tool.flwr.app.config]``) and what a device may set (``--node-config``), with checks.

Flower's configuration takes single values only, so an experiment is one key, the path of its TOML file; everything
about method, model and data stands there.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from airtune.errors import InputError
from airtune.experiment.config import Experiment, read_file
from airtune.experiment.sections import Engine

Chosen = TypeVar("Chosen")


@dataclass(frozen=True)
class ServerOptions:
    """The run configuration; keys in kebab-case.

    Attributes
    ----------
    experiment : path of the experiment file, the same on the server and, unless its node says otherwise, on a device.
    method : method or variant; empty: the file's own. overrides : as on the command line, ``stop.rounds=3 seed=1``.
    out : folder of the run on the server; empty: ``runs/NAME-METHOD-SEED-flower``.
    resume : go on with the run in `out` if there is one; without it a folder that is not empty is refused.
    nodes : how many clients must have reported before round 1; 0: all of the experiment's fleet.
    wait_seconds : how long to wait for them. round_seconds : the longest round, whatever the plan says.
    poll_seconds : between two looks for replies.
    observe : "measured": what the devices report of themselves and what their links did; "simulated": the
        experiment's cell, so that plans are those of the simulation (real time still decides who arrives).
    measure : whether devices measure their speed and link when they report.
    max_norm : largest norm of an update's change; a larger one is kept out.
    """

    experiment: str = ""
    method: str = ""
    overrides: str = ""
    out: str = ""
    resume: bool = False
    nodes: int = 0
    wait_seconds: float = 600.0
    round_seconds: float = 3600.0
    poll_seconds: float = 0.5
    observe: Literal["measured", "simulated"] = "measured"
    measure: bool = True
    max_norm: float = 1000.0

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.experiment:
            raise InputError("experiment: is missing; valid: -c 'experiment=\"/path/of/experiment.toml\"'")
        if self.observe not in ("measured", "simulated"):
            raise InputError(f"observe: unknown {self.observe!r}; valid: measured, simulated")
        if self.nodes < 0:
            raise InputError(f"nodes: {self.nodes} is negative; valid: 0 for all, or more")
        for name in ("wait_seconds", "round_seconds", "poll_seconds", "max_norm"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise InputError(f"{kebab(name)}: {getattr(self, name)} is not possible; valid: a positive number")


@dataclass(frozen=True)
class DeviceOptions:
    """The node configuration; keys in kebab-case.

    Attributes
    ----------
    partition_id : which client of the experiment this device is, from 0. num_partitions : Flower's simulation sets it.
    experiment : path of the experiment file on this device; empty: the path in the run configuration.
    data : a file with this device's own rows; empty: its partition of the experiment's data.
    state_folder : where the device keeps what is its own from run to run; empty: in Flower's state of the run only.
    device : address of a resident trainer (``airtune device``); empty: the model is loaded in each app process.
    token_file : of that trainer.
    memory_gb, gflops, uplink_mbit_s, downlink_mbit_s : given instead of measured; 0: measured.
    """

    partition_id: int = -1
    num_partitions: int = 0
    experiment: str = ""
    data: str = ""
    state_folder: str = ""
    device: str = ""
    token_file: str = ""
    memory_gb: float = 0.0
    gflops: float = 0.0
    uplink_mbit_s: float = 0.0
    downlink_mbit_s: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        if self.partition_id < 0:
            raise InputError('partition-id: is missing; valid: --node-config "partition-id=0"')
        for name in ("memory_gb", "gflops", "uplink_mbit_s", "downlink_mbit_s"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{kebab(name)}: {getattr(self, name)} is not possible; valid: 0 or more")


def kebab(name: str) -> str:
    """Return a field's name as configurations spell it."""
    return name.replace("_", "-")


def read_options(kind: type[Chosen], config: Mapping[str, Any]) -> Chosen:
    """Return the options that a configuration holds; keys that are none of theirs are left to others.

    Raises
    ------
    InputError : a value of another type, or one that is not possible.
    """
    values: dict[str, Any] = {}
    for entry in fields(cast("Any", kind)):
        key = kebab(entry.name)
        if key not in config:
            continue
        default = None if entry.default is MISSING else entry.default
        values[entry.name] = _converted(key, config[key], type(default))
    return kind(**values)


def _converted(key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InputError(f"{key}: {value!r} is not of type {kind.__name__}")
    return value


def read_experiment_of(options: ServerOptions, device: DeviceOptions | None = None) -> tuple[Experiment, Path]:
    """Return the experiment as the server or a device reads it, and its file.

    Raises
    ------
    InputError : there is no such file, it cannot be read, or it asks for an engine that is for simulations.
    """
    path = Path(device.experiment if device is not None and device.experiment else options.experiment).expanduser()
    if not path.is_file():
        raise InputError(f"experiment: there is no file {path}; valid: the path of an experiment file on this machine")
    overrides: dict[str, Any] = {}
    for word in shlex.split(options.overrides):
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"overrides: {word!r} is not NAME=VALUE")
        overrides[name] = value
    if device is not None and device.data:
        overrides["data.name"] = str(Path(device.data).expanduser().resolve())
        overrides["data.partition"] = "iid"  # whatever it is: all rows are this device's
    experiment = read_file(path, overrides).experiment(options.method or None)
    _check_engine(experiment.engine)
    return experiment, path


def _check_engine(engine: Engine) -> None:
    """Refuse what a device cannot do as the experiment says."""
    if engine.precision == "fp64":
        raise InputError("training.precision: fp64 does not travel (models are sent in 32 bits); valid: fp32, bf16")
    if engine.engine == "cohort" or engine.workers is not None:
        name = "engine" if engine.engine == "cohort" else "workers"
        raise InputError(f'training.{name}: a device trains one client at a time; valid: engine = "twin", no workers')
