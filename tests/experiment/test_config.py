"""Experiment files: every method and every part goes to TOML and back; mistakes are one line."""

from __future__ import annotations

import json
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.devices.profiles import profile_names
from airtune.errors import InputError
from airtune.experiment.config import KEYS, ExperimentFile, read_experiment, read_file
from airtune.experiment.hints import choices_of, field_names
from airtune.experiment.sections import Engine, Evaluation, FleetConfig, StopLimits
from airtune.experiment.toml import write_toml
from airtune.methods import method_class, method_names
from airtune.training.data import DataConfig
from airtune.training.partition import PARTITIONERS
from airtune.training.shapes import ModelConfig
from airtune.types import LocalTraining
from airtune.wireless.channel import Channel
from tiny_experiment import write_experiment

BASE: dict[str, Any] = {"fleet": {"devices": {"jetson-tx2": 2}}}
NESTED = {"name": "composed", "planner": {"type": "legend", "cohort_size": 2}}


def file(**sections: Any) -> ExperimentFile:
    return ExperimentFile("test", {**BASE, **sections})


def fields_of(name: str) -> dict[str, Any]:
    """Return what a method needs besides its defaults."""
    needed: dict[str, dict[str, Any]] = {
        "deadline": {"method": {"type": "legend", "slope": 0.5}, "seconds": 3.0},
        "first-arrivals": {"method": "fedit", "updates": 2},
        "staleness": {"method": {"type": "fedit"}},
    }
    return {**needed.get(name, {}), "name": name}


@pytest.mark.parametrize("name", method_names())
def test_every_method_goes_to_toml_and_back(name: str) -> None:
    model = {"adapter": getattr(method_class(name), "only_adapter", "lora")}
    experiment = file(method=fields_of(name), model=model, training={"learning_rate": 0.02}).experiment()
    plain = experiment.plain()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert read_experiment(plain, experiment.label) == experiment
    assert read_experiment(tomllib.loads(write_toml(plain)), experiment.label) == experiment


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"partition": "shard", "name": "imdb"}},
        {"data": {"partition": {"type": "dirichlet", "alpha": 0.1}}},
        {"wireless": {"path_loss": "urban-macro", "carrier_frequency": "3.5 GHz", "block": 0.05}},
        {"wireless": {"path_loss": {"type": "free-space"}, "fading": {"type": "rician", "k_factor": "6 dB"}}},
        {
            "wireless": {
                "area": {"type": "annulus", "outer": "1 km"},
                "knowledge": {"mode": "mean"},
                "downlink": "unicast",
            }
        },
        {"fleet": {"devices": ["pixel-8", "pixel-8"], "mode_period": "5 min", "availability": {"type": "bernoulli"}}},
        {"training": {"local_steps": "none", "epochs": 2, "penalties": [{"type": "proximal-penalty", "weight": 0.1}]}},
        {"compressor": {"type": "dense", "precision": "bf16"}},
        {"stop": {"rounds": "none", "fleet_seconds": "2 min", "target": 0.8}},
        {
            "method": {
                "name": "composed",
                "aggregator": "frobenius-weighted",
                "planner": {"type": "separate", "sampler": "all"},
            }
        },
        {"method": NESTED},
    ],
)
def test_parts_go_to_toml_and_back(sections: dict[str, Any]) -> None:
    experiment = file(**sections).experiment()
    plain = experiment.plain()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert read_experiment(tomllib.loads(write_toml(plain)), experiment.label) == experiment


def test_units_are_read_where_a_field_has_one() -> None:
    wireless = {"uplink_bandwidth": "5 MHz", "base_station_power": "40 dBm", "thermal_noise": "-170 dBm/Hz"}
    channel = file(wireless=wireless).experiment().wireless.channel
    assert channel.uplink_bandwidth == 5e6
    assert channel.base_station_power == pytest.approx(10.0)
    assert isinstance(channel, Channel)
    assert channel.thermal_noise == pytest.approx(1e-20)


def test_training_is_the_default_of_the_methods_training() -> None:
    section = {"learning_rate": 0.02, "batch_size": 4, "threads": 1}
    method = {"name": "fedit", "training": {"batch_size": 2}}
    experiment = file(training=section, method=method).experiment()
    assert experiment.method.training == LocalTraining(learning_rate=0.02, batch_size=2)  # type: ignore[attr-defined]
    assert experiment.plain()["method"]["training"] == {"batch_size": 2}
    outer: Any = file(training=section, method=NESTED).experiment().method
    assert outer.planner.training == outer.training == LocalTraining(learning_rate=0.02, batch_size=4)


def test_the_compressor_section_reaches_every_method() -> None:
    for name in ("fedit", "legend"):
        method: Any = file(compressor={"type": "dense", "precision": "fp16"}).experiment(name).method
        assert method.compressor.precision == "fp16"


