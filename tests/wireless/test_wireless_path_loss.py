"""Path loss: values worked out by hand from the tables, sionna's own code, and ranges."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.wireless.channel import Channel
from airtune.wireless.geometry import Disc
from airtune.wireless.path_loss import FreeSpace, LogDistance, Table
from airtune.wireless.tr38901 import IndoorOffice, RuralMacro, UrbanMacro, UrbanMicro

THREE_GPP = [UrbanMacro(), UrbanMicro(), RuralMacro(), IndoorOffice("mixed"), IndoorOffice("open")]
SIMPLE = [LogDistance(), FreeSpace(), Table((1.0, 200.0), (40.0, 130.0), shadowing_db=2.0)]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "path_loss_against_sionna.py"


def one(model, distance, frequency, sight=True) -> float:
    return float(model.loss_db(np.array([distance]), frequency, np.array([sight]))[0])


def test_values_worked_out_by_hand() -> None:
    """Each from the formula of table 7.4.1-1, with d3D from the heights, on a pocket calculator."""
    assert one(UrbanMacro(), 100.0, 3.5e9) == pytest.approx(28 + 22 * np.log10(102.724) + 20 * np.log10(3.5), abs=1e-3)
    assert one(UrbanMacro(), 100.0, 3.5e9) == pytest.approx(83.138, abs=2e-3)
    assert one(UrbanMacro(), 1000.0, 3.5e9, False) == pytest.approx(141.67, abs=0.01)
    assert one(UrbanMicro(), 100.0, 28e9) == pytest.approx(103.376, abs=0.01)
    assert one(UrbanMicro(), 100.0, 28e9, False) == pytest.approx(123.87, abs=0.01)
    assert one(IndoorOffice(), 10.0, 28e9, False) == pytest.approx(91.96, abs=0.01)
    assert one(FreeSpace(base_height=1.5), 1000.0, 2.4e9) == pytest.approx(100.05, abs=0.01)
    assert one(LogDistance(), 1000.0, 2e9) == 128.1
    assert one(LogDistance(), 100.0, 2e9) == pytest.approx(128.1 - 37.6)


def test_breakpoint_of_uma_is_continuous_up_to_the_tables_own_rounding() -> None:
    breaking = 4 * 24 * 0.5 * 3.5e9 / 299_792_458.0
    near, far = one(UrbanMacro(), breaking * 0.999999, 3.5e9), one(UrbanMacro(), breaking * 1.000001, 3.5e9)
    assert abs(near - far) < 0.01


@pytest.mark.parametrize("model", [*THREE_GPP, *SIMPLE], ids=str)
@pytest.mark.parametrize("sight", [True, False])
def test_loss_grows_with_distance_and_obstruction_never_helps(model, sight) -> None:
    distance = np.geomspace(12.0, 140.0, 300)
    loss = model.loss_db(distance, 2e9, np.full(300, sight))
    assert (np.diff(loss) > 0).all()
    assert (model.loss_db(distance, 2e9, np.zeros(300, bool)) >= model.loss_db(distance, 2e9, np.ones(300, bool))).all()
    if model in THREE_GPP:
        assert (model.loss_db(distance, 4e9, np.full(300, sight)) > loss).all()


@pytest.mark.parametrize("model", THREE_GPP, ids=str)
def test_line_of_sight_probability_is_one_near_falls_and_stays_in_range(model) -> None:
    chance = model.line_of_sight_probability(np.geomspace(1.0, 5000.0, 2000))
    assert chance[0] == 1.0
    assert ((chance >= 0) & (chance <= 1)).all()
    assert (np.diff(chance) <= 0.005).all()  # the table itself steps up by 0.003 at 49 m of an open office
    assert chance[-1] < 0.1


@pytest.mark.parametrize(
    ("model", "distance", "probability"),
    [
        (UrbanMicro(), 100.0, 0.18 + np.exp(-100 / 36) * 0.82),
        (UrbanMacro(), 100.0, 0.18 + np.exp(-100 / 63) * 0.82),
        (RuralMacro(), 510.0, np.exp(-0.5)),
        (IndoorOffice(), 6.5, 0.32),
        (IndoorOffice("open"), 40.4, np.exp(-0.5)),
    ],
    ids=str,
)
def test_line_of_sight_probability_of_the_table(model, distance, probability) -> None:
    assert model.line_of_sight_probability(np.array([distance]))[0] == pytest.approx(probability)


def test_the_share_of_devices_in_line_of_sight_is_the_probability() -> None:
    channel = Channel(path_loss=UrbanMicro(), area=Disc(201.0, 199.0), shadowing=False, carrier_frequency=3.5e9)
    seen, hidden = one(UrbanMicro(), 200.0, 3.5e9), one(UrbanMicro(), 200.0, 3.5e9, False)
    share = np.mean(
        [
            np.mean(-10 * np.log10(channel.mean_gain(seed, np.arange(500), 0.0)) < (seen + hidden) / 2)
            for seed in range(25)
        ]
    )
    assert share == pytest.approx(UrbanMicro().line_of_sight_probability(np.array([200.0]))[0], abs=0.05)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: one(UrbanMacro(), 100.0, 0.4e9), "carrier_frequency: 0.4 GHz .* valid: 0.5 to 100 GHz"),
        (lambda: one(RuralMacro(), 100.0, 31e9), "carrier_frequency.*30 GHz"),
        (lambda: one(UrbanMacro(), 9.0, 2e9), "distance: 9 m .* valid: 10 to 5000 m"),
        (lambda: one(UrbanMicro(), 5001.0, 2e9), "distance"),
        (lambda: one(IndoorOffice(), 151.0, 2e9), "distance"),
        (lambda: one(UrbanMacro(), 0.0, 2e9), "distance"),
        (lambda: one(IndoorOffice(), 0.0, 2e9), "distance: must be positive"),
        (lambda: one(LogDistance(), 0.0, 2e9), "distance: must be positive"),
        (lambda: one(LogDistance(), np.nan, 2e9), "distance: must be positive"),
        (lambda: one(FreeSpace(), 10.0, -1.0), "carrier_frequency: must be positive"),
        (lambda: UrbanMacro(user_height=-1.5), "user_height: -1.5 m .* valid: 1.5 to 13 m"),
        (lambda: UrbanMicro(base_height=0.0), "base_height"),
        (lambda: RuralMacro(street_width=1.0), "street_width"),
        (lambda: FreeSpace(base_height=-2.0), "base_height"),
        (lambda: IndoorOffice("closed"), "office: unknown name 'closed'.*mixed, open"),
        (lambda: Table((1.0,), (2.0,)), "two rows"),
        (lambda: Table((2.0, 1.0), (2.0, 3.0)), "increasing"),
        (lambda: one(SIMPLE[2], 300.0, 2e9), "outside the path-loss table; valid: 1 to 200 m"),
        (lambda: Channel(path_loss=IndoorOffice()), "distance"),
        (lambda: Channel(path_loss=UrbanMacro(), carrier_frequency=0.1e9), "carrier_frequency"),
    ],
)
def test_out_of_range_is_one_line_with_the_valid_range(call, words) -> None:
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def _comparison():
    spec = importlib.util.spec_from_file_location("path_loss_against_sionna", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", list(_comparison().MODELS))
@pytest.mark.filterwarnings("ignore")
def test_sionna_computes_the_same(name) -> None:
    """An independent implementation of the same clauses: within 0.1 dB and 1e-6 of probability, over a grid."""
    pytest.importorskip("sionna", reason="extra 'sionna' (sionna-no-rt) is not installed")
    comparison = _comparison()
    rows = comparison.differences(comparison.MODELS[name])
    assert len(rows) == 2 * len(comparison.FREQUENCIES)
    assert max(row["loss_db"] for row in rows) < 0.1
    assert max(row["probability"] for row in rows) < 1e-6
