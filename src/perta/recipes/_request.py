"""A request to unlearn before any work: its sets, and what would stop it later.

Some retained rows are never used, so that a run can be judged on rows that gave it nothing.
Rows whose moments or importance are protected fare better than others of their kind. So a part of
the retain set, chosen by a fixed seed, takes no part in anything that makes the result, and
retention is judged on it. It is a tenth of the rows, at least 8 and at most 200, and only where
that leaves three quarters to protect (32 rows). Rows of one subject stay together where there are
at least 10 subjects, so that whole subjects are unseen, and equal rows always do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import torch

from perta.data.batch import seeded_sample
from perta.data.examples import (
    Example,
    ExampleSet,
    check_apart,
    general_config,
    load_examples,
    rows_fingerprint,
    subjects,
)
from perta.data.rows import split_by
from perta.data.tokens import encode_examples
from perta.engine.edit.direction import check_moments
from perta.engine.edit.records import check_records, tuned_on
from perta.engine.shard import check_shard
from perta.errors import CheckpointMismatchError, ConfigError
from perta.methods.method import Edit, Method, Needs
from perta.methods.objectives import Training
from perta.methods.registry import get_method, parse
from perta.models.load import batch_of, load_model, load_tokenizer, longest_input, pad_id
from perta.models.loss import losses_of
from perta.options import ComputeConfig, DataConfig, option_name, sample_count
from perta.parallel import everywhere
from perta.progress import say
from perta.recipes.settings import SETS, UnlearnConfig
from perta.report.settings import ReportConfig
from perta.report.write import refuse_foreign_page
from perta.stages.moments import holds
from perta.store.atomic import beside, check_place, check_writable, write_text
from perta.store.record import check_output, check_separate

_SHARE, _SMALLEST, _LARGEST = 0.1, 8, 200
_MOST = 0.25  # largest share of the retain set that is held back by default
_SUBJECTS = 10  # subjects from which on they are held back whole
_SEED = 0
_COMPARED = 64  # rows that tell whether two tokenizers read them alike
_ASKED, _WORSE = 16, 2.0  # rows that tell which of two models knows them, and by what factor

PROTECTED, HELD_BACK = "retain_protected.jsonl", "retain_held_back.jsonl"


def check_options(config: UnlearnConfig, sets: Mapping[str, ExampleSet]) -> None:
    """Stop now at what would stop the edit after the first long step."""
    check_shard(config.tune.shard)
    method, seeds = get_method(config.weighting.method), config.forget_seeds or 1
    needs = method.needs
    if seeds < needs.tuned:
        raise ConfigError(
            f"`{method.name}` compares several task vectors: --forget-seeds must be at least "
            f"{needs.tuned}."
        )
    method.check_place(config.importance_at)
    if seeds > 1 and (config.rounds or 1) > 1:
        raise ConfigError(
            f"--rounds {config.rounds} starts from one forget checkpoint, but --forget-seeds is "
            f"{seeds}. Leave one of the two out."
        )
    if not needs.moments:
        refuse_moments(config)
    if "retain" not in sets:
        _refuse_without_retain(config, method)
        return
    # Plain text is cut into windows that rows do not count.
    share = len(sets["forget"]) / (len(sets["forget"]) + len(sets["retain"]))
    is_counted = all(e.kind != "text" for name in ("forget", "retain") for e in sets[name].examples)
    if is_counted:
        method.check_share(share)


def check_tuned(
    config: UnlearnConfig,
    sets: Mapping[str, ExampleSet],
    folders: Mapping[str, Path],
    fingerprints: Mapping[str, str],
) -> None:
    """Stop at given checkpoints that are not the base tuned on their set, as far as files tell."""
    for side, other, rows in (
        ("forget", "retain", "rows to forget"),
        ("retain", "forget", "retained rows"),
    ):
        name = f"{side}_checkpoint"
        if name not in folders:
            continue
        if other in sets and tuned_on(folders[name]) == sets[other].fingerprint:
            why = f"was tuned on the {other} set, its record says"
        elif fingerprints[name] == fingerprints["base"]:
            why = "is the base model itself"
        else:
            continue
        raise ConfigError(
            f"--{side}-checkpoint {getattr(config, name)} {why}. Give a checkpoint tuned on "
            f"{rows}, or none, so that one is made."
        )
    # Of saved moments single rows are taken out before an edit reads them.
    given = {name: folder for name, folder in folders.items() if name != "retain_moments"}
    check_records(
        get_method(config.weighting.method), given, fingerprints, sets["forget"].fingerprint
    )


def _refuse_without_retain(config: UnlearnConfig, method: Edit) -> None:
    needs = method.needs
    adds = needs.retain_checkpoint and config.retain_checkpoint is None
    given = config.retain_moments is not None or config.general is not None
    if config.weighting.scaling_coef == "auto":
        raise ConfigError(
            "--scaling-coef auto needs --retain: it stops where the loss on what is to be kept "
            "rises. Give examples to keep, or a number."
        )
    if "retain" in needs.importance or adds or ("retain" in needs.moments and not given):
        instead = ", or --retain-moments or --general in its place" if method.needs.moments else ""
        raise ConfigError(
            f"`{method.name}` needs --retain, examples to keep{instead}. The method `tv` protects "
            "nothing and needs none."
        )


def refuse_without_effect(config: UnlearnConfig) -> None:
    """Stop at an option that this run would not look at; see `refuse_unused` for an edit's."""
    method = parse(config.weighting.method, Method)
    needs = method.needs if isinstance(method, Edit) else Needs(tuned=0)
    alpha = config.weighting.scaling_coef
    searches = isinstance(method, Edit) and (alpha == "auto" or (alpha is None and method.searched))
    groups = _groups(config, isinstance(method, Training), needs)
    seeds, tunes, moments = (
        config.forget_seeds or needs.tuned,
        needs.retain_checkpoint,
        bool(needs.moments),
    )
    in_rounds = searches and moments and seeds == 1 and config.rounds != 1
    is_tuned = config.forget_checkpoint is None or seeds > 1 or tunes or in_rounds
    groups.append((config.tune, is_tuned, "the forget checkpoint is given, and nothing is tuned"))
    for group, is_used, why in groups:
        for item in fields(group):  # type: ignore[arg-type]
            usual = "" if item.name == "method" else item.default
            if not is_used and getattr(group, item.name) != usual:
                raise _unused(option_name(group, item.name), method.name, why)
    auto = "it is for --scaling-coef auto"
    rounds = f"{auto} with a structured method, such as `perta-project`"
    subtracts = "it is for methods that subtract task vectors"
    samples = "it is for `msa`, and for moments of the retain set that are measured now"
    measured = "it is for methods with importance or moments"
    single = (
        ("retain_budget", searches, auto),
        ("rounds", searches and moments, rounds),
        ("retain_samples", tunes or (moments and config.retain_moments is None), samples),
        ("retain_checkpoint", tunes, "it is for `msa`"),
        ("importance_at", bool(needs.importance) or moments, measured),
        ("output_format", isinstance(method, Edit), "training writes a checkpoint"),
        ("forget_checkpoint", needs.tuned > 0, subtracts),
        ("forget_seeds", needs.tuned > 0, subtracts),
    )
    usual_of = {item.name: item.default for item in fields(config)}
    for option, is_used, why in single:
        if not is_used and getattr(config, option) != usual_of[option]:
            raise _unused(option, method.name, why)


