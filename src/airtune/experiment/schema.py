"""Tables of an experiment file to frozen dataclasses and back. The dataclass is the schema: there is no second one.

`read` walks a type and a plain value (what `tomllib` or `json` returns) together; `write` goes the other way. What the
types do not say by themselves is said by three conventions:

* a field made by `airtune.wireless.units.quantity` carries its SI unit, so ``"10 MHz"`` and ``1e7`` are both accepted;
* a field typed by a protocol or by a union of dataclasses takes a table with ``type = "name"`` (or the name alone).
  The names of a protocol are those of the table ``NAMES = {"name": Class, ...}`` of its module; where there is none,
  the dataclasses of that module (``FreeSpace`` is ``free-space``);
* ``"none"`` (TOML has no null) or a JSON null is None where None is allowed.

Single values (numbers, text, literals, plain lists) are checked by pydantic. Every problem is one `InputError` that
names the field, what is valid, and the nearest match.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, is_dataclass
from functools import lru_cache
from typing import Any, cast

import pydantic

from airtune.errors import InputError, unknown_name
from airtune.experiment.hints import (
    EMPTY,
    TYPE_KEY,
    Choices,
    Context,
    Plain,
    accepts_bool,
    alternatives,
    choices_of,
    config_fields,
    field_hints,
    field_names,
    is_hashable,
    is_optional,
    is_plain_alternative,
    is_structured,
    item_hint,
    literal_texts,
    shown_type,
    without_none,
)
from airtune.wireless.units import parse_quantity

NONE_TEXT = "none"

# ------------------------------------------------------------------------------------------------------------- reading


def read(hint: Any, value: Any, where: str, context: Context = EMPTY) -> Any:
    """Return the object of type `hint` that a plain value describes.

    Parameters
    ----------
    hint : a dataclass, a protocol, a union, or a type that pydantic knows.
    value : plain data; text is also converted to numbers and lists, as the command line gives nothing else.
    where : the field's dotted name, for errors.
    context : names and defaults that the types do not have.

    Raises
    ------
    InputError : the value does not fit; one line.
    """
    if is_optional(hint):
        if value is None or value == NONE_TEXT:
            return None
        hint = without_none(hint)
    choices = choices_of(hint, context)
    if choices is not None and not is_plain_alternative(hint, value):
        return _read_choice(choices, value, where, context)
    if is_dataclass(hint):
        return read_dataclass(cast("type", hint), value, where, context)
    items = item_hint(hint)
    if items is not None and is_structured(items, context):
        return _read_items(items, value, where, context)
    return _read_single(hint, value, where)


def read_dataclass(kind: type, value: Any, where: str, context: Context = EMPTY) -> Any:
    """Return a dataclass from a table whose keys are its fields."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: must be a table, not {_shown(value)}; valid keys: {', '.join(field_names(kind))}")
    table = cast("Mapping[str, Any]", value)
    check_keys(table, field_names(kind), where)
    hints = field_hints(kind)
    table = _filled(table, hints, context)
    arguments: dict[str, Any] = {}
    for entry in config_fields(kind):
        name = _dotted(where, entry.name)
        if entry.name in table:
            arguments[entry.name] = _read_field(entry, hints[entry.name], table[entry.name], name, context)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise InputError(f"{name}: is missing and has no default")
    return construct(kind, arguments, where)


def construct(kind: type, arguments: Mapping[str, Any], where: str) -> Any:
    """Call a dataclass; a ValueError of its own checks becomes an `InputError` that names the table."""
    try:
        return kind(**arguments)
    except InputError as error:
        raise InputError(_located(str(error), kind, where)) from error
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _located(text: str, kind: type, where: str) -> str:
    """Return an error of a class's own checks with the full name of the field in front."""
    parent, _, last = where.rpartition(".")
    if not where or text.startswith((f"{where}.", f"{where}:")):
        return text
    if text.startswith((f"{last}.", f"{last}:")):
        return _dotted(parent, text)
    named = any(text.startswith((f"{name}:", f"{name}.", f"{name},")) for name in field_names(kind))
    return f"{where}.{text}" if named else f"{where}: {text}"


def check_keys(table: Mapping[str, Any], valid: Sequence[str], where: str) -> None:
    """Raise InputError for the first key that is not valid, with the nearest one."""
    for key in table:
        if key not in valid:
            nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            raise InputError(f"{_dotted(where, str(key))}: unknown key{hint}; valid: {', '.join(valid) or 'none'}")


def _filled(table: Mapping[str, Any], hints: Mapping[str, Any], context: Context) -> Mapping[str, Any]:
    """Return the table with the context's defaults in the fields of those types."""
    filled = dict(table)
    for name, hint in hints.items():
        default = context.defaults.get(hint) if is_hashable(hint) else None
        if default is None or (hint not in context.choices and not is_dataclass(hint) and name in table):
            continue
        given = table.get(name, {})
        if not isinstance(given, Mapping):
            continue
        entries = cast("Mapping[str, Any]", given)
        same_kind = TYPE_KEY not in entries or entries[TYPE_KEY] == default.get(TYPE_KEY)
        filled[name] = {**default, **entries} if same_kind else entries
    return filled


