"""Several methods in one world: same data split, same seeds, same evaluation rows, same fleet seconds.

The rules, so that a reader can check them by hand:

* every method runs with every seed; runs of one seed share partition, fading, motion and availability, because these
  are functions of the seed alone;
* the first method of a seed runs until [stop]; the others of that seed get the same fleet seconds: [stop].fleet_seconds
  if that ended the first run, otherwise the time at which the first run ended. Their number of rounds is free. If the
  first method fails, the next one takes its place;
* [stop].target ends no run of a comparison: it is the default of ``--target``, measured afterwards;
* ``--tune FIELD=v1,v2`` runs each method once for each value with the first seed, measured on validation rows (never on
  test rows), and keeps the value whose last evaluation is best. Fleet seconds are shared there as well. Validation
  rows are taken out of the training rows of all runs.

An interrupted comparison goes on: what is compared stands in comparison.json, finished runs are kept, others go on from
their checkpoints, and every run is what it would have been.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from airtune.errors import InputError, NoResultError
from airtune.experiment import checkpoint
from airtune.experiment.config import Experiment, ExperimentFile
from airtune.experiment.run import Session, resume, start
from airtune.experiment.sections import StopLimits
from airtune.experiment.store import RUN_FILE, Plain, RunStore, make_output_folder, plain
from airtune.experiment.sweep import Values, changes, combinations
from airtune.files import write_atomically

SCHEMA = 1
COMPARISON_FILE = "comparison.json"
RUNS_FOLDER = "runs"
TUNE_FOLDER = "tune"
LARGEST_VALIDATION = (
    500  # rows taken for --tune where the file sets none: a tenth of the training rows, at most so many
)


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes
    ----------
    file : the experiment. methods : names of methods or variants, the first is the reference. seeds : all of them.
    tune : dotted field -> values to try.
    out : folder of the results. target : of the metric, None: chosen afterwards.
    """

    file: ExperimentFile
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    tune: Mapping[str, tuple[str, ...]]
    out: Path
    target: float | None = None

    def __post_init__(self) -> None:
        """Give every method its one name; refuse empty lists, repetitions and overrides without an effect."""
        object.__setattr__(self, "methods", tuple(self.file.label(method) for method in self.methods))
        self.file.check_overrides(self.methods)
        for name, values in (("--methods", self.methods), ("--seeds", self.seeds)):
            if not values:
                raise InputError(f"{name}: is empty; valid: a list like a,b,c")
            if len(set(values)) < len(values):
                raise InputError(f"{name}: names something twice; valid: each once")


@dataclass(frozen=True)
class Compared:
    """What came of it.

    folders : of all runs, in order. failed : folder -> why. tuned : method -> chosen values.
    """

    folders: tuple[Path, ...]
    failed: Mapping[Path, str]
    tuned: Mapping[str, Values]


@dataclass
class _Budget:
    """The fleet seconds that the runs of one seed share: set by the first of them that ends well."""

    limits: StopLimits
    seconds: float | None = None

    def next(self) -> StopLimits:
        if self.seconds is None:
            return self.limits
        return StopLimits(rounds=None, fleet_seconds=self.seconds)

    def spent(self, time: float) -> None:
        if self.seconds is None:
            limit = self.limits.fleet_seconds
            self.seconds = time if limit is None else min(limit, time)


def compare(comparison: Comparison, session: Session) -> Compared:
    """Run everything and return what came of it; a run that fails does not stop the others.

    Raises
    ------
    InputError : bad input, found before the first run; or every run failed because of it.
    """
    experiments = {method: _prepared(comparison, method, session) for method in comparison.methods}
    make_output_folder(comparison.out)
    _write(comparison)
    try:
        return _compare(comparison, experiments, session)
    except InputError:
        for folder in (comparison.out / TUNE_FOLDER, comparison.out / RUNS_FOLDER):
            with contextlib.suppress(OSError):  # it is not there, or not empty
                folder.rmdir()
        if {path.name for path in comparison.out.iterdir()} == {COMPARISON_FILE}:
            (comparison.out / COMPARISON_FILE).unlink()
            comparison.out.rmdir()
        raise


def go_on(comparison: Comparison, session: Session) -> Compared:
    """Finish an interrupted comparison, as `read_comparison` gives it; what failed is tried again from its checkpoint.

    Errors as in `compare`.
    """
    experiments = {method: _prepared(comparison, method, session) for method in comparison.methods}
    return _compare(comparison, experiments, session)


def read_comparison(folder: Path) -> Comparison:
    """Return what is compared in a folder of `compare`; one that is none raises InputError."""
    path = folder / COMPARISON_FILE
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = f"is not a comparison that can go on ({COMPARISON_FILE}: {error})"
        raise InputError(f"--resume: {folder} {why}; valid: a DIR of `airtune compare`") from error
    if not isinstance(found, dict) or cast("Plain", found).get("schema") != SCHEMA:
        raise InputError(f"--resume: {path} is not of this version; valid: a DIR of `airtune compare`")
    stored = cast("Plain", found)
    return Comparison(
        file=ExperimentFile(stored["name"], stored["tables"], stored["overrides"]),
        methods=tuple(stored["methods"]),
        seeds=tuple(stored["seeds"]),
        tune={name: tuple(values) for name, values in stored["tune"].items()},
        out=folder,
        target=stored["target"],
    )