def _groups(config: UnlearnConfig, trains: bool, needs: Needs) -> list[tuple[object, bool, str]]:
    """Groups of options: whether the method looks at them, and whose they are."""
    edits = (
        "it is for edits. Training goes as far as --unlearn-epochs, --unlearn-learning-rate "
        "and the method's settings say"
    )
    importance = "it is for methods with importance, such as `perta-fisher`"
    moments = "it is for methods with moments, such as `perta-project`"
    return [
        (config.training, trains, "it is for methods that train, such as `npo-retain`"),
        (replace(config.weighting, method=""), not trains, edits),
        (config.estimator, bool(needs.importance), importance),
        (config.moments, bool(needs.moments), moments),
    ]


def _unused(option: str, method: str, why: str) -> ConfigError:
    return ConfigError(
        f"--{option.replace('_', '-')} has no effect with `{method}`: {why}. Leave it out; "
        "`perta methods` shows what each method looks at."
    )


def refuse_moments(config: UnlearnConfig) -> None:
    """Stop at options that are for methods with moments."""
    for option, value in (("general", config.general), ("retain-moments", config.retain_moments)):
        if value is not None:
            raise ConfigError(
                f"--{option} is for methods with moments, and `{config.weighting.method}` uses "
                "none. Leave it out, or take a structured method such as `perta-project`."
            )


