"""The folder of a run: run.json, rounds.jsonl, timings.jsonl, and how they survive a crash.

A file that is rewritten (run.json, the checkpoint) is written beside itself, synced and renamed; a file that grows
(rounds.jsonl, timings.jsonl) gets one whole synced line a round. So after a crash at any moment the last finished round
is there. Host times stand in timings.jsonl alone: rounds.jsonl is a function of the configuration.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import numpy as np

from airtune.errors import InputError
from airtune.files import disk_errors, write_atomically
from airtune.types import RoundRecord

SCHEMA = 1
RUN_FILE = "run.json"
ROUNDS_FILE = "rounds.jsonl"
TIMINGS_FILE = "timings.jsonl"
CHECKPOINT_FOLDER = "checkpoint"
ADAPTER_FOLDER = "adapter"

Plain = dict[str, Any]


@dataclass(frozen=True)
class RunStore:
    """The files of one run in `folder`."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Return the folder of the checkpoint."""
        return self.folder / CHECKPOINT_FOLDER

    @property
    def adapter(self) -> Path:
        """Return the folder of the result."""
        return self.folder / ADAPTER_FOLDER

    # -- run.json -----------------------------------------------------------------------------------------------------

    def write_head(self, head: Mapping[str, Any]) -> None:
        """Replace run.json."""
        write_atomically(self.folder / RUN_FILE, (json.dumps(plain(head), indent=1) + "\n").encode())

    def read_head(self) -> Plain:
        """Return run.json.

        Raises
        ------
        InputError : the folder is not a run.
        """
        path = self.folder / RUN_FILE
        try:
            head: object = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(
                f"{self.folder}: is not a run folder (no {RUN_FILE}); valid: a DIR of `airtune run`"
            ) from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); valid: a DIR of `airtune run`") from error
        except ValueError as error:
            raise InputError(f"{path}: is not JSON ({error}); valid: a DIR of `airtune run`") from error
        if not isinstance(head, dict) or "config" not in head or "status" not in head:
            raise InputError(f"{path}: is not the {RUN_FILE} of a run; valid: a DIR of `airtune run`")
        return cast("Plain", head)

    def update_head(self, **changes: Any) -> Plain:
        """Replace some keys of run.json and return it."""
        head = {**self.read_head(), **changes}
        self.write_head(head)
        return head

    # -- lines --------------------------------------------------------------------------------------------------------

    def append_round(self, record: RoundRecord) -> Plain:
        """Add one line to rounds.jsonl and return it."""
        line = record_line(record)
        append_line(self.folder / ROUNDS_FILE, line)
        return line

    def replace_last_round(self, line: Mapping[str, Any]) -> None:
        """Put another line in the place of the last one of rounds.jsonl."""
        lines = [*self.rounds()[:-1], line]
        write_atomically(self.folder / ROUNDS_FILE, b"".join(_json_line(entry) for entry in lines))

    def append_timing(self, round_index: int, **host_seconds: float) -> None:
        """Add one line to timings.jsonl."""
        append_line(self.folder / TIMINGS_FILE, {"round": round_index, **host_seconds})

    def rounds(self) -> list[Plain]:
        """Return the whole lines of rounds.jsonl (a last line that a crash cut off is left out)."""
        return list(_whole_lines(self.folder / ROUNDS_FILE))

    def keep_rounds(self, last: int) -> list[Plain]:
        """Cut both line files to the rounds up to `last`, that of the checkpoint, and return those of rounds.jsonl."""
        for name in (ROUNDS_FILE, TIMINGS_FILE):
            path = self.folder / name
            kept = [line for line in _whole_lines(path) if int(line["round"]) <= last]
            write_atomically(path, b"".join(_json_line(line) for line in kept))
        return self.rounds()


def new_store(folder: Path) -> RunStore:
    """Return the store of a new run.

    Raises
    ------
    InputError : the folder is not empty, or cannot be written to.
    """
    make_output_folder(folder)
    return RunStore(folder)


def make_output_folder(folder: Path) -> None:
    """Make an empty folder for results; a non-empty or unwritable one raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        occupied = next(iter(folder.iterdir()), None)
        if occupied is None:
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written to ({error.strerror}); valid: a new folder") from error
    if occupied is not None:
        raise InputError(f"--out: {folder} is not empty (it holds {occupied.name}); valid: a new or an empty folder")


# ---------------------------------------------------------------------------------------------------------- plain data


def record_line(record: RoundRecord) -> Plain:
    """Return the object of rounds.jsonl for a round; numbers that are not finite become null."""
    line: Plain = {
        "round": record.round,
        "time_s": record.time_s,
        "duration_s": record.duration_s,
        "cohort": record.cohort,
        "arrived": record.arrived,
        "dropped": [{"client": client, "reason": reason} for client, reason in record.dropped],
        "uplink_bits": record.uplink_bits,
        "downlink_bits": record.downlink_bits,
        "energy_j": record.energy_j,
        "train_loss": record.train_loss,
        **record.metrics,
        "clients": [asdict(client) for client in record.clients],
    }
    if record.notes:
        line["notes"] = record.notes
    if record.diagnostics:
        line["diagnostics"] = record.diagnostics
    return cast("Plain", plain(line))


def plain(value: Any) -> Any:
    """Return JSON data: arrays become lists, dataclasses objects, numbers that are not finite null.

    Raises
    ------
    TypeError : the value is none of these.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | np.integer | np.bool_):
        return bool(value) if isinstance(value, np.bool_) else int(value)
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray):
        return [plain(item) for item in cast("list[Any]", value.tolist())]
    if isinstance(value, Enum):
        return plain(value.value)
    if is_dataclass(value) and not isinstance(value, type):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, frozenset | set):
        return sorted(plain(item) for item in cast("frozenset[Any]", value))
    if isinstance(value, Sequence):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    raise TypeError(f"{type(value).__name__} has no JSON form")


# --------------------------------------------------------------------------------------------------------------- files


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one JSON line and sync it; see `write_atomically` for the errors."""
    with disk_errors(path), open(path, "ab") as file:
        file.write(_json_line(line))
        file.flush()
        os.fsync(file.fileno())


def _json_line(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain(line), separators=(", ", ": "), allow_nan=False) + "\n").encode()


def _whole_lines(path: Path) -> Iterator[Plain]:
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)
