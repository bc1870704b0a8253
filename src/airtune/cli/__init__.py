"""The command line: `airtune run`, `compare`, `plan` and so on. `main` is all that anything else needs."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

from airtune.errors import InputError, NoResultError

DONE, BUG, BAD_INPUT, NO_RESULT, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a bug, 2 bad input, 3 no result, 130 interrupted."""
    from airtune.cli.arguments import parse

    # Read by OpenMP when torch is loaded: threads that wait sleep. Spinning ones stall each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(ValueError):  # not in the main thread: whoever started us handles signals
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        command = parse(arguments)
        return command.run()
    except SystemExit as leaving:  # --help and --version
        return int(leaving.code or 0)
    except InputError as error:
        return _say(error, BAD_INPUT)
    except NoResultError as error:
        return _say(error, NO_RESULT)
    except KeyboardInterrupt as stopped:
        print("airtune: interrupted" + "".join(f"; {hint}" for hint in stopped.args), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        return DONE  # the reader of our output (head, less) has seen enough
    except Exception:
        traceback.print_exc()
        return BUG


def _say(error: Exception, code: int) -> int:
    print(f"airtune: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
