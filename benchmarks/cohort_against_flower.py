"""airtune against Flower's simulation: client steps per second on the same model, rows, batches and optimizer.

    python benchmarks/cohort_against_flower.py [--work tiny] [--clients 100] [--engine cohort] [--json FILE]

Flower runs in two forms: "flowertune" builds the base model anew in every call, as the FlowerTune templates do;
"flower tuned" keeps it in each actor. Both have one actor per core, train with a plain PyTorch loop (no Trainer), read
their rows once, and average with Flower's own FedAvg. airtune runs through its round loop with the virtual clock. The
sides take turns round by round, so that other work on the machine hits all of them alike; the first round (Ray, actors
and models start) does not count. What is compared is the median over the rounds of the paired ratios. All sides must
end with the same loss on the test rows within 2 %.

Flower is installed into an environment of its own (--environments), which takes a minute the first time.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from race.environments import environment
from race.referee import engines, parser, race
from race.sides import Side, airtune_side, flower_side


def main() -> int:
    """Race, and return 1 if the sides did not do the same work."""
    given = parser(__doc__ or "").parse_args()
    python, versions = environment("flower", given.environments)

    def sides(work: Path, top: Path) -> Sequence[Side]:
        ours = [airtune_side(name, work, top / name.replace(" ", "-"), e) for name, e in engines(given).items()]
        forms = {"flowertune": False, "flower tuned": True}
        peers = [
            flower_side(name, work, top / name.replace(" ", "-"), python, cached=cached, actors=given.cores)
            for name, cached in forms.items()
        ]
        return [*ours, *(replace(side, versions=versions) for side in peers)]

    result = race(given, sides)
    return int(not all(ratio["same_work"] for ratio in result["ratios"]))


if __name__ == "__main__":
    sys.exit(main())
