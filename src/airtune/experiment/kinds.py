"""The names of what an experiment file may plug in where the classes stand in other modules than their protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from airtune.errors import unknown_name
from airtune.experiment.hints import Choices, Plain, implementations
from airtune.methods import method_class, method_names
from airtune.types import Compressor, LocalTraining, Method
from airtune.wireless.path_loss import PathLoss


class _Lazy(Mapping[str, type]):
    """A table of names that imports a class only when it is asked for."""

    def __init__(self, names: Callable[[], tuple[str, ...]], find: Callable[[str], type]) -> None:
        self._names = names
        self._find = find

    def __getitem__(self, name: str) -> type:
        if name not in self._names():
            raise KeyError(name)
        return self._find(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


METHODS: Choices = _Lazy(method_names, method_class)


def choices() -> Mapping[Any, Choices]:
    """Return protocol -> names for methods, compressors and path-loss laws, whose classes stand in several modules."""
    return {
        Method: METHODS,
        Compressor: _classes_in("airtune.compression", Compressor),
        PathLoss: _classes_in("airtune.wireless", PathLoss, ("path_loss", "tr38901")),
    }


@lru_cache(maxsize=8)
def _classes_in(package: str, protocol: type, modules: tuple[str, ...] | None = None) -> Choices:
    """Return the classes of a package (of all its modules, or of some) that have the members of a protocol."""
    names = modules or tuple(module.name for module in iter_modules(import_module(package).__path__))
    found: dict[str, type] = {}
    for name in names:
        found.update(implementations(protocol, f"{package}.{name}"))
    return found


def defaults(training: Plain, compressor: Plain | None) -> Mapping[Any, Plain]:
    """Return what the sections [training] and [compressor] give to every method that has such a field."""
    return {LocalTraining: training} if compressor is None else {LocalTraining: training, Compressor: compressor}


def find_method(name: str, variants: Mapping[str, Any]) -> str:
    """Return the name of a variant as the file spells it, or of a method in kebab-case; ``-`` and ``_`` are equal.

    Raises
    ------
    InputError : there is no method and no variant of this name.
    """
    kebab = name.replace("_", "-")
    for variant in variants:
        if variant.replace("_", "-") == kebab:
            return variant
    if kebab not in METHODS:
        raise unknown_name("method", name, [*METHODS, *variants])
    return kebab
