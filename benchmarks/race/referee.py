"""Runs the sides in turn, round by round, measures the final adapters, and writes what was found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from race.gate import write
from race.sides import Processes, Side
from race.work import SIZES, Size, prepare

TOLERANCE = 0.02  # of the final loss, relative: all sides did the same work


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options that both races have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    made.add_argument("--work", choices=SIZES, default="minilm", help="minilm: the demo; tiny: overhead alone")
    made.add_argument("--clients", type=int, help="all take part in every round")
    made.add_argument("--rounds", type=int, help="measured rounds; one more before them warms up")
    made.add_argument("--steps", type=int, help="local steps of a client in a round")
    made.add_argument("--engine", default="twin", help="airtune's [training] engine")
    made.add_argument("--precisions", default=_precisions(), help="airtune's, each a side of its own")
    made.add_argument("--threads", type=int, default=cores, help="of airtune's process (default: all cores)")
    made.add_argument("--workers", type=int, default=0, help="airtune on a local Ray cluster of so many workers")
    made.add_argument("--cores", type=int, default=cores, help="actors or processes of the peer")
    made.add_argument("--without", default="", help="sides to leave out, by name, separated by commas")
    made.add_argument("--environments", type=Path, default=_cache() / "peers", help="where the peers are installed")
    made.add_argument("--json", type=Path, help="write the result here")
    made.add_argument("--limit", type=float, default=3600.0, help="seconds after which the race is given up")
    return made


def size_of(given: argparse.Namespace) -> Size:
    """Return the size of the work with the options in it."""
    changes = {name: getattr(given, name) for name in ("clients", "rounds", "steps") if getattr(given, name)}
    return replace(SIZES[given.work], **changes)


def engines(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the fields of [training] for each of airtune's sides, by the side's name."""
    found = {}
    for precision in given.precisions.split(","):
        engine = {"engine": given.engine, "precision": precision, "threads": given.threads}
        if given.workers:
            engine |= {"workers": given.workers, "threads": 1}
        found[f"airtune {precision}"] = engine
    return found


def race(given: argparse.Namespace, make_sides: Callable[[Path, Path], Sequence[Side]]) -> dict[str, Any]:
    """Run a race and return its result; `make_sides` gets the folder of the work and one for the sides."""
    size = size_of(given)
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        top = Path(name)
        settings = prepare(size, top / "work")
        left_out = given.without.split(",")
        sides = [side for side in make_sides(top / "work", top) if side.name not in left_out]
        with Processes() as processes:
            rounds = _rounds(sides, processes, settings, given.limit)
        start = _values(top / "work" / "start" / "adapter_model.safetensors")
        scores = {side.name: _judge(top / "work", side.folder / "final") for side in sides}
    result = _result(given, size, settings, sides, rounds, scores, start)
    _show(result)
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    return result


def _rounds(
    sides: Sequence[Side], processes: Processes, settings: dict[str, Any], limit: float
) -> dict[str, list[tuple[float, float]]]:
    """Let the sides run round after round in turn.

    Returns the seconds and the processor seconds of each round by side, the warm-up first.
    """
    deadline = time.monotonic() + limit
    seconds: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for side in sides:  # one after the other: a start disturbs no other start
        processes.start(side)
        _await(side, "ready-0", processes, deadline)
    for number in range(settings["all_rounds"]):
        turn = number % len(sides)
        for side in [*sides[turn:], *sides[:turn]]:
            before = processes.cpu_seconds(side)
            write(side.folder / f"go-{number}", {})
            found = _await(side, f"ready-{number + 1}", processes, deadline)
            used = processes.cpu_seconds(side) - before
            seconds[side.name].append((found["seconds"], used))
            line = f"round {number}: {side.name:24} {found['seconds']:8.2f} s {used:8.2f} processor s"
            print(line, file=sys.stderr, flush=True)
    for side in sides:
        _await(side, "final", processes, deadline)
    return seconds


def _await(side: Side, name: str, processes: Processes, deadline: float) -> Any:
    path = side.folder / name
    checked = time.monotonic()
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{side.name}: no {name} within the limit\n{processes.logs(side)}")
        if time.monotonic() - checked > 1.0:
            processes.check()
            checked = time.monotonic()
        time.sleep(0.01)
    return json.loads(path.read_text()) if name != "final" else None