def read_by(config: UnlearnConfig, *folders: Path) -> tuple[str | Path, ...]:
    """Everything that a request reads: what the user gave, and the folders that this stands for."""
    names = ("base", "full", "forget_checkpoint", "retain_checkpoint", "retain_moments", *SETS)
    given = (getattr(config, name) for name in names)
    return (*folders, *(place for place in given if place is not None))


def check_places(config: UnlearnConfig, reads: Iterable[str | Path]) -> None:
    """Stop before an output that cannot or must not be written, or a work folder likewise."""
    work = config.work_folder
    for place in (config.output, work):
        check_writable(place / "file" if place.exists() else place)
    if config.evaluate:
        refuse_foreign_page(ReportConfig(output=page_of(config.output)))
    if work.resolve().is_relative_to(config.output.resolve()):
        raise ConfigError(
            f"The work folder {work} lies in the output {config.output}, which replaces what was "
            "there. Give another --work-dir."
        )
    check_output(config.output, reads, overwrite=config.overwrite)
    for name in (PROTECTED, HELD_BACK):
        check_separate(work / name, reads)
    check_place(work)


def page_of(output: Path) -> Path:
    """Where the report on an output lies."""
    return beside(output, ".report.html")


def check_retain_moments(
    config: UnlearnConfig, model: Path, sets: Mapping[str, ExampleSet]
) -> None:
    """Stop at saved moments that do not fit the model, or the moments that will join them."""
    folder, method = config.retain_moments, get_method(config.weighting.method)
    if folder is None or not method.needs.moments:
        return
    facts = check_moments(folder, [model], method.needs.gradients).facts
    joined = "general" in sets or "forget" in method.needs.moments
    if joined and facts["token_choice"] != config.moments.tokens:
        raise ConfigError(
            f"--retain-moments {folder} counts `{facts['token_choice']}` tokens, and the moments "
            f"measured here would count `{config.moments.tokens}`. Give --tokens "
            f"{facts['token_choice']}, or make them again."
        )
    if "general" in sets and holds(folder, sets["general"].examples):
        raise ConfigError(
            f"--retain-moments {folder} holds the moments of --general {sets['general'].source} "
            "already. Make them again without it, or leave it out."
        )


def check_same_tokens(base: Path, full: Path, rows: ExampleSet, data_config: DataConfig) -> None:
    """Stop where the base model would be tuned on other tokens than the full model reads."""
    few = replace(rows, examples=rows.examples[:_COMPARED])
    found = [
        encode_examples(few, load_tokenizer(folder), data_config).encoded for folder in (base, full)
    ]
    different = [one.row for one, other in zip(*found, strict=False) if one != other]
    if different or len(found[0]) != len(found[1]):
        row = f" (row {different[0]} of {rows.source} is the first)" if different else ""
        raise CheckpointMismatchError(
            f"--base ({base}) and --full ({full}) read rows as other tokens{row}: their "
            "tokenizers or chat templates differ, so what is tuned and measured at the base would "
            "not be what the full model reads. Give a copy of the base with the tokenizer files "
            "and chat template of the full model, or --no-chat-template if the full model was "
            "tuned without one."
        )


