"""Typed reading of JSON objects whose errors name the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from airtune.errors import InputError


@dataclass(frozen=True)
class Fields:
    """One JSON object together with the place it was read from.

    Attributes
    ----------
    where : file and line or path inside the file, the beginning of every error message.
    values : the object's keys and values.
    """

    where: str
    values: Mapping[str, object]

    def number(self, key: str) -> float:
        """Return a required finite number."""
        value = self.maybe_number(key)
        if value is None:
            raise InputError(f"{self.where}: {key}: missing or null; valid: a number")
        return value

    def maybe_number(self, key: str) -> float | None:
        """Return a number, or None where the key is absent, null or not finite (JSON writers differ on NaN)."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.where}: {key}: {value!r} is not a number")
        return float(value) if math.isfinite(value) else None

    def integer(self, key: str) -> int:
        """Return a required whole number."""
        value = self.number(key)
        if value != int(value):
            raise InputError(f"{self.where}: {key}: {value!r} is not a whole number")
        return int(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; without a default the key is required."""
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise InputError(f"{self.where}: {key}: missing or not a text")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a required list of whole numbers."""
        return tuple(Fields(self.where, {key: item}).integer(key) for item in self.items(key))

    def items(self, key: str, *, required: bool = True) -> Sequence[object]:
        """Return a list; an absent optional list is empty."""
        value = self.values.get(key)
        if value is None and not required:
            return ()
        if not isinstance(value, list):
            raise InputError(f"{self.where}: {key}: missing or not a list")
        return cast("list[object]", value)

    def objects(self, key: str, *, required: bool = True) -> tuple[Fields, ...]:
        """Return a list of objects; an absent optional list is empty."""
        items = self.items(key, required=required)
        return tuple(as_fields(f"{self.where}: {key}[{i}]", item) for i, item in enumerate(items))

    def mapping(self, key: str, *, required: bool = True) -> dict[str, object]:
        """Return an object; an absent optional object is empty."""
        value = self.values.get(key)
        if value is None and not required:
            return {}
        return dict(as_fields(f"{self.where}: {key}", value).values)

    def numbers_of(self, key: str) -> dict[str, float]:
        """Return the finite numbers of an optional object; entries of another kind are not numbers and are left out."""
        inner = self.mapping(key, required=False)
        return {
            name: float(value)
            for name, value in inner.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }


def as_fields(where: str, value: object) -> Fields:
    """Return a JSON value as `Fields`, or raise `InputError` where it is not an object."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object")
    return Fields(where, cast("dict[str, object]", value))


def read_text(path: Path) -> str:
    """Return a file's text, or raise `InputError` naming the file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"{path}: cannot be read ({reason})") from error


def read_object(path: Path) -> Fields:
    """Return the one JSON object of a file, or raise `InputError` naming the file."""
    try:
        value = cast("object", json.loads(read_text(path)))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON (line {error.lineno}: {error.msg})") from error
    return as_fields(str(path), value)


def read_lines(path: Path) -> tuple[tuple[Fields, ...], tuple[str, ...]]:
    """Return the objects of a JSON-lines file and warnings.

    A last line that is not complete JSON is what a crash leaves: it is left out and a warning says so. Any other bad
    line raises `InputError` naming file and line.
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    found: list[Fields] = []
    for position, (number, line) in enumerate(lines):
        where = f"{path}: line {number}"
        try:
            found.append(as_fields(where, cast("object", json.loads(line))))
        except json.JSONDecodeError as error:
            if position == len(lines) - 1:
                cut = f"{path.name}: the last line ({number}) is cut off and was left out; the run stopped in writing"
                return tuple(found), (cut,)
            raise InputError(f"{where}: not valid JSON ({error.msg})") from error
    return tuple(found), ()
