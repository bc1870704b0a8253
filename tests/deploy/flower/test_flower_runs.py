"""Whole runs over a grid without processes: the adapter of the simulation, faults that a run survives, restarts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, Message, RecordDict
from safetensors.torch import load_file

from airtune.deploy.flower.codec import from_array, to_array
from airtune.deploy.flower.device import device_of
from airtune.deploy.flower.facts import read_facts
from airtune.deploy.flower.mail import Mail
from airtune.deploy.flower.probe import BYTES, RESOLUTION
from airtune.deploy.flower.server_app import environment_of, main, serve
from airtune.errors import InputError, NoResultError
from airtune.experiment.build import Workshop, build
from airtune.experiment.config import read_file
from airtune.experiment.run import Session, start
from airtune.methods import method_names
from airtune.types import Pending
from flower_loopback import Delivery, LoopbackGrid, Spoil, fleet_of_nodes, options_for
from tiny_experiment import head_of, lines_of, write_experiment

CLIENTS = 6
Weights = dict[str, torch.Tensor]
PLANS_WITH_MEASURED_TIME = frozenset({"hierfedlora", "legend", "tsfa"})  # from round 2 on, real seconds decide
WHO_IS_FIRST = frozenset({"fedbuff", "first-arrivals"})  # real seconds decide in round 1
NEEDS: Mapping[str, Mapping[str, str]] = {
    "fedbuff": {"method__concurrency": "3", "method__buffer_size": "2"},
    "deadline": {"method__method": "fedit", "method__seconds": "1000"},
    "first-arrivals": {"method__method": "fedit", "method__updates": "2"},
    "staleness": {"method__method": "fedit"},
    "mole": {"model__adapter": "mole", "method__clusters": "index"},
    "fedadapter": {"model__adapter": "bottleneck"},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experiment(tmp_path_factory.mktemp("task"))


def weights_of(out: Path) -> Weights:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def simulate(path: Path, out: Path, method: str | None = None, **overrides: str) -> Weights:
    """Return the adapter of the simulated run."""
    changed = {name.replace("__", "."): value for name, value in overrides.items()}
    start(read_file(path, changed).experiment(method), out, Session(Workshop()))
    return weights_of(out)


def over_flower(path: Path, out: Path, spoil: Spoil = Delivery.answer, **changes: object) -> Path:
    """Run over the loopback grid and return the run's folder."""
    options = options_for(path, out, **changes)
    serve(LoopbackGrid(options, fleet_of_nodes(CLIENTS), spoil), options)
    return out


def words_of(overrides: Mapping[str, str]) -> str:
    return " ".join(f"{name.replace('__', '.')}={value}" for name, value in overrides.items())


def furthest(first: Weights, second: Weights) -> float:
    assert set(first) == set(second)
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("fedit", {}),
        ("fedsa-lora", {}),
        ("flora", {}),
        ("rolora", {"stop__rounds": "3"}),
        ("fedit", {"compressor__type": "error-feedback", "stop__rounds": "3"}),
        ("composed", {"method__planner__type": "separate", "method__aggregator__type": "client-privacy"}),
        ("hierfedlora", {"method__least_frequency": "2", "method__groups": "2", "stop__rounds": "1"}),
    ],
)
def test_the_adapter_is_that_of_the_simulation(
    task: Path, tmp_path: Path, method: str, overrides: dict[str, str]
) -> None:
    simulated = simulate(task, tmp_path / "simulated", method, **overrides)
    real = over_flower(task, tmp_path / "real", method=method, overrides=words_of(overrides))
    assert furthest(simulated, weights_of(real)) <= 1e-6
    ours, theirs = lines_of(real), lines_of(tmp_path / "simulated")
    assert [line["cohort"] for line in ours] == [line["cohort"] for line in theirs]
    assert [line["uplink_bits"] for line in ours] == [line["uplink_bits"] for line in theirs]
    assert [line["accuracy"] for line in ours] == pytest.approx([line["accuracy"] for line in theirs], abs=1e-9)
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-6)
    assert head_of(real)["status"] == "done" and (real / "report.html").is_file()


