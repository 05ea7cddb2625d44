"""What an output may be put in place of: one rule for every command."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from perta.errors import ConfigError, OutputExistsError
from perta.store.atomic import check_place
from perta.store.record import read_manifest


def check_output(
    output: Path,
    reads: Iterable[str | Path] = (),
    *,
    overwrite: bool,
    within: bool = False,
    ours: Callable[[Path], bool] | None = None,
) -> None:
    """Stop before an output that must not be written, or not replace what is there.

    With `overwrite` an output replaces regular files and folders that this package wrote, which
    their records say, and empty ones. It never replaces anything else, and never what is read.

    Args:
        output: folder or file of the result.
        reads: folders and files that are read; what is not there counts as no path.
        overwrite: whether the output may replace what is there.
        within: whether it may lie in a folder that is read, as files may.
        ours: says of what is there that this package wrote it [default: `made_here`].

    Raises:
        ConfigError: see `check_separate`.
        OutputExistsError: something is there that must stay.
    """
    check_separate(output, reads, within=within)
    check_place(output)
    if overwrite and output.exists() and not (ours or made_here)(output):
        raise OutputExistsError(
            f"{output} exists and was not made by perta, so it is never replaced. Choose another "
            "--output, or move it away yourself."
        )


def made_here(output: Path) -> bool:
    """Whether a file or folder is empty, or has a record of this package in it."""
    if output.is_dir():
        return read_manifest(output) is not None or not any(output.iterdir())
    return output.stat().st_size == 0 or read_manifest(output) is not None


def check_separate(output: Path, reads: Iterable[str | Path], *, within: bool = False) -> None:
    """Make sure that writing the output cannot touch an input.

    Raises:
        ConfigError: it is an input, contains one, or lies in one and may not (`within`).
    """
    place = output.resolve()
    for given in reads:
        other = Path(given).expanduser().resolve()
        inside = place != other and place.is_relative_to(other)
        if (inside and not within) or other.is_relative_to(place):
            raise ConfigError(
                f"The output {output} overlaps the input {given}, which must stay as it is. "
                "Give an output of its own."
            )
