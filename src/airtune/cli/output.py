"""What the command line says besides what was asked for: on stderr, since stdout is for JSON and tables."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Print one line on stderr."""
    print(text, file=sys.stderr)
