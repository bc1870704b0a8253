"""The public names: exactly what is promised, each importable, all of them torch-free."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import airtune


def test_every_public_name_is_there() -> None:
    for name in airtune.__all__:
        assert getattr(airtune, name).__name__ == name


def test_all_is_exactly_what_type_checkers_see() -> None:
    tree = ast.parse(Path(airtune.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    seen = [alias.name for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert seen == airtune.__all__
    assert len(set(seen)) == len(seen)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(airtune, "no_such_name")


def test_public_names_load_no_torch() -> None:
    code = "import sys, airtune; [getattr(airtune, n) for n in airtune.__all__]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
