"""TOFU: fictitious authors to forget, others to keep, real authors and world facts.

Files, metrics and the form of results are those of the community's common evaluation
(open-unlearning, commit d3d7cf9), so results stand beside published ones and published logs of
retrained models serve as reference. `compat` differs from the default in two places:

- where padding and end-of-turn are one token, attention does not see end-of-turn tokens inside
  the prompt (the default's mask comes from true lengths);
- without a chat template, the prompt ends in a space of its own, so that the first token of
  most answers carries no label (the default labels the whole answer).

Source: Maini et al., arXiv 2401.06121; Dorna et al., arXiv 2506.12618.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.batch import IGNORE, Encoded
from perta.data.examples import Example, ExampleSet
from perta.data.tokens import encode_example, encode_prompt, text_ids, uses_chat_template
from perta.errors import ConfigError, DataError
from perta.evidence import metrics
from perta.evidence.benchmark import (
    Benchmark,
    Given,
    Journal,
    Reference,
    open_journal,
    run_with_journal,
)
from perta.evidence.published._shared import (
    QA,
    attack_entry,
    hub_files,
    load_file,
    privleak_entry,
    published_options,
    reference_ratios,
)
from perta.evidence.results import Results, decode, labelled_text, missing, rouge_row, table
from perta.evidence.scoring.answers import Score
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import Item, Outcome, ScoringOptions, gradient_norm_score
from perta.evidence.settings import PeopleBenchConfig, TofuConfig
from perta.models.load import batch_of, load_model
from perta.models.resolve import resolve_checkpoint
from perta.progress import track
from perta.store.fingerprint import fingerprint

_SPLITS = ("01", "05", "10")
_SUBSETS = (
    *(f"forget{split}_perturbed" for split in _SPLITS),
    "retain_perturbed",
    "real_authors_perturbed",
    "world_facts_perturbed",
    *(f"holdout{split}" for split in _SPLITS),
)
_MAX_NEW_TOKENS = 200
_PLAIN_LENGTH = 512  # tokens after which sequences of models without a chat template are cut
PEOPLE = "people"
"""Name in place of a split for the files of `perta people`; they have no real authors or facts."""
_PEOPLE = (
    ("forget", "forget.jsonl", True),
    ("retain", "retain.jsonl", True),
    ("holdout", "holdout.jsonl", False),
)
_NO_REFERENCE = (
    "forget quality compares with the model retrained without the forget set: give its results "
    "as --reference"
)
_ATTACKS = {
    "loss": "",
    "zlib": "",
    "reference": "the reference attack subtracts a reference model's loss: give that model",
    "min_k": "",
    "min_k_plus_plus": "",
    "gradnorm": "it was left out",
}
"""Membership attacks, and why one may not have been run."""


@dataclass(frozen=True)
class Part:
    """One data file of the benchmark."""

    name: str
    file: str
    paraphrased: bool  # its right answer for the truth ratio is the paraphrase
    examples: ExampleSet | None  # its rows; None where the file is missing
    cut: bool = False  # only its first rows are looked at

    @property
    def rows(self) -> tuple[Example, ...]:
        """Its rows, none where the file is missing."""
        return self.examples.examples if self.examples else ()

    @property
    def generate(self) -> bool:
        """Whether answers are generated, and there are wrong ones."""
        return self.name != "holdout"

    @property
    def attacked(self) -> bool:
        """Whether membership attacks are run on it."""
        return self.name in ("forget", "holdout")


@dataclass(frozen=True)
class Measured:
    """Everything measured on one part, row by row."""

    part: Part
    items: Sequence[Item]
    outcomes: Sequence[Outcome]
    gradient_norms: Sequence[float | None] | None = None
    reference_losses: Sequence[float] | None = None

    @property
    def answers(self) -> list[Score]:
        """Scores of the right answers."""
        return [outcome.scores[0] for outcome in self.outcomes]

    @property
    def paraphrases(self) -> list[Score]:
        """Scores of the paraphrased right answers."""
        return [outcome.scores[1] for outcome in self.outcomes]

    @property
    def wrong(self) -> list[tuple[Score, ...]]:
        """Scores of each row's wrong answers."""
        return [outcome.scores[1 + self.part.paraphrased :] for outcome in self.outcomes]


