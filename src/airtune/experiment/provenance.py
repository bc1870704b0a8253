"""What a run was made with: versions of the packages, revisions of airtune and of the experiment file."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from airtune.version import __version__

PACKAGE = Path(__file__).resolve().parents[1]

PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy", "datasets", "flwr-datasets", "safetensors")


def versions() -> dict[str, str]:
    """Return name -> version of airtune, Python and the packages that numbers depend on."""
    found = {"airtune": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_revision(path: Path = PACKAGE) -> str | None:
    """Return the commit of the repository that tracks a file or folder; None where none does.

    path : airtune's own code unless given. ``-dirty`` after the commit: tracked files differ from it.
    """
    folder = path if path.is_dir() else path.parent
    if not _git(folder, "ls-files", "--", str(path)):
        return None  # not in a repository, or only lying in one: an installed airtune in somebody else's checkout
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
