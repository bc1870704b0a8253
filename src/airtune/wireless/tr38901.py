"""Path loss, line-of-sight probability and shadowing of 3GPP TR 38.901: UMa, UMi, RMa and InH.

Formulas: tables 7.4.1-1 (path loss, shadowing) and 7.4.2-1 (line of sight); the constants stand in
``data/tr38901.toml``. Outdoor devices; distances, heights and carriers outside the tables' ranges are errors.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError, unknown_name
from airtune.wireless.path_loss import SPEED_OF_LIGHT, check_distance
from airtune.wireless.units import quantity

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]
Constants = dict[str, Any]

_RANGE_SLACK = 1e-9


@dataclass(frozen=True)
class UrbanMacro:
    """UMa: base stations above the roofs. Heights in m.

    The effective environment height is 1 m, which the table gives with probability 1 below a device height of 13 m;
    higher devices are refused.
    """

    base_height: float = quantity("25 m", "m")
    user_height: float = quantity("1.5 m", "m")

    def __post_init__(self) -> None:
        _check_heights(_constants("uma"), self.base_height, self.user_height)

    def loss_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the path loss, dB: two slopes with line of sight, the larger of two laws without."""
        return _urban_loss(_constants("uma"), self, distance, frequency, line_of_sight)

    def line_of_sight_probability(self, distance: Array) -> Array:
        """Return the probability of table 7.4.2-1 (for devices up to 13 m high)."""
        return _street_probability(_constants("uma")["sight"], distance)

    def shadowing_deviation_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the standard deviation, dB."""
        return _two_values(_constants("uma")["shadowing"], line_of_sight)

    def correlation_distance(self, line_of_sight: bool) -> float:
        """Return that of shadowing, m."""
        return float(_constants("uma")["correlation"]["los" if line_of_sight else "nlos"])

    @property
    def line_of_sight_distance(self) -> float:
        """Correlation distance of the line-of-sight state, m."""
        return float(_constants("uma")["sight_correlation"])


@dataclass(frozen=True)
class UrbanMicro:
    """UMi street canyon: base stations below the roofs. Heights in m."""

    base_height: float = quantity("10 m", "m")
    user_height: float = quantity("1.5 m", "m")

    def __post_init__(self) -> None:
        _check_heights(_constants("umi"), self.base_height, self.user_height)

    def loss_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the path loss, dB: two slopes with line of sight, the larger of two laws without."""
        return _urban_loss(_constants("umi"), self, distance, frequency, line_of_sight)

    def line_of_sight_probability(self, distance: Array) -> Array:
        """Return the probability of table 7.4.2-1."""
        return _street_probability(_constants("umi")["sight"], distance)

    def shadowing_deviation_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the standard deviation, dB."""
        return _two_values(_constants("umi")["shadowing"], line_of_sight)

    def correlation_distance(self, line_of_sight: bool) -> float:
        """Return that of shadowing, m."""
        return float(_constants("umi")["correlation"]["los" if line_of_sight else "nlos"])

    @property
    def line_of_sight_distance(self) -> float:
        """Correlation distance of the line-of-sight state, m."""
        return float(_constants("umi")["sight_correlation"])


@dataclass(frozen=True)
class RuralMacro:
    """RMa: large cells. Heights, building height and street width in m."""

    base_height: float = quantity("35 m", "m")
    user_height: float = quantity("1.5 m", "m")
    building_height: float = quantity("5 m", "m")
    street_width: float = quantity("20 m", "m")

    def __post_init__(self) -> None:
        constants = _constants("rma")
        _check_heights(constants, self.base_height, self.user_height)
        _check_range("building_height", self.building_height, constants["building_height_range"], "m")
        _check_range("street_width", self.street_width, constants["street_width_range"], "m")

    def loss_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the path loss, dB: two slopes with line of sight, the larger of two laws without."""
        _check_link(_constants("rma"), distance, frequency)
        direct = np.hypot(distance, self.base_height - self.user_height)
        breaking = self._breakpoint(frequency)
        seen = np.where(
            distance <= breaking,
            self._near(direct, frequency),
            self._near(np.asarray(breaking), frequency) + 40.0 * np.log10(direct / breaking),
        )
        return np.where(line_of_sight, seen, np.maximum(seen, self._hidden(direct, frequency)))

    def line_of_sight_probability(self, distance: Array) -> Array:
        """Return the probability of table 7.4.2-1."""
        sight = _constants("rma")["sight"]
        return np.where(distance <= sight["near"], 1.0, np.exp(-(distance - sight["near"]) / sight["decay"]))

    def shadowing_deviation_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the standard deviation, dB: larger beyond the breakpoint."""
        shadowing = _constants("rma")["shadowing"]
        seen = np.where(distance <= self._breakpoint(frequency), shadowing["los"], shadowing["far"])
        return np.where(line_of_sight, seen, shadowing["nlos"])

    def correlation_distance(self, line_of_sight: bool) -> float:
        """Return that of shadowing, m."""
        return float(_constants("rma")["correlation"]["los" if line_of_sight else "nlos"])

    @property
    def line_of_sight_distance(self) -> float:
        """Correlation distance of the line-of-sight state, m."""
        return float(_constants("rma")["sight_correlation"])

    def _breakpoint(self, frequency: float) -> float:
        return 2.0 * math.pi * self.base_height * self.user_height * frequency / SPEED_OF_LIGHT

    def _near(self, direct: Array, frequency: float) -> Array:
        """Return PL1 of RMa; its first term 20 log10(40 pi d fc / 3) is the loss of free space with c = 3e8 m/s."""
        power = self.building_height**1.72
        free = 20.0 * np.log10(40.0 * math.pi * direct * (frequency / 1e9) / 3.0)
        bend = min(0.03 * power, 10.0) * np.log10(direct) - min(0.044 * power, 14.77)
        return free + bend + 0.002 * math.log10(self.building_height) * direct

    def _hidden(self, direct: Array, frequency: float) -> Array:
        """Return PL' of RMa without line of sight."""
        h, base = self.building_height, math.log10(self.base_height)
        fixed = 161.04 - 7.1 * math.log10(self.street_width) + 7.5 * math.log10(h)
        fixed -= (24.37 - 3.7 * (h / self.base_height) ** 2) * base
        fixed += 20.0 * math.log10(frequency / 1e9) - (3.2 * math.log10(11.75 * self.user_height) ** 2 - 4.97)
        return fixed + (43.42 - 3.1 * base) * (np.log10(direct) - 3.0)


