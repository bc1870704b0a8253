"""Where and how precisely training computes: chosen by the user, never silently replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from airtune.errors import InputError

Precision = Literal["fp32", "bf16", "fp64"]
BASE_TYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def checked_device(name: str) -> torch.device:
    """Return the device of a name ("cpu", "cuda", "cuda:1").

    Raises
    ------
    InputError : there is no such device here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"training.device: unknown device {name!r}; valid: cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"training.device: {name!r} is not supported; valid: cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"training.device: there is no {name!r} here ({torch.cuda.device_count()} found); valid: cpu")
    return device


def checked_precision(name: str, device: torch.device) -> Precision:
    """Return the precision if the device computes in it.

    Raises
    ------
    InputError : unknown name, or bf16 on hardware without bf16 instructions.
    """
    if name not in BASE_TYPE:
        raise InputError(f"training.precision: unknown precision {name!r}; valid: {', '.join(BASE_TYPE)}")
    if name == "bf16" and not _has_bf16(device):
        raise InputError(f"training.precision: {device.type} has no bf16 instructions here; valid: fp32")
    return cast(Precision, name)


def on_device(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """Return arrays as tensors on a device; to a GPU through pinned memory: the host does not wait for the copy.

    On the CPU a tensor shares its array's memory.
    """
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    if device.type == "cpu":
        return tensors
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(value is True for name, value in torch.cpu.get_capabilities().items() if "bf16" in name)
