"""A method of another distribution: really installed by pip, it appears by name and passes the conformance table."""

import base64
import hashlib
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SOURCE = TESTS / "third_party_method"


def build_wheel(source: Path, folder: Path) -> Path:
    """Write the package's wheel (a zip with metadata), as its build backend would, without needing that backend."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    points = project["entry-points"]["airtune.methods"]
    files = {str(path.relative_to(source / "src")): path.read_bytes() for path in sorted(source.rglob("src/**/*.py"))}
    meta = f"{stem}.dist-info"
    files[f"{meta}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n".encode()
    )
    files[f"{meta}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    lines = ["[airtune.methods]", *(f"{name} = {value}" for name, value in points.items()), ""]
    files[f"{meta}/entry_points.txt"] = "\n".join(lines).encode()
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    files[f"{meta}/RECORD"] = f"{record}{meta}/RECORD,,\n".encode()
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment in which the package is installed beside airtune."""
    folder = tmp_path_factory.mktemp("third_party")
    wheel = build_wheel(SOURCE, folder)
    target = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, "--disable-pip-version-check", str(wheel)], check=True, timeout=120)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), os.environ.get("PYTHONPATH", "")])}


def python(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_found_by_name_with_its_package_and_its_paper(installed: dict[str, str]) -> None:
    code = (
        "import airtune.methods as m\n"
        "info = next(i for i in m.describe() if i.name == 'fastest-first')\n"
        "print(info.package, info.arxiv, 'nishio' in m.cite('fastest_first'), m.method_class('fastest-first').__name__)"
    )
    assert python(code, installed) == "airtune-fastest 1804.08333 True FastestFirst"


def test_it_is_not_there_without_the_package() -> None:
    assert (
        python("import airtune.methods as m; print('fastest-first' in m.method_names())", dict(os.environ)) == "False"
    )


def test_it_passes_the_conformance_table(installed: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "fastest-first"]
    done = subprocess.run(
        [*command, str(TESTS / "test_every_method.py")],
        env=installed,
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_the_documentation_shows_this_very_package() -> None:
    page = (TESTS.parent / "docs" / "writing-a-method.md").read_text(encoding="utf-8")
    for shown in ("src/airtune_fastest/__init__.py", "pyproject.toml"):
        assert (SOURCE / shown).read_text(encoding="utf-8") in page
