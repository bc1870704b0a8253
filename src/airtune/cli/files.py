"""The experiment file of a command, with what the command line changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from airtune.cli.arguments import Arguments
from airtune.experiment.config import ExperimentFile, read_file


def experiment_file(arguments: Arguments) -> ExperimentFile:
    """Return the experiment file of a command with the command line's overrides."""
    overrides: dict[str, Any] = dict(arguments.overrides)
    if arguments.values.get("seed") is not None:
        overrides["seed"] = arguments.seed
    return read_file(Path(arguments.experiment), overrides)
