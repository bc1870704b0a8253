"""The aggregation family trained for real on a tiny BERT: bits in both directions, frozen factors, personal models."""

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from airtune.aggregation.mean import Mean
from airtune.aggregation.merging import Redraw
from airtune.aggregation.stacking import Stacking
from airtune.devices.latency import TransformerShape
from airtune.devices.profiles import load_profile
from airtune.errors import InputError
from airtune.federation import Progress, Stop, begin, run
from airtune.lora import ONLY_A, ONLY_B, AdapterSlice, LoraFactors
from airtune.methods import method_class
from airtune.methods.composed import Composed
from airtune.methods.fed_sb import FedSB
from airtune.methods.fedit import FedIT
from airtune.methods.fedsa_lora import FedSALoRA
from airtune.methods.galore_avg import GaLoreAverage
from airtune.methods.rac_lora import RACLoRA
from airtune.methods.rolora import RoLoRA
from airtune.scheduling.planner import Separate
from airtune.scheduling.slicing import RankByMemory, Sketch
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of
from airtune.simulation.runner import SimulatedRunner
from airtune.streams import stream
from airtune.training.evaluation import evaluate
from airtune.training.local import LocalTrainer
from airtune.training.model import FederatedModel
from airtune.types import LocalTraining, RoundRecord, ServerModel, Trained, TrainingJob
from tiny_networks import WIDTH, federated, tokens

CLIENTS, RANK, SLOTS = 3, 4, 4
FACTOR = SLOTS * RANK * WIDTH  # values of all A, and of all B: the layers are square
TRAINING = LocalTraining(local_steps=6, batch_size=8, learning_rate=5e-3)


@dataclass
class Watched:
    """A trainer that keeps what it was asked and what came out."""

    inner: LocalTrainer
    seen: list[tuple[TrainingJob, Trained]]

    def train(self, jobs: list[TrainingJob]) -> list[Trained]:
        results = self.inner.train(jobs)
        self.seen.extend(zip(jobs, results, strict=True))
        return list(results)


@dataclass
class Bench:
    method: Any
    federated: FederatedModel
    cell: Cell
    trainer: Watched

    def play(self, rounds: int) -> list[tuple[Progress, RoundRecord]]:
        start = begin(self.method, ServerModel(self.federated.initial_adapter(0)), self.cell)
        runner = SimulatedRunner(self.cell, self.cell.costs, self.trainer, 0)
        return list(run(self.method, start, self.cell, runner, stop=Stop(rounds), seed=0, evaluate=self.evaluate))

    def evaluate(self, model: ServerModel) -> Mapping[str, float]:
        return evaluate(self.federated, model, self.trainer.inner.tokens)


def bench_of(method: Any, clients: int = CLIENTS, **model: Any) -> Bench:
    base = federated(**{"rank": RANK, **model})
    data = tokens(clients * 20)
    rows = [np.arange(20 * c, 20 * c + 20) for c in range(clients)]
    fleet = fleet_of([load_profile("jetson-tx2")] * clients, np.full(clients, 20))
    start = ServerModel(base.initial_adapter(0))
    shape = (method.prepare(start) if hasattr(method, "prepare") else start).adapter.shape
    network = TransformerShape.from_config(base.config_json)
    costs = CostModel(fleet=fleet, shape=shape, network=network, tokens=np.full(clients, 8.0), constant_bytes=0.0)
    cell = Cell(nominal=fleet, costs=costs, seed=0, downlink="unicast")
    return Bench(method, base, cell, Watched(LocalTrainer(base, data, rows, 0), []))


def named(name: str, **fields: Any) -> Any:
    return method_class(name)(training=TRAINING, **fields)


