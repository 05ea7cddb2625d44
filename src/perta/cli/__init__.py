"""The command line: one subcommand per stage, each imported when it is called."""

from __future__ import annotations

import os
import re
import signal
import sys
from functools import partial
from io import TextIOWrapper
from traceback import format_exc, walk_tb
from types import FrameType

from cyclopts import CycloptsError, MissingArgumentError, UnknownOptionError, UnusedCliTokensError

from perta.cli import _requests, _runs, _session, _stages  # noqa: F401
from perta.cli._app import app
from perta.cli._bench import add_own_benchmark
from perta.errors import PertaError, first_line, shortage
from perta.parallel import lead
from perta.progress import PlainConsole


def main() -> None:
    """Entry point: errors become one message and a status, never a traceback by default."""
    signal.signal(signal.SIGTERM, _stop)
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that has no such letters
        sys.stdout.reconfigure(errors="backslashreplace")
    lead(partial(_run, sys.argv[1:]))


def _run(tokens: list[str]) -> None:
    try:
        add_own_benchmark(tokens)
        app.meta(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except PertaError as error:
        _fail(shortage(error) or str(error), 1, tokens)
    except CycloptsError as error:
        _fail(_usage(error), 2, tokens)
    except KeyboardInterrupt:
        _fail("Interrupted; nothing was left half-written.", 130, tokens)
    except (Exception, SystemExit) as error:  # code of a user's own may end the program
        _fail(_unforeseen(error), 1, tokens)


def _fail(message: str, status: int, tokens: list[str]) -> None:
    if "--traceback" in tokens:
        message = format_exc()
    PlainConsole(stderr=True).print(f"error: {message}", markup=False, style="red", soft_wrap=True)
    sys.exit(status)


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # Cleaning up partial output hangs on exceptions, and a plain SIGTERM raises none.
    raise KeyboardInterrupt


def _usage(error: CycloptsError) -> str:
    """What is wrong with the options that were given."""
    from perta.methods.registry import where_set

    unknown = [error.token.keyword] if isinstance(error, UnknownOptionError) else []
    unknown += (token.partition("=")[0] for token in error.unused_tokens or ())
    if "--show-samples" in unknown:
        return "--show-samples is an option of `perta evaluate` alone: give it there."
    text = " ".join(str(error).split())
    if unknown and (elsewhere := where_set(unknown[0] or "")):
        text = f"There is no option {unknown[0]}.{elsewhere}"
    elif isinstance(error, UnusedCliTokensError):
        text = (
            f"Not understood: {' '.join(error.unused_tokens or ())}. Of several values each has "
            "the option before it, and one with spaces stands in quotes."
        )
    if isinstance(error, MissingArgumentError) and error.keyword is None and error.argument:
        text = f"{error.argument.name} is missing."
        if error.unused_tokens:
            text += f" Not understood: {' '.join(error.unused_tokens)}."
    return f"{text} Run `perta --help`, or a subcommand with --help, for the options."


def _unforeseen(error: Exception | SystemExit) -> str:
    """What the computer ran out of or refused; of a defect, whose code it is in."""
    short = shortage(error)
    if short:
        return short
    # `run_file` leaves its mark in what is global to the code that it runs.
    steps = walk_tb(error.__traceback__)
    own = [(frame, line) for frame, line in steps if "loaded_from" in frame.f_globals]
    if isinstance(error, SystemExit) and not own:
        raise error  # of the terminal, whose reader went away
    if own:
        frame, line = own[-1]
        what = f"{type(error).__name__}: {first_line(error)}"
        return f"{frame.f_code.co_filename}, line {line}: {what}. This is code of your own."
    if told := re.search(r"\(os error (\d+)\)", str(error)):  # as libraries in Rust say it
        error = OSError(int(told[1]), os.strerror(int(told[1])))
    if not isinstance(error, OSError):
        return f"This is a defect in perta.\n{format_exc()}"
    place = f": {error.filename}" if error.filename else ""
    return (
        f"{error.strerror or error}{place}. Check the path, its permissions, disk space and limits."
    )
