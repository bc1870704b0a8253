"""The run folder: plain JSON, whole lines, errors of the disk."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.experiment.store import RunStore, make_output_folder, new_store, plain
from airtune.types import ClientRecord, RoundRecord

CLIENT = ClientRecord(3, 8, 2, 1e6, 100, 50, 0.1, 0.2, 0.3, 0.4, 5.0)


def record(number: int, **changes: Any) -> RoundRecord:
    fields: dict[str, Any] = {
        "round": number,
        "time_s": 1.5 * number,
        "duration_s": 1.5,
        "cohort": (3, 4),
        "arrived": (3,),
        "dropped": ((4, "late"),),
        "uplink_bits": 100,
        "downlink_bits": 50,
        "energy_j": 5.0,
        "train_loss": 0.7,
        "metrics": {"accuracy": 0.5, "loss": 0.6},
        "clients": (CLIENT,),
        "notes": {},
        "diagnostics": {},
    }
    return RoundRecord(**{**fields, **changes})


def test_a_line_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    line = new_store(tmp_path).append_round(record(1))
    assert list(line) == [
        "round", "time_s", "duration_s", "cohort", "arrived", "dropped", "uplink_bits", "downlink_bits", "energy_j",
        "train_loss", "accuracy", "loss", "clients",
    ]  # fmt: skip
    assert line["dropped"] == [{"client": 4, "reason": "late"}]
    assert set(line["clients"][0]) >= {
        "client",
        "components",
        "depth",
        "bits_up",
        "bits_down",
        "download_s",
        "compute_s",
        "upload_s",
        "wait_s",
    }
    assert json.loads((tmp_path / "rounds.jsonl").read_text()) == line


def test_numbers_that_are_not_finite_become_null_and_json_stays_strict(tmp_path: Path) -> None:
    line = new_store(tmp_path).append_round(
        record(1, train_loss=math.nan, metrics={"loss": math.inf}, notes={"x": np.float64("nan")})
    )
    assert (line["train_loss"], line["loss"], line["notes"]) == (None, None, {"x": None})

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads((tmp_path / "rounds.jsonl").read_text(), parse_constant=refuse)


def test_plain_takes_what_planners_note() -> None:
    noted = {"a": np.arange(3), "b": (1, np.float32(0.5)), 3: CLIENT, "c": frozenset({2, 1}), "d": np.bool_(True)}
    made = plain(noted)
    assert made["a"] == [0, 1, 2]
    assert made["b"] == [1, 0.5]
    assert made["3"]["client"] == 3
    assert (made["c"], made["d"]) == ([1, 2], True)
    with pytest.raises(TypeError, match="no JSON form"):
        plain(object())


def test_lines_beyond_the_checkpoint_and_cut_off_lines_go(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    for number in range(5):
        store.append_round(record(number))
        store.append_timing(number, round_s=1.0)
    with open(tmp_path / "rounds.jsonl", "a") as file:
        file.write('{"round": 5, "time')
    kept = store.keep_rounds(2)
    assert [line["round"] for line in kept] == [0, 1, 2]
    assert len((tmp_path / "timings.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "rounds.jsonl").read_text().endswith("\n")
    assert store.keep_rounds(-1) == []


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out: .* not empty"):
        make_output_folder(tmp_path / "full")
    with pytest.raises(InputError, match=r"--out: .* cannot be written"):
        make_output_folder(tmp_path / "file" / "below")
    with pytest.raises(InputError, match=r"--out: .* cannot be written"):
        make_output_folder(Path("/proc/airtune"))


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        RunStore(tmp_path).read_head()
    for text in ("{", "[]", '{"a": 1}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(InputError, match=r"run\.json"):
            RunStore(tmp_path).read_head()
