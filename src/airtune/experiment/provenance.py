"""What a run was made with: versions of the packages, the revision of the working directory."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

from airtune.version import __version__

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


def git_revision() -> str | None:
    """Return the commit of the working directory, with ``-dirty`` after it if files differ; None outside of git."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
