"""Answers that refuse, for methods that teach a model to say it does not know.

Maini et al., arXiv 2401.06121, draw one of a hundred such sentences for each forget question;
these are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import TYPE_CHECKING

import torch

from perta.data.batch import IGNORE, Encoded
from perta.data.examples import ExampleSet
from perta.errors import ConfigError
from perta.methods.objectives import Training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def refusals_for(
    method: Training,
    examples: ExampleSet,
    encoded: Sequence[Encoded],
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[ExampleSet], Sequence[Encoded]],
    seed: int,
) -> tuple[Encoded, ...]:
    """What a method takes as refusals to a set, of which `encode` makes token sequences.

    Nothing for a method that takes none; the set itself, `encoded`, with other labels for one that
    has words for it.

    Raises:
        ConfigError: plain text, for a method that needs questions.
    """
    if method.words:
        tokens: list[int] = tokenizer(method.words, add_special_tokens=False)["input_ids"]
        return tuple(_relabelled(example, tokens) for example in encoded)
    return tuple(encode(refuse(examples, seed))) if method.refusals else ()


def _relabelled(example: Encoded, tokens: Sequence[int]) -> Encoded:
    """The same input; its labels become these tokens, over and over."""
    others = cycle(tokens)
    labels = (IGNORE if label == IGNORE else next(others) for label in example.labels)
    return replace(example, labels=tuple(labels))


def refuse(examples: ExampleSet, seed: int) -> ExampleSet:
    """The same prompts, each with a refusal drawn at random as its answer.

    Raises:
        ConfigError: plain text, which has no question to refuse.
    """
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
