"""TensorBoard event files of a stored run, through TensorBoard's own writer (extra ``plots``; no torch)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from airtune.errors import InputError
from airtune.report.load import load_run
from airtune.report.records import Round
from airtune.report.tables import Paid, paid

FOLDER = "tensorboard"


def write_event_files(run_dir: str | Path, out_dir: str | Path | None = None) -> Path:
    """Write one event file with every scalar of rounds.jsonl and return its folder.

    The step is the round. The event's time is *fleet* seconds, so TensorBoard's horizontal axis "relative" shows fleet
    time. Costs are cumulative under ``paid/`` and of the round under ``round/``; diagnostics keep their names.
    An event file written here before is replaced.

    Parameters
    ----------
    run_dir : a folder of `airtune run`.
    out_dir : where to write; None takes ``run_dir/tensorboard``.

    Raises
    ------
    InputError : the folder is not a run, TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from tensorboard.summary import Writer
    except ModuleNotFoundError as error:
        raise InputError("tensorboard: not installed; valid: pip install 'airtune[plots]'") from error
    run = load_run(run_dir)
    folder = Path(out_dir) if out_dir is not None else run.path / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer = Writer(str(folder))
        for line, costs in zip(run.rounds, paid(run), strict=True):
            for tag, value in scalars(line, costs):
                writer.add_scalar(tag, value, line.number, wall_time=line.time_s)
        writer.close()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); valid: a writable folder") from error
    return folder


def scalars(line: Round, costs: Paid) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) of one round; what was not measured is left out."""
    measured = {"test/accuracy": line.accuracy, "test/loss": line.loss, "train/loss": line.train_loss}
    yield from ((tag, value) for tag, value in measured.items() if value is not None)
    yield "paid/fleet_seconds", costs.time_s
    yield "paid/uplink_bits", costs.uplink_bits
    yield "paid/downlink_bits", costs.downlink_bits
    yield "paid/energy_j", costs.energy_j
    yield "round/seconds", line.duration_s
    yield "round/arrived", float(len(line.arrived))
    yield "round/dropped", float(len(line.dropped))
    yield from ((f"diagnostics/{name}", value) for name, value in sorted(line.diagnostics.items()))
