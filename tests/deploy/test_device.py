"""`airtune device` as real processes: the same bits as in this process, and nothing a client does ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from airtune import cli
from airtune.compression.quantize import Quantized
from airtune.deploy.device.address import read_address
from airtune.deploy.device.client import Device, DeviceError, RemoteTrainer
from airtune.deploy.device.frames import MAGIC, receive, send
from airtune.deploy.device.handshake import introduce, make_token, read_token
from airtune.deploy.device.server import Server
from airtune.deploy.device.work import fingerprint
from airtune.deploy.jobs import pack_job, unpack_turn
from airtune.deploy.turn import take_turn
from airtune.errors import InputError, NoResultError
from airtune.experiment.build import Bench, Workshop, build
from airtune.experiment.config import read_file
from airtune.lora import AdapterSlice, LoraFactors
from airtune.types import ClientTask, ServerModel, Trained, TrainingJob
from small_world import make_adapter, make_task
from tiny_experiment import write_experiment

CODE = "import sys; from airtune.cli import main; sys.exit(main())"
TOKEN = "a-token-of-sufficient-length"


def _hear_ctrl_c() -> None:
    """Undo what a shell's background job passes on: SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class Process:
    """A running `airtune device`."""

    popen: subprocess.Popen[str]
    address: str
    errors: Path

    def end(self, number: int = signal.SIGTERM) -> int:
        self.popen.send_signal(number)
        return self.popen.wait(20)

    def said(self, text: str, seconds: float = 10.0) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if text in self.errors.read_text():
                return True
            time.sleep(0.02)
        return False


def start(folder: Path, experiment: Path, *options: str, name: str = "device") -> Process:
    """Start a device and wait until it is ready."""
    errors = folder / f"{name}.err"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with errors.open("w") as file:
        command = [sys.executable, "-c", CODE, "device", str(experiment), *options]
        popen = subprocess.Popen(
            command, stderr=file, stdout=subprocess.DEVNULL, env=environment, text=True, preexec_fn=_hear_ctrl_c
        )
    process = Process(popen, "", errors)
    end = time.monotonic() + 240
    while "ready at" not in errors.read_text():
        if popen.poll() is not None or time.monotonic() > end:
            popen.kill()
            popen.wait()
            raise AssertionError(errors.read_text())
        time.sleep(0.05)
    process.address = errors.read_text().partition("ready at ")[2].split()[0]
    return process


@contextlib.contextmanager
def running(*arguments: object, **named: str) -> Iterator[Process]:
    process = start(*arguments, **named)  # type: ignore[arg-type]
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.popen.kill()
            process.popen.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("device")


@pytest.fixture(scope="module")
def experiment(folder: Path) -> Path:
    return write_experiment(folder)


@pytest.fixture(scope="module")
def bench(experiment: Path) -> Bench:
    return build(read_file(experiment).experiment(), Workshop())


@pytest.fixture(scope="module")
def unix(folder: Path, experiment: Path) -> Iterator[Process]:
    with running(folder, experiment, "--socket", str(folder / "s"), name="unix") as process:
        yield process


@pytest.fixture(scope="module")
def tcp(folder: Path, experiment: Path) -> Iterator[Process]:
    path = folder / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    options = ("--listen", "127.0.0.1:0", "--token-file", str(path))
    with running(folder, experiment, *options, name="tcp") as process:
        yield process


def job_of(bench: Bench, client: int, round_: int = 1, steps: int = 2) -> TrainingJob:
    adapter = bench.start.adapter
    part = AdapterSlice.truncation(adapter.shape, 2)
    training = replace(bench.experiment.training, local_steps=steps, lora_dropout=0.1)
    task = ClientTask(client, AdapterSlice.everything(adapter.shape), part, part, training, Quantized(8), 1e6, 0.1)
    module = next(iter(adapter.factors))
    factors = adapter.factors[module]
    torch.manual_seed(0)
    merged = LoraFactors(torch.randn(2, factors.in_features), 0.1 * torch.randn(factors.out_features, 2), 1.0)
    return TrainingJob(task, replace(bench.start, base_update={module: merged}), round_)


