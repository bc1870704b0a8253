"""docs/privacy.md says of every method what the code does."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from airtune.aggregation.declaring import is_linear
from airtune.aggregation.privacy import ClientPrivacy
from airtune.capabilities import Trait
from airtune.errors import InputError
from airtune.methods import built_in_names, method_class
from airtune.methods.composed import Composed
from airtune.methods.wrappers import Wrapper

PAGE = Path(__file__).parents[2] / "docs" / "privacy.md"
PLACES = {Trait.UNEQUAL_RANKS, Trait.PARTIAL_DEPTH, Trait.SKETCH}
SPARSE = {"soft", "tsfa"}  # send the components that matter most to the client


def rows() -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[0].startswith("`"):
            for name in re.findall(r"`([^`]+)`", cells[0]):
                assert name not in found
                assert len(cells[3]) > 10
                found[name] = (cells[1], cells[2])
    return found


def parts(name: str) -> tuple[Any, Any]:
    """Return planner and aggregator of a method as it comes."""
    method = method_class(name)()
    whole = getattr(method, "composed", method)
    return getattr(whole, "planner", whole), getattr(whole, "aggregator", None)


def secure(name: str) -> str:
    planner, rule = parts(name)
    if rule is None or not is_linear(rule):
        return "no"
    return "with care" if name in SPARSE or PLACES & getattr(planner, "traits", frozenset()) else "yes"


def private(name: str) -> str:
    planner, rule = parts(name)
    try:
        Composed(planner, ClientPrivacy(inner=rule))
    except InputError:
        return "no"
    return "yes"


def is_wrapper(name: str) -> bool:
    kind = method_class(name)
    return issubclass(kind, Wrapper) or "method" in {entry.name for entry in fields(kind)}


def test_the_page_has_every_method_once() -> None:
    assert set(rows()) == set(built_in_names())


@pytest.mark.parametrize("name", built_in_names())
def test_both_columns_say_what_the_code_does(name: str) -> None:
    expected = ("as inside", "as inside") if is_wrapper(name) else (secure(name), private(name))
    assert rows()[name] == expected
