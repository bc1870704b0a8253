"""Frames on a socket: a fixed prefix, a JSON head, a body of bytes. Sizes are checked before anything is read.

    "ATD1" | length of the head, 4 bytes | length of the body, 8 bytes | head | body        (big-endian)

Memory grows with what has arrived, never with what a prefix promises.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from airtune.errors import NoResultError

MAGIC = b"ATD1"
PREFIX = struct.Struct(">4sIQ")
LARGEST_HEAD = 64 * 1024
CHUNK = 1 << 20

Head = Mapping[str, Any]


class FrameError(NoResultError):
    """A frame that is not one of ours, is too large, or ends in the middle."""


class ClosedError(FrameError):
    """The other side closed the connection between two frames."""


@dataclass(frozen=True)
class Frame:
    """One message: `head` is JSON, `body` is whatever the head says."""

    head: Head
    body: bytes = b""


def send(connection: socket.socket, head: Head, body: bytes = b"") -> None:
    """Send one frame; OSError as the socket raises it."""
    text = json.dumps(head).encode()
    if len(text) > LARGEST_HEAD:
        raise ValueError(f"a head of {len(text)} bytes; at most {LARGEST_HEAD} fit")
    connection.sendall(PREFIX.pack(MAGIC, len(text), len(body)) + text)
    if body:
        connection.sendall(body)


def receive(connection: socket.socket, largest_body: int, *, patience: float | None = None) -> Frame:
    """Return the next frame.

    Parameters
    ----------
    largest_body : bytes; a frame that promises more is refused before it is read.
    patience : s to wait for each further piece once a frame has begun; None: as the socket is set. The wait for the
        first byte is always as the socket is set.

    Raises
    ------
    ClosedError : the other side closed the connection instead of sending.
    FrameError : the frame is not ours, too large, or cut off.
    TimeoutError, OSError : as the socket raises them.
    """
    prefix = connection.recv(PREFIX.size)
    if not prefix:
        raise ClosedError("the connection was closed")
    waiting = connection.gettimeout()
    try:
        connection.settimeout(waiting if patience is None else patience)
        prefix += _exactly(connection, PREFIX.size - len(prefix))
        magic, head_size, body_size = PREFIX.unpack(prefix)
        if magic != MAGIC:
            raise FrameError(f"{magic!r} does not begin a frame")
        if head_size > LARGEST_HEAD or body_size > largest_body:
            raise FrameError(f"a frame of {head_size} + {body_size} bytes; at most {LARGEST_HEAD} + {largest_body}")
        head = _head(_exactly(connection, head_size))
        return Frame(head, _exactly(connection, body_size))
    finally:
        connection.settimeout(waiting)


def _exactly(connection: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        piece = connection.recv(min(CHUNK, size - len(content)))
        if not piece:
            raise FrameError(f"the connection was closed after {len(content)} of {size} bytes")
        content += piece
    return bytes(content)


def _head(text: bytes) -> Head:
    try:
        head: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"the head of a frame is not JSON ({error})") from error
    if not isinstance(head, dict):
        raise FrameError("the head of a frame is no table")
    return cast("Head", head)
