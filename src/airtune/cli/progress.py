"""Progress on stderr: a live bar on a terminal, one line a round elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from airtune.cli.sampling_table import warnings_of

if TYPE_CHECKING:
    from airtune.experiment.build import Bench
    from airtune.experiment.store import RunStore

Plain = dict[str, Any]


def console() -> Console:
    """Return a console on stderr: stdout is for JSON and tables that were asked for."""
    return Console(stderr=True, highlight=False)


@dataclass
class Display:
    """Shows round, metric, fleet seconds, bits and the time that is left; an `airtune.experiment.run.Reporter`."""

    screen: Console = field(default_factory=console)
    bar: Progress | None = None
    task: TaskID | None = None
    label: str = ""
    metric: str = "accuracy"
    value: float | None = None
    uplink_bits: float = 0.0
    rounds: int | None = None
    seconds: float | None = None
    warned: set[str] = field(default_factory=set[str])

    def started(self, bench: Bench, store: RunStore, rounds_done: int) -> None:
        """Show the run's name, its limits and the folder."""
        limits = bench.experiment.stop
        self.label = f"{bench.experiment.label}-{bench.experiment.seed}"
        self.metric, self.rounds, self.seconds = bench.metric, limits.rounds, limits.fleet_seconds
        lines = store.rounds()
        self.value, self.uplink_bits = None, sum(line["uplink_bits"] for line in lines)
        idle = [client for client, rows in enumerate(bench.clients) if len(rows) == 0]
        if idle:
            self.screen.print(f"{self.label}: {len(idle)} of {len(bench.clients)} clients have no data: {_some(idle)}")
        self.screen.print(f"{self.label}: {len(bench.clients)} clients, {store.folder}")
        if self.screen.is_terminal:
            self._open_bar(rounds_done if self.rounds is not None else lines[-1]["time_s"] if lines else 0.0)

    def round_done(self, line: Plain) -> None:
        """Show one more round."""
        self.uplink_bits += line["uplink_bits"]
        if line.get(self.metric) is not None:
            self.value = line[self.metric]
        for text in [f"{self.label}: {text}" for text in warnings_of(line.get("notes", {}))]:
            if text not in self.warned:
                self.warned.add(text)
                self.screen.print(text, soft_wrap=True)
        for lost in line["dropped"]:
            if lost["reason"] == "diverged":
                self.screen.print(f"{self.label}: round {line['round']}: client {lost['client']} diverged, dropped")
        if self.bar is None or self.task is None:
            self.screen.print(f"{self.label}: {self._text(line)}", soft_wrap=True)
            return
        done = line["round"] if self.rounds is not None else line["time_s"]
        self.bar.update(self.task, completed=done, text=self._text(line))

    def finished(self, head: Plain) -> None:
        """Close the bar, and say what a private run has spent."""
        self.close()
        for unit, spent in head.get("privacy", {}).items():
            value = "not known: " + spent["reason"] if spent["epsilon"] is None else f"{spent['epsilon']:.3g}"
            delta = f" at delta {spent['delta']:.2g}" if "delta" in spent else ""
            self.screen.print(f"{self.label}: epsilon of {unit} {value}{delta}", soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the screen, whatever happened."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _open_bar(self, done: float) -> None:
        self.close()
        text, left = TextColumn("{task.fields[text]}"), TimeRemainingColumn(compact=True)
        name = TextColumn("{task.description}")
        self.bar = Progress(name, BarColumn(bar_width=8), text, TextColumn("ETA"), left, console=self.screen)
        total = self.rounds if self.rounds is not None else self.seconds
        self.task = self.bar.add_task(self.label, total=total, text="evaluating")
        self.bar.update(self.task, completed=done)
        self.bar.start()

    def _text(self, line: Plain) -> str:
        value = "" if self.value is None else f"{self.metric} {self.value:.3f}, "
        count = f"{line['round']}" if self.rounds is None else f"{line['round']}/{self.rounds}"
        return f"round {count}: {value}{line['time_s']:.1f} fleet s, {self.uplink_bits / 8e6:.1f} MB up"


def _some(numbers: list[int]) -> str:
    text = ", ".join(str(number) for number in numbers[:10])
    return text if len(numbers) <= 10 else f"{text}, ..."
