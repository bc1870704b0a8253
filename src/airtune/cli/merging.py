"""`airtune merge`: a run's model as ordinary weights."""

from __future__ import annotations

from pathlib import Path

from airtune.cli.arguments import Arguments
from airtune.errors import InputError


def merge(arguments: Arguments) -> int:
    """Write the model of a run, its adapter merged in."""
    from airtune.experiment.merging import merge_run

    if not arguments.out:
        raise InputError("--out: missing; valid: a new folder")
    merge_run(Path(arguments.run_dir), Path(arguments.out))
    print(arguments.out)
    return 0
