"""The command line: one subcommand per stage, each imported when it is called."""

from __future__ import annotations

import signal
import sys
from functools import partial
from traceback import format_exc
from types import FrameType

from cyclopts import CycloptsError

from perta.cli import _requests, _runs, _session, _stages  # noqa: F401
from perta.cli._app import app
from perta.cli._bench import add_own_benchmark
from perta.cli._errors import unforeseen, usage
from perta.errors import PertaError, shortage
from perta.parallel import lead
from perta.progress import PlainConsole


def main() -> None:
    """Entry point: errors become one message and a status, never a traceback by default."""
    signal.signal(signal.SIGTERM, _stop)
    lead(partial(_run, sys.argv[1:]))


def _run(tokens: list[str]) -> None:
    try:
        add_own_benchmark(tokens)
        app.meta(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except PertaError as error:
        _fail(shortage(error) or str(error), 1, tokens)
    except CycloptsError as error:
        _fail(usage(error), 2, tokens)
    except KeyboardInterrupt:
        _fail("Interrupted; nothing was left half-written.", 130, tokens)
    except Exception as error:
        _fail(unforeseen(error), 1, tokens)


def _fail(message: str, status: int, tokens: list[str]) -> None:
    if "--traceback" in tokens:
        message = format_exc()
    PlainConsole(stderr=True).print(f"error: {message}", markup=False, style="red", soft_wrap=True)
    sys.exit(status)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # Cleaning up partial output hangs on exceptions, and a plain SIGTERM raises none.
    raise KeyboardInterrupt
