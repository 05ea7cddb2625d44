"""The sets of one seed, and the models tuned on them.

Half of the retain rows, every second one, are `protected`: the methods may look at them. The
others are `unseen` by every method, and retention is reported on them.

    forget ─────────────┐
    retain ─ protected  ├─ full model      tuned on forget + retain
           └ unseen     └─ retrained model tuned on retain
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perta.data.examples import check_apart, load_examples
from perta.data.rows import jsonl
from perta.errors import ConfigError, DataError, first_line
from perta.evidence.published.tofu import PEOPLE
from perta.options import DataConfig
from perta.recipes._plan import Asked
from perta.recipes._workspace import Workspace
from perta.recipes.compare.settings import CompareConfig
from perta.stages.bench import divide_people
from perta.stages.settings import PeopleConfig
from perta.stages.stage import exists_error
from perta.store.atomic import write_text
from perta.store.parse import parse_json

Rows = Sequence[Mapping[str, Any]]

PROMPT, ANSWER = "question", "answer"
_FACTS = "world_facts_perturbed.jsonl"
_ELSEWHERE = ("real_authors_perturbed.jsonl", _FACTS)
_SLICED = "forget10"


@dataclass(frozen=True)
class Sets:
    """Rows of one seed."""

    forget: Rows = field(repr=False)
    retain: Rows = field(repr=False)
    # file -> rows of the TOFU evaluation, of the retain rows the unseen ones; or empty
    suite: Mapping[str, Rows] = field(repr=False)
    split: str  # what that evaluation calls them


@dataclass(frozen=True)
class Draw:
    """Everything of one seed that all methods share."""

    seed: int
    folder: Path
    # `forget`, `retain`, `full`, `protected`, `unseen`, and `facts` for TOFU
    files: Mapping[str, Path]
    suite: Path  # folder with the files of the TOFU evaluation, cut to this draw
    split: str
    base: Path
    full: Path
    retrained: Path  # θ₀ tuned on the retain set
    forget_checkpoint: Path  # θ_f
    asked: Asked | None = None  # where nothing is to be made: what would be

    def share_of_protected(self, share: float) -> Path:
        """The first protected rows, as a proxy of all of them."""
        if share == 1:
            return self.files["protected"]
        lines = self.files["protected"].read_text("utf-8").splitlines()
        kept = lines[: max(1, round(share * len(lines)))]
        file = self.files["protected"].with_name(f"protected_{share:g}.jsonl")
        write_text(file, "".join(f"{line}\n" for line in kept))
        return file


def make_draw(
    config: CompareConfig,
    base: Path,
    seed: int,
    *,
    asked: Asked | None = None,
    scratch: Path | None = None,
) -> Draw:
    """Write the sets of a seed (to `scratch` if only asked) and tune on them what is not there."""
    folder = config.output / f"seed-{seed}"
    home = (scratch or config.output) / folder.name
    sets = draw_sets(config, seed)
    if min(len(sets.forget), len(sets.retain)) < 2:
        raise ConfigError(
            f"Seed {seed} has {len(sets.forget)} rows to forget and {len(sets.retain)} to keep. A "
            "comparison needs at least 2 of each: some are shown to the methods, or shown again, "
            "and others are measured. Give more rows, or ask for more --questions or --people."
        )
    parts = {
        "forget": sets.forget,
        "retain": sets.retain,
        "full": [*sets.retain, *sets.forget],
        "protected": sets.retain[0::2],
        "unseen": _unseen(sets.retain),
    }
    texts = {f"data/{name}.jsonl": jsonl(rows) for name, rows in parts.items()}
    texts |= {f"suite/{name}": jsonl(rows) for name, rows in sets.suite.items()}
    for name, text in texts.items():
        there = folder / name
        if there.is_file() and not config.overwrite and there.read_text("utf-8") != text:
            raise exists_error(there, "holds other rows: this folder is of another comparison")
    for name, text in texts.items():
        write_text(home / name, text)
    files = {name: home / "data" / f"{name}.jsonl" for name in parts}
    if _FACTS in sets.suite:
        files["facts"] = home / "suite" / _FACTS

    work = Workspace(
        folder=folder,
        base=base,
        measured=base,
        sets={name: str(file) for name, file in files.items()},
        tune=replace(config.tune, seed=seed, loss_on="answer"),
        save_dtype=config.save_dtype,
        data_config=config.data_config,
        compute=config.compute,
        overwrite=config.overwrite,
        asked=asked,
    )
    on_forget = replace(work.tune, loss_on=config.tune.loss_on or "answer")
    models = {
        "full": work.tuned("full", "full", work.tune, "full"),
        "retrained": work.tuned("retrained", "retain", work.tune, "retrained"),
        "forget_checkpoint": work.tuned("forget_checkpoint", "forget", on_forget, "finetune"),
    }
    return Draw(seed, folder, files, home / "suite", sets.split, base, **models, asked=asked)


def draw_sets(config: CompareConfig, seed: int) -> Sets:
    """The user's rows; or `tofu_split`; or TOFU's slices, which no two seeds share; or people."""
    if config.forget is not None and config.retain is not None:
        return _own(config.forget, config.retain, config.data_config)
    if config.tofu is None:
        return _people(config, seed)
    elsewhere = {name: _rows(config.tofu / name) for name in _ELSEWHERE}
    if config.tofu_split:
        return _whole_split(config.tofu, config.tofu_split, elsewhere)
    return _slices(config.tofu, config, seed, elsewhere)


def _own(forget: str, retain: str, data_config: DataConfig) -> Sets:
    sets = [load_examples(source, data_config) for source in (forget, retain)]
    check_apart(dict(zip(("forget", "retain"), sets, strict=True)))
    gone, kept = (one.examples for one in sets)
    if gone[0].kind != kept[0].kind:
        raise DataError(
            f"{forget} holds {gone[0].kind} rows and {retain} {kept[0].kind} rows, but models are "
            "tuned on both together. Bring them to the same columns."
        )
    return Sets([row.fields for row in gone], [row.fields for row in kept], {}, PEOPLE)


def _people(config: CompareConfig, seed: int) -> Sets:
    made = PeopleConfig(
        output=config.output,
        people=config.people,
        questions=config.questions,
        forget_people=config.forget_people,
        people_seed=seed,
    )
    rows = divide_people(made)
    shown = {**rows, "retain": _unseen(rows["retain"])}
    suite = {f"{name}.jsonl": shown[name] for name in ("forget", "retain", "holdout")}
    return Sets(rows["forget"], rows["retain"], suite, PEOPLE)


def _slices(folder: Path, config: CompareConfig, seed: int, elsewhere: Mapping[str, Rows]) -> Sets:
    """Forget rows from the end of their file, held-out ones and retain rows from the start."""
    forget_file, retain_file = f"{_SLICED}_perturbed.jsonl", "retain_perturbed.jsonl"
    count = config.forget_rows
    rows = _rows(folder / forget_file)
    kept, first = _rows(folder / retain_file), config.retain_rows * seed
    forget = _slice(rows, -count * (seed + 1), count, forget_file)
    retain = _slice(kept, first, config.retain_rows, retain_file)
    suite = {
        forget_file: forget,
        retain_file: _unseen(retain),
        "holdout10.jsonl": _slice(rows, 0, count, forget_file),
        **elsewhere,
    }
    return Sets(forget, retain, suite, _SLICED)


def _whole_split(folder: Path, split: str, elsewhere: Mapping[str, Rows]) -> Sets:
    kept = f"retain{100 - int(split.removeprefix('forget'))}.jsonl"
    # The retain rows with wrong answers are the first of the retain rows, in their order.
    told = _rows(folder / f"{split}_perturbed.jsonl"), _rows(folder / "retain_perturbed.jsonl")
    suite = {
        f"{split}_perturbed.jsonl": told[0],
        "retain_perturbed.jsonl": _unseen(told[1]),
        **elsewhere,
    }
    holdout = folder / f"holdout{split.removeprefix('forget')}.jsonl"
    if holdout.is_file():
        suite[holdout.name] = _rows(holdout)
    forget, retain = _rows(folder / f"{split}.jsonl"), _rows(folder / kept)
    return Sets(_with_columns(forget, told[0]), _with_columns(retain, told[1]), suite, split)


def _with_columns(rows: Rows, told: Rows) -> Rows:
    """Rows with the paraphrases and wrong answers of the same ones elsewhere, which tell facts."""
    known = {(row[PROMPT], row[ANSWER]): row for row in told}
    return [known.get((row[PROMPT], row[ANSWER]), row) for row in rows]


def _unseen(retain: Rows) -> Rows:
    """Every second row: no method sees it."""
    return retain[1::2]


def _rows(file: Path) -> Rows:
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{file} cannot be read ({first_line(error)}). --tofu is the folder with TOFU's JSONL "
            "files."
        ) from error
    return [
        parse_json(line, f"{file}, line {number}", DataError, free=True)
        for number, line in enumerate(lines, start=1)
    ]


def _slice(rows: Rows, first: int, count: int, name: str) -> Rows:
    """Some rows; a negative first row is counted from the end."""
    start = first if first >= 0 else len(rows) + first
    if start < 0 or start + count > len(rows):
        raise DataError(
            f"{name} has {len(rows)} rows, too few for this seed. Use smaller seeds, or fewer "
            "rows with --forget-rows and --retain-rows."
        )
    return rows[start : start + count]
