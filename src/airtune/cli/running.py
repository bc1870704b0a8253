"""`airtune run` and `airtune compare`."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from airtune.cli.arguments import Arguments, listed, numbers
from airtune.cli.files import experiment_file
from airtune.cli.output import say
from airtune.cli.progress import Display
from airtune.errors import InputError, MissingPackageError, NoResultError
from airtune.experiment.config import ExperimentFile
from airtune.experiment.store import RunStore, make_output_folder
from airtune.experiment.sweep import Values, parse_settings

if TYPE_CHECKING:
    from airtune.experiment.compare import Compared, Comparison

NO_RESULT = 3


# ----------------------------------------------------------------------------------------------------------------- run


def run(arguments: Arguments) -> int:
    """Run one experiment, or resume one."""
    if arguments.resume is not None:
        head, folder = _resume(arguments)
    else:
        head, folder = _start(arguments)
    from airtune.report.page import write_run_report

    page = _page(lambda: write_run_report(folder))
    final = head["final"]
    metric = f"{head['metric']} {final[head['metric']]:.3f}, " if final.get(head["metric"]) is not None else ""
    say(f"done: {metric}{final['time_s']:.1f} fleet seconds, {final['energy_j']:.1f} J; {page or folder}")
    if arguments.json:
        print(json.dumps(head))
    return 0


def _start(arguments: Arguments) -> tuple[Mapping[str, Any], Path]:
    if arguments.experiment is None:
        raise InputError("EXPERIMENT.toml: is missing; valid: airtune run EXPERIMENT.toml, or airtune run --resume DIR")
    file = experiment_file(arguments)
    experiment = file.experiment(arguments.method)
    file.check_overrides([experiment.label])
    default = Path("runs") / f"{experiment.name}-{experiment.label}-{experiment.seed}"
    folder = Path(arguments.out) if arguments.out else default
    make_output_folder(folder)  # before torch is imported, which takes seconds
    from airtune.experiment.build import Workshop
    from airtune.experiment.run import Session, start

    with _resumable(folder), _display() as display:
        session = Session(Workshop(), display, arguments.line, Path(arguments.experiment))
        return start(experiment, folder, session), folder


def _resume(arguments: Arguments) -> tuple[Mapping[str, Any], Path]:
    given = [name for name in ("experiment", "method", "seed", "out") if arguments.values.get(name) is not None]
    other = [f"--{name}" for name in arguments.overrides if not name.startswith("stop.")]
    if given or other:
        what = given[0] if given[:1] == ["experiment"] else (f"--{given[0]}" if given else other[0])
        raise InputError(f"--resume: takes no {what}, the run keeps its configuration; valid: --stop.FIELD VALUE")
    limits = {name.removeprefix("stop."): value for name, value in arguments.overrides.items()}
    folder = Path(arguments.resume)
    RunStore(folder).read_head()
    from airtune.experiment.build import Workshop
    from airtune.experiment.run import Session, resume

    with _resumable(folder), _display() as display:
        return resume(folder, limits, Session(Workshop(), display, arguments.line)), folder


def _page(write: Callable[[], Path]) -> Path | None:
    """Write a page; where plotly is not installed say so: the run itself is done."""
    try:
        return write()
    except MissingPackageError as error:
        say(f"no page: {error}")
        return None


@contextlib.contextmanager
def _resumable(folder: Path) -> Generator[None]:
    """Add to an interruption how to go on; `folder` is that of a run or of a comparison."""
    try:
        yield
    except KeyboardInterrupt:
        if _is_interrupted(folder):
            raise KeyboardInterrupt(f"to go on: airtune run --resume {shlex.quote(str(folder))}") from None
        if (folder / "comparison.json").is_file():
            raise KeyboardInterrupt(f"to go on: airtune compare --resume {shlex.quote(str(folder))}") from None
        raise


def _is_interrupted(folder: Path) -> bool:
    try:
        return RunStore(folder).read_head()["status"] == "interrupted"
    except InputError:
        return False


@contextlib.contextmanager
def _display() -> Generator[Display]:
    display = Display()
    try:
        yield display
    finally:
        display.close()


# ------------------------------------------------------------------------------------------------------------- compare


def compare(arguments: Arguments) -> int:
    """Run several methods with several seeds, and write the comparison."""
    from airtune.experiment.build import Workshop
    from airtune.experiment.compare import compare as run_all
    from airtune.experiment.compare import go_on
    from airtune.experiment.run import Session

    resumed = arguments.resume is not None
    comparison = _interrupted(arguments) if resumed else _comparison(arguments)
    source = None if resumed else Path(arguments.experiment)
    with _resumable(comparison.out), _display() as display:
        compared = (go_on if resumed else run_all)(comparison, Session(Workshop(), display, file=source))
    _write_comparison(compared, comparison, comparison.target, print_json=arguments.json)
    for folder, reason in compared.failed.items():
        say(f"failed: {folder}: {' '.join(reason.split())}")
    return NO_RESULT if compared.failed else 0


def _comparison(arguments: Arguments) -> Comparison:
    from airtune.experiment.compare import Comparison

    if arguments.experiment is None:
        raise InputError("EXPERIMENT.toml: is missing; valid: airtune compare EXPERIMENT.toml, or --resume DIR")
    file = experiment_file(arguments)
    default = (file.default_method(), *file.variants)
    return Comparison(
        file=file,
        methods=listed(arguments.methods) if arguments.methods is not None else default,
        seeds=_seeds(arguments, file),
        tune=parse_settings(arguments.tune, "--tune"),
        out=Path(arguments.out) if arguments.out else Path("runs") / f"{file.name}-compare",
        target=_target(arguments, file),
    )


def _interrupted(arguments: Arguments) -> Comparison:
    from airtune.experiment.compare import read_comparison

    names = ("experiment", "methods", "seeds", "target", "out")
    given = [name for name in names if arguments.values.get(name) is not None]
    given += ["tune"] if arguments.tune else []
    other = [f"--{name}" for name in (*given, *arguments.overrides)]
    if other:
        what = "experiment" if given[:1] == ["experiment"] else other[0]
        raise InputError(f"--resume: takes no {what}, the comparison keeps its configuration; valid: DIR alone")
    return read_comparison(Path(arguments.resume))


def _write_comparison(compared: Compared, comparison: Comparison, target: float | None, *, print_json: bool) -> None:
    from airtune.report.cells import render_table
    from airtune.report.load import CompareSummary, load_runs
    from airtune.report.page import write_compare_report
    from airtune.report.tables import compare_summary, write_compare_files

    runs = load_runs([folder for folder in compared.folders if (folder / "rounds.jsonl").is_file()])
    try:
        summary = compare_summary(runs, target, out_dir=comparison.out)
    except InputError as error:
        raise NoResultError(f"{comparison.out}: nothing to compare: {error}") from error
    stored = cast("CompareSummary", {**summary, "tuned": _numbers(compared.tuned)} if compared.tuned else summary)
    write_compare_files(comparison.out, stored)
    page = _page(lambda: write_compare_report(comparison.out, runs, summary))
    with _display() as display:
        display.screen.print(render_table(summary))
    for method, values in compared.tuned.items():
        say(f"tuned: {method}: " + ", ".join(f"{name} = {value}" for name, value in values.items()))
    say(f"done: {page or comparison.out}")
    if print_json:
        print(json.dumps(stored))


def _numbers(tuned: Mapping[str, Values]) -> dict[str, dict[str, int | float | str]]:
    """Return chosen values with texts that are numbers as numbers."""
    return {method: {name: _number(value) for name, value in values.items()} for method, values in tuned.items()}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return value if math.isfinite(value) else text
    return text


def _seeds(arguments: Arguments, file: ExperimentFile) -> tuple[int, ...]:
    if arguments.seeds is not None:
        return numbers(arguments.seeds, "--seeds")
    return (file.experiment().seed,)


def _target(arguments: Arguments, file: ExperimentFile) -> float | None:
    if arguments.target is None:
        return file.experiment().stop.target
    try:
        return float(arguments.target)
    except ValueError as error:
        raise InputError(f"--target: cannot read {arguments.target!r}; valid: a number") from error
