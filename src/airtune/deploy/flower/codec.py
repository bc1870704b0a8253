"""Numbers on the wire: flat arrays of raw bytes in Flower's records, and nothing that has to be unpickled.

A Flower `Array` carries dtype, shape, the name of the serialisation and bytes. Ours is `STYPE`: the values one after
the other, little-endian, in C order, without the header of a ``.npy`` file. So the data bytes of a payload are the bits
that its compressor counts (rounded up to whole bytes per array), bfloat16 travels as it is, and what arrives is checked
against a list of dtypes and against its own size before a single number is read.

On the link each array adds its Flower object (dtype, shape, stype, a name and the SHA-256 of its chunks), each message
its metadata and its records: `ARRAY_HEADER_BYTES`, `MESSAGE_HEADER_BYTES` and `REQUEST_HEADER_BYTES` bound them,
measured in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

STYPE = "airtune.flat.1"
ARRAY_HEADER_BYTES = 512  # of one array of a reply, names up to 32 letters
MESSAGE_HEADER_BYTES = 2048  # of one reply without its arrays: metadata, reports, status
REQUEST_HEADER_BYTES = 4096  # of one request beside its values: the task as JSON, metadata

_LITTLE_ENDIAN = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("float16", "float32", "float64", "uint8", "int8", "uint16", "int16", "int32", "int64")
}
_BFLOAT16 = "bfloat16"  # numpy has no such type: its bits travel as those of uint16


class PayloadError(ValueError):
    """What arrived is not what it says it is; the message says why, in words fit for rounds.jsonl."""


def to_array(values: NDArray[Any]) -> Array:
    """Return a numpy array as Flower's.

    Raises
    ------
    TypeError : its dtype does not travel (a bug of a compressor).
    """
    name = values.dtype.name
    if name not in _LITTLE_ENDIAN:
        raise TypeError(f"arrays of dtype {name} do not travel; valid: {', '.join(_LITTLE_ENDIAN)}")
    flat = np.ascontiguousarray(values, dtype=_LITTLE_ENDIAN[name])
    return Array(name, tuple(int(n) for n in values.shape), STYPE, flat.tobytes())


def from_array(array: Array) -> NDArray[Any]:
    """Return a numpy array of its own memory.

    Raises
    ------
    PayloadError : another serialisation, an unknown dtype, or bytes that are not those of the shape.
    """
    if array.stype != STYPE:
        raise PayloadError(f"array of type {array.stype[:40]!r}, not {STYPE}")
    if array.dtype not in _LITTLE_ENDIAN:
        raise PayloadError(f"array of unknown dtype {array.dtype[:40]!r}")
    if any(n < 0 for n in array.shape):
        raise PayloadError("array of negative size")
    kind = _LITTLE_ENDIAN[array.dtype]
    if math.prod(array.shape) * kind.itemsize != len(array.data):
        raise PayloadError(f"array of shape {tuple(array.shape)[:4]} with {len(array.data)} bytes")
    return np.frombuffer(array.data, dtype=kind).astype(np.dtype(array.dtype), copy=True).reshape(array.shape)


def to_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Return named arrays as a record."""
    return ArrayRecord({name: to_array(values) for name, values in arrays.items()})


def from_record(record: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """Return the arrays of a record; errors as in `from_array`."""
    return {str(name): from_array(array) for name, array in record.items()}


def tensor_to_array(tensor: Tensor) -> Array:
    """Return a tensor as Flower's array; bfloat16 keeps its bits."""
    import torch

    plain = tensor.detach().cpu().contiguous()
    if plain.dtype is not torch.bfloat16:
        return to_array(plain.numpy())
    bits = to_array(plain.view(torch.int16).numpy().view(np.uint16))
    return Array(_BFLOAT16, bits.shape, STYPE, bits.data)


def tensor_from_array(array: Array) -> Tensor:
    """Return the tensor; errors as in `from_array`."""
    import torch

    if array.dtype != _BFLOAT16:
        return torch.from_numpy(from_array(array))
    bits = from_array(Array("uint16", tuple(array.shape), array.stype, array.data))
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def blob(content: bytes) -> Array:
    """Return bytes (a safetensors file) as an array."""
    return Array("uint8", (len(content),), STYPE, content)


def data_bits(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Return the bits of the arrays' data on the wire."""
    return 8 * sum(values.nbytes for values in arrays.values())
