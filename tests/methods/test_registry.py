"""Names, citations and packages of methods."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import airtune.methods as methods
from airtune.errors import InputError


def test_names_are_sorted_and_hyphen_equals_underscore() -> None:
    names = methods.method_names()
    assert list(names) == sorted(names)
    for name in names:
        assert methods.method_class(name.replace("-", "_")) is methods.method_class(name)


def test_an_unknown_name_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(InputError, match=r"method: unknown name 'fedti' \(did you mean 'fedit'\?\); valid: .*fedit"):
        methods.method_class("fedti")


def test_cite_finds_the_paper_of_every_method_that_has_one() -> None:
    for info in methods.describe():
        assert info.summary.endswith("."), info.name
        if info.arxiv:
            assert info.arxiv in methods.cite(info.name)
            assert methods.cite(info.name).startswith("@")
    with pytest.raises(InputError, match="no paper of its own"):
        methods.cite("composed")


def points(*entries: EntryPoint):
    return lambda group: entries if group == methods.ENTRY_POINT_GROUP else ()


def test_a_name_that_is_taken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    group = methods.ENTRY_POINT_GROUP
    monkeypatch.setattr(methods, "entry_points", points(EntryPoint("fedit", "other:Method", group)))
    with pytest.raises(InputError, match="'fedit', which airtune itself uses"):
        methods.method_names()
    twice = (EntryPoint("mine", "one:Method", group), EntryPoint("mine", "two:Method", group))
    monkeypatch.setattr(methods, "entry_points", points(*twice))
    with pytest.raises(InputError, match="both claim 'mine'"):
        methods.method_names()


def test_a_package_that_cannot_be_loaded_or_is_no_method_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    group = methods.ENTRY_POINT_GROUP
    monkeypatch.setattr(methods, "entry_points", points(EntryPoint("gone", "no_such_module:Method", group)))
    with pytest.raises(InputError, match="'gone' of a package cannot be loaded"):
        methods.method_class("gone")
    monkeypatch.setattr(methods, "entry_points", points(EntryPoint("odd", "collections:OrderedDict", group)))
    with pytest.raises(InputError, match="'odd' of a package is not a method"):
        methods.method_class("odd")


def test_names_summaries_and_citations_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, airtune.methods as m\n"
        "infos = m.describe(); [m.cite(i.name) for i in infos if i.arxiv]\n"
        "from airtune.methods.composed import PLANNERS; list(PLANNERS)\n"
        "bad = {'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)\n"
        "sys.exit(', '.join(bad) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
