"""Overhead of the cohort engine per client: training with next to no arithmetic, for cohorts of growing size.

    python benchmarks/cohort_overhead.py [--sizes 10,100,1000,10000] [--repeats 5] [--json FILE]

A BERT of one layer of width 8, one step of one example of four tokens: what is left is the bookkeeping of a client,
from the job to the trained adapter.
"""

from __future__ import annotations

import torch
from cohort_common import finish, paired, parser_of, synthetic

from airtune.training.cohort.trainer import CohortTrainer


def main() -> None:
    """Print a table and write JSON on request."""
    parser = parser_of(__doc__)
    parser.add_argument("--sizes", default="10,100,1000,10000")
    given = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in given.sizes.split(",")]
    setting = synthetic(1, 8, max(sizes), 1, 4)
    engine = CohortTrainer(setting.model, setting.tokens, setting.clients, 0, 2**31)
    rows = []
    for size in sizes:
        jobs = setting.jobs(1, 1, size)
        found = paired({"cohort": lambda jobs=jobs: engine.train(jobs)}, given.repeats)["cohort"]
        each = {name: 1e3 * found[f"median_{name}_s"] / size for name in ("wall", "processor")}
        rows.append({"cohort": size, "ms_per_client": each, **found})
        print(
            f"{size:6d} clients  {each['wall']:7.3f} ms  {each['processor']:7.3f} processor-ms per client", flush=True
        )
    finish(given, {"rows": rows})


if __name__ == "__main__":
    main()