P, K = 2 * FACTOR, CLIENTS
BITS = {  # values per client without the head: upload in rounds 1 and 2, download in rounds 1, 2 and 3
    "fedit": ((P, P), (P, P, P)),
    "flora": ((P, P), (0, K * P, K * P)),
    "flexlora": ((P, P), (P, P, P)),
    "fedex-lora": ((P, P), (P, P + (K - 1) * P, P + (K - 1) * P)),
    "lora-fair": ((P, P), (P, P, P)),
    "ffa-lora": ((P // 2, P // 2), (P // 2, P // 2, P // 2)),
    "rolora": ((P // 2, P // 2), (0, P // 2, P // 2)),
    "fedsa-lora": ((P // 2, P // 2), (P // 2, P // 2, P // 2)),
    "fedsvd": ((P // 2, P // 2), (P, P, P)),
    "fed-sb": ((SLOTS * RANK**2,) * 2, (SLOTS * RANK**2,) * 3),
    "rac-lora": ((P // 2, P // 2), (0, P // 2, P // 2)),
    "galore-avg": ((P // 2, P // 2), (0, P // 2, P // 2)),
}


@pytest.mark.parametrize("name", BITS)
def test_bits_are_those_of_the_method_in_both_directions(name: str) -> None:
    """The table of costs: what each method sends per client and round, in values of 32 bits, head included."""
    bench = bench_of(named(name), rank=2) if name in ("flora", "fedex-lora") else bench_of(named(name))
    half = 2 if name in ("flora", "fedex-lora") else 1  # a lower rank keeps the stack below the dense size
    head = bench.federated.shape.extra_values
    records = [record for _, record in bench.play(3)][1:]
    up, down = BITS[name]
    for record, values in zip(records[:2], up, strict=True):
        assert [c.bits_up for c in record.clients] == [32 * (values // half + head)] * K
    for record, values in zip(records, down, strict=True):
        assert [c.bits_down for c in record.clients] == [32 * (values // half + head)] * K


def test_florist_sends_less_than_the_stack() -> None:
    bench = bench_of(named("florist", energy=0.8), rank=2)
    records = [record for _, record in bench.play(2)][1:]
    head = bench.federated.shape.extra_values
    down = [c.bits_down // 32 - head for c in records[1].clients]
    assert 0 < down[0] < K * P // 2


def test_missed_merges_are_downloaded_later_and_no_more_than_the_dense_size() -> None:
    model = ServerModel(federated(rank=2).initial_adapter(0))
    bits = {1: 100, 2: 100, 3: 10**9}
    merged = replace(model, merged_bits=bits, version=3)
    assert merged.catch_up_bits(3) == 0  # nothing merged that it has not
    bench = bench_of(named("flora", cohort_size=1), rank=2)
    dense = 32 * SLOTS * WIDTH * WIDTH
    head = bench.federated.shape.extra_values
    missed: dict[int, int] = {}
    for _, record in bench.play(8)[1:]:
        (client,) = record.cohort
        wanted = min(missed.get(client, 32 * (record.round - 1) * P // 2), dense)
        assert record.clients[0].bits_down == 32 * head + wanted
        missed = {c: missed.get(c, 32 * (record.round - 1) * P // 2) for c in range(K)}
        missed = {c: bits + 32 * P // 2 for c, bits in missed.items()} | {client: 32 * P // 2}


@pytest.mark.parametrize("name", [*BITS, "florist"])
def test_every_method_learns_and_stays_finite(name: str) -> None:
    fields: dict[str, Any] = {"training": replace(TRAINING, local_steps=15, learning_rate=2e-2)}
    if name == "fed-sb":
        fields["training"] = replace(fields["training"], learning_rate=5e-2)
    bench = bench_of(method_class(name)(**fields), alpha=16.0)
    rounds = bench.play(4)
    losses = [record.metrics["loss"] for _, record in rounds]
    assert all(np.isfinite(losses)) and min(losses[1:]) < losses[0] - 0.05


FROZEN = {
    "ffa-lora": ("A", "A"),
    "rac-lora": ("A", "A"),
    "fedsvd": ("A", "A"),
    "rolora": ("A", "B"),
    "galore-avg": ("B", "B"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_factors_are_the_same_to_the_bit_on_every_client(name: str) -> None:
    bench = bench_of(named(name))
    bench.play(2)
    for job, result in bench.trainer.seen:
        start = job.task.train.take(job.model.adapter)
        kept = FROZEN[name][job.round - 1]
        for slot, factors in result.values.factors.items():
            assert torch.equal(getattr(factors, kept), getattr(start.factors[slot], kept))
            other = "B" if kept == "A" else "A"
            assert not torch.equal(getattr(factors, other), getattr(start.factors[slot], other))


def test_fed_sb_trains_nothing_but_cores_and_head() -> None:
    bench = bench_of(FedSB(training=TRAINING))
    bench.play(2)
    for job, result in bench.trainer.seen:
        for slot, f in result.values.factors.items():
            start = job.model.adapter.factors[slot]
            assert torch.equal(f.A, start.A) and torch.equal(f.B, start.B) and not torch.equal(f.core, start.core)


def test_fedsa_keeps_each_clients_b_and_evaluates_the_clients_models() -> None:
    bench = bench_of(FedSALoRA(training=TRAINING))
    rounds = bench.play(3)
    progress, record = rounds[-1]
    assert all(not f.B.any() for f in progress.model.adapter.factors.values())  # the server never sees a B
    finals = {job.task.client: result for job, result in bench.trainer.seen if job.round == 2}
    for job, _ in bench.trainer.seen:
        if job.round == 3:
            for slot, f in job.model.adapter.factors.items():
                assert torch.equal(f.B, finals[job.task.client].values.factors[slot].B)
                assert torch.equal(f.A, rounds[2][0].model.adapter.factors[slot].A)
    own = [progress.pending.memory[client] for client in range(K)]
    slot = next(iter(progress.model.adapter.factors))
    assert not torch.equal(own[0][f"own/B/{slot}"], own[1][f"own/B/{slot}"])
    scores = []
    for memory in own:
        factors = {name: replace(f, B=memory[f"own/B/{name}"]) for name, f in progress.model.adapter.factors.items()}
        personal = replace(progress.model, adapter=progress.model.adapter.with_factors(factors))
        scores.append(bench.evaluate(personal)["loss"])
    assert record.metrics["loss"] == pytest.approx(np.mean(scores), rel=1e-9)


def test_rolora_downloads_both_factors_only_after_a_missed_round() -> None:
    method = RoLoRA(cohort_size=1, training=TRAINING)
    bench = bench_of(method)
    head = bench.federated.shape.extra_values
    last = dict.fromkeys(range(K), 0)
    for _, record in bench.play(8)[1:]:
        (client,) = record.cohort
        missed = range(max(last[client], 1), record.round)
        changed = {"B" if number % 2 else "A" for number in missed}
        assert record.clients[0].bits_down == 32 * (len(changed) * FACTOR + head)
        last[client] = record.round


# ------------------------------------------------------------------------------------- against dense gradient descent


def _dense_reference(bench: Bench, job: TrainingJob, optimizer: str) -> dict[str, torch.Tensor]:
    """Train the base weights themselves: W <- W - lr * projected step, the projector taken from the job's model."""
    base, training = bench.federated, job.task.training
    base.show(replace(job.model, adapter=_without_product(job.model)))
    weights = {slot: base.network.get_submodule(slot).base_layer.weight for slot in base.shape.slots}
    originals = {slot: w.detach().clone() for slot, w in weights.items()}
    for w in weights.values():
        w.requires_grad_(True)
    small = {slot: _projected(job, slot, torch.zeros_like(w)).requires_grad_(True) for slot, w in weights.items()}
    step = (torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD)(
        list(small.values()), lr=training.learning_rate, weight_decay=0.0
    )
    for indices in bench.trainer.inner.batches(job):
        batch = {n: torch.from_numpy(v) for n, v in bench.trainer.inner.tokens.batch(indices).items()}
        loss = bench.trainer.inner._loss({n: v.numpy() for n, v in batch.items()})
        gradients = torch.autograd.grad(loss, list(weights.values()))
        before = {slot: value.detach().clone() for slot, value in small.items()}
        for (slot, value), gradient in zip(small.items(), gradients, strict=True):
            value.grad = _projected(job, slot, gradient)
        step.step()
        with torch.no_grad():
            for slot, w in weights.items():
                w += _lifted(job, slot, small[slot] - before[slot])
    changes = {slot: (w.detach() - originals[slot]).clone() for slot, w in weights.items()}
    with torch.no_grad():
        for slot, w in weights.items():
            w.copy_(originals[slot])
            w.requires_grad_(False)
    return changes


def _without_product(model: ServerModel) -> Any:
    zero = {s: replace(f, A=torch.zeros_like(f.A), B=torch.zeros_like(f.B)) for s, f in model.adapter.factors.items()}
    return model.adapter.with_factors(zero)


def _projected(job: TrainingJob, slot: str, gradient: torch.Tensor) -> torch.Tensor:
    f = job.model.adapter.factors[slot]
    return f.B.T @ gradient if job.task.train.tensors == ONLY_A else gradient @ f.A.T


def _lifted(job: TrainingJob, slot: str, change: torch.Tensor) -> torch.Tensor:
    f = job.model.adapter.factors[slot]
    return f.B @ change if job.task.train.tensors == ONLY_A else change @ f.A


@pytest.mark.parametrize(
    ("method", "optimizer"), [(GaLoreAverage(), "adamw"), (RACLoRA(), "sgd"), (GaLoreAverage(), "sgd")]
)
def test_local_training_is_descent_of_the_dense_weight_in_the_subspace(method: Any, optimizer: str) -> None:
    """GaLore with a fixed projector (Adam on projected gradients), and RAC's projected gradient descent."""
    bench = bench_of(method, clients=1, alpha=float(RANK), precision="fp64")  # scaling 1
    start = method.prepare(ServerModel(bench.federated.initial_adapter(0)))
    seen = bench.cell.observe(1, 0.0, begin(method, start, bench.cell).pending, start)
    (task,) = method.plan(None, seen, stream(0, "plan", 1)).tasks
    rate = 1e-2 if optimizer == "adamw" else 1.0
    training = LocalTraining(local_steps=5, batch_size=8, learning_rate=rate, optimizer=optimizer)
    task = replace(task, train=replace(task.train, extras=False), training=training)
    job = TrainingJob(task, start, 1)
    (result,) = bench.trainer.inner.train([job])
    wanted = _dense_reference(bench, job, optimizer)
    for slot, change in wanted.items():
        got = result.values.factors[slot].product()
        assert change.norm() > 1e-3
        assert (got - change).norm() < 1e-6 * change.norm()


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("aggregator", ["frozen-a", "alternating", "shared-factor", "shared-core", "refactoring"])
def test_one_factor_rules_refuse_unequal_ranks_with_a_reason(aggregator: str) -> None:
    from airtune.aggregation.registry import AGGREGATORS

    with pytest.raises(InputError, match=r"method\.aggregator: Separate with .* is refused: all clients train"):
        Composed(Separate(slicer=RankByMemory()), AGGREGATORS[aggregator]())


def test_rules_on_products_refuse_sketches() -> None:
    with pytest.raises(InputError, match="random subset"):
        Composed(Separate(slicer=Sketch(2)), Stacking())
    Composed(Separate(slicer=Sketch(2)), Mean())


@pytest.mark.parametrize(
    ("name", "fields", "field"),
    [
        ("florist", {"energy": 1.5}, "method.energy"),
        ("fedex-lora", {"residual_rank": 0}, "method.residual_rank"),
        ("fedsvd", {"period": 0}, "method.period"),
        ("ffa-lora", {"rows": "round"}, "method.rows"),
        ("fedsa-lora", {"shared": "C"}, "method.shared"),
        ("lora-fair", {"strength": 0.0}, "method.strength"),
        ("lora-fair", {"correction_rate": 0.0}, "method.correction_rate"),
        ("flora", {"highest_rank": 4}, "method.highest_rank"),
    ],
)
def test_wrong_fields_are_refused_when_the_method_is_made(name: str, fields: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        method_class(name)(**fields)


def test_fed_sb_needs_a_rank_that_fits_the_layers() -> None:
    with pytest.raises(InputError, match=r"model\.rank"):
        FedSB().prepare(ServerModel(federated(rank=40).initial_adapter(0)))


def test_prepared_models_keep_the_sizes_of_all_but_the_core() -> None:
    start = ServerModel(federated().initial_adapter(0))
    for name in BITS:
        method = named(name)
        if isinstance(method, FedIT | RoLoRA):
            continue
        shape = method.prepare(start).adapter.shape
        assert shape == start.adapter.shape or name == "fed-sb"
    assert AdapterSlice.everything(start.adapter.shape, ONLY_B).num_values(start.adapter.shape) > 0


def test_a_broadcast_carries_the_merges_once() -> None:
    bench = bench_of(named("fedex-lora"), rank=2)
    bench.cell = replace(bench.cell, downlink="broadcast")
    records = [record for _, record in bench.play(2)][1:]
    head = bench.federated.shape.extra_values
    assert [record.downlink_bits for record in records] == [32 * (P // 2 + head), 32 * (K * P // 2 + head)]


def test_another_process_draws_the_same_factor() -> None:
    """Nothing of the drawn factor travels: server and clients are processes of their own."""
    code = (
        "import hashlib, torch; from airtune.aggregation.merging import Redraw; from airtune.lora import LoraFactors\n"
        "f = LoraFactors(torch.zeros(4, 9), torch.zeros(7, 4), 1.0)\n"
        "rows = [Redraw(law, 3).rows(f, 5, 1).A for law in ('kaiming', 'gaussian', 'orthonormal')]\n"
        "print(hashlib.sha256(b''.join(a.numpy().tobytes() for a in rows)).hexdigest())"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "12"
    }
    like = LoraFactors(torch.zeros(4, 9), torch.zeros(7, 4), 1.0)
    rows = [Redraw(law, 3).rows(like, 5, 1).A for law in ("kaiming", "gaussian", "orthonormal")]
    assert outputs == {hashlib.sha256(b"".join(a.numpy().tobytes() for a in rows)).hexdigest() + "\n"}
    assert not torch.equal(rows[0], Redraw("kaiming", 3).rows(like, 6, 1).A)
