"""Device profiles: speed, memory, power and radio of named devices, from a data file that names its sources."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

from airtune.errors import InputError, unknown_name
from airtune.wireless.units import parse_quantity

_NUMBERS = {
    "peak": "FLOP/s",
    "utilisation": "1",
    "memory": "B",
    "transmit_power": "W",
    "receive_power": "W",
}
_MODE_NUMBERS = {"speed": "1", "power": "W"}


@dataclass(frozen=True)
class DeviceMode:
    """A power mode (DVFS): `speed` relative to the first mode, `power` drawn while training, W."""

    name: str
    speed: float
    power: float


@dataclass(frozen=True)
class DeviceProfile:
    """The hardware of one kind of device. SI units.

    Parameters
    ----------
    name, title : short and long name.
    peak_flops_per_second : FP32 FLOP/s (a multiply and an add are two) in the first mode.
    utilisation : share of the peak that training reaches.
    memory_bytes : of the device, shared by everything on it.
    transmit_power : W radiated at most.
    receive_power : W drawn by the radio while it receives.
    modes : power modes, the first is the nominal one.
    sources : field name -> where the number comes from (modes as ``"modes.<name>.<field>"``).
    """

    name: str
    title: str
    peak_flops_per_second: float
    utilisation: float
    memory_bytes: float
    transmit_power: float
    receive_power: float
    modes: tuple[DeviceMode, ...]
    sources: Mapping[str, str]

    @property
    def flops_per_second(self) -> float:
        """Effective training FLOP/s in the first mode: peak times utilisation."""
        return self.peak_flops_per_second * self.utilisation

    @property
    def energy_per_flop(self) -> float:
        """J per FLOP in the first mode: power over effective speed."""
        return self.modes[0].power / self.flops_per_second


def profile_names() -> tuple[str, ...]:
    """Return the names of the profiles that come with airtune."""
    return tuple(sorted(_builtin()))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """Return a profile by name, or the only profile of a TOML file (a path that ends in ``.toml``).

    Raises
    ------
    InputError : an unknown name, an unreadable file, or a field that is missing, without unit or out of range; the
        message names file, profile and field.
    """
    text = str(name_or_path)
    if not text.endswith(".toml"):
        name = text.replace("_", "-").lower()
        if name not in _builtin():
            raise unknown_name("device", text, profile_names())
        return _builtin()[name]
    found = load_profiles(Path(text))
    if len(found) != 1:
        raise InputError(f"{text}: holds {len(found)} profiles ({', '.join(found)}); valid: exactly one")
    return next(iter(found.values()))


def load_profiles(path: Path) -> dict[str, DeviceProfile]:
    """Return all profiles of a TOML file, by name; errors as in `load_profile`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: cannot be read: {problem}") from None
    return _parse(text, str(path))


@lru_cache(maxsize=1)
def _builtin() -> dict[str, DeviceProfile]:
    resource = files("airtune.devices") / "data" / "profiles.toml"
    return _parse(resource.read_text(encoding="utf-8"), "profiles.toml")


def _parse(text: str, origin: str) -> dict[str, DeviceProfile]:
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise InputError(f"{origin}: not valid TOML: {problem}") from None
    sources = cast("dict[str, str]", tables.pop("sources", {}))
    if not isinstance(sources, dict):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"{origin}: sources: must be a table of names and texts")
    return {name: _profile(name, table, sources, f"{origin}: {name}") for name, table in tables.items()}


def _profile(name: str, table: Any, sources: Mapping[str, str], where: str) -> DeviceProfile:
    if not isinstance(table, dict):
        raise InputError(f"{where}: must be a table with {', '.join(_NUMBERS)} and modes")
    fields = cast("dict[str, Any]", table)
    _only(fields, {"title", "modes", *_NUMBERS}, where)
    origin: dict[str, str] = {}
    number = {key: _number(fields, key, unit, sources, origin, where) for key, unit in _NUMBERS.items()}
    if number["utilisation"] > 1.0:
        raise InputError(f"{where}: utilisation: must be at most 1; got {number['utilisation']:g}")
    raw_modes = fields.get("modes")
    if not isinstance(raw_modes, list) or not raw_modes:
        raise InputError(f"{where}: modes: at least one mode with name, speed and power is needed")
    modes = tuple(_mode(m, i, sources, origin, where) for i, m in enumerate(cast("list[Any]", raw_modes)))
    if modes[0].speed != 1.0:
        raise InputError(f"{where}: modes.{modes[0].name}.speed: the first mode has speed 1; got {modes[0].speed:g}")
    return DeviceProfile(
        name=name,
        title=str(fields.get("title", name)),
        peak_flops_per_second=number["peak"],
        utilisation=number["utilisation"],
        memory_bytes=number["memory"],
        transmit_power=number["transmit_power"],
        receive_power=number["receive_power"],
        modes=modes,
        sources=origin,
    )


def _mode(mode: Any, row: int, sources: Mapping[str, str], origin: dict[str, str], where: str) -> DeviceMode:
    if not isinstance(mode, dict) or not isinstance(cast("dict[str, Any]", mode).get("name"), str):
        raise InputError(f"{where}: modes: row {row + 1} needs a name, a speed and a power")
    fields = cast("dict[str, Any]", mode)
    name = f"modes.{fields['name']}"
    _only(fields, {"name", *_MODE_NUMBERS}, f"{where}: {name}")
    found: dict[str, str] = {}
    number = {
        key: _number(fields, key, unit, sources, found, f"{where}: {name}") for key, unit in _MODE_NUMBERS.items()
    }
    origin.update({f"{name}.{key}": text for key, text in found.items()})
    return DeviceMode(str(fields["name"]), number["speed"], number["power"])


def _number(
    fields: Mapping[str, Any], key: str, unit: str, sources: Mapping[str, str], origin: dict[str, str], where: str
) -> float:
    """Return one number in SI units and note its source."""
    entry = fields.get(key)
    if not isinstance(entry, dict):
        raise InputError(f"{where}: {key}: must be {{ value, unit, source }}")
    parts = cast("dict[str, Any]", entry)
    for part in ("value", "unit", "source"):
        if part not in parts:
            raise InputError(f"{where}: {key}: has no {part}; valid: {{ value, unit, source }}")
    _only(parts, {"value", "unit", "source"}, f"{where}: {key}")
    suffix = "" if parts["unit"] == "1" else str(parts["unit"])
    value = parse_quantity(f"{parts['value']} {suffix}", unit, f"{where}: {key}")
    if not 0.0 < value < float("inf"):
        raise InputError(f"{where}: {key}: must be positive and finite; got {parts['value']!r}")
    origin[key] = sources.get(str(parts["source"]), str(parts["source"]))
    return value


def _only(fields: Mapping[str, Any], valid: set[str], where: str) -> None:
    for key in fields:
        if key not in valid:
            raise unknown_name(where, key, valid)