def _judge(work: Path, final: Path) -> dict[str, Any]:
    """Return a final adapter's loss and accuracy on the test rows, and its values."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from race.peft_client import Rows, Work, set_state

    judge = Work(work)
    model, rows = judge.build(), Rows(work, "test")
    set_state(model, load_file(final))
    total = correct = 0.0
    count = len(rows.labels)
    with torch.inference_mode():
        for begin in range(0, count, 50):
            batch = rows.batch(np.arange(begin, min(begin + 50, count)))
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            total += float(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            correct += float((logits.argmax(-1) == batch["labels"]).sum())
    return {"loss": total / count, "accuracy": correct / count, "values": _values(final)}


def _values(file: Path) -> Any:
    """Return all values of an adapter in one vector."""
    import torch
    from safetensors.torch import load_file

    state = load_file(file)
    return torch.cat([state[key].flatten().double() for key in sorted(state)])


def _result(
    given: argparse.Namespace,
    size: Size,
    settings: dict[str, Any],
    sides: Sequence[Side],
    rounds: dict[str, list[tuple[float, float]]],
    scores: dict[str, dict[str, Any]],
    start: Any,
) -> dict[str, Any]:
    reference = scores.get("airtune fp32", scores[sides[0].name])["values"]
    way = (reference - start).norm()
    rows, steps = [], settings["steps_a_round"]
    for side in sides:
        measured, score = [pair[0] for pair in rounds[side.name][1:]], scores[side.name]
        used = [pair[1] for pair in rounds[side.name][1:]]
        distance = float((score["values"] - reference).norm() / way)
        rows.append(
            {
                "side": side.name,
                "steps_per_s": statistics.median(steps / seconds for seconds in measured),
                "slowest": min(steps / seconds for seconds in measured),
                "fastest": max(steps / seconds for seconds in measured),
                "steps_per_cpu_s": statistics.median(steps / max(seconds, 0.01) for seconds in used),
                "warm_up_s": rounds[side.name][0][0],
                "round_s": measured,
                "round_cpu_s": used,
                "loss": score["loss"],
                "accuracy": score["accuracy"],
                "adapter_distance": distance,
                "versions": dict(side.versions),
            }
        )
    ours = [row for row in rows if row["side"].startswith("airtune")]
    theirs = [row for row in rows if not row["side"].startswith("airtune")]
    ratios = [
        {
            "ours": one["side"],
            "peer": other["side"],
            "ratio": _paired(one, other, "round_s"),
            "cpu_ratio": _paired(one, other, "round_cpu_s"),
            "loss_difference": abs(one["loss"] - other["loss"]) / other["loss"],
            "same_work": abs(one["loss"] - other["loss"]) <= TOLERANCE * other["loss"],
        }
        for one in ours
        for other in theirs
    ]
    host = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine(), "python": platform.python_version()}
    options = {key: str(value) for key, value in vars(given).items() if key not in ("json", "environments")}
    return {
        "work": {**asdict(size), "tokens_a_step": settings["mean_tokens_a_step"]},
        "options": options,
        "host": {**host, "load_at_end": os.getloadavg()},
        "sides": rows,
        "ratios": ratios,
    }


def _paired(one: dict[str, Any], other: dict[str, Any], name: str) -> float:
    """Return the median over the rounds of how many times more the other one needed."""
    return statistics.median(b / max(a, 0.01) for a, b in zip(one[name], other[name], strict=True))


def _show(result: dict[str, Any]) -> None:
    work = result["work"]
    print(
        f"{work['name']}: {work['clients']} clients x {work['steps']} steps of {work['batch_size']} examples "
        f"({work['tokens_a_step']:.0f} tokens with padding), median of {work['rounds']} rounds after one warm-up"
    )
    titles = ("steps/s", "slowest", "fastest", "steps/cpu s")
    print(f"{'side':26}{''.join(f'{title:>12}' for title in titles)}{'first round':>13}{'loss':>9}{'distance':>10}")
    for row in result["sides"]:
        print(
            f"{row['side']:26}{row['steps_per_s']:12.2f}{row['slowest']:12.2f}{row['fastest']:12.2f}"
            f"{row['steps_per_cpu_s']:12.2f}"
            f"{row['warm_up_s']:11.1f} s{row['loss']:9.4f}{row['adapter_distance']:10.1e}"
        )
    for ratio in result["ratios"]:
        same = "" if ratio["same_work"] else "   NOT THE SAME WORK: the losses differ by more than 2 %"
        figures = f"{ratio['ratio']:.2f}x, by processor time {ratio['cpu_ratio']:.2f}x"
        print(f"{ratio['ours']} / {ratio['peer']}: {figures}{same}")


def _precisions() -> str:
    """Return the precisions that this machine computes in."""
    import torch

    from airtune.training.hardware import checked_precision

    try:
        return f"{checked_precision('bf16', torch.device('cpu'))},fp32"
    except ValueError:
        return "fp32"


def _cache() -> Path:
    from airtune.training.catalogue import cache_root

    return cache_root()
