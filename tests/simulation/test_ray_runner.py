"""Cohorts on a local Ray cluster of two workers: the same bits, and a lost worker costs nothing but time."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from airtune.errors import InputError, MissingPackageError, NoResultError
from airtune.experiment.build import Bench, Workshop, build, worker_trainer
from airtune.experiment.config import read_file
from airtune.federation import Progress, begin, run
from airtune.simulation.grouped import GroupedTrainer, groups_of
from airtune.simulation.ray_runner import RayRunner, RayTrainer
from tiny_experiment import write_experiment

ROUNDS = 2


def on_a_cluster(test: Any) -> Any:
    """Mark a test that needs a cluster: seconds for Ray and for torch in each worker, and Ray's own warnings."""
    return pytest.mark.slow(pytest.mark.filterwarnings("ignore")(test))


def test_groups_depend_on_the_cohort_and_the_size_alone() -> None:
    assert [list(group) for group in groups_of(range(10), 4)] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]
    for count in range(30):
        for size in (1, 2, 7, 40, None):
            groups = groups_of(range(count), size)
            assert [item for group in groups for item in group] == list(range(count))
            sizes = [len(group) for group in groups]
            assert not sizes or (max(sizes) <= (size or count) and max(sizes) - min(sizes) <= 1)


def test_numbers_with_which_nobody_works_are_refused() -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with pytest.raises(InputError, match=r"^workers: 0 is below 1"):
        RayTrainer(partial(worker_trainer, {}, ""), workers=0)
    with pytest.raises(InputError, match=r"^group_size: 0 is below 1"):
        RayTrainer(partial(worker_trainer, {}, ""), workers=1, group_size=0)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"^training.workers: .*'airtune\[ray\]'$"):
        RayTrainer(partial(worker_trainer, {}, ""), workers=1)


def test_an_experiment_file_asks_for_workers(tmp_path: Path) -> None:
    path = write_experiment(tmp_path)
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    bench = build(read_file(path, {"training.workers": 2, "training.group_size": 3}).experiment(), Workshop())
    assert isinstance(bench.runner.trainer, RayTrainer)
    assert (bench.runner.trainer.workers, bench.runner.trainer.group_size) == (2, 3)
    assert bench.experiment.plain()["training"]["workers"] == 2


# ------------------------------------------------------------------------------------------------ with a real cluster


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    file = read_file(write_experiment(tmp_path_factory.mktemp("ray")), {"method.cohort_size": 5})
    return build(file.experiment(), Workshop())


@pytest.fixture(scope="module")
def cluster(bench: Bench) -> Iterator[RayTrainer]:
    """Return two workers in a cluster of their own; afterwards no process of it is left."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    trainer = RayTrainer(
        partial(worker_trainer, bench.experiment.plain(), bench.experiment.label), workers=2, group_size=2
    )
    try:
        yield trainer
    finally:
        trainer.close()
        with warnings.catch_warnings(action="ignore"):  # Ray does not wait for the daemons that it ends
            ray.shutdown()
            gc.collect()
    assert not _ray_processes(), "Ray left processes behind"


def _ray_processes() -> list[str]:
    """Return the command lines of this process's descendants that belong to Ray, waiting a while for them to end."""
    for _ in range(100):
        listed = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True)
        found = [line for line in listed.stdout.splitlines() if "ray" in line and "defunct" not in line]
        if not found:
            return []
        time.sleep(0.1)
    return found


def rounds(bench: Bench, runner: Any) -> list[tuple[Progress, Any]]:
    experiment = bench.experiment
    start = begin(experiment.method, bench.start, bench.cell)
    stop = replace(bench.stop, rounds=ROUNDS)
    return list(run(experiment.method, start, bench.cell, runner, stop=stop, seed=0, evaluate=lambda model: {}))


def same_bits(first: Progress, second: Progress) -> bool:
    pairs = zip(first.model.adapter.tensors(), second.model.adapter.tensors(), strict=True)
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in pairs)


@on_a_cluster
def test_the_cohort_engine_gives_the_same_bits_in_the_same_groups(tmp_path: Path, cluster: RayTrainer) -> None:
    asked = {"method.cohort_size": 5, "training.engine": "cohort", "training.group_size": 3}
    bench = build(read_file(write_experiment(tmp_path), asked).experiment(), Workshop())
    make = partial(worker_trainer, bench.experiment.plain(), bench.experiment.label)
    workers = RayTrainer(make, workers=2, group_size=3)
    assert isinstance(bench.runner.trainer, GroupedTrainer)
    here, there = rounds(bench, bench.runner), rounds(bench, replace(bench.runner, trainer=workers))
    workers.close()
    assert [record for _, record in here] == [record for _, record in there]
    assert same_bits(here[-1][0], there[-1][0])


@on_a_cluster
def test_the_same_bits_as_in_one_process(bench: Bench, cluster: RayTrainer) -> None:
    grouped = GroupedTrainer(bench.runner.trainer, cluster.group_size)
    here = rounds(bench, replace(bench.runner, trainer=grouped))
    there = rounds(bench, RayRunner(bench.cell, bench.cell.costs, cluster, bench.experiment.seed))
    assert len(set(cluster.worker_processes()) - {os.getpid()}) == 2
    assert [record for _, record in here] == [record for _, record in there]
    assert same_bits(here[-1][0], there[-1][0])
    assert not same_bits(here[0][0], here[-1][0])


@on_a_cluster
def test_what_a_killed_worker_had_is_trained_on_another(bench: Bench, cluster: RayTrainer) -> None:
    here = rounds(bench, bench.runner)
    runner = RayRunner(bench.cell, bench.cell.costs, cluster, bench.experiment.seed)
    rounds(bench, runner)
    before = cluster.worker_processes()
    os.kill(before[0], signal.SIGKILL)
    there = rounds(bench, runner)
    assert same_bits(here[-1][0], there[-1][0])
    after = cluster.worker_processes()
    assert before[0] not in after and before[1] in after and len(after) == 2


@on_a_cluster
def test_a_group_that_kills_every_worker_ends_the_run(bench: Bench, cluster: RayTrainer) -> None:
    class Dies:  # defined here: Ray sends it along instead of looking for this file
        def train(self, jobs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    cluster.close()
    hopeless = RayTrainer(lambda: Dies(), workers=1)
    with pytest.raises(NoResultError, match=r"3 workers were lost while they trained the clients 0, 1$"):
        hopeless.train(_jobs(bench, 2))
    hopeless.close()


@on_a_cluster
def test_bad_input_is_told_as_in_one_process(bench: Bench, cluster: RayTrainer) -> None:
    line = "training.optimizer: not possible; valid: another"

    class Refuses:
        def train(self, jobs: Any) -> Any:
            raise InputError(line)

    def cannot_start() -> Any:
        raise InputError(line)

    cluster.close()
    for make in (lambda: Refuses(), cannot_start):
        trainer = RayTrainer(make, workers=1)
        with pytest.raises(InputError) as told:
            trainer.train(_jobs(bench, 1))
        assert str(told.value) == line
        trainer.close()


def _jobs(bench: Bench, count: int) -> list[Any]:
    from airtune.streams import stream
    from airtune.types import Pending, TrainingJob

    experiment = bench.experiment
    start = begin(experiment.method, bench.start, bench.cell)
    seen = bench.cell.observe(1, 0.0, Pending(), start.model)
    plan = experiment.method.plan(start.state, seen, stream(0, "plan", 1))
    return [TrainingJob(replace(plan.tasks[0], client=client), start.model, 1) for client in range(count)]
