"""The errors that a user can cause or must be told about; anything else that is raised is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: one line that names the field and the valid values. The command line exits with code 2."""


class MissingPackageError(InputError):
    """A package that is needed is not installed; the line names the extra that brings it."""


class NoResultError(RuntimeError):
    """The work was done as asked but has no result (infeasible, diverged, disk full). Exit code 3."""


def unknown_name(field: str, name: str, valid: Iterable[str]) -> InputError:
    """Return the error for a name that is not known: it lists the valid names and the nearest one."""
    names = sorted(valid)
    lower = {known.lower(): known for known in names}
    nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    hint = f" (did you mean {lower[nearest[0]]!r}?)" if nearest else ""
    return InputError(f"{field}: unknown name {name!r}{hint}; valid: {', '.join(names)}")