def assert_equal(first: Trained, second: Trained) -> None:
    assert first.reports == second.reports
    for (owner, kind, one), (owner2, kind2, two) in zip(first.values.tensors(), second.values.tensors(), strict=True):
        assert (owner, kind) == (owner2, kind2)
        assert torch.equal(one, two) and one.stride() == two.stride(), (owner, kind)


# -------------------------------------------------------------------------------------------------------- what it gives


def test_results_are_those_of_this_process_to_the_bit(bench: Bench, unix: Process, tcp: Process) -> None:
    jobs = [job_of(bench, client, round_) for client, round_ in ((0, 1), (3, 1), (0, 2))]
    expected = bench.runner.trainer.train(jobs)
    assert not torch.equal(*(next(iter(e.values.factors.values())).A for e in expected[:2]))
    for device in (Device(unix.address), Device(tcp.address, TOKEN, fingerprint(bench.experiment), timeout=60)):
        for one, other in zip(RemoteTrainer(device).train(jobs), expected, strict=True):
            assert_equal(one, other)


def test_a_turn_is_that_of_this_process(bench: Bench, unix: Process) -> None:
    job = job_of(bench, 1)
    expected = take_turn(bench.runner.trainer, job, bench.experiment.seed)
    answer = Device(unix.address).ask("turn", pack_job(job))
    turn = unpack_turn(answer.body)
    assert answer.head["seconds"] > 0
    assert turn.reports == expected.reports and turn.payload.bits == expected.payload.bits
    for name, array in expected.payload.arrays.items():
        assert array.tobytes() == turn.payload.arrays[name].tobytes(), name


def test_about_counts_the_jobs(bench: Bench, unix: Process) -> None:
    device = Device(unix.address)
    before = device.about()
    assert before["clients"] == len(bench.clients) and before["experiment"] == fingerprint(bench.experiment)
    RemoteTrainer(device).train([job_of(bench, 2)])
    assert device.about()["jobs"] == before["jobs"] + 1


def test_asking_needs_no_torch(unix: Process) -> None:
    code = (
        "import sys; from airtune.deploy.device.client import Device;"
        f"assert Device({unix.address!r}).about()['clients'] == 6;"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_two_clients_at_once_get_their_own_results(bench: Bench, tcp: Process) -> None:
    jobs = [[job_of(bench, client, round_) for round_ in (1, 2, 3)] for client in (0, 1, 2)]
    results: dict[int, object] = {}

    def ask(number: int) -> None:
        results[number] = RemoteTrainer(Device(tcp.address, TOKEN)).train(jobs[number])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for number, mine in enumerate(jobs):
        for one, other in zip(results[number], bench.runner.trainer.train(mine), strict=True):  # type: ignore[call-overload]
            assert_equal(one, other)


# ----------------------------------------------------------------------------------------------- what it does not take


def test_the_socket_file_is_for_its_owner_alone(unix: Process) -> None:
    assert stat.S_IMODE(os.stat(unix.address.removeprefix("unix:")).st_mode) == 0o600


@pytest.mark.parametrize("token", ["another-token-of-that-length", TOKEN[:-1], "", None])
def test_a_wrong_token_is_refused(bench: Bench, tcp: Process, token: str | None) -> None:
    with pytest.raises(DeviceError, match="token"):
        RemoteTrainer(Device(tcp.address, token)).train([job_of(bench, 0)])
    assert Device(tcp.address, TOKEN).about()["clients"] == 6


def test_a_device_that_cannot_prove_itself_gets_no_job(bench: Bench, unix: Process) -> None:
    with pytest.raises(DeviceError, match="cannot prove itself"):
        RemoteTrainer(Device(unix.address, TOKEN)).train([job_of(bench, 0)])


def test_a_stranger_on_the_port_learns_nothing_and_is_found_out() -> None:
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def impostor() -> None:
            connection, _ = listener.accept()
            with connection:
                send(connection, {"protocol": 1, "token": True, "nonce": "00"})
                heard.append(repr(receive(connection, 0).head).encode())
                send(connection, {"proof": "0" * 64})
                heard.append(connection.recv(1000))

        thread = threading.Thread(target=impostor)
        thread.start()
        with pytest.raises(DeviceError, match="does not hold the token"):
            Device(f"127.0.0.1:{listener.getsockname()[1]}", TOKEN).about()
        thread.join(10)
    assert heard[1] == b"" and TOKEN.encode() not in heard[0]


def raw(process: Process) -> socket.socket:
    """Return a connection that has been let in."""
    connection = read_address(process.address).connect(5)
    introduce(connection, TOKEN if "tcp" in process.errors.name else None)
    connection.settimeout(5)
    return connection


def closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


HUGE = struct.pack(">4sIQ", MAGIC, 10, 1 << 62)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (HUGE, "a frame of 10 + 4611686018427387904 bytes"),
        (struct.pack(">4sIQ", MAGIC, 1 << 31, 0), "a frame of 2147483648 + 0 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", "does not begin a frame"),
        (struct.pack(">4sIQ", MAGIC, 4, 0) + b"[[[[", "is not JSON"),
        (struct.pack(">4sIQ", MAGIC, 2, 0) + b"[]", "is no table"),
    ],
)
def test_a_bad_frame_closes_its_connection_alone(tcp: Process, content: bytes, reason: str) -> None:
    with raw(tcp) as other, raw(tcp) as connection:
        connection.sendall(content)
        assert closed(connection)
        assert tcp.said(reason)
        send(other, {"ask": "about"})
        assert receive(other, 0).head["clients"] == 6


