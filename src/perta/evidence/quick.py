"""Quick evaluation: what a model knows of a forget, a retain and a held-out set.

Loss, answer probability, exact memorization and extraction strength come from one
teacher-forced pass per example, ROUGE-L recall from a greedy answer that continues it (see
`scoring`). Results have the form of the TOFU community's published logs: a mean and the value
of every example.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perta.data.examples import ExampleSet, subjects
from perta.data.tokens import encode_examples, encode_prompt
from perta.evidence.results import Results, decode, require_finite, rouge_row, table
from perta.evidence.scoring.answers import Score
from perta.evidence.scoring.cache import Masking
from perta.evidence.scoring.items import Done, Item, Outcome, ScoringOptions, end_tokens, run_items
from perta.models.facts import (
    SAMPLES,
    Fact,
    fact_score,
    find_facts,
    hit_probability,
    unsayable,
)
from perta.models.load import longest_input, pad_id
from perta.options import DataConfig, ScoringConfig


def quick_evaluation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, ExampleSet],
    scoring: ScoringConfig | None = None,
    data_config: DataConfig | None = None,
    done: Done | None = None,
    *,
    facts: Mapping[str, Sequence[Fact]] | None = None,
    batch_size: int = 16,
) -> Results:
    """Evaluate a model on named sets; without `facts`, by set, they are what the rows tell.

    For each set NAME there are `NAME_loss`, `NAME_probability`, `NAME_exact_memorization`,
    `NAME_extraction_strength`, `NAME_fact_probability` (`prob` of the whole fact, `loss` per fact
    token, `hit_64` the probability of at least one hit in 64 samples, `source`), `NAME_fact_choice`
    (`prob`, `rank` and number of `candidates`; where there are wrong answers), `NAME_subject`
    (where the rows have one), `NAME_row` (numbers of the rows in their file, where some were left
    out or cut) and `NAME_rougeL_recall` (where answers were generated), each {"agg_value": mean,
    "value_by_index": {"0": {...}, ...}}; of `NAME_subject` the number of subjects. DataError as of
    `encode_examples`; DivergenceError where the loss is not finite.
    """
    scoring, data_config = scoring or ScoringConfig(), data_config or DataConfig()
    longest = longest_input(model)
    facts = facts or {
        name: find_facts(examples, tokenizer, data_config, longest=longest)
        for name, examples in sets.items()
    }
    items = fact_items(model, tokenizer, sets, facts, data_config, generate=scoring.generate)
    # One run for all sets: what all prompts start with is computed once, batches are fuller.
    everything = [item for group in items.values() for item in group]
    options = scoring_options(model, tokenizer, everything, batch_size, scoring.max_new_tokens)
    outcomes = iter(run_items(model, everything, options, done))
    found = {name: [next(outcomes) for _ in group] for name, group in items.items()}
    return summarise(sets, items, found, facts, tokenizer, data_config.subject_column)


def fact_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, ExampleSet],
    facts: Mapping[str, Sequence[Fact]],
    data_config: DataConfig,
    *,
    generate: bool,
) -> dict[str, list[Item]]:
    """What `quick_evaluation` asks: of every row the answer, and the sequences of its fact."""
    items = {}
    for name, examples in sets.items():
        made = _make_items(model, tokenizer, examples, data_config, generate=generate)
        items[name] = [
            replace(item, answers=(*item.answers, *fact.sequences))
            for item, fact in zip(made, facts[name], strict=True)
        ]
    return items


def summarise(
    sets: Mapping[str, ExampleSet],
    items: Mapping[str, Sequence[Item]],
    outcomes: Mapping[str, Sequence[Outcome]],
    facts: Mapping[str, Sequence[Fact]],
    tokenizer: PreTrainedTokenizerBase,
    subject_column: str | None,
) -> Results:
    """Results of `quick_evaluation` from the outcomes of `fact_items`, all by name of the set."""
    results: Results = {}
    for name, mine in outcomes.items():
        for i, outcome in enumerate(mine):
            require_finite(outcome.scores[0], f"example {i} of {name}")
        results |= _summary(name, items[name], mine, tokenizer)
        results |= _fact_summary(name, facts[name], mine, unsayable(facts[name], tokenizer, name))
        rows = [fact.row for fact in facts[name]]
        if rows != list(range(1, len(rows) + 1)):
            results[f"{name}_row"] = _numbered("row", rows)
        fields = {example.row: example.fields for example in sets[name].examples}
        numbers = subjects([fields[row] for row in rows], subject_column)
        if numbers is not None:
            results[f"{name}_subject"] = _numbered("subject", numbers)
    return results


def score_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSet,
    data_config: DataConfig | None = None,
    *,
    batch_size: int = 16,
) -> list[Score]:
    """Teacher-forced scores of every example in order (of every window, for plain text)."""
    items = _make_items(model, tokenizer, examples, data_config or DataConfig(), generate=False)
    options = scoring_options(model, tokenizer, items, batch_size, 1)
    return [outcome.scores[0] for outcome in run_items(model, items, options)]


def _make_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: ExampleSet,
    data_config: DataConfig,
    *,
    generate: bool,
) -> list[Item]:
    """Tokenise a set; every example but plain text gets a prompt to generate from."""
    encoded = encode_examples(examples, tokenizer, data_config, longest=longest_input(model))
    by_row = {example.row: example for example in examples.examples}
    items = []
    for sequence in encoded.encoded:
        prompt = encode_prompt(by_row[sequence.row], tokenizer, data_config) if generate else []
        items.append(Item((sequence,), tuple(prompt) or None))
    return items


def _summary(
    name: str,
    items: Sequence[Item],
    outcomes: Sequence[Outcome],
    tokenizer: PreTrainedTokenizerBase,
) -> Results:
    scores = [outcome.scores[0] for outcome in outcomes]
    probabilities = [{"prob": score.probability, "avg_loss": score.loss} for score in scores]
    weights = [item.answers[0].weight for item in items]
    strength = [{"score": score.extraction_strength} for score in scores]
    memorization = [{"score": score.exact_memorization} for score in scores]
    summary = {
        f"{name}_loss": table([{"score": score.loss} for score in scores], "score", weights),
        f"{name}_probability": table(probabilities, "prob", weights),
        f"{name}_exact_memorization": table(memorization, "score", weights),
        f"{name}_extraction_strength": table(strength, "score", weights),
    }
    rows = [
        rouge_row(
            # Behind the prompt: earlier turns of a chat are no reference.
            decode(tokenizer, item.answers[0].input_ids[len(item.prompt) :]),
            decode(tokenizer, outcome.generated),
            decode(tokenizer, item.prompt),
            any_script=True,
        )
        for item, outcome in zip(items, outcomes, strict=True)
        if item.prompt is not None and outcome.generated is not None
    ]
    if rows:
        summary[f"{name}_rougeL_recall"] = table(rows, "rougeL_recall")
    return summary


def _fact_summary(
    name: str, facts: Sequence[Fact], outcomes: Sequence[Outcome], unknown: Collection[int]
) -> Results:
    """What the model knows of facts but of `unknown` rows; their scores follow those of answers."""
    scores = [
        fact_score(fact, [score.loss for score in outcome.scores[1:]])
        for fact, outcome in zip(facts, outcomes, strict=True)
    ]
    known = [
        {
            "prob": score.probability,
            "loss": score.loss,
            f"hit_{SAMPLES}": hit_probability(score.log_probability, SAMPLES),
            "source": fact.source,
        }
        if fact.row not in unknown
        else None
        for fact, score in zip(facts, scores, strict=True)
    ]
    choices = [
        {"prob": score.choice, "rank": score.rank, "candidates": 1 + len(fact.wrong)}
        if fact.wrong and fact.row not in unknown
        else None
        for fact, score in zip(facts, scores, strict=True)
    ]
    weights = [fact.encoded.weight for fact in facts]
    summary = {f"{name}_fact_probability": table(known, "prob", weights)}
    if any(choices):
        summary[f"{name}_fact_choice"] = table(choices, "prob")
    return summary


def _numbered(key: str, numbers: Sequence[int]) -> Results:
    return {**table([{key: number} for number in numbers], key), "agg_value": len(set(numbers))}


def scoring_options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Iterable[Item],
    batch_size: int,
    max_new_tokens: int,
) -> ScoringOptions:
    """Options of a run over these items; answers end as the items' own do."""
    # A chat template may end answers with another token than the tokenizer ends texts.
    ends = {item.answers[0].input_ids[-1] for item in items if item.prompt is not None}
    return ScoringOptions(
        Masking(pad_id(tokenizer)),
        end_tokens(model, tokenizer) | ends,
        batch_size,
        max_new_tokens,
        longest_input(model),
    )
