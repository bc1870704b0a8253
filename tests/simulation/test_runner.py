"""The simulated runner: seconds by the book, training only for what arrives, nothing charged twice or forgotten."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from airtune.aggregation.mean import Mean
from airtune.devices.availability import Bernoulli
from airtune.devices.battery import Battery
from airtune.lora import AdapterSlice
from airtune.simulation.runner import SimulatedRunner
from airtune.types import ClientTask, Cutoff, Group, Pending, Plan, RoundOutcome
from airtune.wireless.channel import Channel
from airtune.wireless.fading import NoFading
from airtune.wireless.rate import achievable_rate
from airtune.wireless.retransmission import Retransmission
from small_world import AddOne, make_adapter, make_cell, make_model, make_runner, make_task


def run_round(
    runner: SimulatedRunner,
    tasks: list[ClientTask],
    cutoff: Cutoff | None = None,
    pending: Pending | None = None,
    **at: float,
) -> tuple[RoundOutcome, Pending]:
    plan = Plan((Group(tuple(tasks), cutoff or Cutoff()),))
    where = {"round_index": 1, "time": 0.0, **at}
    return runner.run(plan, make_model(), pending or Pending(), **where)


def test_the_clock_follows_the_formulas() -> None:
    cell = make_cell()
    task = make_task(2, make_adapter())
    outcome, _ = run_round(make_runner(cell), [task])
    update = outcome.updates[0]
    bits = 32 * task.send.num_values(make_adapter().shape)
    down_gain = cell.channel.gain(0, [2], 0.0, "downlink")
    down_rate = achievable_rate(
        10e6, cell.channel.base_station_power, down_gain, cell.channel.noise_density("downlink")
    )
    assert update.cost.download_seconds == pytest.approx(bits / down_rate[0])
    flops = sum(cell.costs.compute_flops(task))
    assert update.cost.compute_seconds == pytest.approx(flops / cell.fleet.flops_per_second[2])
    sent_at = update.cost.download_seconds + update.cost.compute_seconds
    up_gain = cell.channel.gain(0, [2], sent_at, "uplink")
    up_rate = achievable_rate(1e6, 0.1, up_gain, cell.channel.noise_density("uplink"))
    assert update.cost.upload_seconds == pytest.approx(bits / up_rate[0])
    assert update.cost.uplink_bits == bits and outcome.downlink_bits == bits
    assert outcome.end_time == update.arrival_time == pytest.approx(sent_at + update.cost.upload_seconds)
    joules = (
        flops * cell.fleet.energy_per_flop[2]
        + 0.1 * update.cost.upload_seconds
        + cell.fleet.receive_power[2] * update.cost.download_seconds
    )
    assert outcome.joules == pytest.approx(joules)


def test_a_broadcast_is_counted_once_and_unicast_per_client() -> None:
    adapter = make_adapter()
    bits = 32 * AdapterSlice.everything(adapter.shape).num_values(adapter.shape)
    tasks = [make_task(c, adapter) for c in range(3)]
    broadcast, _ = run_round(make_runner(make_cell()), tasks)
    unicast, _ = run_round(make_runner(make_cell(downlink="unicast")), tasks)
    assert (broadcast.downlink_bits, unicast.downlink_bits) == (bits, 3 * bits)
    assert broadcast.uplink_bits == unicast.uplink_bits == 3 * bits
    # everyone has the broadcast at the same moment, when the worst link has it
    assert len({u.cost.download_seconds for u in broadcast.updates}) == 1


@pytest.mark.parametrize("late", ["drop", "keep"])
def test_what_misses_the_cutoff_is_never_trained_but_charged(late: str) -> None:
    trainer = AddOne()
    runner = make_runner(make_cell(), trainer)
    tasks = [make_task(c, make_adapter()) for c in range(4)]
    everyone, _ = run_round(make_runner(make_cell()), tasks)
    outcome, pending = run_round(runner, tasks, Cutoff(min_updates=2, late=late))  # type: ignore[arg-type]
    assert sorted(job.task.client for job in trainer.jobs) == sorted(u.task.client for u in outcome.updates)
    assert len(outcome.updates) == 2
    assert outcome.end_time == sorted(u.arrival_time for u in everyone.updates)[1]
    if late == "drop":
        assert {lost.reason for lost in outcome.lost} == {"late"} and not pending.in_flight
        assert outcome.joules == pytest.approx(everyone.joules)
        assert outcome.uplink_bits == everyone.uplink_bits
    else:
        assert not outcome.lost and len(pending.in_flight) == 2
        later, after = run_round(runner, [], pending=pending, round_index=2, time=outcome.end_time)
        assert {u.model_version for u in later.updates} == {0} and not after.in_flight
        assert outcome.joules + later.joules == pytest.approx(everyone.joules)
        assert later.end_time == everyone.end_time


def test_a_deadline_ends_the_round_even_if_nothing_arrived() -> None:
    outcome, _ = run_round(make_runner(make_cell()), [make_task(0, make_adapter())], Cutoff(deadline=1e-6))
    assert outcome.end_time == 1e-6 and not outcome.updates
    assert [(lost.task.client, lost.reason) for lost in outcome.lost] == [(0, "late")]


def test_an_empty_round_costs_the_stated_seconds() -> None:
    outcome, _ = run_round(make_runner(make_cell(idle_seconds=7.0)), [], time=3.0)
    assert (outcome.start_time, outcome.end_time, outcome.uplink_bits) == (3.0, 10.0, 0)


def test_without_a_link_the_task_is_lost_and_the_round_ends() -> None:
    tasks = [make_task(0, make_adapter(), bandwidth=0.0), make_task(1, make_adapter())]
    outcome, _ = run_round(make_runner(make_cell()), tasks)
    assert [(lost.task.client, lost.reason) for lost in outcome.lost] == [(0, "no link")]
    assert [u.task.client for u in outcome.updates] == [1]
    assert np.isfinite(outcome.end_time) and outcome.lost[0].cost.uplink_bits == 0


def test_a_client_that_vanishes_is_lost() -> None:
    class Gone:
        def available(self, seed: int, clients: np.ndarray, time: float) -> np.ndarray:
            return (np.asarray(clients) != 1) | (time <= 0.0)

    outcome, _ = run_round(
        make_runner(make_cell(availability=Gone())), [make_task(c, make_adapter()) for c in range(3)]
    )
    assert [(lost.task.client, lost.reason) for lost in outcome.lost] == [(1, "vanished")]
    assert {u.task.client for u in outcome.updates} == {0, 2}


def test_a_transfer_that_is_given_up_is_lost_and_what_it_sent_is_charged() -> None:
    hopeless = Retransmission(packet_bits=1000, error_probability=0.9, attempts=2)
    retried = Retransmission(packet_bits=1000, error_probability=0.3, attempts=50)
    task = make_task(2, make_adapter())
    plain, _ = run_round(make_runner(make_cell(channel=Channel(fading=NoFading()))), [task])
    lost, _ = run_round(make_runner(make_cell(channel=Channel(fading=NoFading(), retransmission=hopeless))), [task])
    slow, _ = run_round(make_runner(make_cell(channel=Channel(fading=NoFading(), retransmission=retried))), [task])
    assert [(part.task.client, part.reason) for part in lost.lost] == [(2, "transfer given up")]
    assert lost.lost[0].cost.joules > 0 and np.isfinite(lost.end_time)
    assert slow.updates[0].cost.upload_seconds > plain.updates[0].cost.upload_seconds
    assert slow.updates[0].cost.uplink_bits > plain.updates[0].cost.uplink_bits
    assert slow.joules > plain.joules


def test_batteries_drain_charge_and_decide_who_is_idle() -> None:
    unplugged = Bernoulli(probability=0.0)
    battery = Battery(capacity=1000.0, emptiest=1.0, fullest=1.0, reserve=0.2)
    cell = make_cell(battery=battery, charging=unplugged)
    outcome, pending = run_round(make_runner(cell), [make_task(c, make_adapter()) for c in (0, 2)])
    spent = {u.task.client: u.cost.joules for u in outcome.updates}
    assert pending.charge is not None
    np.testing.assert_allclose(pending.charge, [1000.0 - spent.get(c, 0.0) for c in range(4)])
    weak = replace(pending, charge=np.array([150.0, 1000.0, 199.0, 201.0]))
    assert cell.observe(2, 1.0, weak, make_model()).idle.tolist() == [1, 3]
    _, plugged = run_round(make_runner(make_cell(battery=battery)), [], pending=weak, time=1.0)
    assert plugged.charge is not None and np.all(plugged.charge >= weak.charge)
    empty = replace(pending, charge=np.full(4, 1e-9))
    flat, _ = run_round(make_runner(cell), [make_task(0, make_adapter())], pending=empty)
    assert [(part.task.client, part.reason) for part in flat.lost] == [(0, "battery empty")]


def test_a_diverged_client_is_named_and_charged() -> None:
    runner = make_runner(make_cell(), AddOne(diverging=frozenset({1})))
    outcome, _ = run_round(runner, [make_task(c, make_adapter()) for c in range(3)])
    assert [(lost.task.client, lost.reason) for lost in outcome.lost] == [(1, "diverged")]
    assert outcome.lost[0].cost.joules > 0


def test_cycles_of_a_group_run_one_after_another_and_all_count() -> None:
    trainer = AddOne()
    cell = make_cell(channel=Channel(fading=NoFading()))
    tasks = tuple(make_task(c, make_adapter()) for c in range(2))
    once, _ = make_runner(cell).run(Plan((Group(tasks),)), make_model(), Pending(), round_index=1, time=0.0)
    plan = Plan((Group(tasks, cycles=3, combine=Mean()),))
    thrice, _ = make_runner(cell, trainer).run(plan, make_model(), Pending(), round_index=1, time=0.0)
    assert thrice.end_time == pytest.approx(3 * once.end_time)
    assert (thrice.uplink_bits, thrice.downlink_bits) == (3 * once.uplink_bits, 3 * once.downlink_bits)
    assert thrice.joules == pytest.approx(3 * once.joules)
    assert [job.cycle for job in trainer.jobs] == [0, 0, 1, 1, 2, 2]
    before, after = make_model().adapter, thrice.updates[0].values
    for name, factors in after.factors.items():
        torch.testing.assert_close(factors.A, before.factors[name].A + 3.0)


def test_the_world_is_not_changed_by_who_takes_part() -> None:
    runner = make_runner(make_cell())
    alone, _ = run_round(runner, [make_task(2, make_adapter())])
    together, _ = run_round(runner, [make_task(c, make_adapter()) for c in (0, 2, 3)])
    mine = next(u for u in together.updates if u.task.client == 2)
    assert mine.cost.compute_seconds == alone.updates[0].cost.compute_seconds
    other = make_cell(seed=1)
    moved, _ = run_round(replace(runner, cell=other, seed=1), [make_task(2, make_adapter())])
    assert moved.updates[0].cost.upload_seconds != alone.updates[0].cost.upload_seconds
