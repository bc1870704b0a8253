"""The resident process: threads read questions from the connections, the main thread answers one at a time.

All training happens in the main thread. So there is one job at a time whatever the clients do, and a signal ends the
process between two operations of a local step.
"""

from __future__ import annotations

import queue
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from airtune.deploy.device.frames import ClosedError, Frame, receive, send
from airtune.deploy.device.handshake import greet
from airtune.errors import InputError, NoResultError

MOST_CLIENTS = 32
LONGEST_WAIT = (
    1.0  # s; then the wait is begun anew: a signal that comes just before it, or to another thread, does not end it
)
PATIENCE = 30.0  # s that a client may pause in the middle of a frame

Answer = Callable[[Frame], Frame]


@dataclass(frozen=True)
class _Question:
    frame: Frame
    answer: queue.SimpleQueue[Frame] = field(default_factory=lambda: queue.SimpleQueue[Frame]())


@dataclass
class Server:
    """Answers the questions that arrive on a listening socket until it is interrupted.

    Attributes
    ----------
    listener : a listening socket.
    answer : called in the thread of `serve`, one question at a time.
    token : that clients must hold; None: whoever can open the socket may ask.
    largest_body : bytes of a question.
    say : where to report clients that were turned away.
    """

    listener: socket.socket
    answer: Answer
    token: str | None
    largest_body: int
    say: Callable[[str], None]
    questions: queue.SimpleQueue[_Question] = field(default_factory=lambda: queue.SimpleQueue[_Question]())
    places: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MOST_CLIENTS))

    def serve(self) -> None:
        """Answer until KeyboardInterrupt, which goes on to the caller."""
        threading.Thread(target=self._accept, daemon=True).start()
        while True:
            try:
                question = self.questions.get(timeout=LONGEST_WAIT)
            except queue.Empty:
                continue
            question.answer.put(self._answered(question.frame))

    def _answered(self, question: Frame) -> Frame:
        try:
            return self.answer(question)
        except (InputError, ValueError) as error:
            return Frame({"error": _line(error), "kind": "input"})
        except NoResultError as error:
            return Frame({"error": _line(error), "kind": "no result"})
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            return Frame({"error": f"failed ({type(error).__name__}: {_line(error)})", "kind": "bug"})

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return  # the listener was closed
            if not self.places.acquire(blocking=False):
                self.say(f"{MOST_CLIENTS} clients are connected; one more was turned away")
                connection.close()
                continue
            threading.Thread(target=self._attend, args=(connection,), daemon=True).start()

    def _attend(self, connection: socket.socket) -> None:
        """Let one client in and pass its questions on until it leaves."""
        try:
            with connection:
                greet(connection, self.token)
                while True:
                    question = _Question(receive(connection, self.largest_body, patience=PATIENCE))
                    self.questions.put(question)
                    answer = question.answer.get()
                    send(connection, answer.head, answer.body)
        except ClosedError:
            pass
        except (NoResultError, OSError) as error:
            self.say(f"a connection was closed: {_line(error)}")
        finally:
            self.places.release()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:2000]