def test_overrides_come_last_and_minus_is_underscore(tmp_path: Path) -> None:
    path = write_experiment(tmp_path)
    overrides = {
        "training.learning_rate": "0.1",
        "fleet.devices.jetson_tx2": "7",
        "data.partition": "iid",
        "method.cohort_size": "5",
        "stop.rounds": "9",
    }
    experiment = read_file(path, overrides).experiment()
    assert experiment.training.learning_rate == 0.1
    assert experiment.fleet.devices == {"jetson-tx2": 7, "raspberry-pi-5": 2, "jetson-orin-nano": 2}
    assert experiment.partition == PARTITIONERS["iid"]()
    assert experiment.method.cohort_size == 5  # type: ignore[attr-defined]
    assert experiment.stop.rounds == 9
    assert read_file(path, {"data.partition.alpha": "3"}).experiment().partition == PARTITIONERS["dirichlet"](3.0)


def test_tables_on_the_command_line_are_json_or_toml() -> None:
    for text in ('{"pixel-8": 3}', "{ pixel-8 = 3 }"):
        assert ExperimentFile("x", BASE, {"fleet.devices": text}).experiment().fleet.devices == {"pixel-8": 3}


@pytest.mark.parametrize(
    ("field", "value"), [("memory_budget", 1e9), ("micro_batch_tokens", 512), ("checkpointing", True)]
)
def test_keys_of_the_cohort_engine_are_not_ignored_by_the_twin(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f'{field}: the twin has none; valid: leave it out, or engine = "cohort"'):
        Engine(**{field: value})
    assert getattr(Engine(engine="cohort", **{field: value}), field) == value


def test_an_override_may_be_an_inline_table(tmp_path: Path) -> None:
    path = write_experiment(tmp_path)
    text = '{ type = "dirichlet", alpha = 0.25 }'
    found = read_file(path, {"data.partition": text}).experiment("fedit").partition
    assert type(found) is PARTITIONERS["dirichlet"]
    assert (
        found
        == read_file(path, {"data.partition": "dirichlet", "data.partition.alpha": "0.25"})
        .experiment("fedit")
        .partition
    )
    private = read_file(path, {"training.privacy": "{ largest_norm = 0.5 }"}).experiment("fedit").training.privacy
    assert private is not None and private.largest_norm == 0.5
    assert read_file(path, {"fleet.devices": '{"pixel-8": 3}'}).experiment("fedit").fleet.clients == 3  # JSON
    with pytest.raises(InputError, match=r"data\.partition: .*no inline table"):
        read_file(path, {"data.partition": "{ type = dirichlet }"})


def test_an_override_makes_a_name_a_table() -> None:
    made = ExperimentFile("x", {**BASE, "method": "fedit"}, {"method.cohort_size": "1"}).experiment()
    assert made.method.cohort_size == 1  # type: ignore[attr-defined]


def test_variants_are_names(tmp_path: Path) -> None:
    made = read_file(write_experiment(tmp_path))
    slow: Any = made.experiment("slow")
    assert (slow.label, slow.method_name, slow.method.cohort_size) == ("slow", "fedit", 2)
    assert slow.training.learning_rate == slow.method.training.learning_rate == 1e-4
    plain = made.experiment()
    assert (slow.data, slow.fleet, slow.wireless, slow.seed) == (plain.data, plain.fleet, plain.wireless, plain.seed)
    assert read_experiment(slow.plain(), "slow") == slow


def test_minus_and_underscore_are_equal_in_names_of_methods() -> None:
    made = file(method={"name": "ffa_lora", "cohort_size": 1})
    assert made.experiment() == made.experiment("ffa_lora") == made.experiment("ffa-lora")
    assert made.experiment().label == made.experiment().method_name == "ffa-lora"
    assert made.experiment().method.cohort_size == 1  # type: ignore[attr-defined]


def test_a_variant_of_the_files_method_keeps_its_fields_and_another_method_does_not() -> None:
    made = file(method={"name": "legend", "slope": 0.5}, variant={"flat": {"method": "legend", "profile": "uniform"}})
    flat: Any = made.experiment("flat").method
    assert (flat.slope, flat.profile) == (0.5, "uniform")
    assert made.experiment("fedit").method == file(method="fedit").experiment().method
    shadow = file(variant={"fedit": {"method": "fedit", "cohort_size": 1}}).experiment("fedit")
    assert shadow.method.cohort_size == 1  # type: ignore[attr-defined]


