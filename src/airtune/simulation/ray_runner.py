"""Cohorts spread over the workers of a Ray cluster, one base model in the memory of each.

The round loop, the clock and the aggregation stay where they are; only `Trainer.train` moves. A cohort is cut into
groups that do not depend on the number of workers (`airtune.simulation.grouped`), a free worker takes the next group,
and as a training job is a pure function of its address, it does not matter which worker that is, or whether it is the
second one that tries. So the results equal those of `GroupedTrainer` with the same group size to the bit, on machines
of one kind.

Ray is an extra (``pip install 'airtune[ray]'``) and imported only where workers are asked for. Without an address a
cluster is started on this machine for this process, bound to localhost, without dashboard and telemetry; it ends with
the process. What travels between driver and workers goes through Ray's own serialization, as Ray's functions do:
nothing of it reaches a file of a run.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from airtune.errors import InputError, MissingPackageError, NoResultError
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.grouped import groups_of
from airtune.simulation.runner import SimulatedRunner
from airtune.types import Pending, Plan, RoundOutcome, ServerModel, Trained, Trainer, TrainingJob

ATTEMPTS = 3  # workers that may be lost over one group before the run is given up [our choice]


@dataclass(frozen=True)
class RayTrainer:
    """Trains cohorts on Ray.

    Attributes
    ----------
    make_trainer : builds the trainer of one worker, with its own base model; called once on each worker. Ray sends it
        there, so it is a function of a module that the workers have, or a `functools.partial` of one.
    workers : processes; in a running cluster one CPU each.
    group_size : most clients that one worker trains together; results depend on it where the trainer's do.
    address : of a running cluster; None: start one here, which ends with this process.
    """

    make_trainer: Callable[[], Trainer]
    workers: int
    group_size: int | None = 8
    address: str | None = None
    _pool: list[Any] = field(default_factory=list[Any], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse numbers with which nobody works.

        Raises
        ------
        InputError : a number is below 1. MissingPackageError : Ray is not installed.
        """
        for name in ("workers", "group_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: {value} is below 1; valid: 1 or more")
        _ray()

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[Trained]:
        """Return one result per job, in order. What a lost worker had is trained again on another.

        Raises
        ------
        InputError : there is no cluster at the address.
        NoResultError : a group lost `ATTEMPTS` workers.
        """
        ray = _ray()
        if not self._pool:
            _connect(ray, self.address, self.workers)
            self._pool.extend(self._start(ray) for _ in range(self.workers))
            weakref.finalize(self, _stop, self._pool)
        groups = groups_of(jobs, self.group_size)
        results = self._all_groups(ray, groups)
        return [trained for group in results for trained in group]

    def worker_processes(self) -> list[int]:
        """Return the process numbers of the workers, on their machines; none before the first cohort."""
        return [] if not self._pool else list(_ray().get([worker.process.remote() for worker in self._pool]))

    def close(self) -> None:
        """End the workers. The next cohort would start others."""
        _stop(self._pool)

    # -----------------------------------------------------------------------------------------------------------------

    def _all_groups(self, ray: Any, groups: Sequence[Sequence[TrainingJob]]) -> list[Sequence[Trained]]:
        """Give each free worker the next group until all are trained."""
        results: dict[int, Sequence[Trained]] = {}
        lost = dict.fromkeys(range(len(groups)), 0)
        waiting, free = deque(range(len(groups))), deque(self._pool)
        running: dict[Any, tuple[int, Any]] = {}
        while len(results) < len(groups):
            while waiting and free:
                place, worker = waiting.popleft(), free.popleft()
                running[worker.train.remote(groups[place])] = (place, worker)
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            place, worker = running.pop(done)
            found = _result(ray, done)
            if found is None:
                lost[place] += 1
                _check_losses(groups[place], lost[place])
                free.append(self._replace(ray, worker))
                waiting.appendleft(place)
            else:
                results[place] = found
                free.append(worker)
        return [results[place] for place in range(len(groups))]

    def _start(self, ray: Any) -> Any:
        # In a cluster of our own the workers of an earlier run may still be ending: nobody waits for their CPUs.
        return ray.remote(num_cpus=int(self.address is not None), max_restarts=0)(_Worker).remote(self.make_trainer)

    def _replace(self, ray: Any, worker: Any) -> Any:
        """Put a new worker in the place of a lost one, of which nothing is left running."""
        ray.kill(worker)
        fresh = self._start(ray)
        self._pool[next(place for place, kept in enumerate(self._pool) if kept is worker)] = fresh
        return fresh


@dataclass(frozen=True)
class RayRunner:
    """A `SimulatedRunner` whose clients are trained on Ray; use it in a ``with`` block, or close it.

    Attributes
    ----------
    cell, costs, seed : as of `SimulatedRunner`. trainer : the workers.
    """

    cell: Cell
    costs: CostModel
    trainer: RayTrainer
    seed: int

    def run(
        self, plan: Plan, model: ServerModel, pending: Pending, *, round_index: int, time: float
    ) -> tuple[RoundOutcome, Pending]:
        """Run one round from `time` fleet seconds; see `airtune.types.Runner`."""
        runner = SimulatedRunner(self.cell, self.costs, self.trainer, self.seed)
        return runner.run(plan, model, pending, round_index=round_index, time=time)

    def close(self) -> None:
        """End the workers."""
        self.trainer.close()

    def __enter__(self) -> RayRunner:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        self.close()


class _Worker:
    """What lives in a worker process: one trainer with one base model."""

    def __init__(self, make_trainer: Callable[[], Trainer]) -> None:
        self.trainer = make_trainer()

    def train(self, jobs: Sequence[TrainingJob]) -> list[Trained]:
        """Train one group."""
        return list(self.trainer.train(jobs))

    def process(self) -> int:
        """Return the number of this process."""
        return os.getpid()


def _result(ray: Any, done: Any) -> Sequence[Trained] | None:
    """Return what a worker found, None if the worker was lost; what its trainer raised is raised here."""
    try:
        return ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.OutOfMemoryError) as error:
        if isinstance(error, ray.exceptions.ActorDiedError) and (cause := _raised_at_start(error)) is not None:
            raise cause from None
        return None


def _raised_at_start(error: Any) -> Exception | None:
    """Return why a worker could not be made, None if it was lost later."""
    text = str(error)
    if "error happened in its constructor" not in text and "creation task" not in text.lower():
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if line.startswith("airtune.errors.")]
    if named:
        return InputError(named[-1].partition(": ")[2])
    return RuntimeError(lines[-1] if lines else text)


def _check_losses(group: Sequence[TrainingJob], lost: int) -> None:
    if lost >= ATTEMPTS:
        clients = ", ".join(str(job.task.client) for job in group)
        raise NoResultError(f"training.workers: {lost} workers were lost while they trained the clients {clients}")


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError(
            "training.workers: the package 'ray' is missing; install it with: pip install 'airtune[ray]'"
        ) from error
    return ray


def _connect(ray: Any, address: str | None, workers: int) -> None:
    """Join the cluster at an address, or start one on this machine; one that this process already uses is kept."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        settings |= {"num_cpus": workers, "num_gpus": 0, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        ray.init(address=address or "local", **settings)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        line = " ".join(str(error).split())[:200]
        raise InputError(f"training.workers: no Ray cluster at {address or 'this machine'}: {line}") from error


def _stop(pool: list[Any]) -> None:
    """End workers, if Ray still runs."""
    while pool:
        worker, ray = pool.pop(), _ray()
        if ray.is_initialized():
            ray.kill(worker)
