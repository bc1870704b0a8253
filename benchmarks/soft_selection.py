"""What choosing components costs a client, and what dropping half of them loses: norms, separate masks, and two SVDs.

    OMP_NUM_THREADS=1 python benchmarks/soft_selection.py [--repeats 5] [--json FILE]

One layer of the given size at ranks 4 to 64. Times: SOFT's norms and sort, the QR-core SVD (QR of both factors, SVD of
a [rank, rank] core), and the SVD of the dense product. Errors are relative and squared, of the product, with half of
the components kept and zero fill: random factors, and the same factors after 200 Adam steps on SOFT's cosine penalty
alone, which rotates them towards orthogonality as training does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from airtune.compression.lowrank import LowRank
from airtune.compression.rows import largest
from airtune.compression.soft import Soft, importance
from airtune.compression.topk import RandomComponents, RowTopK, TopK
from airtune.lora import Adapter, AdapterSlice, LoraFactors
from airtune.training.model import ActiveAdapter
from airtune.training.penalties import orthogonality
from airtune.types import Compressor


def random_factors(size: int, rank: int) -> LoraFactors:
    """Return factors whose components differ in size and are not orthogonal: a shared direction in every one."""
    draw = torch.Generator().manual_seed(rank)
    a, b = torch.randn(rank, size, generator=draw), torch.randn(size, rank, generator=draw)
    a, b = a + 1.5 * torch.randn(1, size, generator=draw), b + 1.5 * torch.randn(size, 1, generator=draw)
    scale = 0.9 ** torch.arange(rank, dtype=torch.float32)
    return LoraFactors(a / size**0.5, b * scale / size**0.5, 1.0)


def orthogonalised(factors: LoraFactors) -> LoraFactors:
    """Return the factors after 200 steps on the penalty alone."""
    a, b = (tensor.clone().requires_grad_() for tensor in (factors.A, factors.B))
    adapter = one_slot(LoraFactors(a, b, 1.0))
    active = ActiveAdapter(AdapterSlice.everything(adapter.shape), adapter, adapter)
    optimizer = torch.optim.Adam([a, b], lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        orthogonality("cosine", active).backward()
        optimizer.step()
    return LoraFactors(a.detach(), b.detach(), 1.0)


def one_slot(factors: LoraFactors) -> Adapter:
    return Adapter({"p": factors}, {"p": ("p",)}, {"p": 0}, 1)


def best(work: Callable[[], object], repeats: int) -> float:
    """Return the least processor seconds of some repeats, after one that is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def relative_error(codec: Compressor, factors: LoraFactors) -> float:
    """Return the squared relative error of the product that arrives."""
    adapter = one_slot(factors)
    part = AdapterSlice.everything(adapter.shape)
    payload, _ = codec.encode(part, adapter, adapter, {}, np.random.default_rng(0))
    arrived = codec.decode(part, payload, adapter).factors["p"].product()
    dense = factors.product()
    return float((arrived - dense).square().sum() / dense.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for rank in (4, 16, 64):
        factors = random_factors(options.size, rank)
        times = {
            "norms": best(lambda f=factors, r=rank: largest(importance(f, f), r // 2), options.repeats),
            "qr-core svd": best(lambda f=factors, r=rank: f.truncate(r // 2), options.repeats),
            "dense svd": best(lambda f=factors: torch.linalg.svd(f.product()), min(options.repeats, 2)),
        }
        codecs: dict[str, Compressor] = {
            "soft": Soft(0.5, fill="zero"),
            "row-top-k": RowTopK(0.5, fill="zero"),
            "top-k": TopK(0.5, fill="zero"),
            "random": RandomComponents(0.5, fill="zero"),
            "low-rank": LowRank(0.5),
        }
        near = orthogonalised(factors)
        errors = {name: (relative_error(c, factors), relative_error(c, near)) for name, c in codecs.items()}
        rows.append({"rank": rank, "seconds": times, "errors": errors})
        print(f"rank {rank}: " + ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in times.items()), flush=True)
        for name, (plain, orthogonal) in errors.items():
            print(f"  {name:10s} error {plain:.4f}, after the penalty {orthogonal:.4f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
