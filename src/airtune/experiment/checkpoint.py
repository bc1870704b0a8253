"""A checkpoint: everything the round loop needs to go on, in one safetensors file, to the bit.

`Progress` is a tree of frozen dataclasses, tuples, mappings, numbers, arrays and tensors. The tree is written as JSON
into the file's header, where each tensor and array is a reference to an entry of the file. Nothing is pickled: the JSON
names dataclasses by module and name, and reading constructs only dataclasses of modules that are already imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError
from airtune.federation import Progress
from airtune.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FILE = "progress.safetensors"
SCHEMA = 1

Json = Any


def save(folder: Path, progress: Progress, digest: str = "") -> None:
    """Replace the checkpoint in `folder` by that of `progress`, atomically.

    digest : fingerprint of the configuration that the run was made by.

    Raises
    ------
    NoResultError : the disk is full or not writable.
    TypeError : the method's state holds something that has no place in a checkpoint (a bug of the method).
    """
    from safetensors.torch import save as to_bytes

    writer = _Writer()
    tree = writer.encode(progress)
    header = {"schema": SCHEMA, "round": progress.round, "digest": digest, "progress": tree}
    content = to_bytes(writer.tensors, metadata={"airtune": json.dumps(header)})
    write_atomically(folder / FILE, content)


def load(folder: Path, digest: str = "") -> Progress:
    """Return the progress of the checkpoint in `folder`.

    Raises
    ------
    InputError : there is no checkpoint, it is not one of this version, or its configuration has another fingerprint.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{path}: no checkpoint, so there is nothing to resume; valid: a DIR of an interrupted run")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["airtune"])
            # A tensor read from the file may lie at any address; a copy lies where torch puts all of its tensors.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: is not a checkpoint ({error}); valid: a DIR of an interrupted run") from error
    if header.get("schema") != SCHEMA:
        raise InputError(f"{path}: checkpoint of schema {header.get('schema')}; this version reads {SCHEMA}")
    if header.get("digest") != digest:
        raise InputError(f"{path}: made by another configuration than run.json holds; valid: an unchanged DIR")
    progress = _Reader(tensors).decode(header["progress"])
    if not isinstance(progress, Progress):
        raise InputError(f"{path}: holds {type(progress).__name__}, not the progress of a run")
    return progress


# ------------------------------------------------------------------------------------------------------------- writing


@dataclass
class _Writer:
    """Collects tensors while it turns a tree into JSON; one object that occurs twice is stored once."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    seen: dict[int, str] = field(default_factory=dict[int, str])
    alive: list[Any] = field(default_factory=list[Any])  # keeps ids valid

    def encode(self, value: Any) -> Json:
        if value is None or type(value) in (str, bool, int):
            return value
        if type(value) is float:
            return {"float": value.hex()}
        if isinstance(value, np.ndarray):
            return self._array(cast("NDArray[Any]", value))
        if isinstance(value, np.generic):
            return {"scalar": [value.dtype.str, self._array(np.asarray(value))["array"]]}
        if is_dataclass(value) and not isinstance(value, type):
            entries = {entry.name: self.encode(getattr(value, entry.name)) for entry in fields(value)}
            return {"object": _name_of(type(value)), "fields": entries}
        return self._container(value)

    def _container(self, value: Any) -> Json:
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            return {"mapping": [[self.encode(key), self.encode(item)] for key, item in items]}
        for kind, name in ((tuple, "tuple"), (list, "list")):
            if type(value) is kind:
                return {name: [self.encode(item) for item in cast("Iterable[Any]", value)]}
        if isinstance(value, frozenset):
            ordered = sorted(cast("frozenset[Any]", value), key=repr)
            return {"frozenset": [self.encode(item) for item in ordered]}
        return self._tensor(value)

    def _array(self, value: NDArray[Any]) -> dict[str, Json]:
        import torch

        order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
        stored = value if order == "C" else value.T
        name = self._store(value, lambda: torch.from_numpy(np.ascontiguousarray(stored).reshape(stored.shape).copy()))
        return {"array": name, "order": order}

    def _tensor(self, value: Any) -> Json:
        import torch

        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{type(value).__name__} has no place in a checkpoint")
        tensor = value.detach().cpu()
        entry: dict[str, Json] = {"tensor": self._store(value, lambda: tensor.contiguous().clone())}
        if not tensor.is_contiguous() and 0 not in tensor.stride():
            entry["stride"] = list(tensor.stride())  # the same memory order gives the same bits in later sums
        if value.device.type != "cpu":
            entry["device"] = str(value.device)
        return entry

    def _store(self, value: Any, make: Any) -> str:
        if id(value) not in self.seen:
            name = str(len(self.tensors))
            self.tensors[name] = make()
            self.seen[id(value)] = name
            self.alive.append(value)
        return self.seen[id(value)]


def _name_of(kind: type) -> str:
    if kind.__qualname__ != kind.__name__:
        raise TypeError(f"{kind.__qualname__}: only classes at the top of a module have a place in a checkpoint")
    return f"{kind.__module__}:{kind.__name__}"


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Reader:
    tensors: Mapping[str, Tensor]

    def decode(self, value: Json) -> Any:
        if not isinstance(value, dict):
            return value
        entry = cast("dict[str, Json]", value)
        if "float" in entry:
            return float.fromhex(entry["float"])
        if "array" in entry:
            stored = self.tensors[entry["array"]].numpy()
            return stored.T if entry["order"] == "F" else stored
        if "scalar" in entry:
            dtype, name = entry["scalar"]
            return self.tensors[name].numpy().astype(dtype)[()]
        if "tensor" in entry:
            return self._tensor(entry)
        if "object" in entry:
            return self._object(entry)
        return self._container(entry)

    def _container(self, entry: dict[str, Json]) -> Any:
        if "mapping" in entry:
            return {self.decode(key): self.decode(item) for key, item in entry["mapping"]}
        makers: dict[str, Any] = {"tuple": tuple, "list": list, "frozenset": frozenset}
        for name, make in makers.items():
            if name in entry:
                return make(self.decode(item) for item in entry[name])
        raise InputError(f"checkpoint: unknown entry {sorted(entry)}")

    def _tensor(self, entry: dict[str, Json]) -> Any:
        import torch

        tensor = self.tensors[entry["tensor"]]
        if "stride" in entry:
            tensor = torch.empty_strided(tensor.shape, entry["stride"], dtype=tensor.dtype).copy_(tensor)
        return tensor.to(entry["device"]) if "device" in entry else tensor

    def _object(self, entry: dict[str, Json]) -> Any:
        module, _, name = str(entry["object"]).partition(":")
        kind = getattr(sys.modules.get(module), name, None)
        if not (isinstance(kind, type) and is_dataclass(kind)):
            raise InputError(f"checkpoint: {entry['object']} is no class of this version")
        values = {key: self.decode(item) for key, item in entry["fields"].items()}
        known = {f.name: f for f in fields(kind)}
        if set(values) != set(known):
            raise InputError(f"checkpoint: {entry['object']} has other fields in this version")
        made = kind(**{key: item for key, item in values.items() if known[key].init})
        for key, item in values.items():
            if not known[key].init:
                object.__setattr__(made, key, item)
        return made
