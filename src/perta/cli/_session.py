"""What holds for any subcommand: options from a file, methods of one's own, silence."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from cyclopts import Parameter

from perta.cli._app import app
from perta.errors import ConfigError
from perta.options import Repeated, at_home
from perta.store.parse import parse_yaml, read_bytes


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(name="--config")] = None,
    method_file: Annotated[tuple[Path, ...], Repeated] = (),
    quiet: bool | None = None,
    traceback: bool = False,
) -> None:
    """Run a subcommand.

    Args:
        tokens: the subcommand and its options.
        config: YAML file with options of the subcommand, named as on the command line; flags
            given as well take precedence.
        method_file: Python file that defines methods, which --method then takes as it takes ours.
        quiet: print results only, no progress [default: False].
        traceback: show the full traceback of an error.
    """
    del traceback  # looked at in `main`, before anything can fail
    source, session = (None, _Session()) if config is None else _yaml(at_home(config))
    if session.quiet if quiet is None else quiet:
        from perta.progress import set_quiet

        set_quiet(True)
    _quiet_libraries()
    for file in method_file or session.method_files:
        from perta.methods.registry import load_methods

        load_methods(at_home(file))
    app.config = (source,) if source else ()
    try:
        app(
            [_as_called_now(token) for token in tokens],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    finally:
        app.config = ()  # the next call in this process would read the file as well


def _quiet_libraries() -> None:
    """Progress bars and advice of libraries would drown ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class _Session(NamedTuple):
    """What a YAML file says of the session: it is read before the subcommand is."""

    quiet: bool = False
    method_files: tuple[Path, ...] = ()


def _yaml(file: Path) -> tuple[Any, _Session]:
    """A source of options from a YAML file, checked first so that its errors are plain."""
    from cyclopts.config import Yaml

    if not file.exists():
        raise ConfigError(f"--config {file}: there is no such file.")
    content = parse_yaml(read_bytes(file, ConfigError), f"--config {file}", ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file}: expected `option: value` lines.")
    for name in content.keys() & {"config", "traceback"}:
        raise ConfigError(f"--config {file}: --{name} is given on the command line alone.")
    quiet = content.get("quiet", False)
    if not isinstance(quiet, bool):
        raise ConfigError(f"--config {file}: quiet is true or false.")
    named = content.get("method-file", content.get("method_file", []))
    files = tuple(Path(str(name)) for name in (named if isinstance(named, list) else [named]))
    source = Yaml(file, use_commands_as_keys=False, search_parents=False, must_exist=True)
    return source, _Session(quiet, files)


_NOW_CALLED = {
    "--importance-batch-size": "--pass-batch-size",
    "--moment-batch-size": "--pass-batch-size",
    "--evaluation-batch-size": "--pass-batch-size",
    "--unlearn-seed": "--seed",
}


def _as_called_now(token: str) -> str:
    """An option by its present name; the old one still works, and a line says so."""
    flag, equals, value = token.partition("=")
    if flag not in _NOW_CALLED:
        return token
    from perta.progress import say

    say(f"{flag} is called {_NOW_CALLED[flag]} now.")
    return f"{_NOW_CALLED[flag]}{equals}{value}"