def test_a_truncated_frame_closes_its_connection_alone(bench: Bench, unix: Process) -> None:
    body = pack_job(job_of(bench, 0))
    with raw(unix) as connection:
        send(connection, {"ask": "about"})
        receive(connection, 0)
        connection.sendall(struct.pack(">4sIQ", MAGIC, 16, len(body)) + b'{"ask": "train"}' + body[:500])
    assert unix.said(f"the connection was closed after 500 of {len(body)} bytes")
    assert Device(unix.address).about()["clients"] == 6


def test_a_huge_frame_before_the_token_is_refused(tcp: Process) -> None:
    with read_address(tcp.address).connect(5) as connection:
        receive(connection, 0)
        connection.sendall(struct.pack(">4sIQ", MAGIC, 16, 1))
        assert closed(connection)
    assert tcp.said("a frame of 16 + 1 bytes; at most 65536 + 0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: replace(job, task=replace(job.task, client=6)), r"job\.task\.client: 6; valid: 0 to 5"),
        (lambda job: TrainingJob(make_task(0, make_adapter()), ServerModel(make_adapter()), 1), "none of this"),
        (lambda job: replace(job, task=replace(job.task, train=AdapterSlice({}, extras=False))), "trains nothing"),
    ],
)
def test_a_job_that_does_not_fit_is_refused_by_name(bench: Bench, unix: Process, change: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        RemoteTrainer(Device(unix.address)).train([change(job_of(bench, 0))])  # type: ignore[operator]
    assert Device(unix.address).about()["clients"] == 6


def test_another_experiment_is_refused(bench: Bench, unix: Process) -> None:
    other = fingerprint(replace(bench.experiment, seed=1))
    with pytest.raises(InputError, match="seed or precision differ"):
        RemoteTrainer(Device(unix.address, experiment=other)).train([job_of(bench, 0)])
    with pytest.raises(InputError, match="unknown question 'dance'; valid: about, train, turn"):
        Device(unix.address).ask("dance")
    with pytest.raises(InputError, match="job: cannot be read"):
        Device(unix.address).ask("train", b"\x80\x04N.")


# ---------------------------------------------------------------------------------------------- how it starts and ends


@pytest.mark.slow
def test_it_ends_cleanly_and_a_stale_socket_is_replaced(bench: Bench, folder: Path, experiment: Path) -> None:
    path = folder / "ends"
    options = ("--socket", str(path))
    with running(folder, experiment, *options, name="first") as first:
        second = subprocess.run(
            [sys.executable, "-c", CODE, "device", str(experiment), *options],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert second.returncode == 2 and "listens on" in second.stderr and second.stderr.count("\n") == 1
        first.popen.kill()
        first.popen.wait()
    assert path.exists()
    with pytest.raises(DeviceError, match="start it: airtune device"):
        Device(f"unix:{path}").about()
    for number in (signal.SIGTERM, signal.SIGINT):
        with running(folder, experiment, *options, name="again") as again:
            RemoteTrainer(Device(again.address)).train([job_of(bench, 0)])
            assert again.end(number) == 0
            assert "ended after 1 jobs" in again.errors.read_text() and "Traceback" not in again.errors.read_text()
        assert not path.exists()


def test_a_signal_that_another_thread_takes_ends_the_wait_too() -> None:
    """A signal that the waiting thread takes just before it waits looks the same to it: nothing wakes it."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before, main = signal.signal(signal.SIGTERM, interrupted), threading.get_ident()
    other = threading.Timer(0.3, lambda: signal.pthread_kill(threading.get_ident(), signal.SIGTERM))
    rescue = threading.Timer(10.0, lambda: signal.pthread_kill(main, signal.SIGTERM))
    began = time.monotonic()
    try:
        with socket.socket(socket.AF_UNIX) as listener, pytest.raises(KeyboardInterrupt):
            other.start(), rescue.start()
            Server(listener, lambda question: question, None, 1, print).serve()
        assert time.monotonic() - began < 8.0
    finally:
        rescue.cancel()
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_device_that_ends_during_a_job_is_named(bench: Bench, folder: Path, experiment: Path, number: int) -> None:
    with running(folder, experiment, "--socket", str(folder / "k"), name="killed") as process:
        found: list[BaseException] = []

        def ask() -> None:
            try:
                RemoteTrainer(Device(process.address)).train([job_of(bench, 0, steps=100_000)])
            except BaseException as error:
                found.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(1.0)
        process.popen.send_signal(number)
        assert process.popen.wait(20) == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        thread.join(20)
    assert isinstance(found[0], DeviceError)
    assert "ended before it answered" in str(found[0]) and process.address in str(found[0])


def test_a_slow_answer_ends_the_wait_not_the_device(bench: Bench, tcp: Process) -> None:
    before = Device(tcp.address, TOKEN, timeout=60).about()["jobs"]
    with pytest.raises(DeviceError, match="did not answer in time"):
        RemoteTrainer(Device(tcp.address, TOKEN, timeout=0.2)).train([job_of(bench, 0, steps=200)])
    assert Device(tcp.address, TOKEN, timeout=60).about()["jobs"] == before + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "listens in one place"),
        (["--socket", "x", "--listen", "127.0.0.1:0"], "listens in one place"),
        (["--listen", "127.0.0.1:0"], "--token-file"),
        (["--listen", "0.0.0.0:0", "--token-file", "t"], "other machines reach 0.0.0.0"),
        (["--listen", "somewhere:7", "--token-file", "t"], "cannot read 'somewhere:7'"),
        (["--listen", "127.0.0.1:99999", "--token-file", "t"], "is no port"),
        (["--socket", "rows.csv"], "exists and is no socket"),
        (["--socket", "missing/s"], "is no folder"),
        (["--socket", "x" * 120], "valid: at most 107"),
        (["--socket", "s", "--token-file", "open"], "others may read"),
        (["--socket", "s", "--token-file", "short"], "at least 16"),
    ],
)
def test_bad_options_are_one_line(
    folder: Path, experiment: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    (folder / "open").write_text(TOKEN)
    (folder / "open").chmod(0o644)
    (folder / "short").write_text("abc")
    (folder / "short").chmod(0o600)
    assert cli.main(["device", str(experiment), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_token_is_made_once_and_for_its_owner_alone(folder: Path) -> None:
    path = folder / "made"
    token = make_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(token) > 40
    assert read_token(path) == token
    with pytest.raises(NoResultError, match="cannot write"):
        make_token(path)