def _read_field(entry: Field[Any], hint: Any, value: Any, where: str, context: Context) -> Any:
    unit = entry.metadata.get("unit")
    if unit is None or not isinstance(value, str | int | float | list):
        return read(hint, value, where, context)
    if value == NONE_TEXT and is_optional(hint):
        return None
    if isinstance(value, list):
        return tuple(parse_quantity(item, unit, where) for item in cast("list[str | float]", value))
    return parse_quantity(value, unit, where)


def _read_choice(choices: Choices, value: Any, where: str, context: Context) -> Any:
    table = {TYPE_KEY: value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or TYPE_KEY not in table:
        raise InputError(f'{where}: must be a table with type = "...", not {_shown(value)}; valid: {_listed(choices)}')
    named = cast("Mapping[str, Any]", table)
    name = str(named[TYPE_KEY])
    if name not in choices:
        raise unknown_name(f"{where}.{TYPE_KEY}", name, choices)
    return read_dataclass(choices[name], {key: v for key, v in named.items() if key != TYPE_KEY}, where, context)


def _read_items(item: Any, value: Any, where: str, context: Context) -> Any:
    if isinstance(value, Mapping):
        entries = cast("Mapping[str, Any]", value)
        return {key: read(item, entry, _dotted(where, str(key)), context) for key, entry in entries.items()}
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: must be a list, not {_shown(value)}")
    entries = cast("Sequence[Any]", value)
    return tuple(read(item, entry, f"{where}[{i}]", context) for i, entry in enumerate(entries))


def _read_single(hint: Any, value: Any, where: str) -> Any:
    literals = literal_texts(hint)
    if literals is not None and isinstance(value, str) and value not in literals:
        raise unknown_name(where, value, literals)
    value = _from_text(hint, value)
    if isinstance(value, bool) and not accepts_bool(hint):
        raise InputError(f"{where}: must not be {_shown(value)}; valid: {shown_type(hint)}")
    try:
        result = _adapter(hint).validate_python(value)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InputError(
            f"{where}: {_shown(value)} is wrong: {reason[0].lower()}{reason[1:]}; valid: {shown_type(hint)}"
        ) from error
    if isinstance(result, float) and math.isnan(result):
        raise InputError(f"{where}: must be a number, not nan")
    return result


def _from_text(hint: Any, value: Any) -> Any:
    """Return the list or table that text from the command line stands for, where one is wanted."""
    if not isinstance(value, str) or str in alternatives(hint) or literal_texts(hint) is not None:
        return value
    if item_hint(hint) is None:
        return value
    if value[:1] in "[{":
        try:
            return from_notation(value)
        except ValueError:
            return value
    return [part.strip() for part in value.split(",") if part.strip()]


def from_notation(text: str) -> Any:
    """Return the list or table that a text is in JSON's or in TOML's notation; ValueError if it is neither."""
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    return tomllib.loads(f"value = {text}")["value"]


@lru_cache(maxsize=512)
def _adapter(hint: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(hint)


# ------------------------------------------------------------------------------------------------------------- writing


def write(hint: Any, value: Any, context: Context = EMPTY) -> Any:
    """Return plain data (JSON types) from which `read` makes an equal object of type `hint` in the same context."""
    if value is None:
        return None
    if is_optional(hint):
        hint = without_none(hint)
    choices = choices_of(hint, context)
    if choices is not None and is_dataclass(value):
        return {TYPE_KEY: _name_in(choices, type(value)), **write_dataclass(value, context)}
    if is_dataclass(value):
        return write_dataclass(value, context)
    items = item_hint(hint)
    if isinstance(value, Mapping):
        table = cast("Mapping[str, Any]", value)
        return {str(key): write(Any if items is None else items, entry, context) for key, entry in table.items()}
    if isinstance(value, tuple | list | frozenset | set):
        entries = cast("Iterable[Any]", value)
        listed = [write(Any if items is None else items, entry, context) for entry in entries]
        return sorted(listed) if isinstance(value, frozenset | set) else listed
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"  # JSON has no infinity; `read` takes the text
    if isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is not configuration: it has no plain form")


def write_dataclass(value: Any, context: Context = EMPTY) -> Plain:
    """Return the table of a dataclass: all fields, defaults included, but for what the context fills in."""
    hints = field_hints(type(value))
    table: Plain = {}
    for entry in config_fields(type(value)):
        hint = hints[entry.name]
        written = write(hint, getattr(value, entry.name), context)
        default = context.defaults.get(hint) if is_hashable(hint) else None
        if default is not None and isinstance(written, dict):
            written = _without(cast("Plain", written), default)
            if not written:
                continue
        table[entry.name] = written
    return table


def _without(table: Plain, default: Plain) -> Plain:
    """Return the entries that differ from the default; all of them if the kinds differ."""
    if table.get(TYPE_KEY) != default.get(TYPE_KEY):
        return table
    rest = {key: value for key, value in table.items() if key not in default or default[key] != value}
    return {TYPE_KEY: table[TYPE_KEY], **rest} if rest and TYPE_KEY in table else rest


def _name_in(choices: Choices, kind: type) -> str:
    for name, choice in choices.items():
        if choice is kind:
            return name
    raise InputError(f"{kind.__name__}: has no name in an experiment file; valid: {_listed(choices)}")


# ---------------------------------------------------------------------------------------------------------- small ones


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(choices: Choices) -> str:
    return ", ".join(sorted(choices))


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
