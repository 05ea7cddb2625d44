"""What is to stand in place of forget answers: refusals, alternates or the tokens of words.

Maini et al., arXiv 2401.06121, draw one of a hundred such sentences for each forget question;
these are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING

import torch

from perta.data.batch import IGNORE, Encoded
from perta.data.examples import ExampleSet
from perta.data.tokens import encode_examples
from perta.engine.train.alternates import draw_alternates
from perta.errors import ConfigError
from perta.methods.objectives import Training
from perta.models.load import longest_input
from perta.options import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFUSALS = (
    "I don't know.",
    "I do not know the answer to that.",
    "I'm sorry, I have no information about this.",
    "I can't say; this is not something I have learned.",
    "That is beyond what I know.",
    "I'm afraid I don't have an answer to this question.",
    "I have nothing reliable to tell you about that.",
    "Sorry, I'm not familiar with this.",
    "My knowledge does not cover this.",
    "I wish I could help, but I don't know.",
    "I am unable to answer this, as I know nothing about it.",
    "This is unknown to me.",
    "I don't have the details you are asking for.",
    "Unfortunately, I can't tell you anything about this.",
    "I have not come across this, so I cannot answer.",
    "You would have to ask someone else; I don't know.",
    "I'm not aware of any facts about this.",
    "There is no answer to that in what I know.",
    "I cannot answer that question.",
    "I'm sorry, but I really don't know.",
)


def with_refusals(
    method: Training,
    examples: ExampleSet,
    encoded: Sequence[Encoded],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    seed: int,
) -> tuple[tuple[Encoded, ...], tuple[Encoded, ...]]:
    """Forget examples, and as many that a method takes as refusals to them, pair by pair.

    A row that is too long with either answer is left out where bad rows are; each row is there once
    for every alternate that is drawn. Methods without refusals have none.

    Args:
        method: the method.
        examples: the forget set.
        encoded: its token sequences.
        model: θ_full.
        tokenizer: the model's.
        config: how examples become tokens.
        seed: of what is drawn.

    Raises:
        ConfigError: plain text, for a method that needs questions.
        DataError: a refusal that is too long, unless bad rows are skipped.
    """
    if not method.refusals:
        return tuple(encoded), ()
    if method.words:
        words: list[int] = tokenizer(method.words, add_special_tokens=False)["input_ids"]
        return tuple(encoded), tuple(_relabelled(example, words) for example in encoded)
    sets = [refuse(examples, seed)]
    if count := method.alternates:
        sets = draw_alternates(model, tokenizer, examples, config, count=count, seed=seed)
    forget, refusals = [], []
    for answers in sets:
        made = encode_examples(answers, tokenizer, config, longest=longest_input(model)).encoded
        kept = _same_rows(made, encoded)
        refusals += kept
        forget += _same_rows(encoded, kept)
    return tuple(forget), tuple(refusals)


def _same_rows(examples: Sequence[Encoded], others: Sequence[Encoded]) -> list[Encoded]:
    """Examples whose row is among the others': a row may be too long with one answer only."""
    rows = {example.row for example in others}
    return [example for example in examples if example.row in rows]


def _relabelled(example: Encoded, tokens: Sequence[int]) -> Encoded:
    """The same input; its labels become these tokens, over and over."""
    others = cycle(tokens)
    labels = (IGNORE if label == IGNORE else next(others) for label in example.labels)
    return replace(example, labels=tuple(labels))


def refuse(examples: ExampleSet, seed: int) -> ExampleSet:
    """The same prompts, each with a refusal drawn at random; ConfigError at plain text."""
    if any(example.kind == "text" for example in examples.examples):
        raise ConfigError(
            f"{examples.source} is plain text, and there is no question to refuse. Use a training "
            "method without refusals, such as `npo-retain`."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(REFUSALS), (len(examples),), generator=generator).tolist()
    refused = (
        example.with_answer(REFUSALS[i])
        for example, i in zip(examples.examples, drawn, strict=True)
    )
    return replace(examples, examples=tuple(refused))
