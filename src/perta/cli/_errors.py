"""What is said of an error, in one message."""

from __future__ import annotations

from traceback import format_exc, walk_tb

from cyclopts import CycloptsError, MissingArgumentError, UnknownOptionError

from perta.errors import first_line, shortage


def usage(error: CycloptsError) -> str:
    """What is wrong with the options that were given."""
    unknown = [error.token.keyword] if isinstance(error, UnknownOptionError) else []
    unknown += (token.partition("=")[0] for token in error.unused_tokens or ())
    if "--show-samples" in unknown:
        return "--show-samples is an option of `perta evaluate` alone: give it there."
    text = " ".join(str(error).split())
    if isinstance(error, MissingArgumentError) and error.keyword is None and error.argument:
        text = f"{error.argument.name} is missing."
        if error.unused_tokens:
            text += f" Not understood: {' '.join(error.unused_tokens)}."
    return f"{text} Run `perta --help`, or a subcommand with --help, for the options."


def unforeseen(error: Exception) -> str:
    """What the computer ran out of or refused; of a defect, whose code it is in."""
    short = shortage(error)
    if short:
        return short
    # `run_file` leaves its mark in what is global to the code that it runs.
    steps = walk_tb(error.__traceback__)
    own = [(frame, line) for frame, line in steps if "loaded_from" in frame.f_globals]
    if own:
        frame, line = own[-1]
        what = f"{type(error).__name__}: {first_line(error)}"
        return f"{frame.f_code.co_filename}, line {line}: {what}. This is code of your own."
    if not isinstance(error, OSError):
        return f"This is a defect in perta.\n{format_exc()}"
    place = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{place}. Check the path, its permissions and disk space."
