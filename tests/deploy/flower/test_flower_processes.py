"""Real Flower processes on loopback: the simulation's adapter, the fault matrix, a killed server, clean ends.

Flower polls every three seconds and starts a process for each message, so all but the first take minutes. One resident
trainer serves all nodes of a test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr")

from safetensors.torch import load_file

from airtune.experiment.build import Workshop
from airtune.experiment.config import read_file
from airtune.experiment.run import Session, start
from flower_processes import Federation, wait_for
from tiny_experiment import head_of, lines_of, write_experiment

PATIENCE = 540.0  # s for any one wait; a loaded machine takes minutes where an idle one takes seconds
FAULTY = Path(__file__).resolve().parents[2] / "flower_faulty_client.py"


def write_task(folder: Path, clients: int) -> Path:
    """Write an experiment in which everybody takes part in every round, and return its file."""
    path = write_experiment(folder)
    devices = "jetson-tx2 = 2, raspberry-pi-5 = 2, jetson-orin-nano = 2"
    text = path.read_text().replace(devices, f"jetson-tx2 = {clients}")
    path.write_text(text.replace("cohort_size = 3", f"cohort_size = {clients}"))
    return path


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def simulate(path: Path, out: Path, method: str, overrides: str) -> dict[str, torch.Tensor]:
    words = dict(word.split("=") for word in overrides.split())
    start(read_file(path, words).experiment(method), out, Session(Workshop()))
    return weights_of(out)


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert set(first) == set(second)
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def rounds_done(out: Path) -> int:
    return len(lines_of(out)) - 1 if (out / "rounds.jsonl").is_file() else -1


def config(path: Path, out: Path, overrides: str, **changes: object) -> dict[str, object]:
    quick = {"observe": "simulated", "measure": False, "wait_seconds": PATIENCE, "round_seconds": PATIENCE}
    return {"experiment": str(path), "out": str(out), "overrides": overrides, **quick, **changes}


def test_real_processes_give_the_simulations_adapter(tmp_path: Path) -> None:
    path = write_task(tmp_path / "task", 2)
    overrides = "stop.rounds=1"
    simulated = simulate(path, tmp_path / "simulated", "fedit", overrides)
    with Federation(tmp_path / "federation") as federation:
        federation.resident(path)
        federation.superlink()
        for client in (1, 0):
            federation.supernode(client)
        run = federation.run(**config(path, tmp_path / "real", overrides))
        run.wait(timeout=PATIENCE)
        assert furthest(simulated, weights_of(tmp_path / "real")) <= 1e-6, federation.log("run")
        listed = json.loads(federation.output("flwr", "list", "test", "--format", "json"))
        federation.end(*federation.running)
        wait_for(lambda: not federation.left_behind(), 60, "the end of every process")
    bits = sum(line["uplink_bits"] + line["downlink_bits"] for line in lines_of(tmp_path / "real"))
    assert listed["runs"][0]["network-traffic"]["total-bytes"] >= bits / 8  # and Flower's polls and its app's files
    assert head_of(tmp_path / "real")["status"] == "done"


@pytest.mark.slow
def test_flowers_own_simulation_gives_the_simulations_adapter(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    path = write_task(tmp_path / "task", 2)
    simulated = simulate(path, tmp_path / "simulated", "fedsa-lora", "stop.rounds=2")
    with Federation(tmp_path / "federation") as federation:
        settings = config(path, tmp_path / "real", "stop.rounds=2", method="fedsa-lora")
        federation.superlink("--simulation")
        federation.simulate(2, **settings).wait(timeout=PATIENCE)
        assert head_of(tmp_path / "real")["status"] == "done", federation.log("run")
    assert furthest(simulated, weights_of(tmp_path / "real")) <= 1e-6
    assert not federation.left_behind()


@pytest.mark.slow
def test_the_fault_matrix(tmp_path: Path) -> None:
    path = write_task(tmp_path / "task", 7)
    faults = {1: "raise", 2: "nan", 3: "huge", 4: "exit", 5: "sleep", 6: "short"}
    overrides = "stop.rounds=2"
    with Federation(tmp_path / "federation") as federation:
        shutil.copy(FAULTY, federation.folder / "app" / "airtune_app" / "client_app.py")
        federation.resident(path)
        federation.superlink()
        for client in range(7):
            federation.supernode(client, **({"fault": faults[client]} if client in faults else {}))
        run = federation.run(**config(path, tmp_path / "out", overrides, round_seconds=240.0))
        run.wait(timeout=2 * PATIENCE)
    first, second = lines_of(tmp_path / "out")[1:]
    reasons = {entry["client"]: entry["reason"] for entry in first["dropped"]}
    print(json.dumps({"reasons": reasons, "seconds": [first["duration_s"], second["duration_s"]]}))
    assert first["arrived"] == [0] and set(reasons) == set(faults)
    assert "out of memory" in reasons[1] and "not finite" in reasons[2] and "norm" in reasons[3]
    assert reasons[4].startswith("client error") and reasons[5] == "late"
    assert reasons[6].startswith("quarantined")
    assert {0, 1, 2, 3, 4, 6} <= set(second["arrived"])


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["superlink", "serverapp"])
def test_a_server_killed_with_sigkill_goes_on_to_the_same_adapter(tmp_path: Path, victim: str) -> None:
    path = write_task(tmp_path / "task", 2)
    overrides = "stop.rounds=3 compressor.type=error-feedback"
    simulated = simulate(path, tmp_path / "simulated", "fedit", overrides)
    with Federation(tmp_path / "federation") as federation:
        federation.resident(path)
        federation.superlink()
        for client in (0, 1):
            federation.supernode(client, state_folder=str(tmp_path / f"own-{client}"))
        settings = config(path, tmp_path / "out", overrides, resume=True)
        federation.run(**settings)
        wait_for(lambda: rounds_done(tmp_path / "out") >= 1, PATIENCE, "round 1")
        began = time.monotonic()
        if victim == "superlink":
            federation.end("superlink", number=signal.SIGKILL)
            federation.end("run")
            federation.superlink()
        else:
            os.kill(federation.find("flwr-serverapp"), signal.SIGKILL)
            federation.end("run")
        finished = rounds_done(tmp_path / "out")
        assert finished < 3
        federation.run(**settings).wait(timeout=PATIENCE)
        print(json.dumps({"victim": victim, "rounds kept": finished, "seconds": time.monotonic() - began}))
        assert head_of(tmp_path / "out")["status"] == "done", federation.log("run")
    assert [line["round"] for line in lines_of(tmp_path / "out")] == [0, 1, 2, 3]
    assert furthest(simulated, weights_of(tmp_path / "out")) <= 1e-6


@pytest.mark.slow
def test_a_killed_node_is_left_out_until_it_returns(tmp_path: Path) -> None:
    path = write_task(tmp_path / "task", 2)
    out = tmp_path / "out"
    with Federation(tmp_path / "federation") as federation:
        federation.resident(path)
        federation.superlink()
        for client in (0, 1):
            federation.supernode(client)
        federation.run(**config(path, out, "stop.rounds=200", round_seconds=60.0))
        wait_for(lambda: rounds_done(out) >= 1, PATIENCE, "round 1")
        federation.end("node-1", number=signal.SIGKILL)
        wait_for(lambda: lines_of(out)[-1]["cohort"] == [0], PATIENCE, "a plan without the killed node")
        federation.supernode(1)
        wait_for(lambda: lines_of(out)[-1]["arrived"] == [0, 1], PATIENCE, "an update of the returned node")
        os.kill(federation.find("flwr-serverapp"), signal.SIGTERM)
        wait_for(lambda: head_of(out)["status"] == "interrupted", 60, "the interruption")
    lines = lines_of(out)
    lost = [line for line in lines if line["dropped"]]
    print(json.dumps([(line["round"], line["dropped"], line["duration_s"]) for line in lost]))
    assert all(entry["client"] == 1 for line in lost for entry in line["dropped"])
    assert all(line["arrived"] for line in lines[1:])


@pytest.mark.slow
def test_ctrl_c_leaves_an_interrupted_run_and_no_process(tmp_path: Path) -> None:
    path = write_task(tmp_path / "task", 2)
    with Federation(tmp_path / "federation") as federation:
        federation.resident(path)
        federation.superlink()
        for client in (0, 1):
            federation.supernode(client)
        run = federation.run(**config(path, tmp_path / "out", "stop.rounds=200"))
        wait_for(lambda: rounds_done(tmp_path / "out") >= 1, PATIENCE, "round 1")
        os.kill(federation.find("flwr-serverapp"), signal.SIGINT)
        wait_for(lambda: head_of(tmp_path / "out")["status"] == "interrupted", 60, "the interruption")
        run.wait(timeout=120)
        federation.end(*federation.running)
        wait_for(lambda: not federation.left_behind(), 60, "the end of every process")
