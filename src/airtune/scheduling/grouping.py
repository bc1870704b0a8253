"""Near-IID groups of similar speed, as HierFedLoRA wants them (our reading of arXiv 2503.21213; all choices ours)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from airtune.types import Floats, Ints

_SMOOTHING = 1e-6
_MEMBERS_COMPARED = 32  # of each group in one search for a swap


def divergence(counts: Floats, reference: Floats) -> Floats:
    """Return KL(v || v_ref), [...], of label counts [..., classes] to reference counts [classes]; both smoothed."""
    p, q = _shares(counts), _shares(reference)
    return np.sum(p * (np.log(p) - np.log(q)), axis=-1)


def _shares(counts: Floats) -> Floats:
    total = np.maximum(counts.sum(axis=-1, keepdims=True), 1e-300)
    smooth = counts / total + _SMOOTHING
    return smooth / smooth.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class GroupingProblem:
    """Who is to be grouped, and what a good group is.

    The cost of group g is ``U_g = w KL(v_g || v_mean) / KL_0 + (1 - w) mean_i |c_i - c_g| / (c_max - c_min)``: labels
    like those of everybody, and members that take equally long.

    Attributes
    ----------
    labels : [clients, classes], label counts.
    seconds : [clients], time of one cycle, c_i.
    groups : number of groups, at most the number of clients.
    weight : w, 0 to 1, how much the labels count.
    """

    labels: Floats
    seconds: Floats
    groups: int
    weight: float = 0.7

    @property
    def size(self) -> int:
        """Return the number of clients."""
        return len(self.seconds)

    def scales(self) -> tuple[Floats, float, float]:
        """Return the label counts of all, KL_0 (mean divergence of a client) and the spread of seconds."""
        everyone = self.labels.sum(axis=0)
        typical = max(float(divergence(self.labels, everyone).mean()), _SMOOTHING)
        return everyone, typical, max(float(np.ptp(self.seconds)), 1e-12)

    def costs(self, group: Ints) -> Floats:
        """Return U_g of every group, [groups], for an assignment [clients]."""
        return np.array([self.cost(np.flatnonzero(group == g)) for g in range(self.groups)])

    def cost(self, members: Ints) -> float:
        """Return U_g of one group."""
        return float(self._cost(self.labels[members].sum(axis=0), self.seconds[members]))

    def _cost(self, labels: Floats, seconds: Floats) -> Floats:
        """Return U for label sums [..., classes] and members' seconds [..., members]."""
        everyone, typical, spread = self.scales()
        uneven = np.abs(seconds - seconds.mean(axis=-1, keepdims=True)).mean(axis=-1)
        return self.weight * divergence(labels, everyone) / typical + (1.0 - self.weight) * uneven / spread

    def swap_gain(self, ours: Ints, theirs: Ints, passes: int) -> tuple[float, int, int]:
        """Return the best fall of the summed cost by one exchange between two groups, and whom it exchanges."""
        mine, yours = _some(ours, passes), _some(theirs, passes)
        change = self.labels[yours][None, :, :] - self.labels[mine][:, None, :]
        after = self._cost(self.labels[ours].sum(axis=0) + change, self._exchanged(ours, mine, yours)) + self._cost(
            self.labels[theirs].sum(axis=0) - change, self._exchanged(theirs, yours, mine).swapaxes(0, 1)
        )
        best = int(np.argmin(after))
        i, j = divmod(best, len(yours))
        return self.cost(ours) + self.cost(theirs) - float(after[i, j]), int(mine[i]), int(yours[j])

    def _exchanged(self, members: Ints, out: Ints, into: Ints) -> Floats:
        """Return the seconds of the members with each of `out` replaced by each of `into`, [out, into, members]."""
        seconds = np.broadcast_to(self.seconds[members], (len(out), len(into), len(members))).copy()
        rows, columns = np.nonzero(out[:, None] == members[None, :])
        seconds[rows, :, columns] = self.seconds[into][None, :]
        return seconds


def near_iid_groups(problem: GroupingProblem) -> Ints:
    """Return the group of every client, [clients]: sizes differ by at most one.

    Groups are opened by clients spread over the range of speeds; the others are placed most skewed first, where the
    cost rises least; then members are exchanged in pairs while the summed cost falls.
    """
    return swapped(problem, placed(problem))


def placed(problem: GroupingProblem) -> Ints:
    """Return the greedy assignment, before any exchange."""
    size, groups = problem.size, problem.groups
    room = np.full(groups, size // groups) + (np.arange(groups) < size % groups)
    everyone, typical, spread = problem.scales()
    by_speed = np.argsort(problem.seconds, kind="stable")
    group = np.full(size, -1, dtype=np.int64)
    seeds = by_speed[((np.arange(groups) + 0.5) / groups * size).astype(np.int64)]
    group[seeds] = np.arange(groups)
    labels, seconds, count = problem.labels[seeds].copy(), problem.seconds[seeds].copy(), np.ones(groups)
    skew = divergence(problem.labels, everyone)
    for client in np.argsort(-skew, kind="stable"):
        if group[client] >= 0:
            continue
        apart = np.abs(problem.seconds[client] - seconds / count) / spread
        cost = problem.weight * divergence(labels + problem.labels[client], everyone) / typical
        best = int(np.argmin(np.where(count < room, cost + (1.0 - problem.weight) * apart, np.inf)))
        group[client] = best
        labels[best] += problem.labels[client]
        seconds[best] += problem.seconds[client]
        count[best] += 1
    return group


def swapped(problem: GroupingProblem, group: Ints) -> Ints:
    """Return the assignment after exchanges of pairs, each of which lowers the summed cost by more than 1e-12."""
    group = group.copy()
    for passes in range(10 * problem.size):
        improved = False
        for ours in range(problem.groups):
            for theirs in range(ours + 1, problem.groups):
                members = np.flatnonzero(group == ours), np.flatnonzero(group == theirs)
                gain, one, other = problem.swap_gain(*members, passes)
                if gain > 1e-12:
                    group[one], group[other] = theirs, ours
                    improved = True
        if not improved:
            break
    return group


def _some(members: Ints, passes: int) -> Ints:
    """Return at most 32 members, others in each pass: a search in large groups stays small."""
    if len(members) <= _MEMBERS_COMPARED:
        return members
    return np.sort(np.roll(members, -_MEMBERS_COMPARED * passes)[:_MEMBERS_COMPARED])
