"""Rules that split a band and choose powers: what all of them promise, and what each is for."""

from __future__ import annotations

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.scheduling.bandwidth import (
    BANDWIDTH_RULES,
    EqualFinish,
    EqualSplit,
    MinEnergy,
    MinLatencySum,
    Proportional,
    bandwidth_rule,
)
from airtune.scheduling.power import POWER_RULES, FullPower, JointMinEnergy, LeastPower, power_rule
from airtune.solvers.equal_finish import Uploads

NOISE, TOTAL, BLOCK = 4e-21, 20e6, 180e3
RULES = [EqualSplit(), Proportional(), Proportional("airtime"), EqualFinish(), MinEnergy(), MinLatencySum()]
BLOCK_RULES = [
    EqualSplit(BLOCK),
    Proportional("bits", BLOCK),
    Proportional("airtime", BLOCK),
    EqualFinish(resource_block=BLOCK),
    MinEnergy(resource_block=BLOCK),
    MinLatencySum(resource_block=BLOCK),
]
POWERS = [FullPower(), LeastPower(), LeastPower(slack=1.5), JointMinEnergy()]


def cohort(size, seed=0):
    rng = np.random.default_rng(seed)
    gain = 10 ** (-(128.1 + 37.6 * np.log10(rng.uniform(0.05, 0.5, size))) / 10) * rng.uniform(0.2, 2, size)
    return rng.uniform(0, 3, size), rng.uniform(1e6, 1e7, size), np.full(size, 0.2), gain, NOISE, TOTAL


def energy(link, bandwidth, power):
    uploads = Uploads.of(link[0], link[1], power, *link[3:5])
    return float((power * (uploads.finish(bandwidth) - link[0])).sum())


@pytest.mark.parametrize("rule", [*RULES, *BLOCK_RULES], ids=str)
@pytest.mark.parametrize("size", [1, 7, 60])
def test_a_split_fits_the_band_and_reports_its_latest_finish(rule, size) -> None:
    link = cohort(size)
    found = rule.allocate(*link)
    assert found.ok
    assert (found.value > 0).all()
    assert found.value.sum() <= TOTAL * (1 + 1e-12)
    assert found.objective == pytest.approx(Uploads.of(*link[:5]).finish(found.value).max(), rel=1e-9)
    if rule in BLOCK_RULES:
        count = found.value / BLOCK
        np.testing.assert_allclose(count, np.rint(count), atol=1e-9)
        assert (count >= 1).all()
    else:
        assert found.value.sum() == pytest.approx(TOTAL)


@pytest.mark.parametrize("rules", [RULES, BLOCK_RULES], ids=["continuous", "blocks"])
def test_no_rule_ends_earlier_than_equal_finish(rules) -> None:
    for seed in range(5):
        link = cohort(12, seed)
        finish = {type(r).__name__ + getattr(r, "to", ""): r.allocate(*link).objective for r in rules}
        assert finish["EqualFinish"] <= min(finish.values()) * (1 + 1e-12)
        assert finish["EqualFinish"] < 0.95 * finish["EqualSplit"]


def test_each_optimal_rule_is_best_at_what_it_minimises() -> None:
    link = cohort(12, 3)
    power = link[2]
    splits = {str(r): r.allocate(*link).value for r in RULES}
    total = {name: Uploads.of(*link[:5]).finish(w).sum() for name, w in splits.items()}
    assert total[str(MinLatencySum())] == min(total.values())
    earliest = EqualFinish().allocate(*link).objective
    by = MinEnergy(slack=1.3).allocate(*link)
    assert by.objective <= 1.3 * earliest * (1 + 1e-9)
    assert energy(link, by.value, power) < energy(link, splits[str(EqualFinish())], power)
    at_once = MinEnergy(slack=1.0).allocate(*link)
    np.testing.assert_allclose(at_once.value, splits[str(EqualFinish())], rtol=1e-6)


@pytest.mark.parametrize("rule", [*RULES, *BLOCK_RULES], ids=str)
def test_nothing_to_send_gets_nothing_and_no_channel_is_named(rule) -> None:
    compute, bits, power, gain, noise, total = cohort(6)
    bits[4] = 0.0
    assert rule.allocate(compute, bits, power, gain, noise, total).value[4] == 0.0
    gain[2] = 0.0
    found = rule.allocate(compute, bits, power, gain, noise, total)
    assert found.status == "infeasible"
    assert "client 2" in found.message


@pytest.mark.parametrize("rule", BLOCK_RULES, ids=str)
def test_too_few_blocks_is_infeasible(rule) -> None:
    compute, bits, power, gain, noise, _ = cohort(6)
    found = rule.allocate(compute, bits, power, gain, noise, 5.5 * BLOCK)
    assert found.status == "infeasible"
    assert "client" in found.message


