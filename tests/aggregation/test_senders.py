"""The mean over senders: each component over those who moved it, everything else as the plain mean has it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aggregation_examples import NO_COST, outcome, random_adapter, task
from airtune.aggregation.mean import Mean
from airtune.aggregation.senders import SendersMean
from airtune.compression.soft import Soft
from airtune.errors import InputError
from airtune.lora import AdapterSlice
from airtune.methods.soft import SoftLoRA
from airtune.methods.tsfa import TSFA
from airtune.types import ClientUpdate, ServerModel

EXAMPLES = (10, 20, 30)


def arrived(ratio, rank=6, sent_rank=None):
    """Return the server's model and the outcome of three clients whose updates went through SOFT's codec."""
    model = ServerModel(random_adapter(rank, seed=0))
    send = AdapterSlice.truncation(model.adapter.shape, sent_rank or rank)
    start, updates = send.take(model.adapter), []
    for client in range(3):
        other = send.take(random_adapter(rank, seed=client + 1))
        trained = start.with_factors(
            {n: replace(f, A=f.A + other.factors[n].A, B=f.B + other.factors[n].B) for n, f in start.factors.items()},
            {n: v + 0.1 * client for n, v in start.extras.items()},
        )
        payload, _ = Soft(ratio).encode(send, trained, start, {}, np.random.default_rng(0))
        values = Soft(ratio).decode(send, payload, start)
        updates.append(ClientUpdate(task(client, send), values, model.version, 0.0, 1.0, NO_COST, {}))
    return model, outcome(updates, EXAMPLES)


@pytest.mark.parametrize("sent_rank", [6, 4])
def test_each_component_is_the_mean_over_those_who_sent_it(sent_rank):
    model, result = arrived(0.5, sent_rank=sent_rank)
    after, before = SendersMean()(model, result).adapter, model.adapter
    several = set()
    for name, old in before.factors.items():
        for i in range(6):
            owners = []
            for update, weight in zip(result.updates, EXAMPLES, strict=True):
                if i < sent_rank and not torch.equal(update.values.factors[name].A[i], old.A[i]):
                    owners.append((weight, update.values.factors[name]))
            several.add(len(owners))
            total = sum(weight for weight, _ in owners)
            rows = sum(weight / total * f.A[i] for weight, f in owners) if owners else old.A[i]
            columns = sum(weight / total * f.B[:, i] for weight, f in owners) if owners else old.B[:, i]
            torch.testing.assert_close(after.factors[name].A[i], rows)
            torch.testing.assert_close(after.factors[name].B[:, i], columns)
    assert len(several) >= 3  # by different numbers of clients, or the test says little


def test_the_head_and_components_that_all_send_are_those_of_the_plain_mean():
    model, result = arrived(1.0)
    one, other = SendersMean()(model, result).adapter, Mean()(model, result).adapter
    for name in one.factors:
        assert torch.equal(one.factors[name].A, other.factors[name].A)
        assert torch.equal(one.factors[name].B, other.factors[name].B)
    model, result = arrived(0.3)
    extras = [rule(model, result).adapter.extras["classifier.weight"] for rule in (SendersMean(), Mean())]
    assert torch.equal(*extras)


@pytest.mark.parametrize("method", [SoftLoRA, TSFA])
def test_methods_take_it_by_name_and_refuse_zero_fill(method):
    assert isinstance(method(average_over="senders").aggregator, SendersMean)
    assert isinstance(method().aggregator, Mean)
    with pytest.raises(InputError, match=r"average_over.*valid"):
        method(average_over="senders", compressor=Soft(fill="zero"))
    with pytest.raises(InputError, match=r"average_over.*valid"):
        method(average_over="nobody")
