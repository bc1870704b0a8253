"""The package as a whole: what it depends on, what a wheel holds, what an import costs."""

import ast
import functools
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import airtune

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "airtune"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CORE = [Requirement(text) for text in PYPROJECT["project"]["dependencies"]]
EXTRAS = {
    name: [Requirement(text) for text in texts] for name, texts in PYPROJECT["project"]["optional-dependencies"].items()
}
# Where an extra may be imported at the top of a module; anywhere else only inside a function.
EXTRA_PACKAGES = {"flower": "deploy"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield (top-level name of an import, whether it runs when the module is imported)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names and top != "airtune":
                yield top, id(node) not in lazy


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


@functools.cache
def installed() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def distributions(top: str) -> set[str]:
    """Return the distributions that bring a module (several share ``google``); one not installed is called like it."""
    return {canonicalize_name(name) for name in installed().get(top, [top])}


def test_every_third_party_import_is_declared() -> None:
    core = {canonicalize_name(r.name) for r in CORE}
    extras = {name: {canonicalize_name(r.name) for r in rs} for name, rs in EXTRAS.items()}
    product = core.union(*(names for extra, names in extras.items() if extra not in {"test", "dev"}))
    wrong: list[str] = []
    for path in modules():
        place = path.relative_to(SOURCE)
        allowed = core.union(*(extras[e] for e, folder in EXTRA_PACKAGES.items() if place.parts[0] == folder))
        for top, at_import in imports(path):
            if distributions(top).isdisjoint(allowed if at_import else product):
                wrong.append(f"{place}: {top}{' at the top of the module' if at_import else ''}")
    assert not wrong


def constraints() -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;+]+)", line)
            assert match, f"not an exact public version: {line!r}"
            name = canonicalize_name(match[1])
            assert name not in pins, f"{name} is pinned twice"
            pins[name] = match[2]
    return pins


def test_constraints_fix_every_dependency_within_its_range() -> None:
    pins = constraints()
    for requirement in (r for rs in (CORE, *EXTRAS.values()) for r in rs):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is missing: make constraints"
        assert requirement.specifier.contains(pins[name]), f"{name}: {pins[name]} is outside {requirement.specifier}"


def test_constraints_are_closed_under_dependencies() -> None:
    """What a fixed package needs is fixed too, so that no machine is free to choose."""
    pins = constraints()
    pins["setuptools"] = "the one that python -m venv installs; tensorboard asks for any"
    todo = [(canonicalize_name(r.name), frozenset(r.extras)) for r in CORE]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        assert name in pins, f"{name} is missing: make constraints"
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    assert len(seen) > len(CORE)


def test_core_needs_neither_flower_nor_ray() -> None:
    """The demo's dependencies, followed to the end, stay clear of what is too heavy for it."""
    todo, seen = [canonicalize_name(r.name) for r in CORE], set[str]()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            for text in importlib.metadata.requires(name) or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                    todo.append(canonicalize_name(needed.name))
    assert not seen & {"flwr", "ray", "cvxpy", "sionna", "sionna-no-rt", "grpcio", "uv", "torchvision"}


def test_version_stands_in_one_place_and_is_cited() -> None:
    assert "version" in PYPROJECT["project"]["dynamic"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {airtune.__version__}\n" in citation


# What answers without training must not wait for torch. Imported one after the other in one fresh interpreter.
LIGHT = (
    "airtune",
    "airtune.lora",
    "airtune.types",
    "airtune.clock",
    "airtune.federation",
    "airtune.wireless",
    "airtune.devices",
    "airtune.solvers",
    "airtune.scheduling",
    "airtune.methods",
    "airtune.report",
    "airtune.cli",
)


def test_light_modules_import_no_torch() -> None:
    code = (
        "import importlib, json, sys\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'flwr', 'matplotlib'}\n"
        "out = {}\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    out[name] = sorted(heavy & set(sys.modules))\n"
        "print(json.dumps(out))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {name: heavy for name, heavy in json.loads(done.stdout).items() if heavy} == {}


def test_imports_have_no_side_effect_on_random_generators_and_threads() -> None:
    """Importing every module leaves the global generators, the thread count and the working folder as they were."""
    names = [
        ".".join(("airtune", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in modules()
        if path.name != "__main__.py" and "deploy" not in path.parts
    ]
    code = (
        "import importlib, os, random, numpy, torch\n"
        "numpy.random.seed(7); random.seed(7); torch.manual_seed(7)\n"
        "def state():\n"
        "    return (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),\n"
        "            torch.get_num_threads(), torch.get_default_dtype(), os.getcwd(), dict(os.environ))\n"
        "import transformers, peft, datasets\n"
        "before = state()\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert state() == before, name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_wheel_holds_the_data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    monkeypatch.chdir(ROOT)
    # hatchling skips what git ignores, as the wheel of a release would.
    wheel = zipfile.ZipFile(io.BytesIO((tmp_path / hatchling.build_wheel(str(tmp_path))).read_bytes()))
    packed = {name.removeprefix("airtune/") for name in wheel.namelist() if name.startswith("airtune/")}
    wanted = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= packed, wanted - packed
    assert "py.typed" in packed
    entry_points = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "airtune = airtune.cli:main" in entry_points
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_command_is_where_the_metadata_says() -> None:
    module, _, function = PYPROJECT["project"]["scripts"]["airtune"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))


def test_continuous_integration_fails_where_a_step_fails(tmp_path: Path) -> None:
    """`.ci/run` stops at the first failing target and passes its exit code on; run with a `make` that fails at lint."""
    fake = tmp_path / "make"
    fake.write_text(
        '#!/bin/sh\necho "$@" "$AIRTUNE_REQUIRE_BROWSER$AIRTUNE_REQUIRE_DATA" >> "$LOG"\n[ "$1" != "$FAIL" ]\n'
    )
    fake.chmod(0o755)
    for name in ("chromium", "chromedriver"):
        (tmp_path / name).symlink_to("/bin/true")
    for failing, calls in (("lint", ["lint 11"]), ("test", ["lint 11", "test 11"]), ("", ["lint 11", "test 11"])):
        log = tmp_path / f"log-{failing}"
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "FAIL": failing}
        done = subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, check=False, timeout=60)
        assert (done.returncode != 0) == bool(failing)
        assert log.read_text().splitlines() == calls
