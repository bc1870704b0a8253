"""LEGEND's decisions: how ranks are spread over layers, and how deep each client trains.

Depth k means the last k adapted layers, those next to the output. The functions see completion times only, as an
array [clients, depths + 1] whose entry [i, k] is the time of client i at depth k and which increases along k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from airtune.errors import InputError, unknown_name
from airtune.types import Floats, Ints

ProfileForm = Literal["increasing", "uniform", "decreasing", "middle"]
Reference = Literal["reachable", "fastest"]
PROFILE_FORMS: tuple[ProfileForm, ...] = ("increasing", "uniform", "decreasing", "middle")


def rank_profile(layers: int, reference_rank: int, form: ProfileForm = "increasing", slope: float = 1.0) -> list[int]:
    """Return the rank of every adapted layer, lowest first, with sum ``layers * reference_rank`` in every form.

    Arithmetic: r_l = r_0 + lambda l, rounded half to even, lambda = slope * 2 (r_ref - 1) / (layers - 1) and r_0 so
    that the sum holds: slope 1 starts at rank 1, slope 0 is uniform. "decreasing" and "middle" hold the same ranks in
    another order (for ablations).

    Parameters
    ----------
    layers : number of adapted layers. reference_rank : mean rank, at least 1.
    form : "increasing" towards the output, "uniform", "decreasing", or "middle" (highest in the middle).
    slope : 0 to 1, share of the steepest slope possible.
    """
    if form not in PROFILE_FORMS:
        raise unknown_name("method.profile", form, PROFILE_FORMS)
    if reference_rank < 1 or not 0.0 <= slope <= 1.0:
        raise InputError(
            f"method.reference_rank, method.slope: {reference_rank} and {slope} are not possible; "
            f"valid: a rank of at least 1, a slope from 0 to 1"
        )
    if form == "uniform" or layers == 1:
        return [reference_rank] * layers
    step = Fraction(slope).limit_denominator(1000) * Fraction(2 * (reference_rank - 1), layers - 1)
    first = reference_rank - step * (layers - 1) / 2
    ranks = [round(first + step * layer) for layer in range(layers)]  # rounds half to even, exactly
    if form == "decreasing":
        return ranks[::-1]
    if form == "middle":
        inwards = sorted(range(layers), key=lambda layer: (-abs(2 * layer - (layers - 1)), layer))
        placed = dict(zip(inwards, ranks, strict=True))
        return [placed[layer] for layer in range(layers)]
    return ranks


@dataclass(frozen=True)
class DepthRule:
    """The constraints of a depth choice.

    Parameters
    ----------
    reference : "reachable" (variant A): the reference time is that of the fastest client at its full depth, or of
        the slowest at its least depth if that is later; "fastest" (variant B): always the first.
    wait_tolerance : allowed mean waiting time as a share of the first reference time.
    wait_seconds : allowed mean waiting time in s; None: by `wait_tolerance`.
    least : least depth of a client that takes part.
    min_owners : clients that every layer should be trained by.
    drop_straggler : whether the slowest client is left out where depth cannot remove more waiting.
    """

    reference: Reference = "reachable"
    wait_tolerance: float = 0.1
    wait_seconds: float | None = None
    least: int = 1
    min_owners: int = 2
    drop_straggler: bool = False


@dataclass(frozen=True)
class DepthChoice:
    """Depths and what they are predicted to lead to.

    Attributes
    ----------
    depth : [clients]; 0 where a client sits the round out.
    reference_seconds : the first reference time, which scales the waiting tolerance.
    round_seconds : the latest completion. mean_wait : of those that take part, s.
    passes : how often depths were set.
    uncovered : depths k whose lowest layer has fewer owners than wanted though no client is left to raise.
    """

    depth: Ints
    reference_seconds: float
    round_seconds: float
    mean_wait: float
    passes: int
    uncovered: tuple[int, ...] = ()


def choose_depths(seconds: Floats, cap: Ints, rule: DepthRule, reference: Ints | None = None) -> DepthChoice:
    """Return LEGEND's configuration (LCD, greedy): depths that leave little waiting, without the coverage guard.

    Every client takes the deepest choice that ends by the reference time. While the mean wait is above the limit, the
    reference falls to the slowest client's time one layer less deep. Of all passes the one of least waiting is kept
    if none meets the limit (lowering the reference can raise the wait).

    Parameters
    ----------
    seconds : [clients, depths + 1], increasing along depth.
    cap : [clients], deepest choice that fits the memory; below `rule.least` a client sits the round out.
    reference : clients among which the fastest is looked for; None: all that take part.
    """
    active = cap >= rule.least
    if not active.any():
        return DepthChoice(np.zeros(len(cap), dtype=np.int64), 0.0, 0.0, 0.0, 0)
    rows = np.arange(len(cap))
    full = np.where(active, seconds[rows, cap], np.inf)
    limit = float(full.min() if reference is None or not len(reference) else full[reference].min())
    if rule.reference == "reachable":
        limit = max(limit, float(seconds[active, rule.least].max()))
    allowed = rule.wait_tolerance * limit if rule.wait_seconds is None else rule.wait_seconds
    first, best, passes = limit, None, 0
    while True:
        passes += 1
        depth = deepest_within(seconds, np.where(active, cap, 0), limit, rule.least)
        choice = _judged(DepthChoice(depth, first, 0.0, 0.0, passes), seconds)
        if best is None or choice.mean_wait < best.mean_wait:
            best = choice
        if choice.mean_wait <= allowed:
            return choice
        slowest = int(np.argmax(np.where(depth > 0, seconds[rows, depth], -np.inf)))
        if depth[slowest] > rule.least:
            limit = float(seconds[slowest, depth[slowest] - 1])
        elif rule.drop_straggler and active.sum() > 1:
            active = active & (rows != slowest)
        else:
            return replace(best, passes=passes)


def choose_most_progress(seconds: Floats, cap: Ints, progress: Floats, rule: DepthRule) -> DepthChoice:
    """Return the depths of most progress per second, ``sum_i progress[k_i] / max_i t_i(k_i)``, within the wait limit.

    For one latest completion T the deepest choices within T have both the most progress and the least waiting, so
    it is enough to look at every completion time of every client: the answer is exact, by one sort.
    The wait limit is that of `choose_depths` (a share of its first reference time). If no T meets it, the choice of
    least waiting is returned.

    Parameters
    ----------
    progress : [depths + 1], rank components trained at each depth.
    """
    active = cap >= rule.least
    if not active.any():
        return DepthChoice(np.zeros(len(cap), dtype=np.int64), 0.0, 0.0, 0.0, 0)
    greedy = choose_depths(seconds, cap, replace(rule, drop_straggler=False))
    allowed = rule.wait_tolerance * greedy.reference_seconds if rule.wait_seconds is None else rule.wait_seconds
    latest, wait, trained = _along_deadlines(seconds, np.where(active, cap, 0), progress, rule.least)
    meets = wait <= allowed + 1e-12 * latest
    if not meets.any():
        return greedy
    limit = latest[int(np.argmax(np.where(meets, trained / latest, -np.inf)))]
    depth = deepest_within(seconds, np.where(active, cap, 0), float(limit), rule.least)
    return _judged(replace(greedy, depth=depth, passes=greedy.passes + len(latest)), seconds)


def _along_deadlines(seconds: Floats, cap: Ints, progress: Floats, least: int) -> tuple[Floats, Floats, Floats]:
    """Return latest completion, mean wait and progress of the deepest choices within every possible deadline.

    Deadlines are the completion times themselves, from the latest of those at depth `least` on, increasing.
    """
    clients = np.flatnonzero(cap >= least)
    base = seconds[clients, least]
    deeper = np.arange(seconds.shape[1])[None, :] <= cap[clients][:, None]
    deeper[:, : least + 1] = False
    row, depth = np.nonzero(deeper)
    times = seconds[clients[row], depth]
    order = np.argsort(times, kind="stable")
    longer = np.cumsum((times - seconds[clients[row], depth - 1])[order])
    more = np.cumsum((progress[depth] - progress[depth - 1])[order])
    latest = np.concatenate([[base.max()], times[order]])
    total = base.sum() + np.concatenate([[0.0], longer])
    trained = progress[least] * len(clients) + np.concatenate([[0.0], more])
    # Equal times: only the last of them has all who end by then; before the base's latest there is no deadline.
    latest = np.maximum(latest, base.max())
    within = np.append(latest[1:] > latest[:-1], True)
    return latest[within], (latest - total / len(clients))[within], trained[within]


def deepest_within(seconds: Floats, cap: Ints, limit: float, least: int) -> Ints:
    """Return the deepest choice that ends by `limit`, [clients]: `least` where none does, 0 where cap is below it."""
    within = (seconds[:, least:] <= limit).sum(axis=1) + least - 1
    return np.where(cap >= least, np.clip(within, least, np.maximum(cap, least)), 0).astype(np.int64)


def cover_layers(choice: DepthChoice, seconds: Floats, cap: Ints, rule: DepthRule) -> DepthChoice:
    """Return the choice with clients raised until every layer has `min_owners` owners, lowest layer first.

    Raised is the client that reaches the layer soonest, among those that can and do not yet; clients that sit the
    round out are left alone. Layers that stay below are named in `uncovered`.
    """
    depth = choice.depth.copy()
    uncovered: list[int] = []
    for wanted in range(seconds.shape[1] - 1, 0, -1):
        while (depth >= wanted).sum() < rule.min_owners:
            able = (cap >= wanted) & (depth < wanted) & (depth > 0)
            if not able.any():
                uncovered.append(wanted)
                break
            depth[int(np.argmin(np.where(able, seconds[:, wanted], np.inf)))] = wanted
    return _judged(replace(choice, depth=depth, uncovered=tuple(uncovered)), seconds)


def _judged(choice: DepthChoice, seconds: Floats) -> DepthChoice:
    """Return the choice with its round time and mean wait."""
    taking_part = choice.depth > 0
    times = seconds[np.arange(len(choice.depth)), choice.depth][taking_part]
    latest = float(times.max(initial=0.0))
    wait = float((latest - times).mean()) if len(times) else 0.0
    return replace(choice, round_seconds=latest, mean_wait=wait)
