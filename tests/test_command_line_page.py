"""The page on the command line names every command and every option, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from airtune import cli
from airtune.cli import arguments

PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()


def options() -> dict[str, set[str]]:
    """Return command -> its options, as the parser knows them."""
    found: dict[str, set[str]] = {}
    parser = arguments._parser()
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for name, command in action.choices.items():
                flags = {flag for each in command._actions for flag in each.option_strings if flag.startswith("--")}
                found[name] = flags - {"--help"}
    return found


def test_every_command_and_option_is_on_the_page() -> None:
    for command, flags in options().items():
        lines = " ".join(line for line in PAGE.splitlines() if f"airtune {command}" in line)
        assert lines, command
        missing = {flag for flag in flags if flag not in PAGE}
        assert not missing, (command, missing)


def test_the_page_names_no_command_or_option_that_is_not_there() -> None:
    known = options()
    assert set(re.findall(r"airtune (\w+)", PAGE)) == set(known)
    flags = set(re.findall(r"(--[a-z-]+)\b(?!\.)", PAGE))
    assert flags <= {flag for each in known.values() for flag in each}


def test_the_exit_codes_are_those_of_the_program() -> None:
    codes = [int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)]
    assert codes == [cli.DONE, cli.BUG, cli.BAD_INPUT, cli.NO_RESULT, cli.INTERRUPTED]
