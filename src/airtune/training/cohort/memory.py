"""The byte budget: how many token places a micro-batch may have, and how many clients a block."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from airtune.devices.latency import TransformerShape
from airtune.devices.memory import activation_bytes

STATE_SHARE = 0.25  # of the budget for the stacks of a block; the rest is for activations [our choice]
ROWS_OF_STATE = 6  # values, gradients, two moments, a step's change, the copy for a micro-batch
ROWS_OF_SNAPSHOT = 3  # values and two moments, which BeamLoRA keeps beside
GREATEST_BLOCK = {"cpu": 128, "cuda": 1024}  # clients; more gain nothing, and their moments would be held at once


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device now; on the CPU what the kernel, or the container's limit, leaves."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found = [int(line.split()[1]) * 1024]
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        found.append(int(limit[0]) - int(used[0]))
    return max(min(found), 0)


def automatic_budget(device: torch.device) -> int:
    """Return half of what is free, rounded down to 64 MiB so that small changes of the machine's load do not show."""
    unit = 64 * 2**20
    return max(unit, free_bytes(device) // 2 // unit * unit)


def bytes_per_token(
    config_json: dict[str, Any], length: int, *, value_bytes: int, causal: bool, checkpointing: bool = False
) -> float:
    """Return an upper estimate of what one token place keeps for the backward pass, with all layers trained.

    With checkpointing every layer keeps its input, and two layers at a time all the rest.
    """
    shape = TransformerShape.from_config(config_json)
    each = float(activation_bytes(shape, length, 1, value_bytes)) / length
    layers = (shape.layers + 1.0) * each
    if checkpointing:
        layers = min(layers, 2.0 * each + (shape.layers + 1.0) * shape.hidden * value_bytes)
    return layers + (16.0 * shape.vocabulary if causal else 0.0)


def block_clients(budget: int, width: int, value_bytes: int, device: str = "cpu", *, rows: int = ROWS_OF_STATE) -> int:
    """Return how many clients fit into the share of the budget for stacks.

    width : trained values of a client. rows : that many values are kept for each of them.
    """
    return max(1, min(GREATEST_BLOCK[device], int(STATE_SHARE * budget) // max(rows * width * value_bytes, 1)))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
