"""airtune against pfl-research: client steps per second on the same model, rows, batches and optimizer.

    python benchmarks/cohort_against_pfl.py [--work tiny] [--clients 100] [--engine cohort] [--json FILE]

pfl keeps one model per process and runs in two forms: "pfl" is one process with a thread per core, "pfl N processes"
one process with one thread per core, joined by torch.distributed as torchrun would. airtune runs through its round loop
with the virtual clock. The sides take turns round by round, so that other work on the machine hits all of them alike;
the first round does not count. What is compared is the median over the rounds of the paired ratios. All sides must end
with the same loss on the test rows within 2 %.

pfl is installed into an environment of its own (--environments), which takes half a minute the first time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from race.environments import environment
from race.referee import engines, parser, race
from race.sides import Side, airtune_side, pfl_side


def main() -> int:
    """Race, and return 1 if the sides did not do the same work."""
    given = parser(__doc__ or "").parse_args()
    python, versions = environment("pfl", given.environments)

    def sides(work: Path, top: Path) -> Sequence[Side]:
        ours = [airtune_side(name, work, top / name.replace(" ", "-"), e) for name, e in engines(given).items()]
        peers = [pfl_side("pfl", work, top / "pfl", python, processes=1, threads=given.cores)]
        if given.cores > 1:
            name = f"pfl {given.cores} processes"
            peers.append(pfl_side(name, work, top / "pfl-several", python, processes=given.cores, threads=1))
        return [*ours, *(replace(side, versions=versions) for side in peers)]

    result = race(given, sides)
    return int(not all(ratio["same_work"] for ratio in result["ratios"]))


if __name__ == "__main__":
    sys.exit(main())
