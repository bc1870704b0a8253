"""Evaluation: exact sums whatever the batches, and the spread over clients."""

import numpy as np
import pytest
import torch

from airtune.training.evaluation import Scores, client_metrics, client_spread, evaluate, score
from airtune.types import ServerModel
from tiny_networks import federated, random_adapter, tokens


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_scores_are_those_of_single_examples(task):
    model, data = federated("llama", task), tokens(13, task)
    server = ServerModel(random_adapter(model))
    found = score(model, server, data, batch_size=4)
    model.show(server)
    for index in range(len(data)):
        arrays = {name: torch.from_numpy(values) for name, values in data.batch([index]).items()}
        with torch.no_grad():
            logits = model.logits(arrays["input_ids"], arrays["attention_mask"])[0]
        if task == "causal-lm":
            ids = arrays["input_ids"][0]
            wanted = -logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].sum()
            assert found.weight[index] == len(ids) - 1
        else:
            wanted = -logits.log_softmax(-1)[data.labels[index]]
            assert found.weight[index] == 1
            assert found.correct[index] == (int(logits.argmax()) == data.labels[index])
        assert found.loss[index] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_metrics_do_not_depend_on_the_batches_or_the_order(task):
    model, data = federated("llama", task, precision="fp64"), tokens(29, task)
    server = ServerModel(random_adapter(model))
    reference = evaluate(model, server, data, batch_size=1)
    assert set(reference) == ({"loss"} if task == "causal-lm" else {"accuracy", "loss"})
    mixed = data.select(np.random.default_rng(0).permutation(29))
    for other in (evaluate(model, server, data, batch_size=7), evaluate(model, server, mixed, batch_size=5)):
        assert other == pytest.approx(reference, rel=1e-12)


def test_evaluation_replaces_what_the_model_carried():
    model, data = federated(), tokens()
    first, second = ServerModel(random_adapter(model, 1)), ServerModel(random_adapter(model, 2))
    before = evaluate(model, first, data)
    assert evaluate(model, second, data) != before
    assert evaluate(model, first, data) == before


def test_no_examples_is_an_error():
    model = federated()
    with pytest.raises(ValueError, match="no examples"):
        evaluate(model, ServerModel(model.initial_adapter(0)), tokens().select([]))


def scores_of(correct, loss):
    return Scores(np.asarray(loss, dtype=float), np.ones(len(loss)), np.asarray(correct, dtype=float))


def test_client_metrics_are_over_the_clients_own_examples():
    scores = scores_of([1, 0, 1, 1], [1.0, 2.0, 3.0, 4.0])
    found = client_metrics(scores, [np.array([0, 1]), np.array([], dtype=int), np.array([2, 3, 3])])
    assert found[0] == {"accuracy": 0.5, "loss": 1.5}
    assert found[1] is None
    assert found[2] == {"accuracy": 1.0, "loss": pytest.approx(11 / 3)}
    assert scores.metrics() == {"accuracy": 0.75, "loss": 2.5}


def test_token_loss_weighs_tokens():
    scores = Scores(np.array([6.0, 2.0]), np.array([3.0, 1.0]), None)
    assert scores.metrics() == {"loss": 2.0}
    assert scores.metrics(np.array([1])) == {"loss": 2.0}


def test_spread_takes_the_bad_end():
    metrics = [{"accuracy": i / 20, "loss": 20.0 - i} for i in range(20)] + [None]
    by_accuracy = client_spread(metrics, "accuracy")
    assert by_accuracy == {"clients": 20.0, "mean": pytest.approx(0.475), "worst_10_percent": pytest.approx(0.025)}
    by_loss = client_spread(metrics, "loss")
    assert by_loss["worst_10_percent"] == pytest.approx(19.5)
    assert client_spread(metrics[:3], "accuracy")["worst_10_percent"] == 0.0
    with pytest.raises(ValueError, match="no client"):
        client_spread([None], "loss")
