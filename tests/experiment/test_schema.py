"""Tables to dataclasses and back: identity, units, names, and errors that name the field."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.errors import InputError
from airtune.experiment.hints import Context, choices_of, kebab
from airtune.experiment.schema import read, read_dataclass, write_dataclass
from airtune.wireless.units import quantity


class Shape(Protocol):
    def area(self) -> float: ...


@dataclass(frozen=True)
class Square:
    side: float = quantity("1 m", "m")

    def area(self) -> float:
        return self.side**2


@dataclass(frozen=True)
class FlatDisc:
    radius: float = 1.0

    def __post_init__(self) -> None:
        if self.radius <= 0:
            raise InputError(f"radius: must be positive; got {self.radius:g}")

    def area(self) -> float:
        return math.pi * self.radius**2


SHAPES: Mapping[str, type[Shape]] = {"square": Square, "disc": FlatDisc}


@dataclass(frozen=True)
class Inner:
    number: int = 1
    ratio: float = 0.5
    name: Literal["one", "two"] = "one"
    text: str = "x"
    flag: bool = False
    maybe: int | None = 3


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    shape: Shape = field(default_factory=Square)
    either: Square | FlatDisc = field(default_factory=FlatDisc)
    block: float | Literal["round"] = "round"
    band: float = quantity("10 MHz", "Hz")
    limit: float | None = field(default=None, metadata={"unit": "s"})
    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)
    many: tuple[Inner, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict[str, int])


INNERS = st.builds(
    Inner,
    number=st.integers(-(10**9), 10**9),
    ratio=st.floats(allow_nan=False),
    name=st.sampled_from(["one", "two"]),
    text=st.text(max_size=8),
    flag=st.booleans(),
    maybe=st.none() | st.integers(0, 9),
)
SQUARES = st.builds(Square, side=st.floats(0.1, 1e6))
DISCS = st.builds(FlatDisc, radius=st.floats(0.1, 1e6))
OUTERS = st.builds(
    Outer,
    inner=INNERS,
    shape=SQUARES | DISCS,
    either=SQUARES | DISCS,
    block=st.just("round") | st.floats(0.01, 10),
    band=st.floats(1.0, 1e10),
    limit=st.none() | st.floats(0.0, 1e6) | st.just(math.inf),
    names=st.lists(st.text(string.ascii_letters, min_size=1), max_size=3).map(tuple),
    sizes=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    many=st.lists(INNERS, max_size=2).map(tuple),
    counts=st.dictionaries(st.text(string.ascii_letters, min_size=1), st.integers(0, 9), max_size=3),
)


@given(OUTERS)
def test_plain_and_back_is_the_identity_through_json(value: Outer) -> None:
    text = json.dumps(write_dataclass(value), allow_nan=False)
    assert read_dataclass(Outer, json.loads(text), "") == value


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"band": "5 MHz"}, Outer(band=5e6)),
        ({"band": "5e6"}, Outer(band=5e6)),
        ({"limit": "2 min"}, Outer(limit=120.0)),
        ({"limit": "none"}, Outer()),
        ({"inner": {"maybe": "none"}}, Outer(inner=Inner(maybe=None))),
        ({"inner": {"number": "7", "flag": "true", "ratio": "1e-3"}}, Outer(inner=Inner(7, 1e-3, flag=True))),
        ({"shape": "disc"}, Outer(shape=FlatDisc())),
        ({"shape": {"type": "square", "side": "2 km"}}, Outer(shape=Square(2000.0))),
        ({"either": {"type": "square"}}, Outer(either=Square())),
        ({"block": 0.05}, Outer(block=0.05)),
        ({"block": "0.05"}, Outer(block=0.05)),
        ({"sizes": "3,4"}, Outer(sizes=(3, 4))),
        ({"sizes": "[3, 4]"}, Outer(sizes=(3, 4))),
        ({"names": "a"}, Outer(names=("a",))),
        ({"counts": '{"a": 2}'}, Outer(counts={"a": 2})),
        ({"many": [{"number": 5}]}, Outer(many=(Inner(5),))),
    ],
)
def test_what_files_and_command_lines_may_write(table: dict[str, Any], expected: Outer) -> None:
    assert read_dataclass(Outer, table, "") == expected


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"iner": {}}, ("iner", "inner", "shape")),
        ({"inner": {"nmber": 1}}, ("inner.nmber", "'number'", "ratio")),
        ({"inner": 3}, ("inner", "table")),
        ({"inner": {"number": "x"}}, ("inner.number", "integer")),
        ({"inner": {"number": 1.5}}, ("inner.number", "1.5")),
        ({"inner": {"number": True}}, ("inner.number", "True")),
        ({"inner": {"number": None}}, ("inner.number",)),
        ({"inner": {"ratio": math.nan}}, ("inner.ratio", "nan")),
        ({"inner": {"name": "on"}}, ("inner.name", "'one'", "two")),
        ({"inner": {"text": 3}}, ("inner.text", "string")),
        ({"shape": "circle"}, ("shape.type", "circle", "disc, square")),
        ({"shape": {"side": 3}}, ("shape", "type", "disc, square")),
        ({"shape": {"type": "disc", "side": 3}}, ("shape.side", "radius")),
        ({"shape": {"type": "disc", "radius": -1}}, ("shape.radius", "positive", "-1")),
        ({"band": "5 MB"}, ("band", "5 MB", "MHz")),
        ({"many": {"x": 1}}, ("many.x", "table")),
        ({"many": [{"numbr": 5}]}, ("many[0].numbr", "number")),
        ({"many": 3}, ("many", "list")),
    ],
)
def test_errors_are_one_line_and_name_field_and_valid_values(table: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        read_dataclass(Outer, table, "")
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@given(
    st.sampled_from(["inner", "shape", "band", "sizes"]), st.text(string.ascii_lowercase + "_", min_size=1), st.data()
)
def test_a_misspelled_key_is_always_refused(name: str, extra: str, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(name)))
    wrong = name[:place] + extra + name[place:]
    if wrong in Outer.__dataclass_fields__:
        return
    with pytest.raises(InputError, match=f"{wrong}: unknown key"):
        read_dataclass(Outer, {wrong: 1}, "")


def test_a_missing_field_without_default_is_named() -> None:
    @dataclass(frozen=True)
    class Needs:
        must: int

    with pytest.raises(InputError, match=r"part\.must: is missing"):
        read(Needs, {}, "part")


def test_names_come_from_the_modules_table_or_from_the_class() -> None:
    assert choices_of(Shape) == SHAPES
    assert choices_of(Square | FlatDisc) == SHAPES
    assert kebab("FlatDisc") == "flat-disc"
    assert choices_of(int) is None


def test_a_context_gives_names_and_defaults() -> None:
    context = Context(choices={Shape: {"only": Square}}, defaults={Inner: {"number": 9, "text": "d"}})
    made = read_dataclass(Outer, {"shape": "only", "inner": {"text": "given"}}, "", context)
    assert made.shape == Square()
    assert made.inner == Inner(number=9, text="given")
    plain = write_dataclass(made, context)
    assert plain["inner"] == {"ratio": 0.5, "name": "one", "text": "given", "flag": False, "maybe": 3}
    assert read_dataclass(Outer, plain, "", context) == made
    with pytest.raises(InputError, match="valid: only"):
        read_dataclass(Outer, {"shape": "disc"}, "", context)
