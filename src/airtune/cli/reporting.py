"""`airtune report`: pages from stored runs. Imports neither torch nor transformers."""

from __future__ import annotations

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
    say(f"done: {write_report(arguments.folders, arguments.out, target)}")
    if arguments.tensorboard:
        from airtune.report.tensorboard import write_event_files

        for folder in [each for path in arguments.folders for each in run_folders(path)]:
            say(f"done: {write_event_files(folder)}")
    return 0
