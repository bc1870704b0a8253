"""Gradient norms and mini-batch noise: exact on whole clients, and the noise falls with the batch as theory says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.config import read_file
from airtune.experiment.gradients import measure_gradients
from airtune.lora import AdapterSlice
from tiny_experiment import write_experiment


def bench_of(folder: Path, batch_size: int) -> Bench:
    """All sentences have one length: batches of like length would be no random ones."""
    changes = {"training__optimizer": "sgd", "training__batch_size": batch_size, "training__learning_rate": 0.3}
    return build(read_file(write_experiment(folder, words=6)).experiment("adaptive-sampling", **changes), Workshop())


def full_gradient(bench: Bench, client: int) -> float:
    """Return the norm of one client's gradient over all of its rows, by autograd directly."""
    everything = AdapterSlice.everything(bench.start.adapter.shape)
    active = bench.federated.activate(bench.start, everything, everything)
    parameters = [tensor for _, _, tensor in active.trained()]
    batch = bench.tokens.train.batch(bench.clients[client])
    arrays = {name: torch.from_numpy(values) for name, values in batch.items()}
    logits = bench.federated.logits(arrays["input_ids"], arrays["attention_mask"])
    loss = torch.nn.functional.cross_entropy(logits, arrays["labels"])
    return float(sum((g.double() ** 2).sum() for g in torch.autograd.grad(loss, parameters)) ** 0.5)


def test_a_batch_of_all_rows_has_no_noise_and_the_norm_of_autograd(tmp_path: Path) -> None:
    bench = bench_of(tmp_path, 400)
    found = measure_gradients(bench, [bench.start], bench.experiment.training)
    has = bench.cell.fleet.num_examples > 0
    assert np.isnan(found.noise[~has]).all()
    for client in np.flatnonzero(has).tolist():
        expected = full_gradient(bench, client)
        assert found.dissimilarity[client] == pytest.approx(expected, rel=1e-3)
        assert found.noise[client] < 1e-3 * expected


def test_mini_batches_are_noisy_around_the_same_gradient(tmp_path: Path) -> None:
    """Sixteen times the batch: a quarter of the noise, and less, as a batch is drawn without replacement.

    The norm is that of all rows, within three standard errors.
    """
    whole = bench_of(tmp_path / "0", 400)
    client = int(whole.cell.fleet.num_examples.argmax())
    expected = full_gradient(whole, client)
    noise: dict[int, float] = {}
    for size in (1, 16):
        bench = bench_of(tmp_path / str(size), size)
        found = measure_gradients(bench, [bench.start], bench.experiment.training, batches=48)
        noise[size] = float(found.noise[client])
        error = 2.0 * expected * noise[size] / 48**0.5 + noise[size] ** 2 / 48
        assert abs(found.dissimilarity[client] ** 2 - expected**2) < 3.0 * error
    rows = int(whole.cell.fleet.num_examples[client])
    assert noise[1] / noise[16] == pytest.approx(4.0 * ((rows - 1) / (rows - 16)) ** 0.5, rel=0.25)