def _write(comparison: Comparison) -> None:
    file = comparison.file
    content: Plain = {
        "schema": SCHEMA,
        "name": file.name,
        "tables": file.tables,
        "overrides": file.overrides,
        "methods": comparison.methods,
        "seeds": comparison.seeds,
        "tune": comparison.tune,
        "target": comparison.target,
    }
    write_atomically(comparison.out / COMPARISON_FILE, (json.dumps(plain(content), indent=1) + "\n").encode())


def _compare(comparison: Comparison, experiments: Mapping[str, Experiment], session: Session) -> Compared:
    tuned = _tune(comparison, experiments, session) if comparison.tune else {}
    folders: list[Path] = []
    failed: dict[Path, str] = {}
    errors: list[Exception] = []
    for seed in comparison.seeds:
        budget = _Budget(replace(experiments[comparison.methods[0]].stop, target=None))
        for method in comparison.methods:
            experiment = _chosen(comparison, experiments[method], method, seed, tuned.get(method, {}))
            folder = comparison.out / RUNS_FOLDER / f"{method}-{seed}"
            folders.append(folder)
            try:
                _one(replace(experiment, stop=budget.next()), folder, session, budget)
            except (InputError, NoResultError) as error:
                failed[folder] = str(error)
                errors.append(error)
    if len(failed) == len(folders) and all(isinstance(error, InputError) for error in errors):
        raise errors[0]
    return Compared(tuple(folder for folder in folders if (folder / "run.json").is_file()), failed, tuned)


def _prepared(comparison: Comparison, method: str, session: Session) -> Experiment:
    """Return a method's experiment (and check all tuned values), with validation rows if it is tuned."""
    for seed in comparison.seeds:
        for values in combinations(comparison.tune):
            comparison.file.experiment(method, seed=seed, **changes(values))
    experiment = comparison.file.experiment(method)
    if experiment.stop.rounds == 0:
        raise InputError("stop.rounds: 0 rounds have no fleet seconds to share; valid: 1 or more in a comparison")
    if comparison.tune and experiment.data.validation_rows == 0:
        rows = len(session.workshop.tokens(experiment.data, experiment.model).train)
        count = max(1, min(LARGEST_VALIDATION, rows // 10))
        experiment = replace(experiment, data=replace(experiment.data, validation_rows=count))
    return experiment


def _chosen(comparison: Comparison, base: Experiment, method: str, seed: int, values: Values) -> Experiment:
    experiment = comparison.file.experiment(method, seed=seed, **changes(values))
    return replace(experiment, data=base.data)


def _one(experiment: Experiment, folder: Path, session: Session, budget: _Budget) -> float | None:
    """Run one experiment, or what of it is missing, and return its last value of the metric."""
    head = _head(experiment, folder, session)
    budget.spent(float(head["final"]["time_s"]))
    return head["final"].get(head["metric"])


def _head(experiment: Experiment, folder: Path, session: Session) -> Plain:
    """Return the final run.json: of the finished run that is there, of one that goes on, or of a new one."""
    store = RunStore(folder)
    if not (folder / RUN_FILE).is_file():
        return start(experiment, folder, session)
    head = store.read_head()
    if head["status"] == "done":
        return head
    if not (store.checkpoint / checkpoint.FILE).is_file():  # a crash in its first moment
        (folder / RUN_FILE).unlink()
        return start(experiment, folder, session)
    return resume(folder, {}, session, finish=True)


# ---------------------------------------------------------------------------------------------------------------- tune


@dataclass
class _Trials:
    """The runs of one method with different values."""

    direction: str
    results: list[tuple[float, int, Values]] = field(default_factory=list[tuple[float, int, Values]])

    def add(self, value: float, values: Values) -> None:
        self.results.append((value if self.direction == "min" else -value, len(self.results), values))

    def best(self) -> Values | None:
        return min(self.results, key=lambda entry: entry[:2])[2] if self.results else None


def _tune(comparison: Comparison, experiments: Mapping[str, Experiment], session: Session) -> dict[str, Values]:
    """Return each method's best values, by validation rows, with the first seed."""
    budget = _Budget(replace(experiments[comparison.methods[0]].stop, target=None))
    tuned: dict[str, Values] = {}
    for method in comparison.methods:
        limits = budget.next()
        trials: _Trials | None = None
        for index, values in enumerate(combinations(comparison.tune)):
            folder = comparison.out / TUNE_FOLDER / f"{method}-{index}"
            experiment = _chosen(comparison, experiments[method], method, comparison.seeds[0], values)
            experiment = replace(experiment, stop=limits, evaluation=replace(experiment.evaluation, split="validation"))
            try:
                value = _one(experiment, folder, session, budget)
            except NoResultError:
                continue  # a value with which the method diverges is not its best one
            trials = trials or _Trials(str(RunStore(folder).read_head()["direction"]))
            if value is not None:
                trials.add(value, values)
        best = trials.best() if trials else None
        if best is None:
            raise NoResultError(f"--tune: {method} reached no result with any of the values")
        tuned[method] = best
    return tuned
