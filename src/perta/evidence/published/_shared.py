"""What published benchmarks share: files of the hub, settings, attacks, and references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.examples import ExampleSet, load_examples
from perta.data.rows import write_jsonl
from perta.errors import DataError, first_line
from perta.evidence import metrics
from perta.evidence.benchmark import Reference
from perta.evidence.results import Results, missing, table
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import ScoringOptions, end_tokens
from perta.models.load import longest_input, pad_id
from perta.models.resolve import cache_folder
from perta.options import DataConfig
from perta.progress import say
from perta.store.atomic import write_text
from perta.store.fingerprint import content_of

QA = DataConfig(format="qa", prompt_column="question", answer_column="answer")
"""Rows of questions and answers, as both benchmarks have them."""


def hub_files(data: str, folder: str, parts: Mapping[Path | str, tuple[str, str, str]]) -> Path:
    """A folder with a benchmark's files, each downloaded once: file -> (id, subset, split)."""
    if Path(data).is_dir():
        return Path(data)
    if data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise DataError(
            f"There is no folder {data}. Give one with the benchmark's JSONL files, or leave "
            "--data out to fetch them from the hub."
        )
    target = cache_folder() / folder
    for file, (name, subset, split) in parts.items():
        _fetch(name, subset, split, target / file)
    return target


def _fetch(name: str, subset: str, split: str, target: Path) -> None:
    """Download one file of a benchmark, once; what is not as it came is fetched again."""
    mark = target.with_name(f"{target.name}.blake3")
    if target.is_file() and mark.is_file() and mark.read_bytes() == content_of(target).encode():
        return
    import datasets

    say(f"Fetching {name}, {subset} ({split})")
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library raises a dozen unrelated classes here
        raise DataError(
            f"{subset} of {name} could not be fetched from the hub: {first_line(error)} "
            "Give a folder with the benchmark's JSONL files as --data."
        ) from error
    write_jsonl((dict(row) for row in rows), target)
    write_text(mark, content_of(target))


def published_options(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, *, compat: bool
) -> ScoringOptions:
    """Of a published benchmark; `compat` hides padding inside prompts as its own code does."""
    padding = pad_id(tokenizer)
    masking = Masking(padding, padding if compat else None)
    ends, longest = end_tokens(model, tokenizer), longest_input(model)
    return ScoringOptions(masking, ends, batch_size, longest=longest)


def load_file(
    folder: Path, name: str, config: DataConfig | None = None, limit: int | None = None
) -> ExampleSet | None:
    """A benchmark file's rows, the first `limit` of them; None where the file is missing."""
    path = folder / name
    if not path.is_file():
        return None
    examples = load_examples(path, config)
    return examples if limit is None else replace(examples, examples=examples.examples[:limit])


def reference_ratios(reference: Reference, answers: Sequence[str], *, cut: bool) -> list[float]:
    """Truth ratios of the retrained model on these rows; if they are `cut`, its log may have more.

    DataError where it has none, or those of another split or benchmark.
    """
    key = "forget_truth_ratio"
    values = (reference.get(key) or {}).get("value_by_index")
    if not values:
        raise DataError(f"The reference results hold no {key}. Give those of a retrained model.")
    if len(values) < len(answers) or (len(values) > len(answers) and not cut):
        raise DataError(
            f"The reference results have {len(values)} rows in {key} and this run "
            f"{len(answers)}: they are of another split."
        )
    _require_same_texts(reference, answers)
    try:
        return [float(values[str(i)]["score"]) for i in range(len(answers))]
    except (KeyError, TypeError) as error:
        raise DataError(f"The reference results' {key} lacks the score of a row.") from error


def _require_same_texts(reference: Reference, answers: Sequence[str]) -> None:
    logged = (reference.get("forget_Q_A_ROUGE") or {}).get("value_by_index") or {}
    pairs = [
        (text, logged[str(i)].get("ground_truth", text))
        for i, text in enumerate(answers)
        if str(i) in logged
    ]
    # Detokenisers move spaces; more than a few differing rows mean other data.
    different = sum("".join(a.split()) != "".join(b.split()) for a, b in pairs)
    if different > 0.1 * max(1, len(pairs)):
        raise DataError(
            f"{different} of {len(pairs)} answers in the reference results differ from the data's: "
            "they are of another split or benchmark."
        )


def attack_entry(forget: Sequence[float | None], holdout: Sequence[float | None]) -> Results:
    """A membership attack: the scores of both sides and the AUC between those that have one."""
    auc = metrics.membership_auc(
        [value for value in forget if value is not None],
        [value for value in holdout if value is not None],
    )
    return {
        "forget": table([{"score": value} for value in forget], "score"),
        "holdout": table([{"score": value} for value in holdout], "score"),
        "auc": auc,
        "agg_value": auc,
    }


def privleak_entry(min_k: Results, reference: Mapping[str, Any] | None) -> Results:
    """Privacy leakage from the Min-K attack on this model, and on the retrained one if given."""
    if min_k["agg_value"] is None:
        return missing(min_k["missing"])
    if reference is None:
        return {"agg_value": metrics.privleak(min_k["agg_value"])}
    retain_auc = (reference.get("mia_min_k") or {}).get("agg_value")
    if retain_auc is None:
        return missing("the reference results hold no mia_min_k")
    return {"agg_value": metrics.privleak(min_k["agg_value"], retain_auc)}
