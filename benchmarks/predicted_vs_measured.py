"""How long do rounds really take, against what the plan said? Real training, real payloads, really shaped links.

Each device is a resident trainer with a processor quota (its speed) behind a link of its own in a network namespace.
Before each round the links get the rates of the plan's bandwidth split (a token bucket at both ends). Runs of
their own calibrate (`airtune.deploy.prediction`); the others are judged. All traffic stays inside the namespaces.

    python benchmarks/predicted_vs_measured.py --transport flower --json predicted.json       (as root)

`--transport sockets` carries the same messages over plain TCP, without Flower's processes and polling.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from predicted_vs_measured_net import Links, Quotas, enter, why_not

from airtune.deploy.prediction import MeasuredRound, fit, read_rounds, relative_errors

HERE = Path(__file__).resolve().parent
APP = HERE.parent / "deploy" / "app"
CLI = [sys.executable, "-c", "import sys; from airtune.cli import main; sys.exit(main())"]
CORES = (0.12, 0.14, 0.16, 0.18, 0.20, 0.22, 0.25, 0.30)  # 1.57 together: below the two cores of a small machine
CALIBRATION = ("calibration", "calibration-short")  # the same with fewer local steps: training apart from overhead
METHODS = ("fedit", "legend", "adaptive-sampling")
PORT = 8000

EXPERIMENT = """\
name = "predicted"
seed = 1
[model]
name = "minilm"
rank = 8
alpha = 16
[data]
name = "reuters-r8"
max_length = 32
train_rows = 2000
test_rows = 100
partition = {{ type = "dirichlet", alpha = 5.0 }}
[fleet]
devices = {devices}
[wireless]
uplink_bandwidth = "7 MHz"
downlink_bandwidth = "20 MHz"
downlink = "unicast"
fading = "none"
shadowing = false
area = {{ type = "annulus", inner = "60 m", outer = "1500 m" }}
[training]
local_steps = {steps}
batch_size = 8
learning_rate = 2e-3
threads = 1
[method]
name = "fedit"
cohort_size = 4
[variant.legend]
method = "legend"
cohort_size = 4
[stop]
rounds = 6
[evaluation]
every = 1000
"""

PROFILE = """\
[sources]
measured = "airtune calibrate on one core of this machine, times the quota"
given = "given"
[{name}]
title = "{name}"
peak = {{ value = {peak:.8g}, unit = "FLOP/s", source = "measured" }}
utilisation = {{ value = 1.0, unit = "1", source = "measured" }}
memory = {{ value = 8e9, unit = "B", source = "given" }}
transmit_power = {{ value = 23, unit = "dBm", source = "given" }}
receive_power = {{ value = 0.9, unit = "W", source = "given" }}
[[{name}.modes]]
name = "full"
speed = {{ value = 1.0, unit = "1", source = "measured" }}
power = {{ value = 10.0, unit = "W", source = "given" }}
"""


class Run:
    """The processes of one benchmark; ended by process id, each with the session that it leads."""

    def __init__(self, folder: Path, links: Links, quotas: Quotas) -> None:
        self.folder, self.links, self.quotas = folder, links, quotas
        self.server = quotas.group("server", None)
        self.groups = [quotas.group(f"device-{index}", cores) for index, cores in enumerate(CORES)]
        self.running: list[subprocess.Popen[bytes]] = []
        own = {"FLWR_HOME": str(folder / "flwr"), "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        own |= {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        own |= {"FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "HF_HUB_OFFLINE": "1"}
        own["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, **own}

    def start(self, name: str, *command: str, group: Path, namespace: str | None = None) -> subprocess.Popen[bytes]:
        words = [*(self.links.inside(namespace) if namespace else []), *command]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=self.environment,
                start_new_session=True,
                preexec_fn=lambda: enter(group, os.getpid()),
            )
        self.running.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def wait_for(self, name: str, text: str, seconds: float = 400.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.log(name):
            if time.monotonic() > end:
                raise TimeoutError(f"{name} did not say {text!r}:\n{self.log(name)[-2000:]}")
            time.sleep(0.2)

    def finish(self, process: subprocess.Popen[bytes], name: str, seconds: float) -> None:
        if process.wait(seconds) != 0:
            raise RuntimeError(f"{name} failed:\n{self.log(name)[-4000:]}")

    def end(self, *chosen: subprocess.Popen[bytes]) -> None:
        """End some processes, or all of them, with their sessions."""
        ending = list(chosen) or self.running
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 20.0)):
            for process in ending:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            end = time.monotonic() + seconds
            while time.monotonic() < end and any(process.poll() is None for process in ending):
                time.sleep(0.1)


def prepare(run: Run, steps: int) -> tuple[Path, float]:
    """Measure one core, write profiles and experiment, and return the experiment with the speed, FLOP/s."""
    trial = run.folder / "trial.toml"
    trial.write_text(EXPERIMENT.format(devices="{ jetson-tx2 = 2 }", steps=steps))
    process = run.start("calibrate", *CLI, "calibrate", str(trial), "--repeats", "5", "--json", group=run.server)
    run.finish(process, "calibrate", 600)
    speed = json.loads(run.log("calibrate").strip().splitlines()[-1])["flops_per_second"]
    profiles = []
    for index, cores in enumerate(CORES):
        path = run.folder / f"device-{index}.toml"
        path.write_text(PROFILE.format(name=f"device-{index}", peak=speed * cores))
        profiles.append(str(path))
    experiment = run.folder / "predicted.toml"
    experiment.write_text(EXPERIMENT.format(devices=json.dumps(profiles), steps=steps))
    (run.folder / "network.json").write_text(json.dumps({"prefix": run.links.prefix}))
    return experiment, speed


def start_trainers(run: Run, experiment: Path) -> None:
    """Start one resident trainer for each device; its quota begins when it is ready."""
    trainers = []
    for index in range(len(CORES)):
        socket = str(run.folder / f"device-{index}.sock")
        command = [*CLI, "device", str(experiment), "--socket", socket]
        trainers.append(run.start(f"trainer-{index}", *command, group=run.server))
        if index % 2:
            run.wait_for(f"trainer-{index}", "ready at")
    for index, process in enumerate(trainers):
        run.wait_for(f"trainer-{index}", "ready at")
        enter(run.groups[index], process.pid)


def node_config(run: Run, index: int) -> dict[str, Any]:
    """Return what Flower tells a device of itself."""
    return {"partition-id": index, "num-partitions": len(CORES), "device": f"unix:{run.folder}/device-{index}.sock"}


def over_sockets(run: Run, experiment: Path, jobs: list[dict[str, Any]]) -> None:
    code = "import json, sys; from predicted_vs_measured_rounds import over_sockets as go; go(*json.loads(sys.argv[1]))"
    words = json.dumps([str(experiment), str(run.folder), len(CORES), jobs])
    driver = run.start("driver", sys.executable, "-c", code, words, group=run.server, namespace=run.links.server)
    time.sleep(2.0)
    for index, group in enumerate(run.groups):
        where = [
            f"10.199.{index}.1",
            "7000",
            f"unix:{run.folder}/device-{index}.sock",
            json.dumps(node_config(run, index)),
        ]
        script = 'for i in $(seq 600); do "$@" && exit; sleep 1; done'  # the driver may not listen yet
        node = [sys.executable, str(HERE / "predicted_vs_measured_node.py"), *where]
        run.start(f"node-{index}", "sh", "-c", script, "sh", *node, group=group, namespace=run.links.device(index))
    run.finish(driver, "driver", 3000)


def over_flower(run: Run, experiment: Path, jobs: list[dict[str, Any]]) -> None:
    app = run.folder / "app"
    shutil.copytree(APP, app)
    (app / "airtune_app" / "server_app.py").write_text(
        'from predicted_vs_measured_rounds import app\n\n__all__ = ["app"]\n'
    )
    (run.folder / "flwr").mkdir()
    (run.folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "b"\n[superlink.b]\naddress = "127.0.0.1:{PORT}"\ninsecure = true\n'
    )
    inside = {"group": run.server, "namespace": run.links.server}
    run.start("superlink", "flower-superlink", "--insecure", "--host", "0.0.0.0", "--port", str(PORT), **inside)
    run.wait_for("superlink", "Uvicorn running")
    for index, group in enumerate(run.groups):
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in node_config(run, index).items())
        address = ["--superlink", f"10.199.{index}.1:{PORT}", "--port", str(9100 + index)]
        command = ["flower-supernode", "--insecure", *address, "--node-config", config]
        run.start(f"node-{index}", *command, group=group, namespace=run.links.device(index))
    for number, job in enumerate(jobs):
        words = {"experiment": str(experiment), "observe": "simulated", "measure": False, "poll-seconds": 0.1, **job}
        words |= {"out": str(run.folder / job["out"]), "wait-seconds": 900.0}
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in words.items())
        name = f"run-{number}"
        process = run.start(name, "flwr", "run", str(app), "b", "--stream", "--run-config", config, **inside)
        run.finish(process, name, 3000)


def analyse(folder: Path, outs: list[str]) -> dict[str, Any]:
    """Return errors before and after calibration, by method and together.

    The first round of a calibration run is left out: devices do some things for the first time in it.
    """
    runs = [folder / name for name in CALIBRATION if (folder / name).is_dir()]
    used = [each for run in runs for each in read_rounds(run) if each.round > 1]
    model = fit(used)
    table: dict[str, Any] = {"calibration": {**vars(model), "rounds": len(used)}}
    together: list[MeasuredRound] = []
    for out in outs:
        rounds = read_rounds(folder / out)
        together += rounds
        table[out] = summary(rounds, model)
    table["all"] = summary(together, model)
    return table


def summary(rounds: list[MeasuredRound], model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"rounds": [], "count": len(rounds)}
    if not rounds:
        return found
    for name, errors in (("plain", relative_errors(rounds)), ("calibrated", relative_errors(rounds, model))):
        size = np.abs(errors)
        found[name] = {
            "median_abs": float(np.median(size)),
            "p10": float(np.percentile(errors, 10)),
            "p50": float(np.percentile(errors, 50)),
            "p90": float(np.percentile(errors, 90)),
            "max_abs": float(size.max()),
        }
    found["rounds"] = [
        {
            "round": each.round,
            "plan_s": each.predicted_s,
            "calibrated_s": model.round_seconds(client for client, _ in each.clients),
            "measured_s": each.measured_s,
            "rates_mbit_s": [round(client.up_bit_s / 1e6, 3) for client, _ in each.clients],
        }
        for each in rounds
    ]
    return found


def report(found: dict[str, Any], folder: Path, methods: list[str], arguments: argparse.Namespace) -> int:
    found |= analyse(folder, methods)
    print(json.dumps(found, indent=1))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def interrupt(*_: object) -> None:
    """End as Ctrl-C does: with everything cleaned up."""
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transport", choices=("flower", "sockets"), default="flower")
    parser.add_argument("--rounds", type=int, default=6, help="of each method")
    parser.add_argument("--calibration", type=int, default=4, help="rounds of each calibration run")
    parser.add_argument("--steps", type=int, default=8, help="local steps")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--keep", metavar="DIR", help="keep logs and runs here")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--analyse", metavar="DIR", help="only read the runs that --keep kept")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    if arguments.analyse:
        return report({"transport": arguments.transport, "cores": CORES}, Path(arguments.analyse), methods, arguments)
    if reason := why_not():
        print(f"skipped: {reason}")
        return 0
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupt)
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="pvm-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    limit = f"stop.rounds={arguments.calibration} method.cohort_size=5"
    jobs: list[dict[str, Any]] = [
        {"method": "fedit", "out": CALIBRATION[0], "overrides": limit},
        {"method": "fedit", "out": CALIBRATION[1], "overrides": f"{limit} training.local_steps=2"},
    ]
    jobs += [{"method": name, "out": name, "overrides": f"stop.rounds={arguments.rounds}"} for name in methods]
    with Links(len(CORES)) as links, Quotas(links.prefix) as quotas:
        run = Run(folder, links, quotas)
        try:
            experiment, speed = prepare(run, arguments.steps)
            start_trainers(run, experiment)
            (over_flower if arguments.transport == "flower" else over_sockets)(run, experiment, jobs)
        finally:
            run.end()
    found = {"transport": arguments.transport, "cores": CORES, "flops_per_second": speed}
    report(found, folder, methods, arguments)
    if not arguments.keep:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
