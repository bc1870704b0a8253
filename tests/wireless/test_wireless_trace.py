"""Measured links: exact rates, exact transfers, and bad files named by file, row and field."""

from __future__ import annotations

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.wireless.rate import achievable_rate
from airtune.wireless.trace import TraceChannel

HEADER = "time_s,client,uplink_bit_per_s,downlink_bit_per_s\n"


def write(path, rows, header=HEADER):
    file = path / "trace.csv"
    file.write_text(header + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(("direction", "rate"), [("uplink", [5.2e6, 1.8e6]), ("downlink", [31e6, 12.5e6])])
def test_at_the_references_the_link_carries_what_was_measured(direction, rate) -> None:
    channel = TraceChannel(snr_gap=2.0)
    power = channel.reference_power if direction == "uplink" else channel.base_station_power
    gain = channel.gain(0, [0, 1], 5.0, direction)
    carried = achievable_rate(channel.reference_bandwidth, power, gain, channel.noise_density(direction), 2.0)
    np.testing.assert_allclose(carried, rate, rtol=1e-12)
    np.testing.assert_array_equal(channel.measured_rate([0, 1], 5.0, direction), rate)


def test_a_transfer_over_steps_and_over_the_end(tmp_path) -> None:
    """1 Mbit/s for 10 s, 3 Mbit/s for 10 s, again and again: 40 Mbit a lap."""
    path = write(tmp_path, ["0,0,1e6,1e6", "10,0,3e6,1e6"])
    c = TraceChannel(path)

    def took(bits, start=0.0):
        return float(c.transfer_seconds(0, [0], start, bits, c.reference_bandwidth, c.reference_power)[0])

    assert took(5e6) == pytest.approx(5.0)
    assert took(10e6) == pytest.approx(10.0)
    assert took(13e6) == pytest.approx(11.0)
    assert took(40e6) == pytest.approx(20.0)
    assert took(41e6) == pytest.approx(21.0)
    assert took(93e6, start=5.0) == pytest.approx(47 + 2 / 3)  # 5 + 30 Mbit, a lap of 40, 10, 8
    assert took(6e6, start=25.0) == pytest.approx(5 + 1 / 3)
    held = TraceChannel(path, after_end="hold")
    assert float(held.transfer_seconds(0, [0], 500.0, 30e6, 1e6, held.reference_power)[0]) == pytest.approx(10.0)


def test_a_dead_link_never_finishes_and_a_pause_is_waited_out(tmp_path) -> None:
    path = write(tmp_path, ["0,0,1e6,1e6", "10,0,0,0", "20,0,1e6,1e6", "0,1,0,1e6", "5,1,0,1e6"])
    c = TraceChannel(path)
    seconds = c.transfer_seconds(0, [0, 1], 8.0, 4e6, c.reference_bandwidth, c.reference_power)
    assert seconds[0] == pytest.approx(14.0)
    assert np.isinf(seconds[1])


def test_half_the_reference_band_gives_less_but_more_than_half() -> None:
    c = TraceChannel()
    full, half = (c.transfer_seconds(0, [0], 0.0, 1e5, w * c.reference_bandwidth, c.reference_power) for w in (1, 0.5))
    assert full < half < 2 * full


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["0,0,1e6,nan"], r"trace\.csv: row 2: downlink_bit_per_s: .*nan"),
        (["0,0,1e6,1e6", "1,0,fast,1e6"], r"row 3: uplink_bit_per_s: .*'fast'"),
        (["0,0,-1,1e6"], r"row 2: uplink_bit_per_s"),
        (["0,0,1e6,inf"], r"row 2: downlink_bit_per_s"),
        (["0,0,1e6,1e6", "5,0,1e6,1e6", "5,0,2e6,1e6"], r"row 4: time_s: must increase; client 0 has 5 before, got 5"),
        (["0,0,1e6,1e6", "9,0,1e6,1e6", "5,0,2e6,1e6"], r"row 4: time_s: must increase"),
        (["1,0,1e6,1e6"], r"row 2: time_s: client 0 must start at 0"),
        (["0,x,1e6,1e6"], r"row 2: client: unknown client 'x'"),
        (["0,-1,1e6,1e6"], r"row 2: client: unknown client"),
        (["0,0,1e6,1e6", "0,2,1e6,1e6"], r"client: no rows for client 1; valid: rows for 0 to 2"),
        (["0,0,1e6"], r"row 2: has 3 fields; valid: 4"),
        ([], r"has no rows"),
    ],
)
def test_bad_rows_are_named_by_file_row_and_field(tmp_path, rows, words) -> None:
    with pytest.raises(InputError, match=words) as caught:
        TraceChannel(write(tmp_path, rows))
    assert "trace.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_headers_missing_files_and_strangers(tmp_path) -> None:
    with pytest.raises(InputError, match=r"row 1: columns are time, client; valid: time_s, client, uplink"):
        TraceChannel(write(tmp_path, [], "time,client\n"))
    with pytest.raises(InputError, match=r"nowhere\.csv: cannot be read"):
        TraceChannel(str(tmp_path / "nowhere.csv"))
    path = write(tmp_path, ["0,0,1e6,1e6", "0,1,1e6,1e6"])
    with pytest.raises(InputError, match=r"row 3: client: unknown client '1'; valid: 0 to 0"):
        TraceChannel(path, clients=1)
    with pytest.raises(InputError, match=r"no rows for client 2"):
        TraceChannel(path, clients=3)
    with pytest.raises(InputError, match=r"no rows for client 7; valid: 0 to 1"):
        TraceChannel(path).gain(0, [0, 7], 0.0)
    with pytest.raises(InputError, match=r"after_end: unknown name 'stop'"):
        TraceChannel(path, after_end="stop")
    with pytest.raises(InputError, match=r"reference_bandwidth: must be positive"):
        TraceChannel(path, reference_bandwidth=0.0)