_TofuLike = TypeVar("_TofuLike", TofuConfig, PeopleBenchConfig)


class _TofuMetrics(Benchmark[_TofuLike]):
    """The TOFU metrics on files in TOFU's form."""

    def inputs(self, config: _TofuLike) -> dict[str, str]:
        """The model whose loss the reference attack subtracts."""
        if not config.reference_checkpoint:
            return {}
        return {"reference_checkpoint": fingerprint(_reference_folder(config))}

    def check(self, config: _TofuLike, given: Given) -> None:
        """The split is there, and the reference is of its rows."""
        parts = load_parts(given.data, config.forget_split, config.limit)
        _reference_ratios(parts, given.reference)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: _TofuLike,
        given: Given,
    ) -> Results:
        """See `run_tofu`."""
        other = None
        if config.reference_checkpoint:
            other = load_model(_reference_folder(config), config.compute)
        return run_tofu(
            model,
            tokenizer,
            given.data,
            config.forget_split,
            reference=given.reference,
            reference_model=other,
            compat=config.compat,
            limit=config.limit,
            batch_size=batch_of(config.compute, 16),
            gradient_norms=config.gradient_norms,
            journal=given.journal,
        )


class Tofu(_TofuMetrics[TofuConfig]):
    """`perta bench tofu`."""

    name = "tofu"
    config = TofuConfig

    def folder(self, config: TofuConfig) -> Path:
        """The files of every split."""
        parts: dict[Path | str, tuple[str, str, str]] = {
            f"{subset}.jsonl": (config.data, subset, "train") for subset in _SUBSETS
        }
        return hub_files(config.data, "tofu", parts)


class People(_TofuMetrics[PeopleBenchConfig]):
    """`perta bench people`."""

    name = "people"
    config = PeopleBenchConfig

    def folder(self, config: PeopleBenchConfig) -> Path:
        """What `perta people` wrote."""
        if not Path(config.data).is_dir():
            raise DataError(f"There is no folder {config.data}. Make it with `perta people`.")
        return Path(config.data)


def _reference_folder(config: TofuConfig | PeopleBenchConfig) -> Path:
    return resolve_checkpoint(str(config.reference_checkpoint))


def run_tofu(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data_folder: str | Path,
    forget_split: str,
    *,
    reference: Reference | None = None,
    reference_model: PreTrainedModel | None = None,
    compat: bool = False,
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = _MAX_NEW_TOKENS,
    gradient_norms: bool = True,
    journal: Path | None = None,
) -> Results:
    """Evaluate a model with every TOFU metric its data files allow, keys as in published logs.

    A metric that lacks its file or its reference is None, with the reason under "missing".
    `forget_split` is such as forget10, or `people` for a folder of `perta people`; the loss under
    `reference_model` is what the reference attack subtracts; `journal` keeps outcomes, so that a
    killed run goes on. ConfigError at a split that is none of TOFU's; DataError without data, at
    unusable rows, or a reference of other data; DivergenceError where the loss is not finite.
    """
    parts = load_parts(Path(data_folder), forget_split, limit)
    _reference_ratios(parts, reference)  # refused before anything is measured
    options = published_options(model, tokenizer, batch_size, compat=compat)
    options = replace(options, max_new_tokens=max_new_tokens)
    there = [part for part in parts if part.examples]
    items = {part.name: _items(part, tokenizer, compat, options.longest) for part in there}
    depends_on = {
        "benchmark": "tofu",
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "template": tokenizer.chat_template,
        "data": {p.name: p.examples.fingerprint for p in parts if p.examples},
        "settings": (forget_split, compat, limit, max_new_tokens, str(model.dtype)),
    }
    models = {"model": model, "reference_model": reference_model}
    attacked = {part.name: items[part.name] for part in there if part.attacked}
    with open_journal(journal, depends_on, models) as kept:
        outcomes = _outcomes("TOFU", model, items, options, kept)
        norms = _norms(model, attacked if gradient_norms else {}, options.masking, kept)
        losses = _losses(reference_model, attacked, options, kept) if reference_model else {}
    measured = {
        name: Measured(part, items[name], outcomes[name], norms.get(name), losses.get(name))
        for part in there
        for name in [part.name]
    }
    return tofu_results(measured, parts, tokenizer, reference)


