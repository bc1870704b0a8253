"""The pages about methods: their examples are valid experiments, and they mention every field."""

import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from airtune.experiment.config import read_experiment, read_file
from airtune.methods import built_in_names, method_class

DOCS = Path(__file__).parents[2] / "docs"
COMMON = {"training", "compressor"}
EXAMPLES = [
    pytest.param(block, id=f"{page.name}-{number}")
    for page in [*sorted((DOCS / "methods").glob("*.md")), DOCS / "choosing-a-method.md"]
    for number, block in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    if "[method]" in block
]


@pytest.mark.parametrize("block", EXAMPLES)
def test_every_example_is_a_valid_experiment(block: str) -> None:
    experiment = read_experiment({"fleet": {"devices": {"jetson-tx2": 2}}, **tomllib.loads(block)})
    assert experiment.method_name in built_in_names()


@pytest.mark.parametrize(
    "name", ["fedadapter", "fedit", "fedra", "hetlora", "hierfedlora", "legend", "mole", "composed"]
)
def test_a_page_mentions_every_field_and_the_paper(name: str) -> None:
    page = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    kind = method_class(name)
    own = {entry.name for entry in fields(kind)} - COMMON
    missing = [field for field in own if f"`{field}`" not in page and f"{field} = " not in page]
    assert [field for field in missing if field not in ("bandwidth", "power", "cohort_size")] == []
    assert getattr(kind, "arxiv", "no paper of its own") in page


@pytest.mark.parametrize("path", sorted((DOCS.parent / "experiments").glob("*/*.toml")), ids=lambda path: path.stem)
def test_every_experiment_and_variant_of_the_repository_can_be_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DOCS.parent)
    file = read_file(path)
    for label in (None, *file.variants):
        assert file.experiment(label).method_name in built_in_names()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 3
