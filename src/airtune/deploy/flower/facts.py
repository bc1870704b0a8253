"""What a device says of itself when the server asks: who it is, what it has, how fast it and its link are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from flwr.app import ConfigRecord, RecordDict

from airtune.deploy.flower.codec import PayloadError, tensor_to_array
from airtune.version import __version__

if TYPE_CHECKING:
    from airtune.experiment.build import Bench

FACTS = "facts"  # name of the record
ANY_DATA = "own"  # the identity of rows that only their device knows


@dataclass(frozen=True)
class Facts:
    """One device.

    Attributes
    ----------
    client : its partition. device : a name for reports.
    examples : training rows. tokens : of an average row. own_data : whether the rows are its own file's.
    memory_bytes : that training may use. flops_per_second : of training, counted FLOPs over measured seconds.
    uplink_rate, downlink_rate : bit/s. 0 for the last four: not known.
    identity : JSON object of what server and client must have in common.
    """

    client: int
    device: str
    examples: int
    tokens: float
    own_data: bool
    memory_bytes: float
    flops_per_second: float
    uplink_rate: float
    downlink_rate: float
    identity: str


def write_facts(facts: Facts) -> RecordDict:
    """Return the content of the answer."""
    return RecordDict({FACTS: ConfigRecord({entry.name: getattr(facts, entry.name) for entry in fields(Facts)})})


def read_facts(content: RecordDict) -> Facts:
    """Return the facts of an answer.

    Raises
    ------
    PayloadError : a value is missing, of another type, or no number that a device can have.
    """
    words: Mapping[str, Any] = content.config_records.get(FACTS, ConfigRecord())
    kinds = {"int": int, "str": str, "float": float, "bool": bool}
    values: dict[str, Any] = {}
    for entry in fields(Facts):
        value = words.get(entry.name)
        if type(value) is not kinds[str(entry.type)]:
            raise PayloadError(f"facts: {entry.name} is not of type {entry.type}")
        if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
            raise PayloadError(f"facts: {entry.name} is {value}")
        values[entry.name] = value
    return Facts(**values)


def identity_of(bench: Bench, *, own_data: bool = False) -> dict[str, str]:
    """Return what must be equal on the server and on a device, each as text.

    own_data : the device trains on rows of its own, so the names of the classes must agree, not the rows.
    """
    experiment, tokens = bench.experiment, bench.tokens.train
    plain = experiment.plain()
    model = {name: value for name, value in plain["model"].items() if name != "name"}  # the weights tell
    return {
        "airtune": __version__,
        "seed": str(experiment.seed),
        "model": json.dumps(model, sort_keys=True),
        "weights": _weights(bench),
        "method": str(plain["method"]["name"]),
        "precision": experiment.engine.precision,
        "classes": json.dumps(tokens.label_names),
        "data": ANY_DATA if own_data else _hashed(*tokens.arrays.values()),
        "clients": str(experiment.fleet.clients),
    }


def differences(mine: Mapping[str, str], theirs: str) -> list[str]:
    """Return the names of what differs; an answer that is no such object differs in everything."""
    try:
        found: Any = json.loads(theirs)
    except ValueError:
        return list(mine)
    if not isinstance(found, dict):
        return list(mine)
    answers = cast("dict[str, Any]", found)
    own_data = answers.get("data") == ANY_DATA
    return [name for name, value in mine.items() if answers.get(name) != value and not (own_data and name == "data")]


def _weights(bench: Bench) -> str:
    """Return a hash of the adapted layers' weights in the base model and of the adapter that follows from the seed."""
    adapter = bench.start.adapter
    base = [tensor_to_array(bench.federated.base_weight(module)).data for module in sorted(adapter.placement)]
    return _hashed(*base, *(tensor_to_array(tensor).data for _, _, tensor in adapter.tensors()))


def _hashed(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:32]
