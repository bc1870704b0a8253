"""MoLE's method: clusters, what travels in which phase, fixed experts, gates averaged or kept; whole runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from airtune.devices.latency import TransformerShape
from airtune.devices.profiles import load_profile
from airtune.errors import InputError
from airtune.experiment import checkpoint
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import read_file
from airtune.experiment.evaluation import evaluate_run
from airtune.experiment.run import Session, digest, resume, start
from airtune.federation import Stop, begin, run
from airtune.lora import AdapterSlice, has_own, with_own
from airtune.methods.mole import MoLE, label_clusters
from airtune.simulation.cell import Cell
from airtune.simulation.costs import CostModel
from airtune.simulation.fleet import fleet_of
from airtune.simulation.runner import SimulatedRunner
from airtune.training.gates import is_gate
from airtune.training.local import LocalTrainer
from airtune.training.saved import open_adapter
from airtune.types import LocalTraining, ServerModel
from tiny_experiment import head_of, lines_of, write_experiment
from tiny_networks import WIDTH, federated, tokens

ROWS = [np.arange(0, 10), np.arange(10, 20), np.arange(20, 30), np.arange(30, 40)]
COUNTS = np.array([[9, 1, 0], [8, 2, 0], [0, 1, 9], [1, 0, 9]])


@pytest.fixture(scope="module")
def model():
    return federated("bert", adapter="mole", experts=2)


def world(model, counts=COUNTS):
    sizes = np.array([len(rows) for rows in ROWS])
    fleet = fleet_of([load_profile("jetson-tx2")] * 4, sizes, counts)
    shape = TransformerShape.from_config(model.config_json)
    costs = CostModel(fleet, model.shape, shape, tokens=np.full(4, 8.0), constant_bytes=0.0)
    cell = Cell(nominal=fleet, costs=costs, seed=0, downlink="unicast")
    return cell, SimulatedRunner(cell, costs, LocalTrainer(model, tokens(), ROWS, 0), 0)


def rounds_of(model, method, count):
    """Return (progress, record) of round 0 and all others."""
    cell, runner = world(model)
    training = LocalTraining(local_steps=2, batch_size=4, learning_rate=0.01)
    method = replace(method, training=training)
    first = begin(method, ServerModel(model.initial_adapter(0)), cell)
    return list(run(method, first, cell, runner, stop=Stop(count), seed=0, evaluate=lambda _: {"loss": 0.0}))


def slots_of(adapter, expert):
    return [slots[expert] for slots in adapter.placement.values()]


def test_clusters_are_the_clients_with_similar_labels():
    assert label_clusters(COUNTS.astype(float), 2).tolist() in ([0, 0, 1, 1], [1, 1, 0, 0])
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 60)
    counts = np.array([rng.multinomial(rng.integers(20, 200), np.eye(3)[t] * 0.7 + 0.1) for t in truth]).astype(float)
    counts[7] = 0.0
    found = label_clusters(counts, 3)
    known = counts.sum(axis=1) > 0
    assert len({(a, b) for a, b in zip(truth[known], found[known], strict=True)}) == 3 and found[7] == 0
    assert np.array_equal(found, label_clusters(3.0 * counts, 3))
    assert label_clusters(np.ones((5, 2)), 3).tolist() == [0] * 5
    assert label_clusters(np.zeros((2, 2)), 3).tolist() == [0, 0]


def test_a_client_trains_the_expert_of_its_cluster_and_then_gates_alone(model):
    done = rounds_of(model, MoLE(expert_rounds=2), 4)
    start, _, experts, gates, last = (progress.model.adapter for progress, _ in done)
    cluster = done[0][0].state.expert
    assert sorted(cluster.tolist()) == [0, 0, 1, 1] and cluster[0] == cluster[1]
    for expert in (0, 1):
        for slot in slots_of(start, expert):
            assert not torch.equal(experts.factors[slot].B, start.factors[slot].B)
            for later in (gates, last):  # fixed to the bit
                assert torch.equal(later.factors[slot].A, experts.factors[slot].A)
                assert torch.equal(later.factors[slot].B, experts.factors[slot].B)
    for name in start.extras:
        if is_gate(name):
            assert torch.equal(experts.extras[name], start.extras[name])
        assert not torch.equal(last.extras[name], experts.extras[name])
    one, extras = 4 * 4 * 2 * WIDTH, model.shape.extra_values
    for (_, record), up, down in zip(
        done[1:], [one + extras] * 2 + [extras] * 2, [one + extras] * 2 + [2 * one + extras, extras], strict=True
    ):
        assert all(c.bits_up == 32 * up and c.bits_down == 32 * down for c in record.clients)
        assert len(record.arrived) == 4
    assert [record.notes["phase"] for _, record in done[1:]] == ["experts", "experts", "gates", "gates"]
    assert done[3][0].state.holders == (0, 1, 2, 3) and done[2][0].state.holders == ()


def test_an_expert_is_the_mean_of_its_cluster(model):
    """With uniform weights the two clients of a cluster, alone in a federation of plain LoRA, average to the same."""
    done = rounds_of(model, MoLE(expert_rounds=1, weights="uniform"), 1)
    cell, runner = world(model)
    start, after = done[0][0], done[1][0].model.adapter
    method = replace(MoLE(expert_rounds=1), training=LocalTraining(local_steps=2, batch_size=4, learning_rate=0.01))
    seen = cell.observe(1, 0.0, start.pending, start.model)
    plan = method.plan(start.state, seen, np.random.default_rng(0))
    outcome, _ = runner.run(plan, start.model, start.pending, round_index=1, time=0.0)
    for expert in (0, 1):
        mine = [u for u in outcome.updates if start.state.expert[u.task.client] == expert]
        assert len(mine) == 2
        for slot in slots_of(after, expert):
            mean = (mine[0].values.factors[slot].B + mine[1].values.factors[slot].B) / 2
            assert torch.allclose(after.factors[slot].B, mean, atol=1e-7)


def test_personal_gates_stay_on_their_client(model):
    done = rounds_of(model, MoLE(expert_rounds=1, personal=True), 3)
    (first, _), (second, sent), (last, record) = done[1:]
    assert all(client.bits_up == 0 for client in (*sent.clients, *record.clients))
    assert all(client.bits_down == 0 for client in record.clients)  # they hold everything by now
    assert second.model == first.model and last.model == first.model
    whole = AdapterSlice.everything(model.shape)
    memories = [last.pending.memory[client] for client in range(4)]
    assert all(has_own(memory) for memory in memories)
    own = [with_own(last.model.adapter, whole, memory) for memory in memories]
    for name in model.shape.extras:
        assert not torch.equal(own[0].extras[name], own[3].extras[name])
    assert all(torch.equal(o.factors[s].A, f.A) for o in own for s, f in last.model.adapter.factors.items())
    again = [with_own(second.model.adapter, whole, second.pending.memory[c]) for c in range(4)]
    assert not torch.equal(again[0].extras["layer0.gate"], own[0].extras["layer0.gate"])  # trained further


def test_the_balance_enters_in_the_second_phase_only(model):
    plain = rounds_of(model, MoLE(expert_rounds=1, balance=0.0), 2)
    pulled = rounds_of(model, MoLE(expert_rounds=1, balance=5.0), 2)
    same, other = (done[1][0].model.adapter for done in (plain, pulled))
    assert all(torch.equal(same.factors[s].B, f.B) for s, f in other.factors.items())
    first, second = (done[2][0].model.adapter.extras["layer0.gate"] for done in (plain, pulled))
    assert not torch.equal(first, second)


def test_fields_that_mean_nothing_are_refused(model):
    for field, value in {"expert_rounds": 0, "clusters": "names", "balance": -1.0, "weights": "norms"}.items():
        with pytest.raises(InputError, match=field if field != "weights" else "weights"):
            MoLE(**{field: value})
    cell, _ = world(model, counts=None)
    with pytest.raises(InputError, match=r"method\.clusters: the data have no labels"):
        MoLE().init(ServerModel(model.initial_adapter(0)), cell.nominal)


@pytest.mark.parametrize("personal", [False, True])
def test_a_run_resumes_to_the_bit_and_its_folders_open(tmp_path, personal):
    overrides = {
        "model.adapter": "mole",
        "method.expert_rounds": 1,
        "method.personal": personal,
        "method.cohort_size": 3,
        "stop.rounds": 3,
    }
    file = read_file(write_experiment(tmp_path))
    session = Session(Workshop())
    experiment = file.experiment("mole", **overrides)
    head = start(experiment, tmp_path / "whole", session)
    assert head["export"]["kind"] == "airtune" and ("personal" in head["export"]) == personal
    part = replace(experiment, stop=replace(experiment.stop, rounds=2))
    start(part, tmp_path / "parts", Session(Workshop()))
    resume(tmp_path / "parts", {"rounds": 3}, Session(Workshop()))
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "parts")
    folders = sorted((tmp_path / "whole" / "adapters").iterdir()) if personal else [tmp_path / "whole" / "adapter"]
    bench = build(experiment, session.workshop)
    progress = checkpoint.load(tmp_path / "whole" / "checkpoint", digest(head_of(tmp_path / "whole")["config"]))
    arrays = bench.tokens.test.batch(np.arange(8))
    ids, mask = torch.from_numpy(arrays["input_ids"]), torch.from_numpy(arrays["attention_mask"])
    logits = []
    for folder in folders:
        assert json.loads((folder / "airtune_adapter.json").read_text())["model"]["adapter"] == "mole"
        server = progress.model
        if personal:
            whole, memory = AdapterSlice.everything(bench.federated.shape), progress.pending.memory[int(folder.name)]
            server = replace(server, adapter=with_own(server.adapter, whole, memory))
        bench.federated.show(server)
        with torch.no_grad():
            logits.append(open_adapter(folder).logits(ids, mask))
            assert (bench.federated.logits(ids, mask) - logits[-1]).abs().max() <= 1e-5
    found = evaluate_run(tmp_path / "whole", None, session.workshop)
    assert (found["personal"] is not None) == personal
    if personal:
        parts = experiment.partition(bench.tokens.test.labels, 6, seed=experiment.seed)
        of_each: list[float] = []
        for folder in folders:
            if len(part := parts[int(folder.name)]):
                mine = bench.tokens.test.select(part).batch(np.arange(len(part)))
                with torch.no_grad():
                    ids, mask = (torch.from_numpy(mine[name]) for name in ("input_ids", "attention_mask"))
                    right = open_adapter(folder).logits(ids, mask).argmax(dim=1).numpy() == mine["labels"]
                of_each.append(float(right.mean()))
        assert found["personal"]["own"] == pytest.approx(np.mean(of_each)) and found["personal"]["clients"] >= 2
    assert len(folders) >= (2 if personal else 1)
    assert all(not torch.equal(a, logits[0]) for a in logits[1:])
