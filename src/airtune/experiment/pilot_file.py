"""pilot.json: what pilots gave, and how an experiment takes it up again. Imports no torch.

``constants = "DIR/pilot.json"`` in the table of the method stands for the table ``constants`` of that file. The numbers
are read once, with the experiment, and stored with the run. alpha, beta and the form are the experiment's for every
seed; gradient norms belong to the partition of one seed and are taken for that seed only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from airtune.errors import InputError

PILOT_FILE = "pilot.json"
SCHEMA = 1
PER_CLIENT = ("gradient_norms", "gradient_noise")

Plain = dict[str, Any]


def read_constants(text: str, seed: int, where: str = "method.constants") -> Plain:
    """Return the table ``constants`` of a pilot.json (or of the folder that holds it).

    seed : of the experiment; norms of the clients of another seed are left out.

    Raises
    ------
    InputError : there is no such file, it is none of this version, or its fit is too poor to plan from.
    """
    path = Path(text).expanduser()
    path = path / PILOT_FILE if path.is_dir() else path
    try:
        found: object = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror}); valid: a {PILOT_FILE}") from error
    except ValueError as error:
        raise InputError(f"{where}: {path} is not JSON ({error}); valid: a {PILOT_FILE}") from error
    content = cast("Plain", found) if isinstance(found, dict) else {}
    if content.get("schema") != SCHEMA or not isinstance(content.get("constants"), Mapping):
        raise InputError(f"{where}: {path} is no {PILOT_FILE} of this version; valid: one of `airtune plan --pilot`")
    if content.get("usable") is not True:
        off = content.get("largest_residual")
        shown = f"is {off:.0%} off" if isinstance(off, float) else "is too poor"
        raise InputError(f"{where}: the fit in {path} {shown}; valid: a {PILOT_FILE} with usable = true")
    constants = dict(cast("Plain", content["constants"]))
    if content.get("seed") != seed:
        constants = {name: value for name, value in constants.items() if name not in PER_CLIENT}
    return constants
