"""What holds for every test: one thread, no network, examples that do not change from run to run."""

import os

# Before torch is imported anywhere: tests run in parallel processes, each with one thread.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("airtune", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("airtune")


@pytest.fixture(scope="session")
def fetched() -> Callable[[str], Path]:
    """Return a function: name of a catalogue entry -> its folder in the user's cache.

    Where the entry was not fetched the test is skipped, or fails if AIRTUNE_REQUIRE_DATA=1 (as in `.ci/run`).
    """
    from airtune.training.catalogue import find, folder_of, is_fetched

    def folder(name: str) -> Path:
        entry = find(name)
        if not is_fetched(entry):
            reason = f"{name} is not in the cache: airtune fetch {name}"
            if os.environ.get("AIRTUNE_REQUIRE_DATA") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        return folder_of(entry)

    return folder
