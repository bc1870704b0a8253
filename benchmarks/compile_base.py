"""Would torch.compile pay? A training step of the base model as it is against the compiled one, paired in one run.

    python benchmarks/compile_base.py [--repeats 7] [--json FILE]

MiniLM with LoRA of rank 8 through PEFT, 32 rows of 32 tokens, forward and backward pass, one thread. Compilation
happens once for each size of batch: its seconds are printed beside what it saves per step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from airtune.training.catalogue import resolve_model

ROWS, TOKENS = 32, 32


def network(dtype: torch.dtype) -> Any:
    """Return the model with its adapter, in one precision."""
    attention = "eager" if dtype is torch.bfloat16 else "sdpa"  # what airtune takes on a CPU
    model = AutoModelForSequenceClassification.from_pretrained(
        resolve_model("minilm"), dtype=dtype, attn_implementation=attention
    )
    return get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"])).eval()


def step(model: Any, ids: torch.Tensor) -> float:
    """Run one step and return its seconds."""
    began = time.perf_counter()
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float().square().mean().backward()
    return time.perf_counter() - began


def measure(dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Return medians of both forms and what compiling took."""
    plain = network(dtype)
    compiled = torch.compile(network(dtype))
    ids = torch.randint(5, 1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    step(plain, ids)
    first = step(compiled, ids)
    pairs = [(step(plain, ids), step(compiled, ids)) for _ in range(repeats)]
    return {
        "plain_s": statistics.median(a for a, _ in pairs),
        "compiled_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "compile_s": first,
    }


def main() -> None:
    """Measure both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        str(dtype).removeprefix("torch."): measure(dtype, given.repeats) for dtype in (torch.float32, torch.bfloat16)
    }
    text = json.dumps(found, indent=1)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