def check_order(
    base: Path,
    full: Path,
    rows: ExampleSet,
    data_config: DataConfig,
    compute: ComputeConfig,
) -> None:
    """Stop where the full model's loss on rows is twice the base's: they are given for each other.

    Less may come of rows that the full model was not tuned on, or has forgotten.
    """
    tokenizer, longest = load_tokenizer(full), longest_input(full)
    encoded = encode_examples(rows, tokenizer, data_config, longest=longest).encoded
    asked, pad = seeded_sample(encoded, _ASKED, _SEED), pad_id(tokenizer)
    size = batch_of(compute, _ASKED)

    def loss(folder: Path) -> float:
        model = load_model(folder, compute)
        return fmean(everywhere(losses_of, model, asked, batch_size=size, pad=pad))

    of_full, of_base = loss(full), loss(base)
    if not of_full < _WORSE * of_base:
        raise CheckpointMismatchError(
            f"--full ({full}) knows the rows of {rows.source} far less than --base ({base}) does: "
            f"its loss is {of_full:.3f} nats per token, that of the base {of_base:.3f}. Were the "
            "two given for each other? The full model is the one that was tuned on the data."
        )


def with_picked_rows(config: UnlearnConfig) -> UnlearnConfig:
    """The request with both sets of `--forget-where` in the place of the file they come from."""
    if config.forget_where is None:
        return config
    check_separate(config.output, [config.forget])
    forget, retain = split_by(config.forget, config.forget_where, config.data_config.split)
    say(f"--forget-where: {len(forget.numbered)} rows to forget, {len(retain.numbered)} to keep")
    return replace(config, forget=forget, retain=retain, forget_where=None)


def read_set(name: str, source: str, data_config: DataConfig) -> ExampleSet:
    """Read one of the sets; general text may have columns of its own."""
    is_general = name == "general"
    return load_examples(source, general_config(source, data_config) if is_general else data_config)


def _uses_retain(config: UnlearnConfig, method: Method, retain: ExampleSet) -> bool:
    """Whether anything that makes the result reads the rows to keep."""
    if isinstance(method, Training):
        return method.retain is not None
    needs, saved = get_method(config.weighting.method).needs, config.retain_moments
    return bool(
        config.weighting.scaling_coef == "auto"
        or "retain" in needs.importance
        or ("retain" in needs.moments and (saved is None or holds(saved, retain.examples)))
        or (needs.retain_checkpoint and config.retain_checkpoint is None)
    )


def split_retain(
    config: UnlearnConfig, sets: Mapping[str, ExampleSet]
) -> tuple[Split | None, dict[str, Any]]:
    """Keep rows out of the run, to judge retention by; both parts, and what the record says."""
    if "retain" not in sets:
        return None, {}
    retain, column = sets["retain"], config.data_config.subject_column
    # Saved moments tell what rows are in them; a checkpoint does not.
    saved = config.retain_checkpoint is not None
    seen = {"seen_by": "the checkpoint saved before (--retain-checkpoint)"} if saved else {}
    method = parse(config.weighting.method, Method)
    if isinstance(method, Training) and method.start == "base":
        # Rows that retraining leaves out would not be retained at all.
        split = Split(retain, reason="Training again needs all of them.")
    elif not _uses_retain(config, method, retain):
        split = Split(retain, reason="None took part in the edit.")
        return split, {**split.record(), **seen, "used": saved}
    else:
        split = hold_back(retain, config.held_back, column)
    if split.held_back is not None:
        say(
            f"retain set: {len(split.held_back)} of {len(retain)} rows are kept out of the run, "
            "and retention is judged on them"
        )
    return split, {**split.record(), **seen, "used": True}


