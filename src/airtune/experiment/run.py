"""One run: start or resume, round after round into its folder, the result exported at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from airtune.aggregation.error import aggregation_error
from airtune.clock import host_seconds
from airtune.errors import InputError, NoResultError
from airtune.experiment import checkpoint
from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.config import Experiment, read_experiment
from airtune.experiment.privacy_spent import privacy_spent
from airtune.experiment.provenance import git_revision, versions
from airtune.experiment.store import ADAPTER_FOLDER, SCHEMA, Plain, RunStore, new_store
from airtune.federation import Evaluate, Progress, begin, run
from airtune.files import disk_errors
from airtune.lora import AdapterSlice, has_own, with_own
from airtune.streams import stream
from airtune.types import Environment, RoundRecord, Runner

PERSONAL_FOLDER = "adapters"  # one adapter per client, where models are personal
LARGEST_FLEET_TABLE = 20_000  # clients; run.json names each client of a smaller fleet [our choice]
Rounds = Iterator[tuple[Progress, RoundRecord]]


class Reporter(Protocol):
    """Hears of a run's progress; the command line shows it."""

    def started(self, bench: Bench, store: RunStore, rounds_done: int) -> None:
        """Be told that rounds are about to run."""
        ...

    def round_done(self, line: Plain) -> None:
        """Be told of the line that was just added to rounds.jsonl."""
        ...

    def finished(self, head: Plain) -> None:
        """Be told of the final run.json."""
        ...


class Silent:
    """A reporter that says nothing."""

    def started(self, bench: Bench, store: RunStore, rounds_done: int) -> None:
        """Say nothing."""

    def round_done(self, line: Plain) -> None:
        """Say nothing."""

    def finished(self, head: Plain) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Actors:
    """Who acts in a run: the world that planners see, what carries out plans, and what measures the model."""

    environment: Environment
    runner: Runner
    evaluate: Evaluate


def simulated(bench: Bench) -> Actors:
    """Return the simulated cell and its runner."""
    return Actors(bench.cell, bench.runner, bench.evaluate)


@dataclass(frozen=True)
class Session:
    """What `start` and `resume` need besides the experiment.

    workshop : base model and tokens, shared between runs.
    reporter : hears of the progress.
    command : the command line that repeats the run, for run.json; empty if unknown.
    file : the experiment file, whose revision run.json names.
    actors : gives the environment and the runner, those of real devices for example.
    """

    workshop: Workshop
    reporter: Reporter = field(default_factory=Silent)
    command: str = ""
    file: Path | None = None
    actors: Callable[[Bench], Actors] = simulated


def start(experiment: Experiment, folder: Path, session: Session) -> Plain:
    """Run an experiment into a new folder and return the final run.json.

    Raises
    ------
    InputError : the folder is not empty, or the experiment cannot be built, or round 1 cannot be planned: no folder
        is left.
    NoResultError : a later round cannot be planned, the run diverged or the disk is full; what was written is kept.
    KeyboardInterrupt : passed on after run.json says "interrupted"; the checkpoint is that of the last whole round.
    """
    store = new_store(folder)
    try:
        bench = build(experiment, session.workshop)
        actors = session.actors(bench)
        progress = begin(bench.experiment.method, bench.start, actors.environment)
        _check_first_plan(bench, actors.environment, progress)
    except BaseException:
        folder.rmdir()
        raise
    store.write_head(_first_head(bench, session))
    fingerprint = digest(bench.experiment.plain())
    checkpoint.save(store.checkpoint, progress, fingerprint)
    return _run(bench, actors, store, progress, session, fingerprint)


def _check_first_plan(bench: Bench, environment: Environment, progress: Progress) -> None:
    """Plan round 1 as the loop will (same world, same draws), so that what cannot be planned is found at once."""
    seen = environment.observe(1, 0.0, progress.pending, progress.model)
    rng = stream(bench.experiment.seed, "plan", 1)
    bench.experiment.method.plan(progress.state, seen, rng).check(seen)