def test_a_device_may_train_on_rows_of_its_own(task: Path, tmp_path: Path) -> None:
    own = write_experiment(tmp_path / "own", rows=80).parent / "rows.csv"
    options = options_for(task, tmp_path / "out", overrides="stop.rounds=1 method.cohort_size=6", observe="measured")
    nodes = fleet_of_nodes(CLIENTS)
    node = next(node for node, config in nodes.items() if config["partition-id"] == 3)
    nodes[node] = {"partition-id": 3, "data": str(own)}
    serve(LoopbackGrid(options, nodes), options)
    (line,) = lines_of(tmp_path / "out")[1:]
    assert line["arrived"] == [0, 1, 2, 3, 4, 5]
    device = device_of({"experiment": str(task), "overrides": options.overrides}, nodes[node])
    facts = read_facts(device.facts(measure=False))
    assert facts.own_data and facts.examples == len(device.bench.tokens.train) == 60


# -- what is the client's own ------------------------------------------------------------------------------------------


def test_the_clients_own_factors_never_reach_the_server(task: Path, tmp_path: Path) -> None:
    options = options_for(task, tmp_path / "out", method="fedsa-lora")
    grid = LoopbackGrid(options, fleet_of_nodes(CLIENTS))
    serve(grid, options)
    stored = (tmp_path / "out" / "checkpoint" / "progress.safetensors").read_bytes()
    assert b"own/B" not in stored
    assert any(len(state.array_records["airtune-own"]) >= 2 for state in grid.states.values() if state)


# -- faults ------------------------------------------------------------------------------------------------------------


def changed(delivery: Delivery, change: Callable[[torch.Tensor], torch.Tensor]) -> Message:
    """Return the device's answer with other numbers in it."""
    answer = delivery.answer()
    values = torch.from_numpy(from_array(answer.content.array_records["update"]["values"]))
    answer.content["update"] = ArrayRecord({"values": to_array(change(values).numpy())})
    return answer


def raising(delivery: Delivery) -> Message:
    return delivery.error("\x1b[36mTraceback ...\nValueError: out of memory\x1b[0m")