def load_sets(config: UnlearnConfig) -> dict[str, ExampleSet]:
    """Read the sets that were given; no two may be the same rows."""
    sets = {
        name: read_set(name, source, config.data_config)
        for name in SETS
        if (source := getattr(config, name)) is not None
    }
    check_apart(sets)
    return sets


# --- rows that a run never uses -----------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """A retain set in two parts; `held_back` is None where all rows are used."""

    protected: ExampleSet
    held_back: ExampleSet | None = None
    by: Literal["subject", "row"] = "row"
    reason: str = ""

    def write(self, folder: Path) -> None:
        """Write both parts as JSONL that only this user can read."""
        if self.held_back is not None:
            write_rows(folder / PROTECTED, self.protected)
            write_rows(folder / HELD_BACK, self.held_back)

    def record(self) -> dict[str, Any]:
        """Numbers and fingerprints for the record of a run."""
        held = len(self.held_back) if self.held_back else 0
        found: dict[str, Any] = {"rows": held, "of": held + len(self.protected)}
        if self.held_back is None:
            return {**found, "reason": self.reason}
        return {
            **found,
            "by": self.by,
            "seed": _SEED,
            "fingerprint": self.held_back.fingerprint,
            "protected": self.protected.fingerprint,
        }


def hold_back(examples: ExampleSet, wanted: str | None, subject_column: str | None) -> Split:
    """Keep a part of a retain set out of a run: a share or a count, or by default as said above."""
    n = len(examples)
    count = _count(n, wanted)
    if not count:
        asked = wanted is not None
        reason = "None was to be kept out." if asked else f"{n} are too few to keep some out."
        return Split(examples, reason=reason)
    numbers = subjects([example.fields for example in examples.examples], subject_column)
    by: Literal["subject", "row"] = "row"
    units: dict[object, list[int]] = {}
    if numbers is not None and len(set(numbers)) >= _SUBJECTS:
        by = "subject"
    for place, example in enumerate(examples.examples):
        unit = numbers[place] if by == "subject" and numbers else example.messages
        units.setdefault(unit, []).append(place)
    chosen = _choose(list(units.values()), count, max(count, int(_MOST * n)))
    if not chosen or len(chosen) == n:
        return Split(examples, reason="Its rows are too much alike to keep some out.")
    kept = [e for i, e in enumerate(examples.examples) if i not in chosen]
    held = [e for i, e in enumerate(examples.examples) if i in chosen]
    return Split(_part(examples, kept), _part(examples, held), by)


def _count(n: int, wanted: str | None) -> int:
    if wanted is None:
        count = max(_SMALLEST, min(_LARGEST, round(_SHARE * n)))
        return count if count <= _MOST * n else 0
    if wanted.strip() == "0":
        return 0
    count = sample_count(wanted, "held-back", n)
    if count >= n:
        raise ConfigError(
            f"--held-back {wanted} leaves none of the {n} examples to keep for the edit to "
            "protect. Hold fewer back, or give a larger retain set."
        )
    return count


def _choose(units: list[list[int]], count: int, most: int) -> set[int]:
    """Whole units in a seeded order until there are `count` rows; none that would exceed `most`."""
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(_SEED)).tolist()
    chosen: set[int] = set()
    for i in order:
        if len(chosen) >= count:
            break
        if len(chosen) + len(units[i]) <= most:
            chosen.update(units[i])
    return chosen


def _part(examples: ExampleSet, rows: list[Example]) -> ExampleSet:
    return replace(
        examples,
        examples=tuple(rows),
        fingerprint=rows_fingerprint([dict(example.fields) for example in rows]),
    )


def write_rows(file: Path, examples: ExampleSet) -> None:
    """Write the rows of a set as JSONL, column by column as they were read."""
    lines = (json.dumps(dict(e.fields), default=str) + "\n" for e in examples.examples)
    write_text(file, "".join(lines), private=True)
