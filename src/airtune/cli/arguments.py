"""What stands on the command line: commands and their options, and overrides of any field of the experiment."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from airtune.errors import InputError, unknown_name
from airtune.version import __version__

HELP = """\
Any field of the experiment file can be set: --SECTION.FIELD VALUE, as in --training.learning-rate 1e-3,
--wireless.uplink-bandwidth "5 MHz" or --method.cohort-size 8. "-" and "_" are equal here."""

Run = Callable[["Arguments"], int]


@dataclass(frozen=True)
class Arguments:
    """The command line, taken apart.

    values : options by name. overrides : dotted field -> text. line : the command line as it was typed.
    """

    values: Mapping[str, Any]
    overrides: Mapping[str, str]
    line: str

    def __getattr__(self, name: str) -> Any:
        """Return an option."""
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Command:
    """A command with its arguments, ready to run."""

    arguments: Arguments
    function: Run

    def run(self) -> int:
        """Run it and return the exit code."""
        return self.function(self.arguments)


def parse(argv: Sequence[str]) -> Command:
    """Return the command that a command line asks for.

    Raises
    ------
    InputError : an unknown command or option, or a value that is missing.
    SystemExit : after --help or --version.
    """
    plain, overrides = split_overrides(argv)
    parser = _parser()
    known, rest = parser.parse_known_args(plain)
    if rest:
        raise _unknown(rest[0], parser, known.command)
    values = vars(known)
    function = values.pop("function")
    if overrides and not values.pop("takes_overrides"):
        name = next(iter(overrides))
        raise InputError(f"--{name}: `airtune {known.command}` takes no experiment; valid: its options, see --help")
    return Command(Arguments(values, overrides, shlex.join(["airtune", *argv])), function)


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments without the overrides ``--a.b VALUE`` (or ``--a.b=VALUE``), and the overrides."""
    plain: list[str] = []
    overrides: dict[str, str] = {}
    rest = iter(argv)
    for argument in rest:
        name, sign, value = argument.partition("=")
        if not name.startswith("--") or "." not in name:
            plain.append(argument)
            continue
        if not sign:
            given = next(rest, None)
            if given is None or (given.startswith("--") and not _is_number(given)):
                raise InputError(f"{name}: has no value; valid: {name} VALUE")
            value = given
        overrides[name.removeprefix("--").replace("-", "_")] = value
    return plain, overrides


def listed(text: str) -> tuple[str, ...]:
    """Return the items of ``a,b,c``."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Return the whole numbers of ``0,1,2``; anything else raises InputError."""
    try:
        return tuple(int(item) for item in listed(text))
    except ValueError as error:
        raise InputError(f"{option}: cannot read {text!r}; valid: whole numbers like 0,1,2") from error


# -------------------------------------------------------------------------------------------------------------- parser