def load_parts(folder: Path, forget_split: str, limit: int | None = None) -> list[Part]:
    """The benchmark's files; an error where none is there, or the split is none of TOFU's."""
    plan = _PEOPLE if forget_split == PEOPLE else _tofu_files(folder, forget_split)
    parts = [
        Part(name, file, paraphrased, load_file(folder, file, QA, limit), cut=limit is not None)
        for name, file, paraphrased in plan
    ]
    if all(part.examples is None for part in parts):
        raise DataError(
            f"{folder} has none of TOFU's files ({', '.join(file for _, file, _ in plan)})."
        )
    return parts


def _reference_ratios(parts: Sequence[Part], reference: Reference | None) -> list[float] | None:
    """Truth ratios of the retrained model on this run's forget rows, where both are there."""
    (forget,) = [part for part in parts if part.name == "forget"]
    if reference is None or forget.examples is None:
        return None
    answers = [row.answer for row in forget.rows]
    return reference_ratios(reference, answers, cut=forget.cut)


def _tofu_files(folder: Path, forget_split: str) -> tuple[tuple[str, str, bool], ...]:
    match = re.fullmatch(r"forget(\d\d)", forget_split)
    file = f"{forget_split}_perturbed.jsonl"
    if not match or (match[1] not in _SPLITS and not (folder / file).is_file()):
        raise ConfigError(f"--forget-split is {forget_split}; it must be forget01, 05 or 10.")
    return (
        ("forget", file, True),
        ("retain", "retain_perturbed.jsonl", True),
        ("ra", "real_authors_perturbed.jsonl", False),
        ("wf", "world_facts_perturbed.jsonl", False),
        ("holdout", f"holdout{match[1]}.jsonl", False),
    )


def tofu_results(
    measured: Mapping[str, Measured],
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference | None,
) -> Results:
    """Every metric, from what was measured."""
    results: Results = {}
    for part in parts:
        found = _part_results(measured.get(part.name) or Measured(part, (), ()), tokenizer)
        absent = missing(f"{part.file} is not there")
        results |= found if part.name in measured else dict.fromkeys(found, absent)
    results |= _attacks(measured, parts, tokenizer)
    results["forget_quality"] = _forget_quality(
        results["forget_truth_ratio"], _reference_ratios(parts, reference)
    )
    results["privleak"] = privleak_entry(results["mia_min_k"], reference)
    results["model_utility"] = _utility(results, [part.name for part in parts])
    return dict(sorted(results.items()))


# --- measuring ------------------------------------------------------------------------------


def _outcomes(
    what: str,
    model: PreTrainedModel,
    groups: Mapping[str, Sequence[Item]],
    options: ScoringOptions,
    journal: Journal,
) -> dict[str, list[Outcome]]:
    named = {f"{n}:{i}": item for n, group in groups.items() for i, item in enumerate(group)}
    found = iter(run_with_journal(what, model, named, options, journal).values())
    return {name: [next(found) for _ in group] for name, group in groups.items()}


def _norms(
    model: PreTrainedModel, groups: Mapping[str, Sequence[Item]], masking: Masking, journal: Journal
) -> dict[str, list[float | None]]:
    norms: dict[str, list[float | None]] = {name: [] for name in groups}
    for name, items in groups.items():
        with track(f"Gradient norms, {name}", len(items)) as advance:
            for i, item in enumerate(items):
                make = partial(gradient_norm_score, model, item.answers[0], masking)
                norms[name].append(journal.kept(f"gradnorm:{name}:{i}", make))
                advance(1)
    return norms


def _losses(
    model: PreTrainedModel,
    groups: Mapping[str, Sequence[Item]],
    options: ScoringOptions,
    journal: Journal,
) -> dict[str, list[float]]:
    """Losses of the right answers under the reference model."""
    asked = {
        f"reference:{name}": [Item(item.answers[:1]) for item in items]
        for name, items in groups.items()
    }
    found = _outcomes("Reference model", model, asked, options, journal).values()
    return {
        name: [outcome.scores[0].loss for outcome in outcomes]
        for name, outcomes in zip(groups, found, strict=True)
    }


