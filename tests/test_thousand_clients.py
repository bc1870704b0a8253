"""The base model is in memory once: a thousand clients cost hardly more than ten."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXPERIMENT = """
name = "many"
[model]
name = "minilm"
[data]
name = "reuters-r8"
max_length = 16
test_rows = 50
partition = { type = "dirichlet", alpha = 1.0 }
[fleet.devices]
jetson-tx2 = CLIENTS
[training]
local_steps = 1
batch_size = 4
threads = 1
[method]
name = "fedit"
cohort_size = 5
[stop]
rounds = 1
"""
RUN = """
import json, resource, sys
from airtune import cli
code = cli.main(["run", sys.argv[1], "--out", sys.argv[2]])
print(json.dumps({"code": code, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


@pytest.mark.slow
def test_a_thousand_clients_fit_and_cost_no_copy_of_the_model(tmp_path: Path, fetched: Callable[[str], Path]) -> None:
    for name in ("minilm", "reuters-r8"):
        fetched(name)
    peak = {clients: _peak_bytes(tmp_path, clients) for clients in (10, 1000)}
    assert peak[1000] < 4e9
    assert peak[1000] - peak[10] < 100e6  # the model alone has 91 MB in fp32


def _peak_bytes(folder: Path, clients: int) -> int:
    file = folder / f"{clients}.toml"
    file.write_text(EXPERIMENT.replace("CLIENTS", str(clients)), encoding="utf-8")
    arguments = [sys.executable, "-c", RUN, str(file), str(folder / f"run-{clients}")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == 0, done.stderr
    lines = (folder / f"run-{clients}" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(json.loads(lines[-1])["arrived"]) == 5
    return int(found["bytes"])
