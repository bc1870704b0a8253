"""What a stored run says, as frozen dataclasses. SI units: seconds, bits, joules, hertz, metres.

`uplink_bits`, `downlink_bits` and `energy_j` of a round belong to that round; `time_s` is cumulative.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

PREDICTED = ("predicted_round_s", "predicted_s")  # names under which planners note the length of their round


@dataclass(frozen=True)
class ClientRecord:
    """What one client did in one round. A quantity that the line does not give is None.

    Attributes
    ----------
    client : the client's number in the fleet.
    components : trained rank components, summed over modules; depth : trained transformer layers.
    bandwidth_hz : its part of the uplink band, Hz.
    bits_up, bits_down : payload, bits.
    start_s : when its work began, seconds after the round's start (negative for work that was in flight already).
        Optional key; without it, an arrived client's work began `wait_s` and its own seconds before the round's end.
    download_s, compute_s, upload_s, wait_s : seconds.
    energy_j : joules of this device in this round.
    """

    client: int
    components: float | None
    depth: float | None
    bandwidth_hz: float | None
    bits_up: float | None
    bits_down: float | None
    start_s: float
    download_s: float
    compute_s: float
    upload_s: float
    wait_s: float
    energy_j: float | None


@dataclass(frozen=True)
class DroppedRecord:
    """One client whose work did not count in a round, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Round:
    """One line of rounds.jsonl. Round 0 is the evaluation before training.

    `time_s` is cumulative fleet seconds at the round's end; bits and joules are of this round alone.
    `accuracy` and `loss` are None in rounds that were not evaluated.
    """

    number: int
    time_s: float
    duration_s: float
    cohort: tuple[int, ...]
    arrived: tuple[int, ...]
    dropped: tuple[DroppedRecord, ...]
    uplink_bits: float
    downlink_bits: float
    energy_j: float
    train_loss: float | None
    accuracy: float | None
    loss: float | None
    clients: tuple[ClientRecord, ...]
    diagnostics: dict[str, float]
    notes: dict[str, object]

    @property
    def predicted_s(self) -> float | None:
        """The round's length as the planner noted it, seconds; None where it noted none."""
        found = [self.notes.get(name) for name in PREDICTED]
        return next((float(value) for value in found if isinstance(value, int | float)), None)

    def value(self, metric: str) -> float | None:
        """Return the evaluated value of ``"accuracy"`` or ``"loss"``."""
        return self.accuracy if metric == "accuracy" else self.loss


@dataclass(frozen=True)
class FleetClient:
    """One client of the fleet, from the optional list `fleet` of run.json. Absent quantities are None.

    `x_m`, `y_m` : metres from the base station. `gain` : channel power gain, linear (mean over fading).
    """

    client: int
    device: str
    flops_per_second: float | None
    memory_bytes: float | None
    x_m: float | None
    y_m: float | None
    gain: float | None
    examples: float | None


@dataclass(frozen=True)
class Curve:
    """A curve that a planner decided by, for example its bound over ranks; `chosen` is the x it took.

    Optional key `curves` of run.json and of a plan: [{title, x_label, y_label, x: [...], y: [...], chosen}].
    """

    title: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    chosen: float | None


@dataclass(frozen=True)
class Run:
    """One stored run.

    Attributes
    ----------
    path : the run's folder.
    metric, direction : ``"accuracy"`` or ``"loss"``; ``"max"`` or ``"min"``.
    config : the resolved configuration, nested plain data.
    final : the totals that run.json holds.
    command : the command line that made the run (optional key `command`: a text, or a list of texts).
    git, error : the revision the run was made with, and why it failed (optional keys).
    rounds : every readable line of rounds.jsonl, in order.
    host_seconds : total host seconds by name, summed over timings.jsonl.
    warnings : what could not be read although the run as a whole can, one sentence each.
    """

    path: Path
    method: str
    seed: int
    status: str
    metric: str
    direction: str
    airtune: str
    config: dict[str, object]
    versions: dict[str, object]
    final: dict[str, float]
    export: object
    command: str | None
    git: str | None
    error: str | None
    fleet: tuple[FleetClient, ...]
    curves: tuple[Curve, ...]
    rounds: tuple[Round, ...]
    host_seconds: dict[str, float]
    warnings: tuple[str, ...]

    def evaluations(self, metric: str | None = None) -> tuple[tuple[Round, float], ...]:
        """Return the rounds that evaluated a metric (default: the run's own) with their values."""
        name = metric or self.metric
        pairs = ((line, line.value(name)) for line in self.rounds)
        return tuple((line, value) for line, value in pairs if value is not None)


class CompareRun(TypedDict):
    """One run of compare.json; seconds, bits and joules are None where the target was missed."""

    method: str
    seed: int
    status: str
    run_dir: str
    time_to_target_s: float | None
    uplink_bits_to_target: float | None
    downlink_bits_to_target: float | None
    energy_j_to_target: float | None
    final_metric: float | None
    rounds: int


class CompareSummary(TypedDict):
    """The content of compare.json. `target_source` is ``"given"`` or ``"default"`` (see `tables.default_target`).

    `tuned` : method -> field -> the value that ``--tune`` chose for it.
    """

    schema: int
    metric: str
    direction: str
    target: float
    target_source: str
    runs: list[CompareRun]
    tuned: NotRequired[dict[str, dict[str, str]]]
