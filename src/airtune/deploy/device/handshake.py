"""Both sides prove that they hold the same token; the token itself never travels.

The server sends a nonce; the client answers with its own nonce and ``HMAC-SHA256(token, "client" | both nonces)``; the
server answers with ``HMAC-SHA256(token, "server" | both nonces)``. So a stranger that listens on the device's port
learns nothing that it could use. Digests are compared in constant time. Nonces are secrets, not draws of an experiment:
they come from the operating system. A Unix socket may go without a token: its file mode keeps others out.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import stat
from pathlib import Path

from airtune.deploy.device.frames import receive, send
from airtune.errors import InputError, NoResultError
from airtune.files import disk_errors

PROTOCOL = 1
PATIENCE = 10.0  # s for each message of the handshake
SHORTEST = 16  # characters of a token


class DeniedError(NoResultError):
    """The other side does not hold the token, or speaks another protocol."""


def greet(connection: socket.socket, token: str | None) -> None:
    """Let a client in that holds the token.

    Raises
    ------
    DeniedError : it does not; it has been told so.
    FrameError, OSError : it does not speak as it should.
    """
    connection.settimeout(PATIENCE)
    nonce = secrets.token_hex(32)
    send(connection, {"protocol": PROTOCOL, "token": token is not None, "nonce": nonce})
    answer = receive(connection, 0).head
    theirs = str(answer.get("nonce"))
    if token is not None and not _equal(answer.get("proof"), _proof(token, "client", nonce, theirs)):
        send(connection, {"error": "wrong token"})
        raise DeniedError("a client does not hold the token")
    send(connection, {"proof": _proof(token, "server", nonce, theirs) if token is not None else ""})
    connection.settimeout(None)


def introduce(connection: socket.socket, token: str | None) -> None:
    """Prove the token to a server, and have it prove that it holds it too; errors as in `greet`."""
    connection.settimeout(PATIENCE)
    greeting = receive(connection, 0).head
    if greeting.get("protocol") != PROTOCOL:
        raise DeniedError(f"speaks protocol {greeting.get('protocol')!r}, this version {PROTOCOL}")
    if greeting.get("token") is not (token is not None):
        raise DeniedError("wants a token" if token is None else "was started without a token and cannot prove itself")
    nonce, theirs = secrets.token_hex(32), str(greeting.get("nonce"))
    send(connection, {"nonce": nonce, "proof": "" if token is None else _proof(token, "client", theirs, nonce)})
    answer = receive(connection, 0).head
    if "error" in answer:
        raise DeniedError(str(answer["error"]))
    if token is not None and not _equal(answer.get("proof"), _proof(token, "server", theirs, nonce)):
        raise DeniedError("does not hold the token")
    connection.settimeout(None)


def read_token(path: Path) -> str:
    """Return the token in a file that only its owner may read.

    Raises
    ------
    InputError : there is no such file, others may read it, or what it holds is too short.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file: {path} cannot be read ({error}); valid: a file with a long secret") from error
    if stat.S_IMODE(mode) & 0o077:
        raise InputError(f"--token-file: others may read {path}; valid: mode 0600 (chmod 600 {path})")
    if len(text) < SHORTEST or len(text.split()) != 1:
        raise InputError(f"--token-file: {path} must hold one word of at least {SHORTEST} characters")
    return text


def make_token(path: Path) -> str:
    """Write a new token into a new file of mode 0600 and return it."""
    token = secrets.token_urlsafe(32)
    with disk_errors(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(token + "\n")
    return token


def _proof(token: str, side: str, first: str, second: str) -> str:
    return hmac.new(token.encode(), f"{side}|{first}|{second}".encode(), hashlib.sha256).hexdigest()


def _equal(given: object, expected: str) -> bool:
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())
