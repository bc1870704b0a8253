"""Which revision a run was made with."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from airtune.experiment.provenance import PACKAGE, git_revision


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_revision_is_that_of_the_file_wherever_the_shell_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = git_revision()
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a.toml").write_text("seed = 1\n")
    git(inside, "init", "-q")
    git(inside, "add", "a.toml")
    git(inside, "commit", "-q", "-m", "a")
    monkeypatch.chdir(inside)
    assert git_revision() == ours, "another repository's commit is not that of airtune"
    commit = git(inside, "rev-parse", "HEAD")
    monkeypatch.chdir(outside)
    assert git_revision(inside / "a.toml") == commit
    (inside / "a.toml").write_text("seed = 2\n")
    assert git_revision(inside / "a.toml") == f"{commit}-dirty"
    (inside / "b.toml").write_text("")
    assert git_revision(inside / "b.toml") is None, "not tracked"
    assert git_revision(outside / "a.toml") is None
    assert (PACKAGE / "version.py").is_file()
