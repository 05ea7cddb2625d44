"""Write a benchmark of fictitious people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perta.data.rows import jsonl, write_jsonl
from perta.evidence.people import generate_people, split_people
from perta.stages.settings import PeopleConfig
from perta.store.atomic import atomic_folder, recover
from perta.store.record import check_output, make_manifest, settings_of, write_manifest


def divide_people(
    config: PeopleConfig,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Forget rows, retain rows, rows of others whom no model is tuned on, and the first two.

    There are as many others as are to be forgotten; the last have their own order.
    """
    everybody = config.people + config.forget_people
    everything = generate_people(everybody, config.questions, config.people_seed)
    rows = everything[: config.people * config.questions]
    forget, retain = split_people(rows, forget_people=config.forget_people, seed=config.people_seed)
    return forget, retain, everything[len(rows) :], rows


def write_people(config: PeopleConfig) -> list[Path]:
    """Write a benchmark of fictitious people (`perta people`).

    Returns:
        The files `forget.jsonl`, `retain.jsonl`, `full.jsonl`, and `holdout.jsonl` with as many
        other people as are to be forgotten, whom no model is tuned on.

    Raises:
        OutputExistsError: the folder is there and holds anything else.
    """
    forget, retain, holdout, rows = divide_people(config)
    parts = {"forget": forget, "retain": retain, "full": rows, "holdout": holdout}
    files = [config.output / f"{name}.jsonl" for name in parts]
    texts = dict(zip(files, map(jsonl, parts.values()), strict=True))
    recover(config.output)
    if all(file.exists() and file.read_text("utf-8") == texts[file] for file in files):
        return files
    check_output(config.output, overwrite=config.overwrite)
    with atomic_folder(config.output, overwrite=config.overwrite) as folder:
        for name, part in parts.items():
            write_jsonl(part, folder / f"{name}.jsonl")
        write_manifest(folder, make_manifest("people", settings_of(config), {}))
    return files
