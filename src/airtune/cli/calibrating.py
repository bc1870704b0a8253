"""`airtune calibrate`: this machine as a device profile."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rich.console import Console

from airtune.cli.arguments import Arguments
from airtune.cli.files import experiment_file
from airtune.errors import InputError
from airtune.wireless.units import parse_quantity


def calibrate(arguments: Arguments) -> int:
    """Time real local steps, show the speed, and write the profile if a file is named."""
    if arguments.flower is not None:
        return _flower(arguments)
    if arguments.experiment is None:
        raise InputError("airtune calibrate: needs a file; valid: airtune calibrate EXPERIMENT.toml, or --flower DIR")
    out = None if arguments.out is None else Path(arguments.out)
    power = _power(arguments) if out is not None else None
    memory = _memory(arguments)
    repeats = _repeats(arguments.repeats)
    experiment = experiment_file(arguments).experiment()

    from airtune.devices.calibrate import write_profile
    from airtune.experiment.build import Workshop
    from airtune.experiment.calibration import calibrate as measure

    found = measure(experiment, repeats, Workshop())
    if out is not None and power is not None:
        try:
            write_profile(out, arguments.name, found, memory_bytes=memory, power=power)
        except OSError as error:
            raise InputError(f"--out: cannot write {out}: {error.strerror}") from error
    if arguments.json:
        print(
            json.dumps(
                {
                    "flops_per_second": found.flops_per_second,
                    "peak_flops_per_second": found.peak_flops_per_second,
                    "utilisation": found.utilisation,
                    "spread": found.spread,
                    "profile": None if out is None else str(out),
                }
            )
        )
        return 0
    Console().print(
        f"training: {found.flops_per_second / 1e9:.1f} GFLOP/s, {100 * found.utilisation:.0f} % of the "
        f"{found.peak_flops_per_second / 1e9:.1f} GFLOP/s of a matrix product; repeats spread by "
        f"{100 * found.spread:.0f} % of their median"
    )
    if out is not None:
        Console().print(f'done: {out} (use it as `"{out}" = 1` in \\[fleet.devices])')
    return 0


def _flower(arguments: Arguments) -> int:
    """Fit what real devices add to the predicted seconds of a run, show it, and write it if a file is named."""
    if arguments.experiment is not None:
        raise InputError(f"--flower: takes no experiment ({arguments.experiment}); valid: the folder of a run alone")
    from dataclasses import asdict
    from statistics import median

    from airtune.deploy.prediction import fit, read_rounds, relative_errors
    from airtune.files import write_atomically

    rounds = read_rounds(Path(arguments.flower))
    model = fit(rounds)
    before, after = (median(map(abs, relative_errors(rounds, each))) for each in (None, model))
    found = {"rounds": len(rounds), "median_error_before": before, "median_error_after": after, "model": asdict(model)}
    text = json.dumps(found)
    if arguments.out is not None:
        write_atomically(Path(arguments.out), (text + "\n").encode())
    if arguments.json:
        print(text)
        return 0
    Console().print(
        f"{len(rounds)} rounds: {model.fixed_s:.2f} s + {model.overhead_flops / 1e9:.2f} GFLOP a message, "
        f"compute x {model.compute:.2f}, download x {model.download:.2f}, upload x {model.upload:.2f}; median error "
        f"{100 * before:.0f} % before, {100 * after:.0f} % after, on the same rounds"
    )
    return 0


def _power(arguments: Arguments) -> float:
    if arguments.power is None:
        raise InputError('--power: a profile needs the power drawn while training; valid: --power "15 W"')
    return parse_quantity(arguments.power, "W", "--power")


def _memory(arguments: Arguments) -> float:
    if arguments.memory is not None:
        return parse_quantity(arguments.memory, "B", "--memory")
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _repeats(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--repeats: cannot read {text!r}; valid: a whole number, at least 1")
    return int(text)