# --- tokens ---------------------------------------------------------------------------------


def _items(
    part: Part, tokenizer: PreTrainedTokenizerBase, compat: bool, longest: int | None
) -> list[Item]:
    items = []
    for number, row in enumerate(part.rows, start=1):
        items.append(make_item(row, part, tokenizer, compat))
        size = max(len(encoded.input_ids) for encoded in items[-1].answers)
        if longest is not None and size > longest:
            raise DataError(
                f"{part.file}, row {number}: {size} tokens and the model takes {longest}. The "
                "benchmark does not cut chat sequences; use a model with a longer context."
            )
    return items


def make_item(
    example: Example, part: Part, tokenizer: PreTrainedTokenizerBase, compat: bool
) -> Item:
    """Tokenise a row: the right answer first, then its paraphrase, then the wrong ones."""
    texts = [example.answer]
    if part.paraphrased:
        texts += _texts(example, "paraphrased_answer", part)
    if part.generate:
        texts += _texts(example, "perturbed_answer", part)
    answers = []
    for text in texts:
        encoded = encode(example.with_answer(text), tokenizer, compat)
        if not encoded.labelled:
            raise DataError(f"{part.file}, row {example.row}: the answer {text!r} has no tokens.")
        answers.append(encoded)
    prompt = tuple(_prompt_tokens(example, tokenizer, compat)) if part.generate else None
    return Item(tuple(answers), prompt, moments=part.attacked)


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, compat: bool) -> Encoded:
    """Tokens and labels of question and answer; without a chat template at most 512, then eos."""
    chat = uses_chat_template(example, tokenizer, QA)
    if chat or not compat:
        encoded = encode_example(example, tokenizer, QA, as_published=True)
    else:
        text = f"Question: {example.prompt}\nAnswer: {example.answer}"
        encoded = _with_eos(tuple(text_ids(text, tokenizer)), (), tokenizer, example.row)
    if not chat and len(encoded.input_ids) > _PLAIN_LENGTH:
        cut = encoded.input_ids[:_PLAIN_LENGTH]
        encoded = _with_eos(cut, encoded.labels[:_PLAIN_LENGTH], tokenizer, example.row)
    if compat:
        start = len(_prompt_tokens(example, tokenizer, compat))
        labels = (IGNORE,) * start + encoded.input_ids[start:]
        encoded = Encoded(encoded.input_ids, labels[: len(encoded.input_ids)], example.row)
    return encoded


def _prompt_tokens(
    example: Example, tokenizer: PreTrainedTokenizerBase, compat: bool
) -> Sequence[int]:
    """Tokens to generate from."""
    if uses_chat_template(example, tokenizer, QA):
        return encode_prompt(example, tokenizer, QA)
    if compat:
        return text_ids(f"Question: {example.prompt}\nAnswer: ", tokenizer)[:_PLAIN_LENGTH]
    return encode_prompt(example, tokenizer, QA)[:_PLAIN_LENGTH]


def _with_eos(
    ids: tuple[int, ...], labels: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, row: int
) -> Encoded:
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1:] != (eos,):
        ids, labels = (*ids, int(eos)), (*labels, int(eos))
    return Encoded(ids, labels, row)


def _texts(example: Example, column: str, part: Part) -> list[str]:
    value = example.fields.get(column)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(
            f"{part.file}, row {example.row}: column {column!r} must hold one text or a list of "
            "texts. Use TOFU's perturbed files."
        )
    return texts


# --- results --------------------------------------------------------------------------------


