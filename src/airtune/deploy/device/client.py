"""The other end of `airtune device`: a `Trainer` whose training happens in the resident process.

`Device.ask` moves bytes and imports no torch, so that a process that lives for one message can stay small.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from airtune.deploy.device.address import read_address
from airtune.deploy.device.frames import Frame, FrameError, receive, send
from airtune.deploy.device.handshake import DeniedError, introduce
from airtune.errors import InputError, NoResultError
from airtune.types import Trained, TrainingJob

LARGEST_ANSWER = 1 << 34
CONNECT = 10.0  # s


class DeviceError(NoResultError):
    """The device is not there, refuses us, or ended before it answered."""


@dataclass(frozen=True)
class Device:
    """A resident trainer.

    Attributes
    ----------
    address : ``unix:PATH`` or ``127.0.0.1:PORT``.
    token : that it was started with; None for a Unix socket without one.
    experiment : fingerprint (`airtune.deploy.device.work.fingerprint`) that it must have been started with; None: any.
    timeout : s to wait for an answer; None: as long as the device lives.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    experiment: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Check the address."""
        read_address(self.address)

    def about(self) -> dict[str, Any]:
        """Return what the device says about itself: clients, examples, fingerprint, jobs done ..."""
        return dict(self.ask("about").head)

    def ask(self, question: str, body: bytes = b"", words: Mapping[str, Any] | None = None) -> Frame:
        """Return the answer to one question; `words` go into the head beside it.

        Raises
        ------
        DeviceError : the device is not there, refuses us, or ended before it answered.
        InputError : it says that the question is wrong.
        NoResultError : it says that there is no result (the training diverged).
        """
        with self.conversation() as talk:
            return talk.ask(question, body, words)

    @contextlib.contextmanager
    def conversation(self) -> Generator[Conversation]:
        """Open one connection for several questions; errors as in `ask`."""
        with self._errors("cannot be reached"):
            connection = read_address(self.address).connect(CONNECT)
        with connection:
            with self._errors("closed the door"):
                introduce(connection, self.token)
            yield Conversation(self, connection)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Generator[None]:
        start = "start it: airtune device EXPERIMENT.toml"
        try:
            yield
        except DeniedError as error:
            raise DeviceError(f"device {self.address}: {error}; valid: the token it was started with") from error
        except TimeoutError as error:
            raise DeviceError(f"device {self.address}: did not answer in time") from error
        except FrameError as error:
            raise DeviceError(f"device {self.address}: {what} ({error}); if it has ended, {start}") from error
        except OSError as error:
            raise DeviceError(f"device {self.address}: {what} ({error.strerror or error}); {start}") from error


@dataclass(frozen=True)
class Conversation:
    """An open connection to a device."""

    device: Device
    connection: socket.socket

    def ask(self, question: str, body: bytes = b"", words: Mapping[str, Any] | None = None) -> Frame:
        """Return the answer to one question; errors as in `Device.ask`."""
        self.connection.settimeout(self.device.timeout)
        with self.device._errors("ended before it answered"):  # pyright: ignore[reportPrivateUsage]
            send(self.connection, {**(words or {}), "ask": question, "experiment": self.device.experiment}, body)
            answer = receive(self.connection, LARGEST_ANSWER)
        if "error" in answer.head:
            text = f"device {self.device.address}: {answer.head['error']}"
            raise InputError(text) if answer.head.get("kind") == "input" else NoResultError(text)
        return answer


@dataclass(frozen=True)
class RemoteTrainer:
    """A `Trainer` whose results are those of the device's own trainer, to the bit."""

    device: Device

    def train(self, jobs: Sequence[TrainingJob]) -> Sequence[Trained]:
        """Return one result per job, in order; errors as in `Device.ask`."""
        return [trained for trained, _ in self.timed(jobs)]

    def timed(self, jobs: Sequence[TrainingJob]) -> list[tuple[Trained, float]]:
        """Return one result per job with the seconds that the device trained for."""
        from airtune.deploy.jobs import pack_job, unpack_trained

        results: list[tuple[Trained, float]] = []
        with self.device.conversation() as talk:
            for job in jobs:
                answer = talk.ask("train", pack_job(job))
                results.append((unpack_trained(answer.body), float(answer.head["seconds"])))
        return results
