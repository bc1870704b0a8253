"""TSFA's offline stage: the keep ratio of each rank fits the mean round over the channel's law, not one round."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from airtune.errors import InputError
from airtune.federation import begin
from airtune.methods.tsfa import TSFA
from airtune.scheduling.sparsity import Choices, choices_by_rank
from airtune.scheduling.work import LocalWork
from airtune.simulation.cell import UplinkStatistics
from airtune.solvers.equal_finish import equal_finish
from airtune.streams import stream
from airtune.types import ServerModel
from airtune.wireless.channel import Channel
from airtune.wireless.fading import NoFading
from synthetic_federation import SyntheticWorld, make_adapter, make_fleet

FLEET = make_fleet(4, flops=[2e13, 3e13, 4e13, 6e13], memory=1e7)
MEAN = np.geomspace(1e-12, 1e-11, 4)
RANKS = (4, 8)


@dataclass(frozen=True)
class Law:
    """Fading of fourfold diversity about fixed means."""

    def draw(self, count, rng):
        return MEAN * rng.gamma(4.0, 0.25, (count, 4))


def observed(factor: float, *, known: bool = True):
    """Return model and observation of a round whose channel is `factor` times the mean."""
    world, model = SyntheticWorld(FLEET), ServerModel(make_adapter(ranks=8))
    seen = world.observe(1, 0.0, begin(TSFA(), model, world).pending, model)
    links = replace(seen.links, uplink_gain=factor * MEAN)
    return model, replace(seen, links=links, statistics=Law() if known else None)


def offline(method: TSFA, factor: float, *, known: bool = True, seed: int = 0):
    model, seen = observed(factor, known=known)
    return method.plan(method.init(model, FLEET), seen, stream(seed, "plan", 1)).notes["offline"]


def options(rank: int) -> Choices:
    _, seen = observed(1.0)
    work = LocalWork(TSFA().training, TSFA().compressor)
    return choices_by_rank(np.arange(4), (rank,), seen, work, MEAN)[0]


def mean_seconds(ratio: float, rank: int, gains: np.ndarray) -> float:
    """Return the mean of the least round when everybody sends `ratio` of a rank's components, written a second time."""
    o = options(rank)
    bits = np.interp(ratio * rank, o.components, o.bits)
    link = (o.compute_seconds, np.full(4, bits), o.power)
    found = [equal_finish(*link, row, o.noise_density, o.bandwidth, o.snr_gap).objective for row in gains]
    return float(np.mean(found)) + o.download_seconds


def binding_limit() -> float:
    return 0.6 * mean_seconds(1.0, 8, Law().draw(60, stream(1, "limit")))


@pytest.mark.parametrize("factor", [0.25, 2.5])
def test_the_mean_round_over_fresh_draws_meets_the_limit_where_one_round_misses_it(factor):
    """A round far better, or far worse, than the mean decides nothing: fresh draws of the law do."""
    limit = binding_limit()
    mean, one = (TSFA(latency_limit=limit, candidate_ranks=RANKS, channel_draws=count) for count in (60, 0))
    fitted, single = offline(mean, factor), offline(one, factor)
    assert (fitted["channel_draws"], single["channel_draws"]) == (60, 0)
    fresh = Law().draw(150, stream(2, "fresh"))
    assert fitted["keep_ratios"][1] < 1.0
    assert mean_seconds(fitted["keep_ratios"][1], 8, fresh) == pytest.approx(limit, rel=0.05)
    assert not np.isclose(mean_seconds(single["keep_ratios"][1], 8, fresh), limit, rtol=0.1)
    if factor > 1.0:
        assert mean_seconds(single["keep_ratios"][1], 8, fresh) > 1.15 * limit


def test_the_ratio_is_the_largest_that_meets_the_limit_on_the_draws_themselves():
    gains = Law().draw(20, stream(3, "draws"))
    least, most = (mean_seconds(share, 8, gains) for share in (1 / 8, 1.0))
    for limit in np.linspace(1.02 * least, 0.98 * most, 4):
        ratio = options(8).largest_ratio(limit - options(8).download_seconds, gains)
        assert mean_seconds(ratio, 8, gains) <= limit * (1 + 1e-12)
        assert mean_seconds(ratio + 3e-4, 8, gains) > limit


def test_the_draws_come_from_the_plans_stream_and_leave_the_tasks_as_they_are():
    method = TSFA(latency_limit=binding_limit(), candidate_ranks=RANKS, channel_draws=10)
    assert offline(method, 1.0) == offline(method, 1.0)
    assert offline(method, 1.0)["keep_ratios"] != offline(method, 1.0, seed=1)["keep_ratios"]
    model, seen = observed(1.0)
    plans = [m.plan(m.init(model, FLEET), seen, stream(0, "p")) for m in (method, replace(method, channel_draws=0))]
    sent = [[(t.client, t.bandwidth, t.compressor) for t in plan.tasks] for plan in plans]
    assert sent[0] == sent[1]


def test_where_the_law_is_not_known_the_rounds_own_channel_counts_and_that_is_on_record():
    limit = binding_limit()
    found = offline(TSFA(latency_limit=limit, candidate_ranks=RANKS), 1.0, known=False)
    assert found == offline(TSFA(latency_limit=limit, candidate_ranks=RANKS, channel_draws=0), 1.0)
    assert found["channel_draws"] == 0


def test_measured_rates_are_not_drawn():
    model, seen = observed(1.0)
    links = replace(seen.links, fixed_uplink_rate=np.full(4, 1e6), fixed_downlink_rate=np.full(4, 1e6))
    method = TSFA(candidate_ranks=RANKS)
    plan = method.plan(method.init(model, FLEET), replace(seen, links=links), stream(0, "p"))
    assert plan.notes["offline"]["channel_draws"] == 0


def test_a_limit_that_no_rank_meets_in_the_mean_is_said():
    model, seen = observed(1.0)
    one = mean_seconds(1 / 4, 4, Law().draw(60, stream(1, "limit")))
    method = TSFA(latency_limit=0.7 * one, candidate_ranks=RANKS)
    notes = method.plan(method.init(model, FLEET), seen, stream(0, "p")).notes
    assert notes["offline"]["keep_ratios"] == [None, None]
    assert "no rank sends one component" in notes["rank_out_of_reach"]


def test_a_cells_law_has_its_path_loss_and_fresh_fading():
    channel, everyone = Channel(), np.arange(40)
    draws = UplinkStatistics(channel, 7, 0.0, 40).draw(200, stream(0, "test law"))
    power = draws / channel.mean_gain(7, everyone, 0.0, "uplink")
    assert draws.shape == (200, 40)
    assert power.mean() == pytest.approx(1.0, abs=0.05)
    assert (power < np.log(2.0)).mean() == pytest.approx(0.5, abs=0.03)  # the median of an exponential
    assert abs(np.corrcoef(power[:100].ravel(), power[100:].ravel())[0, 1]) < 0.05
    still = replace(channel, fading=NoFading())
    same = UplinkStatistics(still, 7, 0.0, 40).draw(3, stream(0, "test law"))
    np.testing.assert_allclose(same, np.tile(still.mean_gain(7, everyone, 0.0, "uplink"), (3, 1)), rtol=1e-12)


def test_fewer_than_no_draws_are_refused():
    with pytest.raises(InputError, match=r"method\.channel_draws.*valid"):
        TSFA(channel_draws=-1)