def test_overrides_reach_variants_and_none_is_lost(tmp_path: Path) -> None:
    path = write_experiment(tmp_path)
    changed = read_file(path, {"variant.slow.cohort_size": "1", "variant.slow.training.learning_rate": "0.2"})
    slow: Any = changed.experiment("slow")
    assert (slow.method.cohort_size, slow.training.learning_rate) == (1, 0.2)
    assert changed.experiment() == read_file(path).experiment()
    changed.check_overrides(["fedit", "slow"])
    with pytest.raises(InputError, match=r"variant\.slow: .* does not run; valid: fedit"):
        changed.check_overrides(["fedit"])
    for name, words in (
        ("variant.slw.cohort_size", "'slow'"),
        ("variant.slow", "--variant.slow.FIELD"),
        ("variant.slow.cohort", "'cohort_size'"),
        ("name.x", r"name\.x: unknown key"),
        ("seed.x", r"seed\.x: unknown key"),
        ("name", "name: unknown key"),
    ):
        with pytest.raises(InputError, match=words):
            read_file(path, {name: "3"}).experiment("slow")


def test_a_variant_is_found_with_minus_and_underscore_and_is_never_another_method() -> None:
    made = file(variant={"my-slow": {"method": "fedit", "cohort_size": 1}})
    assert made.experiment("my_slow") == made.experiment("my-slow")
    assert made.experiment("my_slow").label == "my-slow"
    for variants, words in (
        ({"fedit": {"method": "legend"}}, "variant.fedit: fedit is a method, and not legend"),
        ({"fed_sb": {"method": "legend"}}, "variant.fed_sb: fed_sb is a method"),
        ({"a-b": {"method": "legend"}, "a_b": {"method": "fedit"}}, "the same name as"),
        ({"../x": {"method": "legend"}}, "names no folder"),
    ):
        with pytest.raises(InputError, match=words):
            file(variant=variants).experiment(next(iter(variants)))


@pytest.mark.parametrize("name", ["3", '"../x"', '".."', '""', '"a b"'])
def test_a_name_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = write_experiment(tmp_path)
    path.write_text(f"name = {name}\n{path.read_text()}")
    with pytest.raises(InputError, match=r"^name: .* names no folder"):
        read_file(path)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"modle": {}}, ("modle", "'model'", "training")),
        ({"fleet": {}}, ("fleet.devices", "missing")),
        ({"fleet": {"devices": {"jetson": 2}}}, ("fleet.devices", "jetson-tx2")),
        ({"fleet": {"devices": {"jetson-tx2": -1}}}, ("fleet.devices", "-1")),
        ({"fleet": {"devices": {}}}, ("fleet.devices", "at least one client")),
        ({"fleet": {"devices": {"jetson-tx2": 1.5}}}, ("fleet.devices", "integer")),
        ({"fleet": {**BASE["fleet"], "memory_share": 0}}, ("fleet.memory_share", "(0, 1]")),
        ({"fleet": {**BASE["fleet"], "mode_period": "-5 s"}}, ("fleet.mode_period", "-5")),
        ({"fleet": {**BASE["fleet"], "availability": "sometimes"}}, ("fleet.availability.type", "always")),
        ({"model": {"rank": 0}}, ("model.rank", "1 or more")),
        ({"model": {"task": "vision"}}, ("model.task", "causal-lm")),
        ({"data": {"partition": "dirichlett"}}, ("data.partition.type", "'dirichlet'", "iid")),
        ({"data": {"partition": {"type": "dirichlet", "alpha": 0}}}, ("data.partition.alpha", "positive")),
        ({"data": {"max_len": 3}}, ("data.max_len", "'max_length'", "partition")),
        ({"wireless": {"uplink_bandwidth": 0}}, ("wireless.uplink_bandwidth", "positive")),
        ({"wireless": {"uplink_bandwidth": "-5 MHz"}}, ("wireless.uplink_bandwidth", "positive")),
        ({"wireless": {"uplink_bandwidth": "5 Mhz"}}, ("wireless.uplink_bandwidth", "MHz")),
        ({"wireless": {"type": "wire"}}, ("wireless.type", "cell")),
        ({"wireless": {"path_loss": "log"}}, ("wireless.path_loss.type", "log-distance")),
        (
            {"wireless": {"path_loss": {"type": "log-distance", "exponnt": 2}}},
            ("wireless.path_loss.exponnt", "'exponent'"),
        ),
        ({"training": {"learning_rate": 0}}, ("training.learning_rate", "positive")),
        ({"training": {"learning_rate": "fast"}}, ("training.learning_rate", "fast")),
        ({"training": {"batch_size": 0}}, ("training.batch_size", "1 or more")),
        ({"training": {"local_steps": 0}}, ("training.local_steps", "1 or more")),
        ({"training": {"precision": "fp8"}}, ("training.precision", "bf16")),
        ({"training": {"threads": 0}}, ("training.threads", "below 1")),
        ({"training": {"engine": "jet"}}, ("training.engine", "twin")),
        ({"method": "legned"}, ("method", "'legend'", "fedit")),
        ({"method": {"cohort_size": 2}}, ("method", "name", "fedit")),
        ({"method": {"name": "fedit", "cohort": 2}}, ("method.cohort", "'cohort_size'")),
        ({"method": {"name": "fedit", "training": {"batch_size": 0}}}, ("method.training.batch_size",)),
        ({"method": {"name": "fedit", "bandwidth": "more"}}, ("method.bandwidth.type", "equal-finish")),
        ({"method": 3}, ("method",)),
        ({"compressor": "zip"}, ("compressor.type", "dense")),
        ({"stop": {"rounds": "none"}}, ("stop.rounds", "fleet_seconds")),
        ({"stop": {"rounds": -1}}, ("stop.rounds", "negative")),
        ({"stop": {"fleet_seconds": 0}}, ("stop.fleet_seconds", "positive")),
        ({"evaluation": {"every": 0}}, ("evaluation.every", "below 1")),
        ({"seed": -1}, ("seed", "negative")),
        ({"seed": "one"}, ("seed", "one")),
        ({"variant": {"v": {}}}, ("variant.v", "method")),
        ({"variant": 3}, ("variant", "tables")),
    ],
)
def test_mistakes_are_one_line_that_names_field_and_valid_values(
    sections: dict[str, Any], words: tuple[str, ...]
) -> None:
    made = file(**sections)
    with pytest.raises(InputError) as caught:
        made.experiment("v" if "variant" in sections and isinstance(sections["variant"], dict) else None)
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_a_variant_may_not_change_the_world() -> None:
    for section in ("data", "fleet", "wireless", "evaluation", "stop"):
        with pytest.raises(InputError, match=f"variant.v.{section}: variants are compared in one world"):
            file(variant={"v": {"method": "fedit", section: {}}}).experiment("v")


