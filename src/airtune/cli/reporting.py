"""`airtune report`: pages from stored runs. Imports neither torch nor transformers."""

from __future__ import annotations

import os
from pathlib import Path

from airtune.cli.arguments import Arguments
from airtune.cli.output import say
from airtune.errors import InputError


def report(arguments: Arguments) -> int:
    """Write report.html for run folders and compare folders."""
    from airtune.report.load import run_folders
    from airtune.report.page import write_report

    target = None
    if arguments.target is not None:
        try:
            target = float(arguments.target)
        except ValueError as error:
            raise InputError(f"--target: cannot read {arguments.target!r}; valid: a number") from error
    if arguments.out is not None:
        _check_writable(Path(arguments.out))
    say(f"done: {write_report(arguments.folders, arguments.out, target)}")
    if arguments.tensorboard:
        from airtune.report.tensorboard import write_event_files

        for folder in [each for path in arguments.folders for each in run_folders(path)]:
            say(f"done: {write_event_files(folder)}")
    return 0


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written to ({error.strerror}); valid: a folder") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"--out: {folder} cannot be written to; valid: a folder")