class _Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are `InputError`s."""

    def error(self, message: str) -> NoReturn:
        wrong = re.fullmatch(r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong:
            raise unknown_name(wrong[1], wrong[2], wrong[3].replace("'", "").split(", "))
        raise InputError(f"{message}; see {self.prog} --help")


def _parser() -> _Parser:
    parser = _Parser(
        prog="airtune",
        description="Federated LoRA fine-tuning over unequal devices and radio links, in seconds, bits and joules.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"airtune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    results = (_run, _compare, _plan, _evaluate, _merge, _report)
    for add in (*results, _fetch, _methods, _cite, _calibrate, _device, _deploy):
        add(commands)
    return parser


def _add(commands: Any, name: str, function: str, summary: str, *, overrides: bool = False) -> Any:
    """Add a command whose function stands in `airtune.cli.commands`, imported when it runs."""
    formatter = argparse.RawDescriptionHelpFormatter
    text = f"{summary}\n\n{HELP}" if overrides else summary
    parser = commands.add_parser(name, help=summary, description=text, allow_abbrev=False, formatter_class=formatter)

    def run(arguments: Arguments) -> int:
        from importlib import import_module

        module, _, attribute = function.rpartition(".")
        return int(getattr(import_module(f"airtune.cli.{module}"), attribute)(arguments))

    parser.set_defaults(function=run, takes_overrides=overrides)
    return parser


def _run(commands: Any) -> None:
    parser = _add(commands, "run", "running.run", "run one experiment, or go on with one", overrides=True)
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT.toml")
    parser.add_argument("--method", metavar="NAME", help="a method or a [variant.NAME] of the file")
    parser.add_argument("--seed", metavar="N", help="of everything that is drawn")
    parser.add_argument("--out", metavar="DIR", help="a new folder (default: runs/NAME-METHOD-SEED)")
    parser.add_argument("--resume", metavar="DIR", help="go on with an interrupted run; only --stop.* may change")
    parser.add_argument("--json", action="store_true", help="print run.json at the end")


def _compare(commands: Any) -> None:
    parser = _add(commands, "compare", "running.compare", "run several methods in one world", overrides=True)
    parser.add_argument("experiment", nargs="?", metavar="EXPERIMENT.toml")
    parser.add_argument("--methods", metavar="A,B,...", help="methods and variants; the first is the reference")
    parser.add_argument("--seeds", metavar="0,1,...", help="(default: the file's seed)")
    parser.add_argument("--target", metavar="X", help="of the metric (default: the worst run's best value)")
    parser.add_argument("--tune", action="append", default=[], metavar="FIELD=v1,v2", help="choose on validation rows")
    parser.add_argument("--out", metavar="DIR", help="a new folder (default: runs/NAME-compare)")
    parser.add_argument("--resume", metavar="DIR", help="go on with a comparison: finished runs are kept")
    parser.add_argument("--json", action="store_true", help="print compare.json at the end")


def _plan(commands: Any) -> None:
    summary = "predict seconds, bits and joules of a round, without training unless --pilot"
    parser = _add(commands, "plan", "planning.plan", summary, overrides=True)
    parser.add_argument("experiment", metavar="EXPERIMENT.toml")
    parser.add_argument("--method", metavar="NAME", help="a method or a [variant.NAME] of the file")
    parser.add_argument("--methods", metavar="A,B,...", help="several of them")
    parser.add_argument("--seed", metavar="N", help="of the world")
    parser.add_argument("--sweep", action="append", default=[], metavar="FIELD=v1,v2", help="plan for each value")
    parser.add_argument("--pilot", action="store_true", help="first fit adaptive-sampling's constants to short runs")
    parser.add_argument("--pilot-rounds", metavar="N", help="of each pilot (default: 12)")
    parser.add_argument("--out", metavar="DIR", help="also write plan.json and plan.html into a new folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _evaluate(commands: Any) -> None:
    parser = _add(commands, "evaluate", "evaluating.evaluate", "measure a run's model, also per client")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--data", metavar="FILE", help="other test rows: .csv, .jsonl or .parquet")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _merge(commands: Any) -> None:
    parser = _add(commands, "merge", "merging.merge", "write a run's model as ordinary weights, its adapter merged in")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--out", metavar="DIR", help="a new folder, for transformers' from_pretrained")


def _fetch(commands: Any) -> None:
    parser = _add(commands, "fetch", "catalogue.fetch", "fetch models and data sets of the catalogue")
    parser.add_argument("names", nargs="*", metavar="NAME", help='names of the catalogue, or "all"')
    parser.add_argument("--list", action="store_true", help="show the catalogue")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _methods(commands: Any) -> None:
    parser = _add(commands, "methods", "catalogue.methods", "list the methods")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _cite(commands: Any) -> None:
    parser = _add(commands, "cite", "catalogue.cite", "print the BibTeX of a method's paper")
    parser.add_argument("method", metavar="METHOD")


def _report(commands: Any) -> None:
    parser = _add(commands, "report", "reporting.report", "write report.html for stored runs")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folders of `airtune run` or `airtune compare`")
    parser.add_argument("--target", metavar="X", help="of the metric")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: the folder, if only one is named)")
    parser.add_argument("--tensorboard", action="store_true", help="also write event files")


def _calibrate(commands: Any) -> None:
    summary = "measure how fast this machine trains, and write a device profile"
    parser = _add(commands, "calibrate", "calibrating.calibrate", summary, overrides=True)
    parser.add_argument(
        "experiment", nargs="?", metavar="EXPERIMENT.toml", help="names model, data, batch size and threads"
    )
    parser.add_argument("--flower", metavar="DIR", help="instead: fit what real devices add to a run's predictions")
    parser.add_argument("--name", default="this-machine", metavar="NAME", help="of the profile")
    parser.add_argument("--power", metavar="W", help='drawn while training, as in "15 W": given, not measured')
    parser.add_argument("--memory", metavar="B", help='as in "8 GB" (default: all that this machine has)')
    parser.add_argument("--repeats", default="5", metavar="N", help="timed repeats")
    parser.add_argument("--out", metavar="FILE", help="where the profile (.toml) or the fit goes (default: nowhere)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _device(commands: Any) -> None:
    summary = "keep the base model loaded and train the jobs that local processes send"
    parser = _add(commands, "device", "device.device", summary, overrides=True)
    parser.add_argument("experiment", metavar="EXPERIMENT.toml", help="names model, data, seed and threads")
    parser.add_argument("--socket", metavar="PATH", help="listen on a Unix socket of mode 0600")
    parser.add_argument("--listen", metavar="127.0.0.1:PORT", help="listen on a loopback port; needs a token")
    parser.add_argument("--token-file", metavar="FILE", help="the secret of both sides; written if it is not there")


def _deploy(commands: Any) -> None:
    summary = "write certificates, keys, configuration and start scripts for Flower on real devices"
    parser = _add(commands, "deploy", "deploying.deploy", summary)
    parser.add_argument("action", choices=("init",), metavar="init")
    parser.add_argument("folder", metavar="DIR", help="a new folder")
    parser.add_argument("--nodes", default="2", metavar="N", help="devices (default: 2)")
    parser.add_argument("--host", default="localhost", metavar="A,B", help="names of the server that devices dial")
    parser.add_argument("--port", default="8000", metavar="N", help="of the server (default: 8000)")
    parser.add_argument("--insecure", action="store_true", help="no encryption, no authentication: for a trial")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _unknown(argument: str, parser: argparse.ArgumentParser, command: str) -> InputError:
    if not argument.startswith("-"):
        return InputError(f"{argument!r}: one argument too many for `airtune {command}`; see airtune {command} --help")
    name = argument.partition("=")[0]
    valid = _options(parser, command)
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" (did you mean {nearest[0]}?)" if nearest else ""
    return InputError(f"{name}: unknown option of `airtune {command}`{hint}; valid: {', '.join(valid)}")


def _options(parser: argparse.ArgumentParser, command: str) -> list[str]:
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            chosen = action.choices[command]
            names = [name for each in chosen._actions for name in each.option_strings]  # pyright: ignore[reportPrivateUsage]
            return [*sorted(name for name in names if name.startswith("--")), "--SECTION.FIELD"]
    return []


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
