"""TSFA: SOFT with a rank fixed before training, and keep ratios and bandwidth controlled by a long-term latency."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np

from airtune.aggregation.covariance import factor_diagnostics, pilot_terms, tail_energies
from airtune.aggregation.mean import Mean, Weights
from airtune.aggregation.resize import emptied_beyond, sorted_by_energy
from airtune.aggregation.senders import AverageOver, SendersMean, check_average_over
from airtune.capabilities import Trait
from airtune.compression.soft import OrthogonalityForm, Soft, check_orthogonality, orthogonalized
from airtune.errors import InputError, NoResultError, unknown_name
from airtune.lora import AdapterSlice
from airtune.scheduling.latency_control import LatencyControl, planned_clients, quantile_gain, relative_errors
from airtune.scheduling.planner import able_clients, make_tasks
from airtune.scheduling.sampling import everyone_or
from airtune.scheduling.sparsity import Choices, choices_by_rank, offline_notes
from airtune.scheduling.work import LocalWork, Slices
from airtune.solvers.solution import Solution
from airtune.solvers.structural_rank import structural_rank
from airtune.types import (
    ClientTask,
    Compressor,
    Fleet,
    Floats,
    Group,
    Ints,
    LocalTraining,
    Observation,
    Plan,
    RoundOutcome,
    ServerModel,
)

ErrorModelName = Literal["profile", "quadratic", "linear"]


@dataclass(frozen=True)
class TSFA:
    """Rank before training; every round keep ratios and bandwidth, so that the mean latency stays within a limit.

    Paper: Kim and Choi, "Two-Stage Wireless Federated LoRA Fine-Tuning with Sparsified Orthogonal Updates", arXiv
    2505.00333. Only the abstract is public to us: SOFT, a structural rank fixed offline, sparsification ratio and
    bandwidth online by Lyapunov optimisation under a long-term latency constraint, and a bound that shows rank,
    sparsification error and covariance. *Objectives, forms and algorithms here are our reading [choice]*; no result is
    a reproduction.

    Offline: in the first `pilot_rounds` everybody trains and sends the whole adapter; the rank of least bound, given
    what each rank could send within the limit, is kept by an SVD of the adapter. Online: a queue grows by what rounds
    take beyond the limit; each round minimises ``V sum p_k e_k(components_k) + Q latency`` over what every client sends
    and how the band is shared (`airtune.solvers.drift_plus_penalty`).

    =====================  =======================================================================================
    specification          here
    =====================  =======================================================================================
    tau_bar                `latency_limit`; round latency as the clock measures it, download included
    V                      `error_weight` * latency_limit^2, errors relative to the cohort's energy
    Q(t), Q_k(t)           `LatencyControl.queue`; `queues` = "round" or "client"
    e_k(s)                 `error_model`: tail of the squared component norms of the last upload, (1-s)^2, 1-s
    kappa_k, s_k, s_min    components sent, over the structural rank; at least 1
    Rset, Psi(r)           `candidate_ranks`, notes["offline"]
    lambda, Pen            `orthogonality_weight`, `orthogonality`
    =====================  =======================================================================================

    Departures from the specification: keep ratios are whole numbers of components from the start, since nothing else
    can be sent. The largest rank is [model].rank, and the pilot runs inside the training with the queue counting it;
    alpha / rank stays that of [model].rank. The covariance term of a smaller rank is measured on its most important
    components. Norms come from the last upload; what was not sent counts with the server's values. The offline
    stage takes path loss and shadowing of the round in which it decides, and the mean over drawn fading.

    Parameters
    ----------
    latency_limit : s, mean over rounds; None: `limit_share` of the way from the least round 1 could take (one
        component each) to the least it takes uncompressed, as round 1's channel estimates have it.
    limit_share : 0 to 1.
    error_weight : weight of the error against latency, above 0; large values need more rounds to meet the limit.
    queues : "round": one queue for the longest client; "client": one per client, which limits each one's mean.
    error_model : "profile", "quadratic" or "linear".
    pilot_rounds : 0: the rank is [model].rank.
    candidate_ranks : ranks to choose from, at most [model].rank; empty: powers of two up to it, and itself.
    channel_draws : channels, drawn from the law of the gains, over which the offline stage takes the mean latency; 0,
        or where that law is not known (measured rates): the estimated channel of the round.
    rate_quantile : plan with the rate that the true one falls below with this probability; None: with the estimate.
    error_variance : of the channel estimates, assumed for `rate_quantile`, as in [wireless.knowledge].
    outage_after : a client that, alone in the whole band, would upload one component for more than so many limits is
        left out of the round (those without any link always are); None: nobody is.
    orthogonality_weight, orthogonality : the penalty, see `SoftLoRA`.
    weights : "examples" or "uniform".
    average_over : "everyone": who did not send a component counts as the server's value; "senders": does not count.
    cohort_size : clients drawn each round; None: everyone.
    training, compressor : as for every method; a compressor without keep ratio leaves only the bandwidth to decide.
    """

    latency_limit: float | None = None
    limit_share: float = 0.5
    error_weight: float = 1.0
    queues: Literal["round", "client"] = "round"
    error_model: ErrorModelName = "profile"
    pilot_rounds: int = 1
    candidate_ranks: tuple[int, ...] = ()
    channel_draws: int = 32
    rate_quantile: float | None = None
    error_variance: float = 0.1
    outage_after: float | None = None
    orthogonality_weight: float = 1e-2
    orthogonality: OrthogonalityForm = "cosine"
    weights: Weights = "examples"
    average_over: AverageOver = "everyone"
    cohort_size: int | None = None
    training: LocalTraining = field(default_factory=LocalTraining)
    compressor: Compressor = field(default_factory=Soft)

    arxiv: ClassVar[str] = "2505.00333"
    citation: ClassVar[str] = """@article{kim2025tsfa,
  title   = {Two-Stage Wireless Federated {LoRA} Fine-Tuning with Sparsified Orthogonal Updates},
  author  = {Kim, Bumjun and Choi, Wan},
  journal = {arXiv preprint arXiv:2505.00333},
  year    = {2025}
}"""

    def __post_init__(self) -> None:
        """Check ranges and names."""
        check_orthogonality(self.orthogonality_weight, self.orthogonality)
        check_average_over(self.average_over, self.compressor)
        limit, quantile = self.latency_limit, self.rate_quantile
        _check("latency_limit", limit, limit is None or 0.0 < limit < math.inf, "above 0, in s")
        _check("limit_share", self.limit_share, 0.0 <= self.limit_share <= 1.0, "0 to 1")
        _check("error_weight", self.error_weight, 0.0 < self.error_weight < math.inf, "above 0")
        _check("pilot_rounds", self.pilot_rounds, self.pilot_rounds >= 0, "at least 0")
        _check("channel_draws", self.channel_draws, self.channel_draws >= 0, "at least 0")
        ranks = self.candidate_ranks
        _check("candidate_ranks", ranks, all(r >= 1 for r in ranks) and list(ranks) == sorted({*ranks}), "increasing")
        _check("rate_quantile", quantile, quantile is None or 0.0 < quantile < 1.0, "above 0, below 1")
        _check("error_variance", self.error_variance, 0.0 <= self.error_variance <= 1.0, "0 to 1")
        out = self.outage_after
        _check("outage_after", out, out is None or 0.0 < out < math.inf, "above 0")
        if self.queues not in ("round", "client"):
            raise unknown_name("method.queues", self.queues, ("round", "client"))
        if self.error_model not in ("profile", "quadratic", "linear"):
            raise unknown_name("method.error_model", self.error_model, ("profile", "quadratic", "linear"))

    @property
    def traits(self) -> frozenset[Trait]:
        """Return nothing: everybody holds the same components."""
        return frozenset()

    @property
    def aggregator(self) -> Mean | SendersMean:
        """Return the separate mean of A and B."""
        return SendersMean(self.weights) if self.average_over == "senders" else Mean(self.weights)

    def init(self, model: ServerModel, fleet: Fleet) -> LatencyControl:
        """Return empty queues; the rank is open if there is a pilot and something to choose."""
        largest = model.adapter.shape.max_rank
        candidates = self._candidates(largest)
        state = LatencyControl.new(fleet.size, largest, per_client=self.queues == "client")
        return replace(state, rank=0 if self.pilot_rounds > 0 and candidates != (largest,) else largest)

    # -- a round ------------------------------------------------------------------------------------------------------

    def plan(self, state: LatencyControl, seen: Observation, rng: np.random.Generator) -> Plan:
        """Decide a round with this method's own training and compressor."""
        return self.decide(state, seen, rng, LocalWork(self.training, self.compressor))

    def decide(self, state: LatencyControl, seen: Observation, rng: np.random.Generator, work: LocalWork) -> Plan:
        """Choose what everybody sends and share the band."""
        training = orthogonalized(work.training, self.orthogonality_weight, self.orthogonality)
        work = replace(work, training=training)
        rank = state.rank or seen.shape.max_rank
        slices = Slices.same(AdapterSlice.truncation(seen.shape, rank))
        able, notes = able_clients(seen, work, slices)
        cohort = everyone_or(self.cohort_size).sample(able, seen, rng)
        if not len(cohort.clients):
            return Plan((Group(()),), notes)
        gain = self._planned_gain(state, seen)
        tasks = make_tasks(cohort.clients, [slices] * len(cohort.clients), seen, work, cohort.probability.tolist())
        options, limit, outage = self._reached(state, tasks, rank, seen, gain)
        notes |= outage
        if state.rounds == 0:
            _check_possible(options, limit)
        weights = planned_clients(options.clients, self._fleet_weights(seen.fleet))
        found = self._solve(state, options, limit, options.clients, weights)
        if not found.ok:
            raise NoResultError(f"method: tsfa: {found.message}")
        planned = options.planned(found.value["choice"], found.value["bandwidth"])
        notes |= self._notes(state, options, found, limit, weights)
        notes |= self._offline_notes(state, options.clients, seen, work, gain, limit, rng)
        if self.rate_quantile is not None:
            notes["estimated_gain"] = seen.links.uplink_gain.tolist()
        return Plan((Group(planned),), notes)

    def learn(self, state: LatencyControl, outcome: RoundOutcome) -> LatencyControl:
        """Update queues and profiles; without the method's own average the pilot ends with the largest rank."""
        notes = outcome.plan.notes
        if "latency_limit_s" not in notes:  # nobody was able to take part
            return state
        if "estimated_gain" in notes:
            state = state.having_seen(np.asarray(notes["estimated_gain"], dtype=np.float64))
        state = replace(state, limit=float(notes["latency_limit_s"]), latency=float(notes["planned_latency_s"]))
        tails = state.tails.copy()
        for update in outcome.updates:
            if len(update.task.send.tensors) == 2:
                tails[update.task.client] = tail_energies(update.values, tails.shape[1] - 1)
        state = replace(state.after(outcome), tails=tails)
        if state.rank == 0 and state.rounds >= self.pilot_rounds and outcome.updates:
            state = replace(state, rank=tails.shape[1] - 1)
        return state

    def aggregate(
        self, state: LatencyControl, model: ServerModel, outcome: RoundOutcome
    ) -> tuple[ServerModel, LatencyControl]:
        """Average A and B separately; after the pilot, fix the rank and keep that many singular components."""
        averaged, new = self.aggregator(model, outcome), self.learn(state, outcome)
        if state.rank != 0 or new.rank == 0 or "offline" not in outcome.plan.notes:
            return averaged, new
        candidates = self._candidates(new.rank)
        terms = pilot_terms(model, averaged, outcome, candidates, self.weights)
        if terms is None:
            return averaged, new
        ratios = [math.nan if s is None else s for s in outcome.plan.notes["offline"]["keep_ratios"]]
        found = structural_rank(candidates, ratios, terms.residual, terms.covariance, terms.energies)
        rank = int(found.value["rank"]) if found.ok else candidates[0]
        adapter = sorted_by_energy(averaged.adapter)
        adapter = emptied_beyond(adapter, {name: min(rank, f.rank) for name, f in adapter.factors.items()})
        model = ServerModel(adapter, averaged.base_update, averaged.version, averaged.merged_bits)
        tails = np.full((len(new.tails), rank + 1), np.nan)
        bounds = tuple(float(value) for value in found.value["bound"])
        return model, replace(new, rank=rank, tails=tails, bounds=bounds)

    def diagnose(self, state: LatencyControl, outcome: RoundOutcome) -> Mapping[str, float]:
        """Return the factors' covariance and coherence, the largest queue and the mean latency so far."""
        control = {"queue_s": float(state.queue.max()), "mean_latency_s": state.mean_latency}
        return {**factor_diagnostics(outcome, self.weights), **control} if state.rounds else {}

    # -- parts of a decision ------------------------------------------------------------------------------------------

    def _solve(self, state: LatencyControl, options: Choices, limit: float, clients: Ints, weights: Floats) -> Solution:
        """Return the decision; during the pilot everybody sends everything."""
        pilot = state.rank == 0
        errors = relative_errors(state.tails[clients], weights, options.rank, self.error_model)
        queue = np.zeros(1) if pilot else state.queue[clients] if state.per_client else state.queue
        scale = self.error_weight * limit**2
        start = None if pilot or math.isnan(state.latency) else state.latency
        return options.solve(scale * weights[:, None] * errors, queue, start)

    def _reached(
        self, state: LatencyControl, tasks: Sequence[ClientTask], rank: int, seen: Observation, gain: Floats
    ) -> tuple[Choices, float, dict[str, Any]]:
        """Return the choices of those who are not in outage, the limit in s, and a note of who is."""
        options = Choices.of(tasks, rank, seen, gain)
        limit = self._limit(state, options)
        if self.outage_after is None:
            return options, limit, {}
        upload = options.alone() - options.compute_seconds
        longest = max(self.outage_after * limit, float(upload.min()))  # somebody must send
        out = options.clients[upload > longest]
        if not len(out):
            return options, limit, {}
        kept = [task for task in tasks if task.client not in out]
        return Choices.of(kept, rank, seen, gain), limit, {"outage": out.tolist()}

    def _limit(self, state: LatencyControl, options: Choices) -> float:
        """Return the limit in s: the user's, that of round 1, or the one that round 1 sets."""
        if self.latency_limit is not None:
            return self.latency_limit
        if not math.isnan(state.limit):
            return state.limit
        least, most = options.latency(0), options.latency(len(options.bits) - 1)
        return options.download_seconds + least + self.limit_share * (most - least)

    def _planned_gain(self, state: LatencyControl, seen: Observation) -> Floats:
        """Return the gains to plan with, [clients]: the estimates, or a quantile of what they leave open."""
        gain = seen.links.uplink_gain
        if self.rate_quantile is None:
            return gain
        mean = state.having_seen(gain).mean_gain
        return quantile_gain(gain, mean, self.error_variance, self.rate_quantile)

    def _candidates(self, largest: int) -> tuple[int, ...]:
        powers = [2**k for k in range(largest.bit_length())]
        candidates = self.candidate_ranks or tuple(sorted({*powers, largest}))
        if max(candidates) > largest:
            raise InputError(f"method.candidate_ranks: {max(candidates)} is above [model].rank = {largest}")
        return candidates

    def _fleet_weights(self, fleet: Fleet) -> Floats:
        return fleet.data_weight if self.weights == "examples" else (fleet.num_examples > 0).astype(np.float64)

    def _offline_notes(
        self,
        state: LatencyControl,
        clients: Ints,
        seen: Observation,
        work: LocalWork,
        gain: Floats,
        limit: float,
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """Return the curve over ranks: in the pilot what each could send, after it the bound that decided."""
        if state.rank == 0:
            options = choices_by_rank(clients, self._candidates(seen.shape.max_rank), seen, work, gain)
            known = self.channel_draws > 0 and seen.links.fixed_uplink_rate is None
            draws = seen.statistics.draw(self.channel_draws, rng) if known and seen.statistics is not None else None
            offline = offline_notes(options, limit, draws)
            sent = [0.0 if s is None else s * r for r, s in zip(offline["ranks"], offline["keep_ratios"], strict=True)]
            notes: dict[str, Any] = {"offline": offline}
            if all(ratio is None for ratio in offline["keep_ratios"]):
                notes["rank_out_of_reach"] = "in the mean no rank sends one component in time; the least is taken"
            return {**notes, "curves": [_curve("Components within the limit", offline["ranks"], sent, None)]}
        if state.bounds and state.rounds == self.pilot_rounds:
            return {"curves": [self.bound_curve(state, seen.shape.max_rank)]}
        return {}

    def bound_curve(self, state: LatencyControl, largest: int) -> dict[str, Any]:
        """Return the bound over the candidate ranks, of which `largest` is that of the model, with the choice."""
        return _curve("Bound over ranks", self._candidates(largest), state.bounds, state.rank)

    def _notes(
        self, state: LatencyControl, options: Choices, found: Solution, limit: float, weights: Floats
    ) -> dict[str, Any]:
        """Return what goes on record of a round."""
        sent = options.components[found.value["choice"]]
        floor = options.latency(0) + options.download_seconds
        notes: dict[str, Any] = {
            "predicted_round_s": float(found.value["latency"]) + options.download_seconds,
            "planned_latency_s": float(found.value["latency"]),
            "latency_limit_s": limit,
            "least_latency_s": floor,
            "queue_s": float(state.queue.max()),
            "structural_rank": options.rank,
            "mean_keep_ratio": float(weights @ sent) / options.rank,
            "solver": {
                "status": found.status,
                "objective": found.objective,
                "iterations": found.iterations,
                "branch": "pilot" if state.rank == 0 else self.queues,
                "gap": _gap(found),
            },
        }
        if floor > limit:
            notes["limit_out_of_reach"] = options.shortfall(limit - options.download_seconds)
        return notes


def _check_possible(options: Choices, limit: float) -> None:
    """Raise InputError if a client computes longer than the limit: no channel can help."""
    slow = options.compute_seconds >= limit
    if slow.any():
        worst = int(np.argmax(options.compute_seconds))
        seconds = float(options.compute_seconds[worst])
        raise InputError(
            f"method.latency_limit: {limit:.4g} s cannot be met: client {options.tasks[worst].client} computes for "
            f"{seconds:.4g} s; valid: above that, fewer local steps, or a cohort without it"
        )


def _gap(found: Solution) -> float | None:
    bound = found.value.get("bound")
    return None if bound is None or not found.objective > 0.0 else float((found.objective - bound) / found.objective)


def _curve(title: str, ranks: Sequence[int], values: Sequence[float], chosen: int | None) -> dict[str, Any]:
    finite = [(rank, value) for rank, value in zip(ranks, values, strict=True) if math.isfinite(value)]
    curve: dict[str, Any] = {"title": title, "x_label": "Rank", "y_label": title}
    curve |= {"x": [rank for rank, _ in finite], "y": [value for _, value in finite]}
    return curve if chosen is None else {**curve, "chosen": chosen}


def _check(name: str, value: object, valid: bool, range_text: str) -> None:
    if not valid:
        raise InputError(f"method.{name}: {value} is not possible; valid: {range_text}")
