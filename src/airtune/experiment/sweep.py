"""Fields with several values, ``FIELD=v1,v2``: what ``--tune`` and ``--sweep`` go through."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from airtune.errors import InputError

Values = Mapping[str, str]


def parse_settings(texts: Sequence[str], option: str) -> dict[str, tuple[str, ...]]:
    """Return dotted field -> values.

    Parameters
    ----------
    texts : each ``FIELD=v1,v2``. option : named in errors.

    Raises
    ------
    InputError : a text without a field or without values.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, sign, values = text.partition("=")
        listed = tuple(value.strip() for value in values.split(",") if value.strip())
        if not sign or not listed or "." not in name:
            example = "training.learning_rate=1e-4,1e-3"
            raise InputError(f"{option}: cannot read {text!r}; valid: SECTION.FIELD=v1,v2 as in {example}")
        found[name.strip().removeprefix("--").replace("-", "_")] = listed
    return found


def combinations(settings: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    """Yield every combination of the values of several fields; one empty combination for no field."""
    for values in itertools.product(*settings.values()):
        yield dict(zip(settings, values, strict=True))


def changes(values: Values) -> dict[str, str]:
    """Return the keyword arguments of `ExperimentFile.experiment` for a combination."""
    return {name.replace(".", "__"): value for name, value in values.items()}