SECTION_FIELDS = {
    "": KEYS,
    "model": field_names(ModelConfig),
    "data": (*field_names(DataConfig), "partition"),
    "fleet": field_names(FleetConfig),
    "wireless": (*field_names(Channel), "knowledge", "downlink", "type"),
    "training": (*field_names(LocalTraining), *field_names(Engine)),
    "stop": field_names(StopLimits),
    "evaluation": field_names(Evaluation),
}
KEY_CHANGES = st.tuples(
    st.sampled_from(["insert", "drop", "swap"]), st.integers(0, 30), st.sampled_from(string.ascii_lowercase)
)


def misspelled(key: str, change: tuple[str, int, str]) -> str:
    """Return a key with one slip of the finger."""
    kind, place, letter = change
    place %= len(key)
    if kind == "insert":
        return key[:place] + letter + key[place:]
    if kind == "drop":
        return key[:place] + key[place + 1 :]
    return key[:place] + letter + key[place + 1 :]


@given(st.sampled_from(sorted(SECTION_FIELDS)), st.integers(0, 100), KEY_CHANGES)
def test_one_slip_of_the_finger_is_always_caught(section: str, index: int, change: tuple[str, int, str]) -> None:
    keys = SECTION_FIELDS[section]
    key = keys[index % len(keys)]
    wrong = misspelled(key, change)
    if wrong in keys or not wrong:
        return
    path = f"{section}.{wrong}" if section else wrong
    with pytest.raises(InputError) as caught:
        ExperimentFile("x", BASE, {path: "1"}).experiment()
    text = str(caught.value)
    assert text.startswith(f"{path}: unknown key"), text
    assert key in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("wrong", "right"), [("training.alpha", "model.alpha"), ("model.optimizer", "training.optimizer")]
)
def test_a_field_of_the_other_section_is_told_its_place(wrong: str, right: str) -> None:
    with pytest.raises(InputError, match=rf"^{wrong}: unknown key; valid: {right}, "):
        ExperimentFile("x", BASE, {wrong: "dora"}).experiment()


def test_the_adapter_kind_may_stand_in_training_too() -> None:
    assert ExperimentFile("x", BASE, {"training.adapter": "dora"}).experiment().model.adapter == "dora"
    with pytest.raises(InputError, match=r"^training\.adapter: 'dora', but model\.adapter is 'lora'"):
        ExperimentFile("x", BASE, {"training.adapter": "dora", "model.adapter": "lora"}).experiment()


def test_every_part_that_a_file_can_name_has_names() -> None:
    from airtune.experiment import kinds
    from airtune.experiment.hints import Context, field_hints

    context = Context(kinds.choices())
    for kind in (Channel, FleetConfig):
        protocols = [hint for hint in field_hints(kind).values() if choices_of(hint, context)]
        assert protocols
    assert {"log-distance", "free-space", "urban-macro"} <= set(
        choices_of(field_hints(Channel)["path_loss"], context) or {}
    )
    assert set(profile_names()) >= {"jetson-tx2", "raspberry-pi-5", "pixel-8"}