def resume(folder: Path, limits: Mapping[str, Any], session: Session, *, finish: bool = False) -> Plain:
    """Go on with a run from its checkpoint, bit for bit, and return the final run.json.

    Parameters
    ----------
    folder : of the run.
    limits : new values of some fields of [stop]; nothing else may change.
    finish : a run whose rounds are all there (a crash hit its end) is exported, instead of refused.

    Raises
    ------
    InputError : the folder is not a run, its checkpoint belongs to another configuration, or the run is over.
    """
    store = RunStore(folder)
    head = store.read_head()
    label = str(head.get("method"))
    fingerprint = digest(head["config"])
    experiment = read_experiment(_with_limits(head["config"], limits), label)
    progress = checkpoint.load(store.checkpoint, fingerprint)
    bench = build(experiment, session.workshop)
    lines = store.keep_rounds(progress.round if progress.round else -1)
    if lines and not (finish and _is_over(bench, progress, lines[-1])):
        _check_not_over(bench, progress, lines[-1], folder)
        _forget_last_evaluation(store, lines, bench)
    config = {**head["config"], "stop": bench.experiment.plain()["stop"]}
    store.update_head(status="running", config=config, error=None)
    return _run(bench, session.actors(bench), store, progress, session, fingerprint)


# ------------------------------------------------------------------------------------------------------------ the loop


def _run(
    bench: Bench, actors: Actors, store: RunStore, progress: Progress, session: Session, fingerprint: str
) -> Plain:
    try:
        session.reporter.started(bench, store, progress.round)
        progress = _rounds(bench, actors, store, progress, session.reporter, fingerprint)
        _check_any_update(store)
        export = _export(bench, progress, store)
    except KeyboardInterrupt:
        store.update_head(status="interrupted", **_last(store))
        raise
    except BaseException as error:
        store.update_head(status="failed", error=f"{type(error).__name__}: {error}", **_last(store))
        raise
    spent = privacy_spent(bench.experiment, [len(rows) for rows in bench.clients], store.rounds())
    head = store.update_head(status="done", export=export, **spent, **_last(store))
    session.reporter.finished(head)
    return head


def _rounds(
    bench: Bench, actors: Actors, store: RunStore, progress: Progress, reporter: Reporter, fingerprint: str
) -> Progress:
    experiment = bench.experiment
    began = host_seconds()
    done = progress.round
    rounds = run(
        experiment.method,
        progress,
        actors.environment,
        actors.runner,
        stop=bench.stop,
        seed=experiment.seed,
        evaluate=actors.evaluate,
        evaluate_every=experiment.evaluation.every,
        diagnose=aggregation_error if experiment.evaluation.aggregation_error else None,
    )
    for progress, record in _planned(rounds, done):
        ready = host_seconds()
        line = store.append_round(record)
        checkpoint.save(store.checkpoint, progress, fingerprint)
        store.append_timing(record.round, round_s=ready - began, store_s=host_seconds() - ready)
        reporter.round_done(line)
        began = host_seconds()
    return progress


def _planned(rounds: Rounds, done: int) -> Rounds:
    """Pass rounds on; a plan that a later round cannot carry out is no typing error but a run without a result."""
    try:
        for progress, record in rounds:
            done = progress.round
            yield progress, record
    except InputError as error:
        if done == 0:
            raise
        raise NoResultError(f"round {done + 1}: {error}") from error


def _check_any_update(store: RunStore) -> None:
    """Raise NoResultError if no update of any round arrived and local training diverged."""
    lines = store.rounds()
    lost = {entry["client"] for line in lines for entry in line["dropped"] if entry["reason"] == "diverged"}
    if lost and not any(line["arrived"] for line in lines):
        raise NoResultError(
            f"no update of any round arrived, local training diverged at clients {sorted(lost)[:8]}; "
            "lower training.learning_rate"
        )


def _export(bench: Bench, progress: Progress, store: RunStore) -> Plain:
    from airtune.training.export import export_adapter, export_kind

    with disk_errors(store.adapter):
        export_adapter(bench.federated, progress.model, store.adapter)
    kind = export_kind(bench.federated)
    labels = [] if bench.experiment.model.task == "causal-lm" else list(bench.tokens.train.label_names)
    base = bench.experiment.model.name
    export: Plain = {"kind": kind, "path": ADAPTER_FOLDER, "base_model": base, "labels": labels}
    if (stored := bench.experiment.model.base_weights) != "full":
        export["base_weights"] = stored  # opened on full weights it computes something slightly different
    own = {client: memory for client, memory in sorted(progress.pending.memory.items()) if has_own(memory)}
    if not own:
        return export
    adapter = progress.model.adapter
    whole = AdapterSlice.everything(adapter.shape)
    for client, memory in own.items():
        folder = store.adapter.parent / PERSONAL_FOLDER / str(client)
        with disk_errors(folder):
            personal = replace(progress.model, adapter=with_own(adapter, whole, memory))
            export_adapter(bench.federated, personal, folder)
    return {**export, "personal": PERSONAL_FOLDER}


