"""Device profiles: every number has a unit and a source; bad files are named by file, profile and field."""

from __future__ import annotations

import pytest

from airtune.devices.calibrate import Calibration, measure, measure_peak, write_profile
from airtune.devices.profiles import load_profile, load_profiles, profile_names
from airtune.errors import InputError

GOOD = """
[sources]
sheet = "a data sheet"
[box]
title = "A box"
peak = { value = 1, unit = "TFLOP/s", source = "sheet" }
utilisation = { value = 0.25, unit = "1", source = "sheet" }
memory = { value = 4, unit = "GB", source = "sheet" }
transmit_power = { value = 23, unit = "dBm", source = "sheet" }
receive_power = { value = 900, unit = "mW", source = "sheet" }
[[box.modes]]
name = "full"
speed = { value = 1.0, unit = "1", source = "sheet" }
power = { value = 10, unit = "W", source = "sheet" }
[[box.modes]]
name = "half"
speed = { value = 50, unit = "%", source = "sheet" }
power = { value = 4, unit = "W", source = "our own" }
"""


def write(path, text):
    file = path / "box.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_promised_devices_are_there() -> None:
    wanted = {"jetson-tx2", "jetson-xavier-nx", "jetson-agx-xavier", "jetson-orin-nano", "raspberry-pi-5"}
    assert wanted <= set(profile_names())
    assert len(set(profile_names()) - wanted) >= 2


@pytest.mark.parametrize("name", profile_names())
def test_each_profile_is_sane_and_sourced(name) -> None:
    p = load_profile(name)
    assert 1e10 < p.flops_per_second < 1e12
    assert p.flops_per_second == p.peak_flops_per_second * p.utilisation
    assert 1e9 < p.memory_bytes < 1e11
    assert 0.05 < p.transmit_power < 0.5
    assert 1e-12 < p.energy_per_flop < 1e-9
    assert p.modes[0].speed == 1.0
    for slower in p.modes[1:]:
        assert 0.0 < slower.speed < 1.0
        assert slower.power < p.modes[0].power
    fields = {"peak", "utilisation", "memory", "transmit_power", "receive_power"}
    fields |= {f"modes.{m.name}.{part}" for m in p.modes for part in ("speed", "power")}
    assert set(p.sources) == fields
    assert all(len(source) > 20 for source in p.sources.values())


def test_a_file_is_read_with_its_units(tmp_path) -> None:
    p = load_profile(write(tmp_path, GOOD))
    assert (p.name, p.title, p.flops_per_second, p.memory_bytes) == ("box", "A box", 0.25e12, 4e9)
    assert p.receive_power == pytest.approx(0.9)
    assert p.modes[1].speed == 0.5
    assert p.sources["modes.half.power"] == "our own"
    assert p.energy_per_flop == pytest.approx(4e-11)


def test_names_take_underscores_and_unknown_ones_are_listed() -> None:
    assert load_profile("jetson_tx2") is load_profile("jetson-tx2")
    with pytest.raises(InputError, match=r"device: unknown name 'jetson-tx3' \(did you mean 'jetson-tx2'"):
        load_profile("jetson-tx3")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('peak = { value = 1, unit = "TFLOP/s", ', "peak = { value = 1, ", r"box: peak: has no unit"),
        (
            'memory = { value = 4, unit = "GB", source = "sheet" }',
            "",
            r"box: memory: must be \{ value, unit, source \}",
        ),
        ("value = 0.25", "value = 1.25", r"box: utilisation: must be at most 1"),
        ("value = 0.25", "value = -1", r"box: utilisation: must be positive"),
        ('unit = "GB"', 'unit = "MHz"', r"box: memory: cannot read .* valid: .*GiB"),
        ('"GB", source = "sheet"', '"GB"', r"box: memory: has no source"),
        ("value = 4, unit", 'value = "nan", unit', r"box: memory: cannot read"),
        ('title = "A box"', 'titel = "A box"', r"box: unknown name 'titel' \(did you mean 'title'"),
        ('name = "half"', 'label = "half"', r"box: modes: row 2 needs a name"),
        ("value = 1.0", "value = 0.9", r"modes\.full\.speed: the first mode has speed 1"),
        ("[box]", "[box", r"not valid TOML"),
    ],
)
def test_bad_files_name_file_profile_and_field(tmp_path, old, new, words) -> None:
    assert old in GOOD
    with pytest.raises(InputError, match=words) as caught:
        load_profile(write(tmp_path, GOOD.replace(old, new, 1)))
    assert "box.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_or_hold_several(tmp_path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        load_profile(tmp_path / "none.toml")
    second = GOOD.partition("[box]")[2].replace("box.", "other.")
    several = write(tmp_path, GOOD + "[other]" + second)
    assert set(load_profiles(several)) == {"box", "other"}
    with pytest.raises(InputError, match="holds 2 profiles"):
        load_profile(several)


class Clock:
    """A clock that advances by what the work says it takes."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def test_calibration_divides_counted_flops_by_the_median_step() -> None:
    clock, durations = Clock(), iter([9.0, 0.2, 0.1, 0.3])

    def step() -> None:
        clock.now += next(durations)

    found = measure(step, 4e9, clock, repeats=3, warmup=1)
    assert found.seconds == pytest.approx(0.201)
    assert found.flops_per_second == pytest.approx(4e9 / 0.201)
    assert found.spread == pytest.approx(0.2 / 0.201)
    assert found.peak_flops_per_second == pytest.approx(2 * 1024**3 / 0.001)
    assert 0 < found.utilisation <= 1


def test_a_measured_profile_can_be_read_back(tmp_path) -> None:
    found = Calibration(3e10, 1.2e11, 0.5, 0.04)
    path = tmp_path / "mine.toml"
    write_profile(path, "my-machine", found, memory_bytes=16e9, power=25.0, title='the "grey" one')
    p = load_profile(path)
    assert p.name == "my-machine"
    assert p.flops_per_second == pytest.approx(3e10, rel=1e-5)
    assert p.energy_per_flop == pytest.approx(25.0 / 3e10, rel=1e-5)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: measure(lambda: None, 0.0, Clock()),
        lambda: measure(lambda: None, 1.0, Clock(), repeats=0),
        lambda: measure(lambda: None, 1.0, lambda: 5.0),
        lambda: measure_peak(lambda: 5.0),
    ],
)
def test_calibration_refuses_what_measures_nothing(call) -> None:
    with pytest.raises(InputError):
        call()


@pytest.mark.parametrize(
    ("name", "fields"), [("My Box", {}), ("", {}), ("box", {"power": 0.0}), ("box", {"memory_bytes": -1.0})]
)
def test_bad_profiles_are_not_written(tmp_path, name, fields) -> None:
    arguments = {"memory_bytes": 1e9, "power": 5.0, **fields}
    with pytest.raises(InputError):
        write_profile(tmp_path / "x.toml", name, Calibration(1e9, 1e10, 1.0, 0.0), **arguments)
    assert not list(tmp_path.iterdir())
