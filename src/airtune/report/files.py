"""Writing text files so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from airtune.errors import InputError


def write_text(path: Path, text: str) -> Path:
    """Write a file atomically: to a neighbour first, then renamed over the old one.

    Raises
    ------
    InputError : the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, neighbour = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); valid: a writable folder") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(neighbour, 0o644)
        os.replace(neighbour, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(neighbour)
        raise InputError(f"{path}: cannot be written ({error.strerror}); valid: a writable folder") from error
    return path
