"""Writing files so that no reader, and no crash, ever meets half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

from airtune.errors import NoResultError


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, and a crash, meets the old or the new content, never a mixture.

    Raises
    ------
    NoResultError : the disk is full or not writable.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, neighbour = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(neighbour, 0o644)
            os.replace(neighbour, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(neighbour)
            raise
        sync_folder(path.parent)


@contextlib.contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turn an OSError (disk full, not writable) into the `NoResultError` that names the file."""
    try:
        yield
    except OSError as error:
        what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot write ({error.strerror})"
        raise NoResultError(f"{path}: {what}; what was written before is kept") from error


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
