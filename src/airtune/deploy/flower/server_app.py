"""The `ServerApp`: an experiment's own run (same store, checkpoint, records, report) on the devices of a federation.

Neither `FedAvg` nor `Strategy.start` is used: the loop is `airtune.federation.run`, which can resume, and which asks
the method for a plan and the runner for its outcome.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from airtune.deploy.flower.environment import FlowerEnvironment
from airtune.deploy.flower.evaluation import FlowerEvaluation
from airtune.deploy.flower.facts import identity_of
from airtune.deploy.flower.mail import Carrier, Mail
from airtune.deploy.flower.nodes import Nodes
from airtune.deploy.flower.options import ServerOptions, read_experiment_of, read_options
from airtune.deploy.flower.runner import FlowerRunner
from airtune.deploy.prediction import Observed, Predicting, Simulated
from airtune.errors import MissingPackageError, NoResultError
from airtune.experiment.build import Bench, Workshop
from airtune.experiment.run import Actors, Session, resume, start
from airtune.experiment.store import Plain, RunStore

log = logging.getLogger("flwr")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run configuration names, or go on with it.

    Raises
    ------
    NoResultError : as `serve`, and where the run was interrupted: Flower then ends the process in order.
    """
    options = read_options(ServerOptions, context.run_config)
    try:
        with _termination_is_an_interruption():
            head = serve(cast("Carrier", grid), options, command=f"flwr run (run {context.run_id})")
    except KeyboardInterrupt as interruption:
        raise NoResultError(f"interrupted ({interruption}); to go on: the same flwr run with resume=true") from None
    log.info("done: %s", json.dumps(head["final"]))


def serve(carrier: Carrier, options: ServerOptions, *, command: str = "") -> Plain:
    """Run an experiment on the devices that a grid reaches, into its folder, and return the final run.json.

    Raises
    ------
    InputError : the experiment cannot be built, or the folder is not empty and `resume` was not asked for.
    NoResultError : too few devices reported, a later round cannot be planned, or the run diverged.
    KeyboardInterrupt : passed on; run.json says "interrupted", the checkpoint is that of the last whole round.
    """
    experiment, file = read_experiment_of(options)
    default = Path("runs") / f"{experiment.name}-{experiment.label}-{experiment.seed}-flower"
    folder = Path(options.out).expanduser() if options.out else default
    session = Session(Workshop(), Rounds(), command, file, actors=lambda bench: actors_of(bench, carrier, options))
    if options.resume and RunStore(folder).checkpoint.is_dir():
        head = RunStore(folder).read_head()
        if head["status"] == "done":
            log.info("the run in %s is done", folder)
            return head
        log.info("going on with the run in %s", folder)
        head = resume(folder, {}, session, finish=True)
    else:
        head = start(experiment, folder, session)
    _write_page(folder)
    return head


def actors_of(bench: Bench, carrier: Carrier, options: ServerOptions) -> Actors:
    """Return the environment and the runner that stand for real devices."""
    mail = Mail(carrier)
    environment = environment_of(bench, mail, options)
    runner = FlowerRunner(
        mail=mail,
        environment=environment,
        round_seconds=options.round_seconds,
        poll_seconds=options.poll_seconds,
        idle_seconds=bench.experiment.fleet.idle_seconds,
        max_norm=options.max_norm,
    )
    prediction = Observed(environment) if environment.measured else Simulated(bench)
    evaluation = FlowerEvaluation(bench.evaluate, runner, options.round_seconds)
    return Actors(environment, Predicting(runner, prediction), evaluation)


def environment_of(bench: Bench, mail: Mail, options: ServerOptions) -> FlowerEnvironment:
    """Return the environment that asks devices over `mail`."""
    clients = bench.experiment.fleet.clients
    return FlowerEnvironment(
        nodes=Nodes(mail, clients, identity_of(bench), options.measure, options.wait_seconds),
        cell=bench.cell,
        costs=bench.cell.costs,
        measured=options.observe == "measured",
        smallest_fleet=min(options.nodes or clients, clients),
        poll_seconds=options.poll_seconds,
    )


@dataclass(frozen=True)
class Rounds:
    """Tells Flower's log of each round."""

    def started(self, bench: Bench, store: RunStore, rounds_done: int) -> None:
        """Say where the run is written, and from where it goes on."""
        log.info("airtune: %s into %s, %s rounds done", bench.experiment.label, store.folder, rounds_done)

    def round_done(self, line: Plain) -> None:
        """Say what a round brought."""
        metrics = ", ".join(f"{name} {line[name]:.4f}" for name in ("accuracy", "loss") if line.get(name) is not None)
        arrived, cohort = len(line["arrived"]), len(line["cohort"])
        log.info("round %s: %s of %s in %.1f s; %s", line["round"], arrived, cohort, line["duration_s"], metrics)

    def finished(self, head: Plain) -> None:
        """Say what the run's result is."""
        log.info("airtune: %s", head["status"])


def _write_page(folder: Path) -> None:
    from airtune.report.page import write_run_report

    try:
        write_run_report(folder)
    except MissingPackageError as error:
        log.info("no page: %s", error)


@contextmanager
def _termination_is_an_interruption() -> Generator[None]:
    """Let SIGTERM and SIGINT end the run as Ctrl-C ends `airtune run`: run.json says "interrupted".

    Flower's own handlers end the process at once. Only the main thread may set handlers; in Flower's simulation the
    app runs in another one, and Flower's handlers stay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    earlier = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
