"""Tensors and JSON data in one safetensors file, to the bit and in the same memory order."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from airtune.errors import InputError
from airtune.experiment.hints import Plain

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
HEADER = "airtune"


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands: its name in the file and, if it is not in C order, the axes from slow to fast."""

    name: str
    order: tuple[int, ...] | None = None


@dataclass
class TensorTable:
    """The tensors of one file; an object that occurs twice is stored once."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, "Tensor"])
    seen: dict[int, Entry] = field(default_factory=dict[int, Entry])
    alive: list[Any] = field(default_factory=list[Any])  # keeps ids valid

    def add(self, tensor: Tensor) -> Entry:
        """Store a tensor, on the CPU, and return where it stands."""
        if id(tensor) not in self.seen:
            entry = Entry(str(len(self.tensors)), _axes(tensor))
            stored = tensor.detach().cpu()
            stored = stored if entry.order is None else stored.permute(entry.order)
            self.tensors[entry.name] = stored.contiguous().clone()
            self.seen[id(tensor)] = entry
            self.alive.append(tensor)
        return self.seen[id(tensor)]

    def add_array(self, array: NDArray[Any]) -> Entry:
        """Store a numpy array."""
        import torch

        return self.add(torch.from_numpy(np.array(array, order="C")))

    def tensor(self, entry: Entry, where: str) -> Tensor:
        """Return a stored tensor with its memory order."""
        if entry.name not in self.tensors:
            raise InputError(f"{where}: the file has no tensor {entry.name!r}")
        stored = self.tensors[entry.name]
        if entry.order is None:
            return stored
        if sorted(entry.order) != list(range(stored.dim())):
            raise InputError(f"{where}: {list(entry.order)} are not the axes of a tensor with {stored.dim()}")
        return stored.permute([entry.order.index(axis) for axis in range(stored.dim())])

    def file(self, kind: str, plain: Plain) -> bytes:
        """Return all tensors and the plain part as one safetensors file."""
        from safetensors.torch import save

        header = json.dumps({"format": FORMAT, "kind": kind, "content": plain}, allow_nan=False)
        return save(self.tensors, metadata={HEADER: header})

    @staticmethod
    def read(kind: str, content: bytes) -> tuple[TensorTable, Plain]:
        """Return the tensors and the plain part of a file."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            length = int.from_bytes(content[:8], "little")
            head = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][HEADER])
            tensors = load(content)
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{kind}: cannot be read ({error})") from error
        found = cast("Plain", head) if isinstance(head, dict) else {}
        if found.get("format") != FORMAT or found.get("kind") != kind:
            raise InputError(f"{kind}: is {found.get('kind')!r} of format {found.get('format')!r}, not {FORMAT}")
        return TensorTable({name: tensor.clone() for name, tensor in tensors.items()}), found["content"]


def _axes(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the axes from slow to fast, None for C order: the same memory order gives the same bits in later sums."""
    if tensor.is_contiguous() or 0 in tensor.stride():
        return None
    return tuple(sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis)))
