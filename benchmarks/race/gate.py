"""Rounds in turn: each side waits here before a round until the referee lets it go. Standard library only.

Sides live in processes that their frameworks start, so the gate is a folder with files: a side announces that it stands
before round k (and how long round k - 1 took), the referee answers. While one side runs, the others sleep.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

POLL = 0.01  # s


class Gate:
    """One side's end of the gate."""

    def __init__(self, folder: str | Path) -> None:
        """Use the side's own folder."""
        self.folder = Path(folder)
        self.round = 0
        self.began: float | None = None

    def wait(self) -> None:
        """Announce that the last round is over, and sleep until the next one may begin."""
        self._announce()
        while not (self.folder / f"go-{self.round}").exists():
            time.sleep(POLL)
        self.began = time.perf_counter()

    def close(self) -> None:
        """Announce that the last round is over; there is no further one."""
        self._announce()

    def _announce(self) -> None:
        seconds = None if self.began is None else time.perf_counter() - self.began
        self.round += self.began is not None
        write(self.folder / f"ready-{self.round}", {"seconds": seconds})


def write(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the whole file or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(content))
    part.rename(path)
