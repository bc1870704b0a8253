"""What types say to a configuration reader: fields, optional and listed values, the names of what can be plugged in."""

from __future__ import annotations

import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from inspect import isabstract
from typing import Any, Literal, Protocol, cast

Plain = dict[str, Any]
Choices = Mapping[str, type]
TYPE_KEY = "type"


@dataclass(frozen=True)
class Context:
    """What reading needs besides the types.

    Attributes
    ----------
    choices : protocol -> names, for protocols whose classes stand in other modules (methods, aggregators).
    defaults : dataclass or protocol -> table that fills in what a field of that type leaves out. The section
        [training] gives the defaults of every method's `training`.
    """

    choices: Mapping[Any, Choices] = field(default_factory=dict[Any, Choices])
    defaults: Mapping[Any, Plain] = field(default_factory=dict[Any, Plain])


EMPTY = Context()


def config_fields(kind: type) -> tuple[Field[Any], ...]:
    """Return the fields of a dataclass that a file may set."""
    return tuple(entry for entry in fields(kind) if entry.init and not entry.name.startswith("_"))


def field_names(kind: type) -> tuple[str, ...]:
    """Return the names of the fields that a file may set."""
    return tuple(entry.name for entry in config_fields(kind))


@lru_cache(maxsize=512)
def field_hints(kind: type) -> dict[str, Any]:
    """Return the resolved type of each field."""
    return typing.get_type_hints(kind)


def choices_of(hint: Any, context: Context = EMPTY) -> Choices | None:
    """Return the named dataclasses that a protocol or a union stands for, None for other types."""
    hint = without_none(hint) if is_optional(hint) else hint
    found: dict[str, type] = {}
    for alternative in alternatives(hint):
        origin = typing.get_origin(alternative) or alternative
        if _is_protocol(origin):
            found.update(context.choices.get(origin) or _registered(origin))
        elif is_dataclass(origin) and len(alternatives(hint)) > 1:
            found[name_of(cast("type", origin))] = cast("type", origin)
    return found or None


def name_of(kind: type) -> str:
    """Return a class's name in a file: that of its module's table of names, else ``FreeSpace`` as ``free-space``."""
    for table in _tables(kind.__module__):
        for name, entry in table.items():
            if entry is kind:
                return name
    return kebab(kind.__name__)


def kebab(name: str) -> str:
    """Return ``FreeSpace`` as ``free-space``."""
    pieces = [f"-{letter.lower()}" if letter.isupper() else letter for letter in name]
    return "".join(pieces).lstrip("-")


@lru_cache(maxsize=256)
def _registered(protocol: type) -> Choices:
    """Return the names of the protocol's own module: its table of names, else the dataclasses that fit."""
    for table in _tables(protocol.__module__):
        if all(_fits(kind, protocol) for kind in table.values()):
            return table
    return implementations(protocol, protocol.__module__)


def implementations(protocol: type, module: str) -> Choices:
    """Return the dataclasses that a module defines, not abstract, that have all members of a protocol, by name."""
    classes = [kind for kind in vars(import_module(module)).values() if isinstance(kind, type)]
    own = [kind for kind in classes if kind.__module__ == module and is_dataclass(kind) and not isabstract(kind)]
    return {name_of(kind): kind for kind in own if _fits(kind, protocol)}


def _fits(kind: type, protocol: type) -> bool:
    return all(hasattr(kind, member) for member in vars(protocol) if not member.startswith("_"))


def _tables(module: str) -> Iterator[Choices]:
    """Yield the tables ``NAMES = {"name": Class}`` of a module: mappings in capitals to dataclasses."""
    for name, table in vars(import_module(module)).items():
        if name.isupper() and not name.startswith("_") and isinstance(table, Mapping) and table:
            classes = cast("Mapping[str, Any]", table)
            if all(isinstance(kind, type) and is_dataclass(kind) for kind in classes.values()):
                yield classes


def _is_protocol(kind: Any) -> bool:
    return isinstance(kind, type) and Protocol in kind.__mro__ and getattr(kind, "_is_protocol", False)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union; the hint itself if it is none."""
    return typing.get_args(hint) if _is_union(hint) else (hint,)


def is_optional(hint: Any) -> bool:
    """Return whether None is allowed."""
    return type(None) in alternatives(hint) and _is_union(hint)


def without_none(hint: Any) -> Any:
    """Return the hint without None."""
    rest = tuple(part for part in alternatives(hint) if part is not type(None))
    return rest[0] if len(rest) == 1 else typing.Union[rest]  # noqa: UP007 (built from a tuple)


def is_plain_alternative(hint: Any, value: Any) -> bool:
    """Whether a union of plain types and tables is given something plain, as ``float | PathLoss`` a number."""
    plain = [part for part in alternatives(hint) if not is_dataclass(part) and not _is_protocol(part)]
    return bool(plain) and not isinstance(value, Mapping | str)


def item_hint(hint: Any) -> Any:
    """Return the type of the items of a list-like or table-like hint, None for anything else."""
    for alternative in alternatives(hint):
        origin, arguments = typing.get_origin(alternative), typing.get_args(alternative)
        if origin in (tuple, list, frozenset, set) or origin is Sequence:
            return arguments[0] if arguments else Any
        if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
            return arguments[1]
    return None


def is_structured(hint: Any, context: Context) -> bool:
    """Return whether values of the hint are tables."""
    return is_dataclass(hint) or choices_of(hint, context) is not None


def is_hashable(hint: Any) -> bool:
    """Return whether a hint can be looked up."""
    return isinstance(hint, Hashable)


def literal_texts(hint: Any) -> tuple[str, ...] | None:
    """Return the texts of a literal type, None for other types."""
    if typing.get_origin(hint) is not Literal:
        return None
    values = typing.get_args(hint)
    return cast("tuple[str, ...]", values) if all(isinstance(value, str) for value in values) else None


def accepts_bool(hint: Any) -> bool:
    """Return whether true and false are values of the hint."""
    return any(part is bool or part is Any or typing.get_origin(part) is Literal for part in alternatives(hint))


def shown_type(hint: Any) -> str:
    """Return the hint as text for an error."""
    return getattr(hint, "__name__", str(hint)).replace("typing.", "")