def _part_results(measured: Measured, tokenizer: PreTrainedTokenizerBase) -> Results:
    """Metrics that need this part's file alone."""
    name, wrong = measured.part.name, measured.wrong
    if name == "holdout":
        return {}
    right = measured.paraphrases if measured.part.paraphrased else measured.answers
    perturbed = [
        {"prob": [s.probability for s in row], "avg_loss": [s.loss for s in row]} for row in wrong
    ]
    results = {
        f"{name}_Q_A_Prob": table([_probability(s) for s in measured.answers], "prob"),
        f"{name}_Q_A_PERT_Prob": table(perturbed, "prob"),
        f"{name}_Q_A_ROUGE": table(_rouge_rows(measured, tokenizer), "rougeL_recall"),
    }
    if measured.part.paraphrased:
        rows = [_probability(s) for s in measured.paraphrases]
        results[f"{name}_Q_A_PARA_Prob"] = table(rows, "prob")
    else:
        shares = [
            metrics.normalised_probability(s.probability, [w.probability for w in row])
            for s, row in zip(measured.answers, wrong, strict=True)
        ]
        results[f"{name}_Q_A_Prob_normalised"] = table([{"prob": p} for p in shares], "prob")
    ratios = [
        metrics.truth_ratio([s.loss], [w.loss for w in row])
        for s, row in zip(right, wrong, strict=True)
    ]
    form = metrics.symmetric if name == "forget" else metrics.margin
    scored = table([{"score": ratio} for ratio in ratios], "score")
    scored["agg_value"] = metrics.mean([form(t) for t in ratios]) if ratios else None
    if name != "forget":
        return {**results, f"{name}_Truth_Ratio": scored}
    for key in ("exact_memorization", "extraction_strength"):
        results[key] = table([{"score": getattr(s, key)} for s in measured.answers], "score")
    return {**results, "forget_truth_ratio": scored}


def _probability(score: Score) -> dict[str, float]:
    return {"prob": score.probability, "avg_loss": score.loss}


def _rouge_rows(measured: Measured, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    columns = (measured.part.rows, measured.items, measured.outcomes)
    return [
        rouge_row(
            row.answer.strip(),
            decode(tokenizer, outcome.generated or ()),
            decode(tokenizer, item.prompt or ()),
        )
        for row, item, outcome in zip(*columns, strict=True)
    ]


def _attacks(
    measured: Mapping[str, Measured], parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase
) -> Results:
    absent = [p.file for p in parts if p.attacked and p.name not in measured]
    if absent:
        return {f"mia_{a}": missing(f"{' and '.join(absent)} not there") for a in _ATTACKS}
    forget, holdout = (_attack_scores(measured[n], tokenizer) for n in ("forget", "holdout"))
    results = {}
    for attack, reason in _ATTACKS.items():
        mine, theirs = forget[attack], holdout[attack]
        results[f"mia_{attack}"] = (
            missing(reason) if mine is None or theirs is None else attack_entry(mine, theirs)
        )
    return results


def _attack_scores(
    measured: Measured, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Sequence[float | None] | None]:
    """What each attack makes of every row; None where it was not run."""
    scores, losses = measured.answers, measured.reference_losses
    texts = [labelled_text(item.answers[0], tokenizer) for item in measured.items]
    return {
        "loss": [s.loss for s in scores],
        "zlib": [metrics.zlib_score(s.loss, text) for s, text in zip(scores, texts, strict=True)],
        "reference": losses and [s.loss - other for s, other in zip(scores, losses, strict=True)],
        "min_k": [s.min_k for s in scores],
        "min_k_plus_plus": [s.min_k_plus_plus for s in scores],
        "gradnorm": measured.gradient_norms,
    }


def _forget_quality(ratios: Results, theirs: Sequence[float] | None) -> Results:
    if "missing" in ratios:
        return missing(ratios["missing"])
    if theirs is None:
        return missing(_NO_REFERENCE)
    ours = [row["score"] for row in ratios["value_by_index"].values()]
    return {"agg_value": metrics.forget_quality(ours, theirs)}


def _utility(results: Results, parts: Sequence[str]) -> Results:
    """Harmonic mean of probability, ROUGE and truth ratio over what should be kept."""
    keys = [
        f"{name}_{kind}"
        for name in parts
        if name in ("retain", "ra", "wf")
        for kind in (
            "Q_A_Prob" if name == "retain" else "Q_A_Prob_normalised",
            "Q_A_ROUGE",
            "Truth_Ratio",
        )
    ]
    reasons = {results[key]["missing"] for key in keys if "missing" in results[key]}
    if reasons:
        return missing("; ".join(sorted(reasons)))
    return {"agg_value": metrics.model_utility([results[key]["agg_value"] for key in keys])}
