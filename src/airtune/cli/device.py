"""`airtune device`: keep the base model loaded and train the jobs that local processes send."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from airtune.cli.arguments import Arguments
from airtune.cli.files import experiment_file
from airtune.cli.output import say
from airtune.deploy.device.address import Address, UnixAddress, read_address
from airtune.deploy.device.handshake import make_token, read_token
from airtune.errors import InputError

if TYPE_CHECKING:
    from airtune.deploy.device.work import Work
    from airtune.experiment.config import Experiment


def device(arguments: Arguments) -> int:
    """Listen, load, answer until SIGTERM or Ctrl-C, and leave no socket file behind."""
    address = _address(arguments)
    token = _token(arguments, address)
    address.check()
    experiment = experiment_file(arguments).experiment()

    from airtune.deploy.device.server import Server

    work = _work(experiment)
    listener, address = address.listen()
    server = Server(listener, work.answer, token, work.largest_job, _say)
    _say(f"ready at {address} ({experiment.model.name}, {len(work.bench.clients)} clients, seed {experiment.seed})")
    try:
        with listener:
            server.serve()
    except KeyboardInterrupt:
        _say(f"ended after {work.done} jobs")
    finally:
        address.leave()
    return 0


def _work(experiment: Experiment) -> Work:
    """Load everything; Flower's messages are answered where Flower is installed, with the same base model."""
    from airtune.deploy.device.work import Work
    from airtune.experiment.build import Workshop, build

    if find_spec("flwr") is None:
        return Work(build(experiment, Workshop()))
    from airtune.deploy.device.resident import Resident
    from airtune.deploy.flower.device import workshop

    work = Work(build(experiment, workshop()))
    work.more["flower"] = Resident(work)
    return work


def _address(arguments: Arguments) -> Address:
    if (arguments.socket is None) == (arguments.listen is None):
        raise InputError("airtune device: listens in one place; valid: --socket PATH or --listen 127.0.0.1:PORT")
    if arguments.socket is not None:
        return UnixAddress(Path(arguments.socket))
    return read_address(arguments.listen, "--listen")


def _token(arguments: Arguments, address: Address) -> str | None:
    if arguments.token_file is None:
        if isinstance(address, UnixAddress):
            return None  # the file's mode keeps others out
        raise InputError("--token-file: every process of this machine reaches a port; valid: a file for the token")
    path = Path(arguments.token_file)
    if path.exists():
        return read_token(path)
    token = make_token(path)
    _say(f"wrote a new token to {path}")
    return token


def _say(text: str) -> None:
    say(f"airtune device: {text}")
