"""Peak memory of the cohort engine against the number of clients, each point in a process of its own.

    python benchmarks/cohort_memory.py [--fleets 10,100,1000,10000] [--cohorts 10,100,1000] [--json FILE]

fleets: a cohort of 10 out of a fleet of so many clients. cohorts: all clients of a fleet of 1,000 train at once or in
part. Model: a random BERT of 2 layers x 128, batches of 4 x 16 tokens, 2 steps. Printed is the growth beyond the first
point, for cohorts also in units of one client's adapter (its trained tensors in fp32) per added member.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch
from cohort_common import finish, parser_of, synthetic

from airtune.training.cohort.trainer import CohortTrainer

BUDGET = 256 * 2**20


def main() -> None:
    """Print a table and write JSON on request."""
    parser = parser_of(__doc__)
    parser.add_argument("--fleets", default="10,100,1000,10000")
    parser.add_argument("--cohorts", default="10,100,1000")
    parser.add_argument("--point", nargs=2, type=int, help="internal: fleet and cohort of one measurement")
    given = parser.parse_args()
    if given.point is not None:
        print(json.dumps(measure(*given.point)))
        return
    fleets = [point(int(size), 10) for size in given.fleets.split(",")]
    cohorts = [point(max(int(size), 1000), int(size)) for size in given.cohorts.split(",")]
    for row in fleets:
        grown, data = row["peak_bytes"] - fleets[0]["peak_bytes"], row["data_bytes"] - fleets[0]["data_bytes"]
        row["grown_beyond_data_bytes"] = grown - data
        print(f"fleet {row['fleet']:6d}  {row['peak_bytes'] / 1e6:8.1f} MB  +{(grown - data) / 1e6:.1f} MB beyond data")
    for row in cohorts:
        members = row["cohort"] - cohorts[0]["cohort"]
        each = (row["peak_bytes"] - cohorts[0]["peak_bytes"]) / members if members else 0.0
        row["adapters_per_member"] = each / row["adapter_bytes"]
        print(
            f"cohort {row['cohort']:5d}  {row['peak_bytes'] / 1e6:8.1f} MB  {row['adapters_per_member']:6.2f} x "
            f"{row['adapter_bytes'] / 1e3:.0f} kB (one adapter) per added member"
        )
    finish(given, {"fleets": fleets, "cohorts": cohorts})


def point(fleet: int, cohort: int) -> dict[str, float]:
    """Measure one point in a fresh process."""
    command = [sys.executable, __file__, "--point", str(fleet), str(cohort)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def measure(fleet: int, cohort: int) -> dict[str, float]:
    """Train a cohort out of a fleet and return the peak of the resident memory."""
    torch.set_num_threads(1)
    setting = synthetic(2, 128, fleet, 8, 16)
    engine = CohortTrainer(setting.model, setting.tokens, setting.clients, 0, BUDGET)
    engine.train(setting.jobs(2, 4, min(10, cohort)))
    kept = engine.train(setting.jobs(2, 4, cohort))
    assert len(kept) == cohort
    data = setting.tokens.ids.nbytes + setting.tokens.offsets.nbytes + setting.tokens.labels.nbytes
    data += sum(part.nbytes for part in setting.clients)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    adapter = setting.adapter_bytes
    return {"fleet": fleet, "cohort": cohort, "peak_bytes": peak, "data_bytes": data, "adapter_bytes": adapter}


if __name__ == "__main__":
    main()