FAULTS: dict[str, tuple[Spoil, str]] = {
    "dead": (lambda d: None, "late"),
    "exception": (raising, "client error: ValueError: out of memory"),
    "not a number": (lambda d: changed(d, lambda v: v * float("nan")), "quarantined: not finite"),
    "huge": (lambda d: changed(d, lambda v: v * 1e9), "quarantined: the norm of the change"),
    "short": (lambda d: changed(d, lambda v: v[:7]), "quarantined"),
    "wrong type": (lambda d: changed(d, lambda v: v.double()), "quarantined"),
    "empty": (lambda d: d.reply(RecordDict()), "the reply has no valid status"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_costs_one_update_and_is_named(task: Path, tmp_path: Path, fault: str) -> None:
    spoil, reason = FAULTS[fault]
    victims: list[int] = []

    def deliver(delivery: Delivery) -> object:
        client = int(delivery.grid.nodes[delivery.node]["partition-id"])
        if delivery.round == 1 and (not victims or victims == [client]):
            victims[:] = [client]
            return spoil(delivery)
        return delivery.answer()

    over_flower(task, tmp_path / "out", deliver, round_seconds=2.0)
    first, second = lines_of(tmp_path / "out")[1:]
    assert [entry["client"] for entry in first["dropped"]] == victims
    assert first["dropped"][0]["reason"].startswith(reason)
    assert sorted([*first["arrived"], *victims]) == sorted(first["cohort"])
    assert second["arrived"] == sorted(second["cohort"])
    assert first["accuracy"] >= 0.0 and head_of(tmp_path / "out")["status"] == "done"


def test_duplicates_and_late_replies_are_named_and_change_nothing(task: Path, tmp_path: Path) -> None:
    held: list[Message] = []

    def deliver(delivery: Delivery) -> object:
        if delivery.kind != "train":
            return delivery.answer()
        if delivery.round == 1 and not held:
            held.append(delivery.answer())  # comes in round 2
            return None
        if delivery.round == 2 and len(held) == 1:
            late = held[0]
            held.append(late)
            return [late, *([delivery.answer()] * 2)]
        return delivery.answer()

    over_flower(task, tmp_path / "out", deliver, round_seconds=2.0)
    first, second = lines_of(tmp_path / "out")[1:]
    (lost,) = first["dropped"]
    assert lost["reason"] == "late"
    reasons = [entry["reason"] for entry in second["notes"]["incidents"]]
    assert sorted(reasons) == ["late reply of round 1", "second reply to one message"]
    assert second["arrived"] == sorted(second["cohort"])


def test_a_plan_is_made_for_those_who_are_there(task: Path, tmp_path: Path) -> None:
    words = "stop.rounds=3 method.cohort_size=6"
    options = options_for(task, tmp_path / "out", overrides=words, round_seconds=1.5)
    nodes = fleet_of_nodes(CLIENTS)
    leaver = next(node for node, config in nodes.items() if config["partition-id"] == 0)

    def deliver(delivery: Delivery) -> object:
        if delivery.round == 1 and delivery.node == leaver:
            del grid.nodes[leaver]
            return None
        if delivery.round == 2:
            grid.nodes[leaver] = {"partition-id": 0}
        return delivery.answer()

    grid = LoopbackGrid(options, nodes, deliver)
    serve(grid, options)
    first, second, third = lines_of(tmp_path / "out")[1:]
    assert first["dropped"] == [{"client": 0, "reason": "late"}]
    assert second["cohort"] == [1, 2, 3, 4, 5] and third["arrived"] == [0, 1, 2, 3, 4, 5]
    assert sum(message.metadata.message_type == "query.facts" for message in grid.sent) == CLIENTS + 1


def test_too_few_nodes_and_strangers_are_named(task: Path, tmp_path: Path) -> None:
    other = write_experiment(tmp_path / "other", rows=200)
    options = options_for(task, tmp_path / "out", wait_seconds=0.5)
    nodes = {**fleet_of_nodes(5), 7: {"partition-id": 5, "experiment": str(other)}, 8: {"partition-id": 0}}
    with pytest.raises(
        NoResultError, match=r"5 of 6 clients .* missing \[5\].*node 7: its data differ.*node 8.*already"
    ):
        serve(LoopbackGrid(options, nodes), options)
    assert not (tmp_path / "out").exists()


# -- restarts ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The server's process is gone."""


@pytest.mark.parametrize("method", ["fedsa-lora", "fedit"])
def test_a_killed_server_goes_on_to_the_same_adapter(task: Path, tmp_path: Path, method: str) -> None:
    words = "stop.rounds=4 method.cohort_size=3"
    words += " compressor.type=error-feedback" if method == "fedit" else ""

    def faulty(delivery: Delivery) -> object:
        """Lose the update of the first client of round 2 on its way, after it has trained."""
        answer = delivery.answer()
        client = delivery.grid.nodes[delivery.node]["partition-id"]
        return None if delivery.round == 2 and client == unlucky else answer

    def killing(delivery: Delivery) -> object:
        if delivery.round == 3 and sum(message.metadata.group_id == "3" for message in delivery.grid.sent) == 3:
            raise Killed
        return faulty(delivery)

    options = options_for(task, tmp_path / "whole", method=method, overrides=words, round_seconds=1.5)
    unlucky = cohorts(task, tmp_path / "plan", method, words)[2][0]
    nodes = fleet_of_nodes(CLIENTS, **{"state-folder": str(tmp_path / "own-whole")})
    serve(LoopbackGrid(options, nodes, faulty), options)

    options = options_for(task, tmp_path / "killed", method=method, overrides=words, round_seconds=1.5, resume=True)
    nodes = fleet_of_nodes(CLIENTS, **{"state-folder": str(tmp_path / "own-killed")})
    with pytest.raises(Killed):
        serve(LoopbackGrid(options, nodes, killing), options)
    assert [line["round"] for line in lines_of(tmp_path / "killed")] == [0, 1, 2]
    serve(LoopbackGrid(options, nodes, faulty), options)  # a new run of Flower: its states are empty
    assert furthest(weights_of(tmp_path / "whole"), weights_of(tmp_path / "killed")) == 0.0
    told = [[(line["arrived"], line["dropped"]) for line in lines_of(tmp_path / out)] for out in ("whole", "killed")]
    assert told[0] == told[1] and told[0][2][1][0]["client"] == unlucky


def cohorts(task: Path, out: Path, method: str, words: str) -> list[list[int]]:
    simulate(task, out, method, **dict(word.split("=") for word in words.split()))
    return [line["cohort"] for line in lines_of(out)]


def test_a_client_that_lost_its_own_state_says_so_and_starts_afresh(task: Path, tmp_path: Path) -> None:
    def forgetful(delivery: Delivery) -> object:
        if delivery.round == 2:
            delivery.grid.states.pop(delivery.node, None)
        return delivery.answer()

    words = "stop.rounds=3 method.cohort_size=6"
    out = over_flower(task, tmp_path / "out", forgetful, method="fedsa-lora", overrides=words, round_seconds=5.0)
    lines = lines_of(out)
    assert {entry["reason"] for entry in lines[2]["dropped"]} == {"has lost its own state"}
    assert len(lines[2]["dropped"]) == len(lines[2]["cohort"]) and lines[3]["arrived"]


def test_what_was_under_way_is_asked_again_after_a_restart(task: Path, tmp_path: Path) -> None:
    words = "stop.rounds=3 method.concurrency=4 method.buffer_size=2"

    def slow(delivery: Delivery) -> object:
        """Hold back one update of round 1 until round 2 is under way."""
        client = delivery.grid.nodes[delivery.node]["partition-id"]
        if delivery.round == 1 and not held:
            held.append((client, delivery.answer()))
            return None
        if delivery.round == 1 and killed and client == held[0][0]:
            return delivery.answer()  # asked again by the new server
        back = [held.pop()[1]] if delivery.round == 2 and held and not killed else []
        return [*back, delivery.answer()]

    held: list[tuple[int, Message]] = []
    killed: list[bool] = []
    whole = over_flower(task, tmp_path / "whole", slow, method="fedbuff", overrides=words)
    held.clear()

    def killing(delivery: Delivery) -> object:
        if delivery.round == 2:
            raise Killed
        return slow(delivery)

    with pytest.raises(Killed):
        over_flower(task, tmp_path / "killed", killing, method="fedbuff", overrides=words)
    killed.append(True)
    again = over_flower(task, tmp_path / "killed", slow, method="fedbuff", overrides=words, resume=True)
    assert held[0][0] in lines_of(whole)[2]["arrived"] == lines_of(again)[2]["arrived"]
    assert furthest(weights_of(whole), weights_of(again)) <= 1e-6


def test_an_occupied_folder_is_refused_unless_asked_to_go_on(task: Path, tmp_path: Path) -> None:
    over_flower(task, tmp_path / "out", overrides="stop.rounds=1")
    with pytest.raises(InputError, match="not empty"):
        over_flower(task, tmp_path / "out")
    before = head_of(tmp_path / "out")
    over_flower(task, tmp_path / "out", overrides="stop.rounds=1", resume=True)
    assert head_of(tmp_path / "out") == before


# -- what devices say of themselves -----------------------------------------------------------------------------------


def test_planners_see_measured_speeds_rates_and_memory(task: Path, tmp_path: Path) -> None:
    options = options_for(task, tmp_path / "out", observe="measured", measure=True)
    nodes = fleet_of_nodes(CLIENTS, gflops=2.0, memory_gb=3.0)
    slow = next(node for node, config in nodes.items() if config["partition-id"] == 4)
    nodes[slow] = {"partition-id": 4, "gflops": 0.5, "memory-gb": 3.0, "uplink-mbit-s": 0.25, "downlink-mbit-s": 2.0}
    grid = LoopbackGrid(options, {node: kebab_keys(config) for node, config in nodes.items()})
    bench = build(read_file(task).experiment(), Workshop())
    environment = environment_of(bench, Mail(grid), options)
    environment.nodes.wait(CLIENTS, 0.01)
    seen = environment.observe(1, 0.0, Pending(), bench.start)
    assert seen.fleet.flops_per_second.tolist() == [2e9] * 4 + [5e8, 2e9]
    assert set(seen.fleet.memory_bytes.tolist()) == {3e9}
    assert seen.links.fixed_uplink_rate is not None and seen.links.fixed_downlink_rate is not None
    assert seen.links.fixed_uplink_rate.tolist() == [8 * BYTES / RESOLUTION] * 4 + [0.25e6, 8 * BYTES / RESOLUTION]
    assert seen.links.fixed_downlink_rate[4] == 2e6
    assert seen.links.uplink_gain[4] == seen.links.uplink_gain.min()
    asked = [message.metadata.message_type for message in grid.sent]
    assert asked.count("query.facts") == CLIENTS and asked.count("query.probe") == 3 * (CLIENTS - 1)
    assert environment.costs_now(bench.start).fleet.flops_per_second[4] == 5e8


def kebab_keys(config: Mapping[str, object]) -> dict[str, object]:
    return {name.replace("_", "-"): value for name, value in config.items()}


@pytest.mark.parametrize("method", ["legend", "soft", "tsfa"])
def test_methods_run_on_measured_fleets(task: Path, tmp_path: Path, method: str) -> None:
    options = options_for(task, tmp_path / "out", observe="measured", method=method)
    serve(LoopbackGrid(options, fleet_of_nodes(CLIENTS, **{"uplink-mbit-s": 1.0, "downlink-mbit-s": 8.0})), options)
    lines = lines_of(tmp_path / "out")
    assert len(lines) == 3 and all(line["arrived"] == sorted(line["cohort"]) for line in lines[1:])
    assert all(client["compute_s"] >= 0.0 and client["bits_up"] > 0 for client in lines[1]["clients"])


@pytest.mark.slow
@pytest.mark.parametrize("method", method_names())
def test_every_method_runs_over_flower(task: Path, tmp_path: Path, method: str) -> None:
    rounds = "1" if method in PLANS_WITH_MEASURED_TIME else "2"
    overrides = {"stop__rounds": rounds, **NEEDS.get(method, {})}
    simulated = simulate(task, tmp_path / "simulated", method, **overrides)
    real = over_flower(task, tmp_path / "real", method=method, overrides=words_of(overrides))
    ours, theirs = lines_of(real), lines_of(tmp_path / "simulated")
    if method in WHO_IS_FIRST:
        assert head_of(real)["status"] == "done" and any(line["arrived"] for line in ours)
        return
    assert all(line["arrived"] == sorted(line["cohort"]) for line in ours[1:])
    assert [line["cohort"] for line in ours] == [line["cohort"] for line in theirs]
    assert furthest(simulated, weights_of(real)) <= 1e-6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_an_interrupted_run_and_says_how_to_go_on(
    task: Path, tmp_path: Path, number: signal.Signals
) -> None:
    def deliver(delivery: Delivery) -> object:
        if delivery.round == 2:
            signal.raise_signal(number)
        return delivery.answer()

    keys = {"experiment": str(task), "out": str(tmp_path / "out"), "observe": "simulated", "measure": False}
    options = options_for(task, tmp_path / "out")
    context: Any = SimpleNamespace(run_config=keys, run_id=1)
    grid: Any = LoopbackGrid(options, fleet_of_nodes(CLIENTS), deliver)
    before = signal.getsignal(number)
    with pytest.raises(NoResultError, match=f"interrupted .{number.name}.*resume=true"):
        main(grid, context)
    assert signal.getsignal(number) is before
    assert head_of(tmp_path / "out")["status"] == "interrupted"
    assert [line["round"] for line in lines_of(tmp_path / "out")] == [0, 1]
