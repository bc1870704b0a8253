"""DP-SGD on a client: opacus's clipping and noise against gradients taken one example at a time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from airtune.errors import InputError
from airtune.lora import ONLY_B, AdapterSlice
from airtune.streams import stream
from airtune.training.local import LocalTrainer
from airtune.training.losses import mean_loss
from airtune.training.private_steps import poisson_batches
from airtune.types import ClientTask, LocalTraining, ServerModel, TailPenalty, TrainingJob
from tiny_networks import federated, random_adapter, tokens

pytest.importorskip("opacus")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
RATE = 0.1
SILENT = 1e-12


def job_of(model, largest_norm, noise, factors=ONLY_B, steps=1, round_index=1, batch_size=4):
    from airtune.compression.dense import Dense
    from airtune.types import SamplePrivacy

    training = LocalTraining(
        local_steps=steps,
        batch_size=batch_size,
        learning_rate=RATE,
        optimizer="sgd",
        privacy=SamplePrivacy(largest_norm, noise),
    )
    server = ServerModel(random_adapter(model, 4))
    train = AdapterSlice.everything(server.adapter.shape, factors)
    return TrainingJob(ClientTask(0, train, train, train, training, Dense(), 1e5, 0.1), server, round_index)


@pytest.fixture(scope="module")
def trainer():
    return LocalTrainer(federated("bert", precision="fp64"), tokens(), [np.arange(12), np.arange(12, 40)], seed=7)


def change(trained, job):
    """Return the step that was made, as one vector."""
    start = job.task.train.take(job.model.adapter)
    before = {(owner, kind): tensor for owner, kind, tensor in start.tensors()}
    wanted = [(o, k, t) for o, k, t in trained.values.tensors() if k in ("B", "extra")]
    return torch.cat([(tensor - before[owner, kind]).flatten() for owner, kind, tensor in wanted])


def one_by_one(trainer, job):
    """Return every example's own gradient of the job's first batch, [examples, values]."""
    (indices,) = trainer.batches(job)
    rows = []
    for index in indices:
        active = trainer.model.activate(job.model, job.task.train, job.task.receive)
        batch = {name: torch.from_numpy(value) for name, value in trainer.tokens.batch(np.array([index])).items()}
        logits = trainer.model.logits(batch["input_ids"], batch["attention_mask"])
        mean_loss(logits, batch["labels"]).backward()
        rows.append(torch.cat([tensor.grad.flatten() for _, _, tensor in active.trained()]))
    return torch.stack(rows)


@pytest.mark.parametrize("largest_norm", [0.05, 0.5, 1e6])
def test_a_step_is_the_sum_of_clipped_gradients_of_single_examples(trainer, largest_norm) -> None:
    job = job_of(trainer.model, largest_norm, SILENT)
    gradients = one_by_one(trainer, job)
    assert len(gradients) > 1
    factor = (largest_norm / gradients.norm(dim=1)).clamp(max=1.0)
    expected = -RATE * (factor[:, None] * gradients).sum(dim=0) / 4
    found = change(trainer.train([job])[0], job)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_no_example_moves_the_sum_by_more_than_its_bound(trainer) -> None:
    job = job_of(trainer.model, 0.2, SILENT, batch_size=12)  # as large as the client: every example is in the batch
    whole = change(trainer.train([job])[0], job) * 12
    for left_out in range(0, 12, 4):
        clients = [np.delete(np.arange(12), left_out)]
        less = change(replace(trainer, clients=clients).train([job])[0], job) * 11  # divided by its own expected size
        assert float((whole - less).norm()) <= RATE * 0.2 * (1 + 1e-6)


def test_the_noise_has_the_promised_deviation_and_its_own_stream(trainer) -> None:
    job = job_of(trainer.model, 0.5, 2.0)
    silent = job_of(trainer.model, 0.5, SILENT)
    noise = change(trainer.train([job])[0], job) - change(trainer.train([silent])[0], silent)
    assert len(noise) > 200
    assert float(noise.std()) == pytest.approx(RATE * 2.0 * 0.5 / 4, rel=0.15)
    assert torch.equal(change(trainer.train([job])[0], job), change(trainer.train([job])[0], job))
    later = job_of(trainer.model, 0.5, 2.0, round_index=2)
    again = change(trainer.train([later])[0], later)
    assert not torch.allclose(again, change(trainer.train([job])[0], job))


def test_an_empty_batch_is_a_step_of_noise(trainer) -> None:
    job = job_of(trainer.model, 0.5, 1.0, steps=12, batch_size=1)
    assert min(len(batch) for batch in trainer.batches(job)) == 0
    assert trainer.train([job])[0].reports["steps"] < 12  # steps with examples
    assert torch.isfinite(change(trainer.train([job])[0], job)).all()


def test_nothing_is_left_behind(trainer) -> None:
    plain = job_of(trainer.model, 1.0, 1.0)
    plain = replace(plain, task=replace(plain.task, training=LocalTraining(local_steps=2, batch_size=4)))
    before = trainer.train([plain])[0]
    trainer.train([job_of(trainer.model, 1.0, 1.0, steps=3)])
    after = trainer.train([plain])[0]
    assert before.reports == after.reports
    for one, other in zip(before.values.tensors(), after.values.tensors(), strict=True):
        assert torch.equal(one[2], other[2])
    assert not any(module._backward_hooks for module in trainer.model.network.modules())


def test_batches_are_independent_coins() -> None:
    indices = np.arange(100, 150)
    batches = poisson_batches(indices, 5, 4000, stream(0, "test"))
    sizes = np.array([len(batch) for batch in batches])
    assert sizes.mean() == pytest.approx(5.0, rel=0.05)
    assert sizes.var() == pytest.approx(50 * 0.1 * 0.9, rel=0.1)
    counts = np.bincount(np.concatenate(batches), minlength=150)[100:]
    np.testing.assert_allclose(counts / 4000, 0.1, atol=0.03)
    assert all(len(batch) == 3 for batch in poisson_batches(np.arange(3), 8, 5, stream(0, "test")))


@pytest.mark.parametrize("factors", [ONLY_B, frozenset({"A", "B"})])
def test_both_factors_can_be_private(trainer, factors) -> None:
    job = job_of(trainer.model, 0.5, 1.0, factors=factors)
    assert torch.isfinite(change(trainer.train([job])[0], job)).all()


def test_what_is_not_covered_is_refused() -> None:
    from airtune.types import SamplePrivacy

    with pytest.raises(InputError, match="penalties"):
        LocalTraining(privacy=SamplePrivacy(), penalties=(TailPenalty(0.1, {}),))
    with pytest.raises(InputError, match="max_grad_norm"):
        LocalTraining(privacy=SamplePrivacy(), max_grad_norm=1.0)
    with pytest.raises(InputError, match="largest_norm"):
        SamplePrivacy(largest_norm=0.0)
    for fields, reason in (({"adapter": "dora"}, "dora"), ({"task": "causal-lm"}, "causal-lm")):
        family = "llama" if "task" in fields else "bert"
        task = fields.get("task", "sequence-classification")
        model = federated(family, **fields)
        trainer = LocalTrainer(model, tokens(task=task), [np.arange(12)], seed=7)
        with pytest.raises(InputError, match=reason):
            trainer.train([job_of(model, 0.5, 1.0, factors=frozenset({"A", "B"}))])
