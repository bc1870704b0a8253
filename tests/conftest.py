"""What holds for every test: one thread, no network, examples that do not change from run to run."""

import os

# Before torch is imported anywhere: tests run in parallel processes, each with one thread.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis  # noqa: E402

hypothesis.settings.register_profile("airtune", derandomize=True, deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("airtune")
