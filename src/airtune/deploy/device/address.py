"""Where a device listens: a Unix socket, or a port that only this machine reaches."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from airtune.errors import InputError

VALID = "unix:PATH or 127.0.0.1:PORT"
LONGEST_PATH = 107  # bytes of a Unix socket's name, on Linux


@dataclass(frozen=True)
class UnixAddress:
    """A socket file, mode 0600."""

    path: Path

    def __str__(self) -> str:
        """Return ``unix:PATH``."""
        return f"unix:{self.path}"

    def connect(self, timeout: float | None) -> socket.socket:
        """Return a connected socket; OSError as it is raised."""
        return _connected(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), str(self.path), timeout)

    def check(self) -> None:
        """Raise InputError if a device cannot listen here; a socket file that nobody listens on is no obstacle."""
        name = len(os.fsencode(self.path))
        if name > LONGEST_PATH:
            raise InputError(f"--socket: {self.path} has {name} bytes; valid: at most {LONGEST_PATH}")
        if not self.path.parent.is_dir():
            raise InputError(f"--socket: {self.path.parent} is no folder")
        try:
            mode = os.lstat(self.path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise InputError(f"--socket: {self.path} exists and is no socket; valid: a new file")
        if self._answers():
            raise InputError(f"--socket: a device listens on {self.path} already; valid: another file")

    def listen(self) -> tuple[socket.socket, UnixAddress]:
        """Return a listening socket; one that a killed device left behind is replaced."""
        self.check()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)  # the file is never open to others, not even for a moment
        try:
            listener.bind(str(self.path))
        except OSError as error:
            listener.close()
            raise InputError(f"--socket: cannot listen on {self.path} ({error.strerror})") from error
        finally:
            os.umask(mask)
        listener.listen()
        return listener, self

    def leave(self) -> None:
        """Remove the socket file."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _answers(self) -> bool:
        try:
            self.connect(1.0).close()
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # it is there and busy, or not ours
        return True


@dataclass(frozen=True)
class LoopbackAddress:
    """A TCP port of the loopback interface; 0: any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        """Return ``HOST:PORT``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def _family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def connect(self, timeout: float | None) -> socket.socket:
        """Return a connected socket; OSError as it is raised."""
        connection = _connected(socket.socket(self._family, socket.SOCK_STREAM), (self.host, self.port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def check(self) -> None:
        """Do nothing: whether the port is free shows when it is taken."""

    def listen(self) -> tuple[socket.socket, LoopbackAddress]:
        """Return a listening socket, and the address with the port that it got."""
        listener = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self.host, self.port))
        except OSError as error:
            listener.close()
            raise InputError(f"--listen: cannot listen on {self} ({error.strerror}); valid: a free port") from error
        listener.listen()
        return listener, LoopbackAddress(self.host, int(listener.getsockname()[1]))

    def leave(self) -> None:
        """Do nothing: a port needs no cleaning up."""


Address = UnixAddress | LoopbackAddress


def read_address(text: str, field: str = "device") -> Address:
    """Return the address of ``unix:PATH`` or ``127.0.0.1:PORT``.

    Raises
    ------
    InputError : it is neither, or other machines could reach it.
    """
    if text.startswith("unix:") and len(text) > len("unix:"):
        return UnixAddress(Path(text.removeprefix("unix:")))
    host, _, port = text.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise InputError(f"{field}: cannot read {text!r}; valid: {VALID}") from error
    if not inside:
        raise InputError(f"{field}: other machines reach {host}; valid: {VALID}")
    if not port.isdecimal() or int(port) > 65535:
        raise InputError(f"{field}: {port!r} is no port; valid: {VALID}")
    return LoopbackAddress(host, int(port))


def _connected(connection: socket.socket, where: str | tuple[str, int], timeout: float | None) -> socket.socket:
    try:
        connection.settimeout(timeout)
        connection.connect(where)
    except BaseException:
        connection.close()
        raise
    return connection
