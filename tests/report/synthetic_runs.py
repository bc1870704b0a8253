"""Synthetic run folders that follow the files' contract: made-up numbers, for tests of the report alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from airtune.streams import stream

DEVICES = [
    ("jetson-tx2", 0.4e12, 8 << 30),
    ("jetson-xavier-nx", 1.2e12, 8 << 30),
    ("jetson-agx-xavier", 2.4e12, 32 << 30),
    ("raspberry-pi-5", 0.05e12, 8 << 30),
    ("phone-mid", 0.3e12, 6 << 30),
]
METHODS = {  # components per client (by device rank), bits a component, learning speed, equal bandwidth
    "legend": (lambda fast: int(12 + 84 * fast), 0.055, False),
    "fedit": (lambda fast: 96, 0.042, True),
    "hetlora": (lambda fast: int(24 + 72 * fast), 0.034, True),
}


def fleet(seed: int, clients: int = 24) -> list[dict[str, object]]:
    rng = stream(seed, "test-fleet")
    found: list[dict[str, object]] = []
    for client in range(clients):
        device, speed, memory = DEVICES[client % len(DEVICES)]
        radius, angle = 250 * np.sqrt(rng.uniform(0.01, 1)), rng.uniform(0, 2 * np.pi)
        loss_db = 32.4 + 20 * np.log10(3.5) + 31.9 * np.log10(radius) + rng.normal(0, 6)
        found.append(
            {
                "client": client,
                "device": device,
                "flops_per_second": speed * float(rng.uniform(0.8, 1.1)),
                "memory_bytes": memory,
                "x_m": float(radius * np.cos(angle)),
                "y_m": float(radius * np.sin(angle)),
                "gain": float(10 ** (-loss_db / 10)),
                "examples": int(rng.integers(20, 400)),
            }
        )
    return found


def write_run(
    folder: Path,
    method: str = "legend",
    seed: int = 0,
    *,
    rounds: int = 24,
    cohort: int = 10,
    clients: int = 24,
    status: str = "done",
    every: int = 2,
    metric: str = "accuracy",
    diagnostics: bool = False,
    with_fleet: bool = True,
) -> Path:
    """Write run.json, rounds.jsonl and timings.jsonl; return the folder."""
    folder.mkdir(parents=True)
    devices = fleet(seed, clients)
    lines = _rounds(method, seed, devices, rounds, cohort, every, metric, diagnostics)
    last = [line for line in lines if metric in line][-1]
    head = {
        "schema": 1,
        "airtune": "0.1.0",
        "config": {
            "method": method,
            "seed": seed,
            "model": {"name": "minilm", "task": "classification", "max_length": 32},
            "data": {"name": "polarity", "partitioner": "dirichlet", "alpha": 0.5, "clients": clients},
            "wireless": {"uplink_bandwidth": 5e6, "noise_figure_db": 7.0, "path_loss": "umi"},
            "training": {"learning_rate": 3e-4, "batch_size": 16, "local_steps": 10},
            "stop": {"rounds": rounds},
        },
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "seed": seed,
        "status": status,
        "method": method,
        "metric": metric,
        "direction": "max" if metric == "accuracy" else "min",
        "final": {
            metric: last[metric],
            "rounds": rounds,
            "time_s": lines[-1]["time_s"],
            "uplink_bits": sum(line["uplink_bits"] for line in lines),
            "downlink_bits": sum(line["downlink_bits"] for line in lines),
            "energy_j": sum(line["energy_j"] for line in lines),
        },
        "export": {"kind": "adapter", "folder": "adapter"},
    }
    if with_fleet:
        head["fleet"] = devices
    (folder / "run.json").write_text(json.dumps(head))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timings = [{"round": n, "train_s": 1.5, "evaluate_s": 0.5} for n in range(1, rounds + 1)]
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    return folder


def write_compare(folder: Path, methods: tuple[str, ...] = ("legend", "fedit", "hetlora"), seeds: int = 3) -> Path:
    """Write a compare folder without compare.json: runs/METHOD-seedN."""
    for method in methods:
        for seed in range(seeds):
            write_run(folder / "runs" / f"{method}-seed{seed}", method, seed)
    return folder


def _rounds(
    method: str,
    seed: int,
    devices: list[dict],
    rounds: int,
    cohort: int,
    every: int,
    metric: str,
    diagnostics: bool,
) -> list[dict]:
    fastest = max(d["flops_per_second"] for d in devices)
    size, speed, equal = METHODS[method]
    rng = stream(seed, f"test-rounds-{method}")
    start = float(stream(seed, "test-start").uniform(0.44, 0.52))
    time, progress, lines = 0.0, 0.0, []
    for number in range(rounds + 1):
        line: dict = {"round": number, "time_s": time, "duration_s": 0.0, "cohort": [], "arrived": [], "dropped": []}
        line |= {"uplink_bits": 0, "downlink_bits": 0, "energy_j": 0.0, "train_loss": None, "clients": []}
        if number:
            who = sorted(int(c) for c in rng.choice(len(devices), cohort, replace=False))
            rows = [_client(devices[c], size(devices[c]["flops_per_second"] / fastest), rng) for c in who]
            _share_band(rows, equal)
            ends = [r["download_s"] + r["compute_s"] + r["upload_s"] for r in rows]
            deadline = 2.2 * float(np.median(ends))
            duration = min(max(ends), deadline)
            for row, end in zip(rows, ends, strict=True):
                row["wait_s"] = max(0.0, duration - end)
                row.pop("rate")
            late = [row["client"] for row, end in zip(rows, ends, strict=True) if end > deadline]
            time += duration
            progress += speed * (1 - len(late) / cohort) * float(rng.uniform(0.7, 1.3))
            line |= {
                "time_s": time,
                "duration_s": duration,
                "cohort": who,
                "arrived": [c for c in who if c not in late],
                "dropped": [{"client": c, "reason": "missed the deadline"} for c in late],
                "uplink_bits": sum(r["bits_up"] for r in rows),
                "downlink_bits": sum(r["bits_down"] for r in rows),
                "energy_j": sum(r["energy_j"] for r in rows),
                "train_loss": 0.69 * float(np.exp(-1.6 * progress)) + 0.05 * float(rng.uniform()),
                "clients": rows,
                "notes": {"predicted_s": duration * float(rng.uniform(0.9, 1.02))},
            }
            if diagnostics:
                line["diagnostics"] = {
                    "covariance_norm": 0.02 + 0.1 * progress * float(rng.uniform(0.8, 1.2)),
                    "covariance_relative": 0.3 * float(np.exp(-progress)) * float(rng.uniform(0.8, 1.2)),
                }
        if number % every == 0 or number == rounds:
            gain = 0.36 * (1 - float(np.exp(-3 * progress))) + 0.01 * float(rng.normal()) * (number > 0)
            line["accuracy"] = min(start + gain, 0.99)
            line["loss"] = 0.70 - 0.9 * gain
            if metric == "loss":
                line.pop("accuracy")
        lines.append(line)
    return lines


def _client(device: dict, components: int, rng: np.random.Generator) -> dict:
    gain = device["gain"] * float(rng.exponential())
    snr = 0.2 * gain / (5e5 * 4e-21 * 5)
    depth = max(1, round(components / 16))
    bits = components * 768 * 32 + 20_000
    compute = 1.2e12 * (0.4 + 0.1 * depth) / device["flops_per_second"]
    return {
        "client": device["client"],
        "components": components,
        "depth": depth,
        "bandwidth_hz": 5e5,
        "bits_up": bits,
        "bits_down": bits,
        "download_s": bits / 6e6,
        "compute_s": compute,
        "upload_s": 0.0,
        "wait_s": 0.0,
        "energy_j": 6.0 * compute + 0.4,
        "rate": float(np.log2(1 + snr)) + 0.05,
    }


def _share_band(rows: list[dict], equal: bool) -> None:
    weights = np.array([1.0 if equal else r["bits_up"] / r["rate"] for r in rows])
    for row, share in zip(rows, weights / weights.sum(), strict=True):
        row["bandwidth_hz"] = 5e6 * float(share)
        row["upload_s"] = row["bits_up"] / (row["bandwidth_hz"] * row["rate"])