# ------------------------------------------------------------------------------------------------------------ run.json


def _first_head(bench: Bench, session: Session) -> Plain:
    experiment = bench.experiment
    head: Plain = {
        "schema": SCHEMA,
        "status": "running",
        "name": experiment.name,
        "method": experiment.label,
        "seed": experiment.seed,
        "metric": bench.metric,
        "direction": bench.direction,
        "command": session.command,
        "config": experiment.plain(),
        "versions": versions(),
        "git": git_revision(),
        "experiment_git": None if session.file is None else git_revision(session.file.resolve()),
        "final": {},
        "export": None,
    }
    if bench.cell.fleet.size <= LARGEST_FLEET_TABLE:
        head["fleet"] = _fleet_table(bench)
    return head


def _fleet_table(bench: Bench) -> list[Plain]:
    """Return one row a client: hardware, data, place and gain at time 0."""
    fleet, channel, seed = bench.cell.nominal, bench.cell.channel, bench.experiment.seed
    clients = np.arange(fleet.size)
    places = getattr(channel, "positions", None)
    positions = None if places is None else places(seed, clients, 0.0)
    gains = channel.mean_gain(seed, clients, 0.0)
    rows: list[Plain] = []
    for client in range(fleet.size):
        row: Plain = {
            "client": client,
            "device": fleet.device[client],
            "flops_per_second": fleet.flops_per_second[client],
            "memory_bytes": fleet.memory_bytes[client],
            "examples": fleet.num_examples[client],
            "gain": gains[client],
        }
        if positions is not None:
            row.update(x_m=positions[client, 0], y_m=positions[client, 1])
        rows.append(row)
    return rows


def _last(store: RunStore) -> Plain:
    """Return what run.json holds of the rounds: the totals, and the curves that plans were decided by."""
    curves = [curve for line in store.rounds() for curve in line.get("notes", {}).get("curves", [])]
    newest = {curve["title"]: curve for curve in curves}
    return {"final": _final(store), **({"curves": list(newest.values())} if newest else {})}


def _final(store: RunStore) -> Plain:
    """Return the totals of rounds.jsonl and its last evaluation."""
    lines = store.rounds()
    if not lines:
        return {}
    evaluated = [line for line in lines if "accuracy" in line or "loss" in line]
    final: Plain = {
        "rounds": lines[-1]["round"],
        "time_s": lines[-1]["time_s"],
        **{name: sum(line[name] for line in lines) for name in ("uplink_bits", "downlink_bits", "energy_j")},
    }
    for name in ("accuracy", "loss"):
        if evaluated and name in evaluated[-1]:
            final[name] = evaluated[-1][name]
    return final


# -------------------------------------------------------------------------------------------------------------- resume


def digest(config: Mapping[str, Any]) -> str:
    """Return a fingerprint of a stored configuration but for [stop]: what a checkpoint depends on.

    It is that of the text in run.json, so a later version, whose classes have more fields, still opens the run.
    """
    kept = {key: value for key, value in config.items() if key != "stop"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _with_limits(config: Any, limits: Mapping[str, Any]) -> Plain:
    plain = dict(cast("Plain", config))
    return {**plain, "stop": {**plain.get("stop", {}), **limits}}


def _is_over(bench: Bench, progress: Progress, last: Plain) -> bool:
    metrics = {name: float(last[name]) for name in (bench.metric,) if last.get(name) is not None}
    return bench.stop.reached(progress, metrics)


def _check_not_over(bench: Bench, progress: Progress, last: Plain, folder: Path) -> None:
    if _is_over(bench, progress, last):
        raise InputError(
            f"--resume: the run in {folder} has reached its end (round {progress.round}); "
            f"valid: a later one, as in --stop.rounds {progress.round + 10}"
        )


def _forget_last_evaluation(store: RunStore, lines: list[Plain], bench: Bench) -> None:
    """Take the evaluation out of the last line if it was made only because the run then ended there.

    The uninterrupted run would not have made it, and rounds.jsonl must not tell how often a run was resumed.
    """
    last, every = lines[-1], bench.experiment.evaluation.every
    if last["round"] % every and any(name in last for name in ("accuracy", "loss")):
        store.replace_last_round({key: value for key, value in last.items() if key not in ("accuracy", "loss")})
