"""Adaptive federated LoRA with independent sampling: who joins, what each trains and how the band is split, jointly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np

from airtune.aggregation.mean import IndependentSampling
from airtune.capabilities import Trait
from airtune.compression.dense import Dense
from airtune.errors import InputError, NoResultError, unknown_name
from airtune.optimizers import SGD
from airtune.scheduling.bandwidth import BandwidthRule, EqualFinish
from airtune.scheduling.capacity import CapacityEstimator
from airtune.scheduling.decision_notes import decision_notes
from airtune.scheduling.joint_cohort import CohortProblem, Measured, RoundConstants
from airtune.scheduling.planner import able_clients, make_tasks, share_band
from airtune.scheduling.sampling import inclusion_probabilities
from airtune.scheduling.sketching import Download, Scope, Sketching, check_ratios, kept_components, round_seed
from airtune.scheduling.work import LocalWork
from airtune.solvers.joint_problem import Decision, JointProblem, Judge
from airtune.solvers.joint_sampling import JointAnswer, solve
from airtune.solvers.pilot_fit import GradientNorms, noise_weights
from airtune.solvers.sampling_baselines import (
    largest_sizes,
    published_decision,
    scaled,
    size_candidates,
    split_decision,
    uniform_decision,
)
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

Sampling = Literal["optimal", "full", "uniform", "weighted", "statistical", "published", "split"]
Sizes = Literal["optimal", "largest"]
Noise = Literal["equal", "gradients", "losses"]
HEURISTIC = "the factors a_n / q_n and rank / kept scale steps of plain SGD; with this optimizer they are heuristic"


@dataclass(frozen=True)
class SamplingState:
    """What the method remembers: the decision in force, and what reports said.

    Attributes
    ----------
    probability : [clients], q_n; empty before round 1. kept : [clients], components of a slot.
    decided : round of the decision, 0 before.
    measured : seconds, rates, gradients and losses.
    """

    probability: Floats
    kept: Ints
    decided: int
    measured: Measured


@dataclass(frozen=True)
class AdaptiveSampling:
    """Every client joins on its own with probability q_n and trains a sketch of k_n components; least time to a target.

    Paper: Hou et al., "Adaptive Federated LoRA in Heterogeneous Wireless Networks with Independent Sampling",
    arXiv 2505.23555. Only its abstract is used: the decisions (sampling probabilities, sketching ratios, bandwidth), a
    bound for independent sampling without bounded gradients, a low-complexity solution of a non-convex problem.
    *Everything else here is our reading [choice]*: the sketch (arXiv 2501.19389), the time model, where the sketch
    enters the bound, the constants without a pilot, the solver. No result is a reproduction.

    Before round 1 (and every `replan_every` rounds) it solves for q and k: expected rounds of the bound times expected
    seconds of a round (`airtune.solvers.joint_sampling`). Each round it tosses a coin for every client, draws the
    sketches, and gives each upload the bandwidth with which all of the cohort finish together. The server adds every
    change with weight a_n / q_n, without renormalising, so that the expected update is the whole fleet's.

    ===============================  ===================================================================================
    specification                    here
    ===============================  ===================================================================================
    a_n, q_n                         `Fleet.data_weight`, `ClientTask.probability`
    gamma, k_n / gamma               ``[model].rank``, one of `ratios`
    S_n                              `AdapterSlice.sketch`, one draw per client and round
    tau_n(k), t_n(k)                 `Costs.compute_seconds` (+ download); uplink bits / spectral efficiency, Hz s
    f_n, f_tot                       `ClientTask.bandwidth`, `Observation.free_bandwidth`
    alpha, beta, forms V and S       `constants`; G_n, sigma_n: `constants.gradient_norms`, `.gradient_noise`
    w_n                              by `noise`
    T_0                              `fixed_seconds`; an empty round costs the cell's `idle_seconds`
    zeta, head                       1; the head is trained by every participant and counted in full
    ===============================  ===================================================================================

    Departures: the clock counts the downlink, here a client's slice at the rate that it would have alone; the
    spectral efficiency of the planner is that of an equal share of the band among the expected cohort. Probabilities
    are not raised for clients that are sometimes away: their data count less. Clipping (`weight_cap`) is a departure
    from the unbiased sum and is noted in every plan. With another optimizer than plain SGD both factors are heuristic
    and the plan says so; experiment files take the optimizer from ``[training]``. A server step size other than 1 is
    not offered.

    Parameters
    ----------
    ratios : the sketching ratios to choose from.
    sampling : "optimal"; baselines: "full" (q = 1), "uniform", "weighted" (q in proportion to a_n), "statistical" (to
        a_n G_n), "published" (the predecessor's line search on the round time, without sketches), "split" (its split
        round count with additive time, solved exactly, sizes included).
    sizes : "optimal", or "largest": what each device's memory holds (with `sampling` = "optimal": q-only; "uniform"
        with "optimal" sizes: k-only).
    expected_cohort_size : sum of q for uniform, weighted and statistical; None: the best for each.
    constants : of the round model, from a pilot or assumed.
    noise : weights w_n: "equal"; "gradients": `constants.gradient_norms`, else the norms of SGD updates so far;
        "losses": in proportion to the latest local losses (a stand-in for gradients).
    replan_every : rounds until q and k are solved again from measured seconds, rates, losses; None: once.
    smoothing, outlier_factor : of the measurements, see `CapacityEstimator`.
    weight_cap : largest a_n / q_n over a_n; None: no clipping.
    fixed_seconds : s added to every round in the plan. idle_seconds : what an empty round is assumed to cost, s (the
        cell's own `idle_seconds` is what it does cost).
    count_download : whether the plan counts the download.
    polish_evaluations : budget of the solver's descents on the mean time; None: 4,000, none above 1,000 clients.
    scope, download : of the sketches, as in FSLoRA.
    bandwidth : of the drawn cohort; "equal" is the ablation, and the solver then expects it.
    training, compressor : as for every method.
    """

    ratios: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    sampling: Sampling = "optimal"
    sizes: Sizes = "optimal"
    expected_cohort_size: float | None = None
    constants: RoundConstants = field(default_factory=RoundConstants)
    noise: Noise = "equal"
    replan_every: int | None = None
    smoothing: float = 0.8
    outlier_factor: float = 2.0
    weight_cap: float | None = None
    fixed_seconds: float = 0.0
    idle_seconds: float = 1.0
    count_download: bool = True
    polish_evaluations: int | None = None
    scope: Scope = "slot"
    download: Download = "slice"
    bandwidth: BandwidthRule = field(default_factory=EqualFinish)
    training: LocalTraining = field(default_factory=lambda: LocalTraining(optimizer="sgd", learning_rate=0.05))
    compressor: Compressor = field(default_factory=Dense)

    arxiv: ClassVar[str] = "2505.23555"
    citation: ClassVar[str] = """@article{hou2025adaptive,
  title   = {Adaptive Federated {LoRA} in Heterogeneous Wireless Networks with Independent Sampling},
  author  = {Hou, Yanzhao and Geng, Jiaxiang and Li, Boyu and Tao, Xiaofeng and Wang, Juncheng and Xu, Xiaodong and
             Luo, Bing},
  journal = {arXiv preprint arXiv:2505.23555},
  year    = {2025}
}"""

    def __post_init__(self) -> None:
        """Check names and ranges that need no fleet."""
        check_ratios(self.ratios)
        _one_of("sampling", self.sampling, get_args(Sampling))
        _one_of("sizes", self.sizes, ("optimal", "largest"))
        _one_of("noise", self.noise, ("equal", "gradients", "losses"))
        Sketching(self.scope, self.download)
        CapacityEstimator(self.smoothing, self.outlier_factor)
        for name, value, least in (
            ("expected_cohort_size", self.expected_cohort_size, 1e-9),
            ("replan_every", self.replan_every, 1),
            ("weight_cap", self.weight_cap, 1.0),
            ("fixed_seconds", self.fixed_seconds, 0.0),
            ("idle_seconds", self.idle_seconds, 0.0),
            ("polish_evaluations", self.polish_evaluations, 0),
        ):
            if value is not None and not least <= value < np.inf:
                raise InputError(f"method.{name}: {value} is not possible; valid: at least {least:g}")

    @property
    def traits(self) -> frozenset[Trait]:
        """Return that slices are sketches of different sizes."""
        return frozenset({Trait.SKETCH, Trait.UNEQUAL_RANKS})

    # -- a round ------------------------------------------------------------------------------------------------------

    def init(self, model: ServerModel, fleet: Fleet) -> SamplingState:
        """Return that nothing is decided or known."""
        return SamplingState(np.zeros(0), np.zeros(0, dtype=np.int64), 0, Measured.unknown(fleet.size))

    def plan(self, state: SamplingState, seen: Observation, rng: np.random.Generator) -> Plan:
        """Decide a round with this method's own training and compressor."""
        return self.decide(state, seen, rng, LocalWork(self.training, self.compressor))

    def decide(self, state: SamplingState, seen: Observation, rng: np.random.Generator, work: LocalWork) -> Plan:
        """Solve if it is time, toss the coins, draw the sketches and share the band."""
        seed, coins = round_seed(rng), rng.random(seen.fleet.size)
        sketching = Sketching(self.scope, self.download)
        smallest = int(kept_components(seen.shape, self.ratios)[0])
        able, notes = able_clients(seen, work, sketching.sized(seen.shape, smallest))
        if self._due(state, seen.round):
            decision, solved = self._solve(state.measured, seen, work)
            kept = kept_components(seen.shape, self.ratios)[decision.choice]
            state = replace(state, probability=decision.probability, kept=kept)
            notes |= {**solved, "sampling": {"probability": decision.probability.tolist(), "kept": kept.tolist()}}
        cohort = able[coins[able] < state.probability[able]]
        slices = [sketching.draw(seen.shape, int(state.kept[c]), seed, int(c)) for c in cohort]
        tasks = make_tasks(cohort, slices, seen, work, state.probability[cohort].tolist())
        shared = share_band(tasks, seen, self.bandwidth)
        return Plan((Group(shared),), {**notes, **self._round_notes(shared, seen, work)})

    def learn(self, state: SamplingState, outcome: RoundOutcome) -> SamplingState:
        """Keep the round's decision and what the clients reported."""
        return self._learn(state, outcome, {})

    def aggregate(
        self, state: SamplingState, model: ServerModel, outcome: RoundOutcome
    ) -> tuple[ServerModel, SamplingState]:
        """Add every change with weight a_n / q_n, and learn."""
        norms = _gradient_norms(model, outcome) if self.noise == "gradients" else {}
        return IndependentSampling()(model, self._capped(outcome)), self._learn(state, outcome, norms)

    @property
    def aggregator(self) -> IndependentSampling:
        """Return the unbiased sum."""
        return IndependentSampling()

    def _capped(self, outcome: RoundOutcome) -> RoundOutcome:
        """Return the outcome with probabilities raised to 1 / `weight_cap`."""
        if self.weight_cap is None:
            return outcome
        least = 1.0 / self.weight_cap
        updates = tuple(
            replace(update, task=replace(update.task, probability=max(update.task.probability, least)))
            for update in outcome.updates
        )
        return replace(outcome, updates=updates)

    def _learn(self, state: SamplingState, outcome: RoundOutcome, norms: dict[int, float]) -> SamplingState:
        notes = outcome.plan.notes
        if "sampling" in notes:
            decided = cast("Mapping[str, list[float]]", notes["sampling"])
            state = replace(
                state,
                probability=np.array(decided["probability"], dtype=np.float64),
                kept=np.array(decided["kept"], dtype=np.int64),
                decided=int(notes["sampling_round"]),
            )
        seconds = cast("list[float]", notes.get("predicted_compute_s", []))
        predicted = {task.client: s for task, s in zip(outcome.plan.tasks, seconds, strict=False)}
        estimator = CapacityEstimator(self.smoothing, self.outlier_factor)
        return replace(state, measured=state.measured.after(outcome, predicted, norms, estimator))

    def _due(self, state: SamplingState, round_index: int) -> bool:
        if not len(state.probability):
            return True
        return self.replan_every is not None and round_index - state.decided >= self.replan_every

    # -- the decision -------------------------------------------------------------------------------------------------

    def _solve(self, measured: Measured, seen: Observation, work: LocalWork) -> tuple[Decision, dict[str, Any]]:
        """Return the decision and what goes on record; the expected cohort that the rates assume is found on the way.

        Raises NoResultError where no decision reaches the target, or nobody can take part.
        """
        gradients = self._gradients(measured, seen.fleet)
        noise = np.ones(seen.fleet.size) if self.noise == "equal" else noise_weights(gradients, seen.fleet.data_weight)
        kept = kept_components(seen.shape, self.ratios)
        builder = CohortProblem(
            kept,
            Sketching(self.scope, self.download),
            self.constants,
            self.fixed_seconds,
            self.idle_seconds,
            self.count_download,
        )
        expected = float(min(8, seen.fleet.size))
        for final in (False, True):
            problem = builder.problem(seen, work, measured, noise, self.bandwidth, expected)
            if not problem.weight.any():
                raise NoResultError("plan: no client has examples, a link and the memory for the smallest sketch")
            answer = self._answer(problem, gradients.dissimilarity, final)
            decision = answer.decision
            if decision is None:
                raise NoResultError(f"plan: {answer.solution.message}")
            expected = float(decision.probability.sum())
        notes = decision_notes(problem, answer, decision, self.constants, self.noise, seen.round)
        notes["expected_uplink_bits"] = self._expected_bits(decision, kept, seen, work)
        return decision, notes

    def _expected_bits(self, decision: Decision, kept: Ints, seen: Observation, work: LocalWork) -> float:
        """Return the uplink bits of a round, the mean over cohorts: those of a size are the same for all clients."""
        sketching, total = Sketching(self.scope, self.download), 0.0
        for choice in np.unique(decision.choice[decision.probability > 0.0]).tolist():
            chosen = decision.choice == choice
            task = work.task(int(chosen.argmax()), sketching.sized(seen.shape, int(kept[choice])), seen)
            total += float(decision.probability[chosen].sum()) * float(seen.costs.uplink_bits(task))
        return total

    def _answer(self, problem: JointProblem, gradients: Floats, final: bool) -> JointAnswer:
        if self.sampling == "optimal":
            chosen = problem if self.sizes == "optimal" else problem.with_full_size()
            budget = self.polish_evaluations if final else 0
            known = _known_or_mean(gradients)
            return solve(chosen, baselines=None if final else False, polish_evaluations=budget, dissimilarity=known)
        judge = Judge.of(problem)
        decision = self._baseline(problem, judge, _known_or_mean(gradients))
        reference = solve(problem, baselines=False, polish_evaluations=0)
        if decision is None:
            message = f"sampling = {self.sampling} reaches the target at no expected cohort size"
            return replace(reference, decision=None, solution=replace(reference.solution, message=message))
        solution = replace(reference.solution, objective=decision.total_seconds, message=f"baseline {self.sampling}")
        worth = {**reference.candidates, self.sampling: decision.total_seconds}
        uniform, changes = uniform_decision(problem, judge), {"branch": self.sampling, "candidates": worth}
        return replace(reference, solution=solution, decision=decision, uniform=uniform, **changes)

    def _baseline(self, problem: JointProblem, judge: Judge, gradients: Floats) -> Decision | None:
        if self.sampling == "published":
            return published_decision(problem, judge)
        if self.sampling == "split":
            return split_decision(problem if self.sizes == "optimal" else problem.with_full_size(), judge)
        used = (problem.weight > 0.0).astype(np.float64)
        shape = {"weighted": problem.weight, "statistical": problem.weight * gradients}.get(self.sampling, used)
        sizes = [largest_sizes(problem)] if self.sizes == "largest" else size_candidates(problem)
        made = [self._of_shape(judge, shape, choice) for choice in sizes]
        reaching = [one for one in made if one is not None and np.isfinite(one.total_seconds)]
        return min(reaching, key=lambda one: one.total_seconds, default=made[-1])  # the largest sizes come last

    def _of_shape(self, judge: Judge, shape: Floats, choice: Ints) -> Decision | None:
        if self.sampling == "full":
            return judge.decision(shape, choice)
        if self.expected_cohort_size is None:
            return scaled(judge, shape, choice)
        used = shape > 0.0
        q = np.zeros(len(shape))
        q[used] = inclusion_probabilities(shape[used], min(self.expected_cohort_size, int(used.sum())))
        return judge.decision(q, choice)

    def _gradients(self, measured: Measured, fleet: Fleet) -> GradientNorms:
        """Return G_n and sigma_n as far as they are known, NaN where not."""
        unknown = np.full(fleet.size, np.nan)
        given = self.constants.per_client(self.constants.gradient_norms, "gradient_norms", fleet.size)
        noise = self.constants.per_client(self.constants.gradient_noise, "gradient_noise", fleet.size)
        if given is not None:
            return GradientNorms(given, unknown if noise is None else noise)
        if self.noise == "losses":
            return GradientNorms(np.sqrt(np.maximum(measured.loss, 0.0)), unknown)
        return GradientNorms(measured.gradient.value, unknown)

    # -- notes --------------------------------------------------------------------------------------------------------

    def _round_notes(self, tasks: tuple[ClientTask, ...], seen: Observation, work: LocalWork) -> dict[str, Any]:
        compute = [seen.costs.compute_seconds(task) for task in tasks]
        ends = _ends(tasks, np.array(compute), seen, self.count_download)
        notes: dict[str, Any] = {
            "predicted_compute_s": compute,
            "predicted_round_s": float(ends.max(initial=0.0)) or self.idle_seconds,
        }
        if not tasks:
            notes["empty_round"] = True
        if not _is_plain_sgd(work.training):
            notes["heuristic_scaling"] = HEURISTIC
        if self.weight_cap is not None:
            clipped = [task.client for task in tasks if task.probability * self.weight_cap < 1.0]
            notes["departure"] = f"weights are clipped at {self.weight_cap:g} a_n, which biases the sum"
            notes["clipped"] = clipped
        return notes


def _ends(tasks: tuple[ClientTask, ...], compute: Floats, seen: Observation, count_download: bool) -> Floats:
    """Return when every client of the cohort ends by the estimated channel, [cohort], s."""
    clients = np.array([task.client for task in tasks], dtype=np.int64)
    width, power = (np.array([getattr(t, name) for t in tasks]) for name in ("bandwidth", "transmit_power"))
    bits = np.array([float(seen.costs.uplink_bits(task)) for task in tasks])
    upload = bits / np.maximum(seen.links.uplink_rate(clients, width, power), 1e-300) if len(tasks) else bits
    received = np.array([float(seen.costs.downlink_bits(task)) for task in tasks])
    download = received / seen.links.downlink_rate(clients) if count_download and len(tasks) else 0.0 * bits
    return np.asarray(download + compute + upload, dtype=np.float64)


def _is_plain_sgd(training: LocalTraining) -> bool:
    return isinstance(training.optimizer, SGD) and training.momentum == 0.0


def _gradient_norms(model: ServerModel, outcome: RoundOutcome) -> dict[int, float]:
    """Return client -> norm of its mean gradient, from the change of plain SGD; nothing for other optimizers.

    The sketch multiplies the second moment by rank / kept; the norm is divided by its root.
    """
    norms: dict[int, float] = {}
    for update in outcome.updates:
        training = update.task.training
        if not _is_plain_sgd(training):
            continue
        start = outcome.start_of(update, model)
        square = sum(
            float(((after - before).double() ** 2).sum())
            for (_, _, after), (_, _, before) in zip(
                update.task.send.payload(update.values), update.task.send.payload(start), strict=True
            )
        )
        shape = model.adapter.shape
        kept = sum(update.task.send.kept(slot) for slot in shape.slots)
        share = kept / max(sum(slot.rank for slot in shape.slots.values()), 1)
        steps = training.steps(int(outcome.fleet.num_examples[update.task.client]))
        norms[update.task.client] = (square * share) ** 0.5 / (steps * training.learning_rate)
    return norms


def _known_or_mean(values: Floats) -> Floats:
    known = np.isfinite(values)
    return np.where(known, values, values[known].mean() if known.any() else 1.0)


def _one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise unknown_name(f"method.{name}", value, valid)