@dataclass(frozen=True)
class IndoorOffice:
    """InH: an office floor, "mixed" or "open". Heights in m."""

    office: Literal["mixed", "open"] = "mixed"
    base_height: float = quantity("3 m", "m")
    user_height: float = quantity("1 m", "m")

    def __post_init__(self) -> None:
        if self.office not in ("mixed", "open"):
            raise unknown_name("office", self.office, ("mixed", "open"))
        _check_heights(_constants("inh"), self.base_height, self.user_height)

    def loss_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the path loss, dB."""
        constants = _constants("inh")
        check_distance(distance)
        direct = np.hypot(distance, self.base_height - self.user_height)
        _check_link(constants, direct, frequency)
        seen = _log_law(constants["los"], direct, frequency)
        return np.where(line_of_sight, seen, np.maximum(seen, _log_law(constants["nlos"], direct, frequency)))

    def line_of_sight_probability(self, distance: Array) -> Array:
        """Return the probability of table 7.4.2-1."""
        sight = _constants("inh")["sight"][self.office]
        middle = np.exp(-(distance - sight["near"]) / sight["decay"])
        far = np.exp(-(distance - sight["middle"]) / sight["far_decay"]) * sight["far_factor"]
        return np.where(distance <= sight["near"], 1.0, np.where(distance < sight["middle"], middle, far))

    def shadowing_deviation_db(self, distance: Array, frequency: float, line_of_sight: Flags) -> Array:
        """Return the standard deviation, dB."""
        return _two_values(_constants("inh")["shadowing"], line_of_sight)

    def correlation_distance(self, line_of_sight: bool) -> float:
        """Return that of shadowing, m."""
        return float(_constants("inh")["correlation"]["los" if line_of_sight else "nlos"])

    @property
    def line_of_sight_distance(self) -> float:
        """Correlation distance of the line-of-sight state, m."""
        return float(_constants("inh")["sight_correlation"])


@lru_cache(maxsize=1)
def _tables() -> dict[str, Constants]:
    text = (files("airtune.wireless") / "data" / "tr38901.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _constants(scenario: str) -> Constants:
    return _tables()[scenario]


def _urban_loss(
    constants: Constants, model: UrbanMacro | UrbanMicro, distance: Array, frequency: float, line_of_sight: Flags
) -> Array:
    """Return the loss of UMa and UMi, which differ in constants only."""
    _check_link(constants, distance, frequency)
    drop = model.base_height - model.user_height
    direct = np.hypot(distance, drop)
    near, far = constants["los"], constants["los"]
    breaking = 4.0 * (model.base_height - 1.0) * (model.user_height - 1.0) * frequency / SPEED_OF_LIGHT
    beyond = _log_law({**far, "distance_slope": far["far_slope"]}, direct, frequency)
    beyond = beyond + far["break_slope"] * math.log10(breaking**2 + drop**2)
    seen = np.where(distance <= breaking, _log_law(near, direct, frequency), beyond)
    hidden = _log_law(constants["nlos"], direct, frequency)
    hidden = hidden + constants["nlos"]["height_slope"] * (model.user_height - 1.5)
    return np.where(line_of_sight, seen, np.maximum(seen, hidden))


def _log_law(law: Constants, direct: Array, frequency: float) -> Array:
    in_frequency = law["frequency_slope"] * math.log10(frequency / 1e9)
    return law["constant"] + law["distance_slope"] * np.log10(direct) + in_frequency


def _street_probability(sight: Constants, distance: Array) -> Array:
    share = sight["near"] / np.maximum(distance, sight["near"])
    return share + np.exp(-distance / sight["decay"]) * (1.0 - share)


def _two_values(values: Constants, line_of_sight: Flags) -> Array:
    return np.where(line_of_sight, float(values["los"]), float(values["nlos"]))


def _check_heights(constants: Constants, base_height: float, user_height: float) -> None:
    _check_range("base_height", base_height, constants["base_height_range"], "m")
    _check_range("user_height", user_height, constants["user_height_range"], "m")


def _check_link(constants: Constants, distance: Array, frequency: float) -> None:
    _check_range("carrier_frequency", frequency / 1e9, constants["frequency_range"], "GHz")
    check_distance(distance)
    if distance.size:
        for end in (float(distance.min()), float(distance.max())):
            _check_range("distance", end, constants["distance_range"], "m")


def _check_range(name: str, value: float, valid: list[float], unit: str) -> None:
    low, high = valid
    if not low * (1.0 - _RANGE_SLACK) <= value <= high * (1.0 + _RANGE_SLACK):
        raise InputError(f"{name}: {value:g} {unit} is outside the model; valid: {low:g} to {high:g} {unit}")
