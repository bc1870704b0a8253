"""Writing the text files of a report."""

from __future__ import annotations

from pathlib import Path

from airtune.files import write_atomically


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file atomically and return its path.

    Raises
    ------
    NoResultError : the disk is full or not writable.
    """
    write_atomically(path, text.encode("utf-8"))
    return path
