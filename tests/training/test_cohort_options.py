"""Kinds of adapters x optimizers in the cohort engine: equal to the readable twin, or refused with the reason."""

import pytest

from airtune.errors import InputError
from airtune.optimizers import OPTIMIZERS
from airtune.training.cohort.network import SERVED
from airtune.training.cohort.trainer import CohortTrainer
from airtune.training.local import LocalTrainer
from airtune.training.shapes import ADAPTER_KINDS
from airtune.types import LocalTraining, ServerModel
from cohort_jobs import CLIENTS, job, moved, worst_distance
from tiny_networks import federated, random_adapter, tokens

LINEAR = {"lora", "rslora", "msp-lora", "beam-lora"}


def engines(kind):
    model = federated("bert", precision="fp64", adapter=kind)
    return CohortTrainer(model, tokens(), CLIENTS, 7), LocalTrainer(model, tokens(), CLIENTS, 7)


@pytest.mark.parametrize("kind", sorted(LINEAR))
def test_linear_kinds_train_as_in_the_twin_with_every_stacked_optimizer(kind):
    cohort, twin = engines(kind)
    server = ServerModel(random_adapter(cohort.model, 4))
    for optimizer in OPTIMIZERS:
        jobs = [job(server, client, optimizer=optimizer) for client in range(3)]
        if optimizer == "galore" or (kind, optimizer) == ("beam-lora", "lora-rite"):
            with pytest.raises(InputError, match=rf"training\.optimizer: .*{optimizer}.*; valid: "):
                cohort.train(jobs)
            continue
        found = cohort.train(jobs)
        assert all(moved(t, j.task.train.take(server.adapter)) for t, j in zip(found, jobs, strict=True))
        assert worst_distance(found, twin.train(jobs)) < 1e-7, (kind, optimizer)


@pytest.mark.parametrize("kind", sorted(set(ADAPTER_KINDS) - LINEAR))
def test_the_other_kinds_are_refused_with_the_reason(kind):
    assert kind not in SERVED
    with pytest.raises(InputError, match=rf"model\.adapter: the cohort engine has no {kind}.*; valid: lora, rslora"):
        engines(kind)


def test_an_optimizer_without_stacks_is_refused_before_training():
    cohort, _ = engines("lora")
    for optimizer in OPTIMIZERS:
        if optimizer == "galore":
            with pytest.raises(InputError, match=r"training\.optimizer: .*galore.*; valid: "):
                cohort.check(LocalTraining(optimizer=optimizer))
        else:
            cohort.check(LocalTraining(optimizer=optimizer))
