"""The TOML writer is the inverse of tomllib."""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airtune.errors import InputError
from airtune.experiment.toml import read_toml, write_toml

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
LEAVES = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
TABLES = st.dictionaries(TEXT, VALUES, max_size=5)


@given(TABLES)
def test_reading_what_was_written_is_the_identity(table: dict[str, Any]) -> None:
    assert tomllib.loads(write_toml(table)) == table


def test_none_is_written_as_text_and_infinity_as_toml_has_it() -> None:
    assert tomllib.loads(write_toml({"a": None, "b": math.inf, "c": -math.inf})) == {
        "a": "none",
        "b": math.inf,
        "c": -math.inf,
    }


def test_what_has_no_toml_form_is_a_bug() -> None:
    with pytest.raises(TypeError, match="set"):
        write_toml({"a": {1, 2}})


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("a = = 1")
    (tmp_path / "latin.toml").write_bytes(b'a = "\xe9"')
    for name, word in (
        ("absent.toml", "no such file"),
        (".", "cannot be read"),
        ("bad.toml", "line 1"),
        ("latin.toml", "UTF-8"),
    ):
        with pytest.raises(InputError, match=word) as caught:
            read_toml(tmp_path / name)
        assert "\n" not in str(caught.value)
