"""Converters and quantities with units."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.errors import InputError
from airtune.wireless.units import (
    db_to_linear,
    dbm_to_watt,
    linear_to_db,
    parse_quantity,
    quantity,
    valid_units,
    watt_to_dbm,
)


@given(st.floats(-200, 200))
def test_decibels_there_and_back(x) -> None:
    assert linear_to_db(db_to_linear(x)) == pytest.approx(x, abs=1e-9)
    assert watt_to_dbm(dbm_to_watt(x)) == pytest.approx(x, abs=1e-9)


def test_known_values() -> None:
    assert dbm_to_watt(30.0) == pytest.approx(1.0)
    assert db_to_linear(3.0) == pytest.approx(1.995, abs=1e-3)
    assert linear_to_db(0.0) == -np.inf


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("10 MHz", "Hz", 10e6),
        ("10MHz", "Hz", 10e6),
        ("1e7", "Hz", 1e7),
        ("1_000 kHz", "Hz", 1e6),
        ("23 dBm", "W", 0.19952623),
        ("-174 dBm/Hz", "W/Hz", 3.981e-21),
        ("5 min", "s", 300.0),
        ("50 ms", "s", 0.05),
        ("2 h", "s", 7200.0),
        ("100 m", "m", 100.0),
        ("1.5 km", "m", 1500.0),
        ("36 km/h", "m/s", 10.0),
        ("8 GB", "B", 8e9),
        ("8 GiB", "B", 8 * 2**30),
        ("3 Mbit/s", "bit/s", 3e6),
        ("3 Mbps", "bit/s", 3e6),
        ("1 MB/s", "bit/s", 8e6),
        ("1500 B", "bit", 12_000.0),
        ("9 dB", "1", 7.943),
        ("30 %", "1", 0.3),
        ("2 Wh", "J", 7200.0),
        ("1.3 TFLOP/s", "FLOP/s", 1.3e12),
        ("20 pJ/FLOP", "J/FLOP", 2e-11),
        ("inf", "s", np.inf),
        (4, "Hz", 4.0),
        (2.5, "s", 2.5),
    ],
)
def test_quantities(text, unit, value) -> None:
    assert parse_quantity(text, unit) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "unit"),
    [("10 MHz", "W"), ("ten", "Hz"), ("", "Hz"), ("5 m", "s"), ("3 dB", "W"), ("nan", "s"), (float("nan"), "s")],
)
def test_errors_name_field_value_and_valid_units(text, unit) -> None:
    with pytest.raises(InputError, match=r"wireless\.x: cannot read .*; valid:") as caught:
        parse_quantity(text, unit, "wireless.x")
    for name in valid_units(unit):
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_boolean_is_no_quantity() -> None:
    with pytest.raises(InputError):
        parse_quantity(True, "Hz")


def test_fields_carry_their_unit() -> None:
    @dataclasses.dataclass
    class Thing:
        width: float = quantity("2 MHz", "Hz")

    assert Thing().width == 2e6
    assert dataclasses.fields(Thing)[0].metadata["unit"] == "Hz"