@pytest.mark.parametrize("weight", [np.ones(7), np.arange(1.0, 8.0), np.array([1e6, 1, 1, 1, 1, 1, 1])])
def test_largest_remainder_gives_all_blocks_and_one_at_least(weight) -> None:
    compute, _, power, gain, noise, _ = cohort(7)
    found = Proportional("bits", BLOCK).allocate(compute, 1e6 * weight, power, gain, noise, 20.4 * BLOCK)
    count = np.rint(found.value / BLOCK)
    assert count.sum() == 20
    assert (count >= 1).all()
    assert (np.diff(count[np.argsort(weight, kind="stable")]) >= 0).all() or weight.max() == weight.min()


@pytest.mark.parametrize("rule", POWERS, ids=str)
@pytest.mark.parametrize("bandwidth", RULES, ids=str)
def test_powers_stay_within_the_device_and_energy_within_full_powers(rule, bandwidth) -> None:
    link = cohort(9)
    full = FullPower().choose(bandwidth, *link)
    found = rule.choose(bandwidth, *link)
    assert found.ok
    power, width = found.value["power"], found.value["bandwidth"]
    assert ((power > 0) & (power <= 0.2 * (1 + 1e-12))).all()
    assert width.sum() <= TOTAL * (1 + 1e-12)
    uploads = Uploads.of(link[0], link[1], power, *link[3:5])
    assert found.objective == pytest.approx(uploads.finish(width).max(), rel=1e-9)
    assert energy(link, width, power) <= energy(link, full.value["bandwidth"], full.value["power"]) * (1 + 1e-9)


def test_least_power_ends_with_the_round_and_saves() -> None:
    link = cohort(9)
    full = FullPower().choose(EqualSplit(), *link)
    least = LeastPower().choose(EqualSplit(), *link)
    uploads = Uploads.of(link[0], link[1], least.value["power"], *link[3:5])
    np.testing.assert_allclose(uploads.finish(least.value["bandwidth"]), full.objective, rtol=1e-9)
    saved = energy(link, least.value["bandwidth"], least.value["power"])
    assert saved < 0.8 * energy(link, full.value["bandwidth"], full.value["power"])


def test_joint_energy_is_the_least_of_all_by_the_same_deadline() -> None:
    link = cohort(9)
    by = 1.2 * EqualFinish().allocate(*link).objective
    joint = JointMinEnergy(deadline=by).choose(EqualSplit(), *link)
    best = energy(link, joint.value["bandwidth"], joint.value["power"])
    assert joint.objective <= by * (1 + 1e-9)
    for bandwidth in RULES:
        other = LeastPower(deadline=by).choose(bandwidth, *link)
        if other.objective <= by:
            assert best <= energy(link, other.value["bandwidth"], other.value["power"]) * (1 + 1e-9)


def test_infeasible_splits_stay_infeasible_under_every_power_rule() -> None:
    compute, bits, power, gain, noise, total = cohort(4)
    gain[1] = 0.0
    for rule in POWERS:
        found = rule.choose(EqualFinish(), compute, bits, power, gain, noise, total)
        assert found.status == "infeasible"
        assert "client 1" in found.message


def test_names() -> None:
    assert {type(r) for r in RULES} == set(BANDWIDTH_RULES.values())
    assert {type(r) for r in POWERS} == set(POWER_RULES.values())
    assert bandwidth_rule("equal_finish") == EqualFinish()
    assert power_rule("joint-min-energy") == JointMinEnergy()
    with pytest.raises(InputError, match=r"bandwidth: unknown name 'equal-finnish' \(did you mean 'equal-finish'"):
        bandwidth_rule("equal-finnish")
    with pytest.raises(InputError, match=r"power: unknown name"):
        power_rule("most")


@pytest.mark.parametrize(
    "make",
    [
        lambda: MinEnergy(deadline=-1.0),
        lambda: MinEnergy(slack=0.9),
        lambda: LeastPower(deadline=0.0),
        lambda: JointMinEnergy(slack=float("nan")),
    ],
)
def test_bad_deadlines_are_refused(make) -> None:
    with pytest.raises(InputError, match=r"deadline|slack"):
        make()


def test_a_bad_weight_and_a_bad_band_are_refused() -> None:
    with pytest.raises(InputError, match=r"bandwidth\.to: unknown name"):
        Proportional("rank").allocate(*cohort(3))
    with pytest.raises(InputError, match="total_bandwidth"):
        EqualSplit().allocate(*cohort(3)[:5], 0.0)
