"""Reading and writing TOML: `tomllib` reads; the writer takes plain data (tables, lists, numbers, text, booleans)."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from airtune.errors import InputError


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a file.

    Raises
    ------
    InputError : the file is missing, unreadable, or not TOML; the message names file, line and column.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; valid: the path of an experiment file (.toml)") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); valid: a readable experiment file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text; valid: an experiment file (.toml)") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not TOML: {' '.join(str(error).split())}") from error


def write_toml(table: Mapping[str, Any]) -> str:
    """Return TOML text from which `tomllib` reads the same data; None is written as ``"none"``."""
    lines: list[str] = []
    _write_table(table, (), lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    nested = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    single = {key: value for key, value in table.items() if key not in nested}
    if path and (single or not nested):
        lines.extend(["", f"[{'.'.join(_key(part) for part in path)}]"])
    lines.extend(f"{_key(key)} = {_value(value)}" for key, value in single.items())
    for key, value in nested.items():
        _write_table(cast("Mapping[str, Any]", value), (*path, key), lines)


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "")
    return name if plain.isalnum() and plain.isascii() else _text(name)


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value).items()
        return "{ " + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in entries) + " }"
    if isinstance(value, Sequence):
        return "[" + ", ".join(_value(item) for item in cast("Sequence[Any]", value)) + "]"
    raise TypeError(f"{type(value).__name__} has no TOML form")
